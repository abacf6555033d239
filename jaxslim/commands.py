"""What each sub-command does: thin; it calls one function and prints what it returns."""
from __future__ import annotations

import json
import logging
import os
import sys
import time


def distributed() -> bool:
    """Whether this process was started as one of several."""
    return bool(os.environ.get("JAXSLIM_DISTRIBUTED") or os.environ.get("JAX_COORDINATOR_ADDRESS"))


def show(args, value, text) -> None:
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


def demo(args) -> None:
    from jaxslim import recipe, report

    started = time.monotonic()
    summary = recipe.demo(args.output)
    show(args, summary, report.console(summary))
    if not args.json:
        print(f"{time.monotonic() - started:.0f} s. Page: {args.output}/report.html   Model: {args.output}/final")


def info(args) -> None:
    from jaxslim import info

    value = info.model(args.model, args.seconds) if args.model else info.environment()
    show(args, value, info.render(value))


def import_(args) -> int:
    from jaxslim import hub

    rows = hub.import_model(args.source, args.destination, check=args.check) or []
    text = f"{args.source} -> {args.destination}"
    if args.check:
        worst = max(rows, key=lambda r: r[1] / max(1.0, r[2]))
        text = "\n".join(f"{name:28} max difference {diff:.2e} of {scale:.3g}  {'ok' if ok else 'DIFFERS'}"
                         for name, diff, scale, ok in rows) + f"\n{text}; largest at {worst[0]}: {worst[1]:.2e}"
    show(args, [dict(zip(("name", "max_difference", "scale", "ok"), r, strict=True)) for r in rows], text)
    return 0 if all(r[3] for r in rows) else 4


def export(args) -> None:
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
    show(args, record, text)


def data_check(args) -> int:
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
    show(args, result | {"findings": [f._asdict() for f in result["findings"]]}, check.render(result))
    return 3 if len(bad) > args.max_bad_fraction * result["rows"] else 0


def data_stats(args) -> None:
    from jaxslim.data import tools

    value = tools.stats(args.data)
    show(args, value, tools.render_stats(value))


def data_vocab(args) -> None:
    from jaxslim.data import tools

    value = tools.vocabulary(args.data, args.destination, args.min_count, args.lower)
    show(args, value, f"{len(value)} tokens in {args.destination}/vocab.json: {' '.join(value)}")


def data_prepare(args) -> None:
    from jaxslim.data import tools

    value = tools.prepare(args.data, args.destination, skip=args.skip, shards=args.shards, seed=args.seed)
    lines = [f"{value['rows']} rows, {value['hours']:.2f} h in {len(value['files'])} files in {args.destination}"]
    lines += [f"left out: {name}: {reason}" for name, reason in value["skipped"].items()]
    show(args, value, "\n".join(lines))


def data_label(args) -> None:
    from jaxslim import pseudo

    value = pseudo.label(args.model, args.data, args.destination, max_wer=args.max_wer, normalize=args.normalize,
                         batch_size=args.batch_size, language=args.language,
                         progress=lambda line: print(line, file=sys.stderr))
    show(args, value, pseudo.render(value))


def train(args) -> None:
    from jaxslim import recipe

    if args.dry_run or args.topology:
        from jaxslim.train import dryrun

        found = dryrun.run(args.config, args.overrides, args.topology)
        show(args, found, dryrun.render(found))
        return
    recipe.train(args.config, [*args.overrides, *(["profile_steps=5"] if args.profile else [])])


def slim(args) -> None:
    from jaxslim import recipe, report

    overrides = [*args.overrides, *recipe.retarget(args.recipe, args.overrides, args.target)]
    if args.sensitivity:
        from jaxslim import sensitivity

        result = sensitivity.run(args.recipe, args.output, overrides)
        report.report(args.output)
        show(args, result, sensitivity.table(result))
        return
    summary = recipe.run(args.recipe, args.output, overrides, overwrite=args.overwrite)
    show(args, summary, report.console(summary))


def eval_(args) -> int:
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
        show(args, rows, robust.render(rows))
        return 0

    mesh = None
    if args.mesh:
        from jaxslim.train import mesh as meshes

        mesh = meshes.make(args.mesh)
    result = evaluate(args.model, args.data, batch_size=args.batch_size, limit=args.limit, dtype=args.dtype, mesh=mesh,
                      normalize=args.normalize, language=args.language, predictions=args.predictions,
                      beam=_beam(args))
    missed = versus.gates(result, result.utterances, args.max_wer, args.max_regression, args.margin)
    show(args, result | {"gates_missed": missed}, "\n".join([render(result), *(f"Gate missed: {m}" for m in missed)]))
    return 4 if missed else 0


def _suite(args) -> int:
    from jaxslim import superb

    logging.getLogger("jaxslim.superb").setLevel(logging.INFO)
    result = superb.evaluate(args.model, teacher=args.baseline or superb.TEACHER, output=args.output,
                             tasks=args.tasks or (), options=superb.options(args.suite_options or ()),
                             generated_layers=args.generated_layers or 0)
    show(args, result, superb.render(result))
    return 0


def generate(args) -> None:
    from jaxslim import causal, hub
    from jaxslim.data import task_of

    model = hub.load(args.model)
    rows = causal.texts(model, task_of(model.spec, hub.folder(args.model)), args.prompts,
                        max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0,
                        temperature=args.temperature or 1.0, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    show(args, rows, "\n".join(row["prompt"] + row["text"] for row in rows))


def compare(args) -> None:
    from jaxslim import versus

    a, b = (versus.read(source, args.role) for source in (args.a, args.b))
    result = versus.compare(a, b, args.by or ("duration",), args.normalize)
    if args.canary:
        with open(args.canary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result["changed"])
    show(args, result, versus.render(result, (args.a, args.b)))


def bench(args) -> None:
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
        show(args, table, f"{args.table}: {table['whole']:.4f} s in all; half of everything takes "
               f"{check['measured']:.4f} s, the table says {check['predicted']:.4f} s")
        return
    rows = speed.main_rows(args.model, args.seconds, args.baseline, batch=args.batch_size, dtype=args.dtype,
                           repeats=args.repeats, threads=args.threads, wav=args.wav,
                           progress=lambda line: print(line, file=sys.stderr))
    show(args, rows, speed.table(rows))


def transcribe(args) -> int:
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

def adapter(args) -> None:
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
        return show(args, rows, text or f"No adapter in {args.paths[0]}.")
    if args.action == "info":
        config = adapter_files.describe(args.paths[0])
        return show(args, config, json.dumps(config, indent=1))
    model = hub.load(args.paths[0])
    if args.action == "extract":
        config = model.save_adapter(args.paths[1], args.name, head=args.head, base_name=args.base)
        return show(args, config, f"{args.paths[1]}: adapter of {args.paths[0]}")
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
    show(args, {"path": target, "logit_change": change}, f"{target}: merged; largest change of the logits {change}")


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
    show(args, curve, text)


def report(args) -> None:
    from jaxslim import pareto, report

    print(report.report(args.runs[0], args.output) if len(args.runs) == 1 else
          pareto.page(args.runs, args.output or "pareto.html"))
