"""The `jaxslim` command: thin; every sub-command calls one function and prints what it returns.

Exit codes: 0 ok, 2 usage or bad input, 3 bad data beyond the limit, 4 gate missed, 5 numerical stop, 75 preempted but
saved.
"""
from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args, rest = top.parse_known_args([_dashes(a) for a in (sys.argv[1:] if argv is None else argv)])
    if rest and not (hasattr(args, "overrides") and all("=" in a for a in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value behind an option, and --key=value
        args.overrides += rest
    logging.basicConfig(level=logging.INFO if args.verbose or args.command in ("train", "slim", "demo") else
                        logging.WARNING, format="%(message)s")
    for noisy in ("jax", "absl", "orbax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING if args.verbose else logging.ERROR)
    if args.devices:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(args.devices)
    try:
        _jax_setup()
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("Interrupted; finished work is kept, run the same command again to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        if args.verbose:
            raise
        code = _exit_code(error)
        if code is None:
            raise
        print(f"jaxslim {args.command}: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that its message explains; None for a defect, which keeps its traceback."""
    from jaxslim.data.rows import DataError
    from jaxslim.export import ParityError
    from jaxslim.train.loop import NumericalStop, Preempted

    for kind, code in ((DataError, 3), (ParityError, 4), (NumericalStop, 5), (Preempted, 75), (ValueError, 2),
                       (OSError, 2), (ImportError, 2)):
        if isinstance(error, kind):
            return code
    return None


def _jax_setup() -> None:
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxslim/xla"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if os.environ.get("JAXSLIM_DISTRIBUTED") or os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize()


def _dashes(word: str) -> str:
    """--batch_size and --batch-size are the same."""
    name, sep, value = word.partition("=")
    return (name[:2] + name[2:].replace("_", "-") if name.startswith("--") else name) + sep + value


def _print(args, value, text) -> None:
    """`value` as JSON with --json, else `text` (a string or something rich prints)."""
    if args.json:
        print(json.dumps(value, indent=1, default=str))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140).print(text, soft_wrap=isinstance(text, str))


# ---- commands ----


def _demo(args) -> None:
    from jaxslim import recipe, report

    started = time.monotonic()
    summary = recipe.demo(args.output)
    _print(args, summary, report.console(summary))
    if not args.json:
        print(f"{time.monotonic() - started:.0f} s. Page: {args.output}/report.html   Model: {args.output}/final")


def _info(args) -> None:
    from jaxslim import info

    value = info.model(args.model, args.seconds) if args.model else info.environment()
    _print(args, value, info.render(value))


def _import(args) -> int:
    from jaxslim import hub

    rows = hub.import_model(args.source, args.destination, check=args.check) or []
    text = f"{args.source} -> {args.destination}"
    if args.check:
        worst = max(rows, key=lambda r: r[1] / max(1.0, r[2]))
        text = "\n".join(f"{name:28} max difference {diff:.2e} of {scale:.3g}  {'ok' if ok else 'DIFFERS'}"
                         for name, diff, scale, ok in rows) + f"\n{text}; largest at {worst[0]}: {worst[1]:.2e}"
    _print(args, [dict(zip(("name", "max_difference", "scale", "ok"), r, strict=True)) for r in rows], text)
    return 0 if all(r[3] for r in rows) else 4


def _export(args) -> None:
    from jaxslim import hub
    from jaxslim.export import export

    record = export(hub.load(args.model), args.destination, format=args.format, source=args.model, dtype=args.dtype,
                    force=args.force, check=not args.no_check)
    opens = "AutoModel..., trust_remote_code=True" if record["trust_remote_code"] else record["class"]
    text = f"{args.model} -> {args.destination} ({args.format}; opens with {opens})\n" + (
        f"PyTorch against JAX: max difference {record['max_difference']:.1e} of {record['max_abs']:.3g}, same argmax "
        f"in {record['argmax_agreement']:.2%} of frames" if record["checked"] else f"not checked: {record['reason']}")
    _print(args, record, text)


def _train(args) -> None:
    from jaxslim import recipe

    recipe.train(args.config, args.overrides)


def _slim(args) -> None:
    from jaxslim import recipe, report

    summary = recipe.run(args.recipe, args.output, args.overrides, overwrite=args.overwrite)
    _print(args, summary, report.console(summary))


def _eval(args) -> None:
    from jaxslim.evaluate import evaluate, render

    result = evaluate(args.model, args.data, batch_size=args.batch_size, limit=args.limit, dtype=args.dtype,
                        predictions=args.predictions)
    _print(args, result, render(result))


def _bench(args) -> None:
    from jaxslim import speed

    rows = speed.main_rows(args.model, args.seconds, args.baseline, batch=args.batch_size, dtype=args.dtype,
                           repeats=args.repeats, threads=args.threads, wav=args.wav,
                           progress=lambda line: print(line, file=sys.stderr))
    _print(args, rows, speed.table(rows))


def _transcribe(args) -> int:
    from jaxslim.evaluate import transcribe

    rows = transcribe(args.model, args.files)
    if args.output_format == "json":
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        for row in rows:
            print(f"{row['file']}: {row['error']}" if row.get("error") else row["text"],
                  file=sys.stderr if row.get("error") else sys.stdout)
    return 3 if any(row.get("error") for row in rows) else 0


def _report(args) -> None:
    from jaxslim import report

    print(report.report(args.run_folder, args.output))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jaxslim", description="Make pretrained speech transformers small, fast and "
                                  "linear-time, in JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, json_output: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.add_argument("-v", "--verbose", action="store_true", help="show tracebacks and library logs")
        p.add_argument("--devices", type=int, help="CPU only: number of virtual devices")
        p.add_argument("--json", action="store_true", help="print results as JSON" if json_output else
                       argparse.SUPPRESS)
        p.set_defaults(run=run)
        return p

    p = command("demo", _demo, "slim the bundled teacher on bundled speech: convert, recover, evaluate, report")
    p.add_argument("--output", default="runs/demo", help="run folder (default runs/demo)")
    p = command("info", _info, "versions, devices and flags; with MODEL its parameters, MACs and layers")
    p.add_argument("model", nargs="?", help="bundled:NAME, a folder, or a hub id")
    p.add_argument("--seconds", type=float, default=10.0, help="audio length for MACs (default 10)")
    p = command("import", _import, "read a Hugging Face model and write it as our folder")
    p.add_argument("source", metavar="SRC")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--check", action="store_true", help="compare every layer with PyTorch (needs torch)")
    p = command("export", _export, "write a model for other programs, opened again and compared")
    p.add_argument("model")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--format", choices=("hf", "hf-dense"), default="hf",
                   help="hf: for transformers (default); hf-dense: filled up to the stock shape, for the stock class")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored weights")
    p.add_argument("--force", action="store_true", help="keep an export that differs from the model")
    p.add_argument("--no-check", action="store_true", help="write without opening it with PyTorch")
    p = command("train", _train, "fine-tune a model with CTC", json_output=False)
    p.add_argument("config", metavar="CONFIG")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p = command("slim", _slim, "run a recipe's stages; run again to resume")
    p.add_argument("recipe", metavar="RECIPE")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--output", required=True, help="run folder")
    p.add_argument("--overwrite", action="store_true", help="run stages again whose config changed")
    p = command("eval", _eval, "word error rate of a model on DATA")
    p.add_argument("model")
    p.add_argument("--data", required=True)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--limit", type=int, help="only the first N rows")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products")
    p.add_argument("--predictions", metavar="FILE", help="write references and hypotheses as JSON lines")
    p = command("bench", _bench, "compile, first and steady time and peak memory by audio length")
    p.add_argument("model")
    p.add_argument("--baseline", help="torch, torch:MODEL or a model, measured in the same run; several with commas")
    p.add_argument("--seconds", default="1,10,60", help="audio lengths, comma separated (default 1,10,60)")
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--repeats", type=int, default=9, help="timed calls of each participant (default 9)")
    p.add_argument("--threads", type=int, help="CPU threads, the same for all (default: all)")
    p.add_argument("--wav", help="audio file to feed; default seeded noise")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p = command("transcribe", _transcribe, "text of audio files of any length and rate", json_output=False)
    p.add_argument("model")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--output-format", choices=("txt", "json"), default="txt")
    p = command("report", _report, "one self-contained HTML page of a run", json_output=False)
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("--output", help="default RUN/report.html")
    return top


if __name__ == "__main__":
    sys.exit(main())
