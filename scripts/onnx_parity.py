"""ONNX exports of the bundled teacher and of slimmed forms of it, run by the real packages on every test clip.

    python scripts/onnx_parity.py [teacher hedgehog pruned lowrank] [--formats onnx sherpa-onnx onnx-asr] [--int8]

Each model is exported, opened by onnxruntime, sherpa-onnx or onnx-asr, and run on the 70 bundled test clips one at a
time; greedy transcripts are compared as strings with this library's. A row of docs/results/onnx.json per model and
format: differences of logits or log probabilities, frames with the same best symbol, transcripts that differ, word
error rates of both, bytes. The slimmed models are cut and not recovered: this is about programs, not about quality.
Needs `jaxslim[export]`.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import tempfile
import time

import jax
import numpy as np

from jaxslim import __version__, export, hub, onnx_bundles, onnx_graph
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.methods import METHODS
from jaxslim.score import score

TEACHER, RESULTS = "bundled:wav2vec2-ctc-en", pathlib.Path(__file__).parents[1] / "docs/results/onnx.json"
METHOD = {  # the model -> method and options that make it; None: the teacher itself
    "teacher": None, "hedgehog": ("linearize", {"mixer": "hedgehog", "options": {"window": 16}}),
    "pruned": ("prune", {"target": {"macs": 0.9}, "select": "magnitude", "blocks": r"^(frontend\.[56]|encoder)"}),
    "lowrank": ("lowrank", {"remove": 0.45, "frames": 4000, "sensitivity": "energy"}),
}


def make(name: str, task):
    teacher = hub.load(TEACHER)
    if METHOD[name] is None:
        return teacher
    method, options = METHOD[name]
    batches = Batches(load_rows("bundled:prompts-en/train"), task, batch_size=8, buckets=[6.0], max_seconds=6.0,
                      shuffle=False, epochs=1)
    method = METHODS[method](**options)
    return method.finish(method.start(teacher, batches, jax.random.key(0)), batches)


def measure(name: str, model, format: str, dtype: str | None, task, waves, texts) -> dict:
    row = {"model": name, "format": format, "dtype": dtype or "float32"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        folder = pathlib.Path(tmp) / "out"
        record = export.export(model, folder, format=format, source=TEACHER, dtype=dtype)
        found = record["int8"] if dtype else record
        ours = onnx_bundles.logits(model, task, waves)
        said = {i: task.transcript(x.argmax(-1)) for i, x in ours.items()}
        if format == "onnx":
            run, theirs = onnx_graph.read(folder), {}
            for i, wave in waves.items():
                theirs[i] = run(**task.extractor([wave], len(wave)))[0]
            heard = {i: task.transcript(x.argmax(-1)) for i, x in theirs.items()}
            different = [i for i in waves if said[i] != heard[i]]
            row |= {"package": f"onnxruntime {importlib.metadata.version('onnxruntime')}", "clips": len(waves),
                    "different": different, "frames_with_the_same_argmax": float(np.concatenate(
                        [ours[i].argmax(-1) == theirs[i].argmax(-1) for i in waves]).mean())}
        else:
            row |= onnx_bundles.transcripts(ours, task, folder, format, waves)
            heard = said | {d["clip"]: d["package"] for d in row["different"]}
    row |= {f"{who}wer": score([texts[i] for i in waves], [words[i] for i in waves])["wer"]
            for who, words in (("", said), ("export_", heard))}
    keys = ("bytes", "max_difference", "max_abs", "relative_difference", "argmax_agreement")
    return {**row, **{f"export_{k}" if k != "bytes" else k: found[k] for k in keys}, "opset": record["opset"],
            "fingerprint": model.fingerprint, "seconds": round(time.perf_counter() - start, 1),
            "device": f"cpu ({platform.machine()})", "versions": record["versions"] | {"jaxslim": __version__},
            "command": f"python scripts/onnx_parity.py {name} --formats {format}" + (" --int8" if dtype else "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(METHOD), metavar="MODEL", help=", ".join(METHOD))
    parser.add_argument("--formats", nargs="+", default=list(export.GRAPHS), choices=export.GRAPHS)
    parser.add_argument("--int8", action="store_true", help="by onnxruntime's dynamic quantisation")
    parser.add_argument("--limit", type=int, help="only the first clips")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.models) - set(METHOD):
        parser.error(f"unknown model {', '.join(unknown)}; known are {', '.join(METHOD)}")
    if missing := [f for f in args.formats if not importlib.util.find_spec(onnx_bundles.BUNDLES.get(f, "onnxruntime"))]:
        parser.error(f"nothing here runs {', '.join(missing)}: pip install 'jaxslim[export]'")
    task = CTCTask.from_pretrained(hub.folder(TEACHER))
    clips = load_rows("bundled:prompts-en/test")[: args.limit]
    waves, texts = {i: clips.audio(i) for i in range(len(clips))}, clips.column("text")
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    for name in args.models:
        model = make(name, task)
        for format in args.formats:
            row = measure(name, model, format, "int8" if args.int8 else None, task, waves, texts)
            print(f"{name:9} {format:12} {row['dtype']:8} {row['package']}: {row['clips'] - len(row['different'])} of "
                  f"{row['clips']} transcripts the same, relative difference {row['export_relative_difference']:.1e} "
                  f"({row['seconds']:.0f} s)", flush=True)
            key = ("model", "format", "dtype")
            rows = [r for r in rows if [r[k] for k in key] != [row[k] for k in key]] + [row]
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
