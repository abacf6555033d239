"""Transcription times side by side: this library, onnxruntime (float32 and int8), sherpa-onnx.

    python scripts/onnx_speed.py [teacher hedgehog] [--seconds 2 10 60] [--repeats 7]

Bundled test clips joined to each length, one at a time, on all cores, all taken in turn; from the wave to the text:
features, model, greedy decoding. A row of docs/results/onnx_speed.json per model, length and engine: the first call
(which compiles here) and the median, least and largest of the others. Needs `jaxslim[export]`. Wants a quiet machine.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np
from onnx_parity import TEACHER, make

from jaxslim import export, hub, onnx_bundles, onnx_graph
from jaxslim.data import CTCTask, load_rows
from jaxslim.decode import Greedy, single
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results/onnx_speed.json"


def engines(model, task, folder: pathlib.Path) -> dict:
    """Name -> wave (samples,) to text."""
    forward = Greedy(model)

    def ours(wave):
        out, _ = forward(single(wave, task))
        return task.transcript(out["ids"][0, : out["lengths"][0]])

    def graph(path):
        run = onnx_graph.read(path)
        return lambda wave: task.transcript(run(**task.extractor([wave], len(wave)))[0].argmax(-1))

    found = {"jaxslim": ours}
    for dtype, name in ((None, "onnxruntime"), ("int8", "onnxruntime int8")):
        export.export(model, folder / name, format="onnx", source=TEACHER, dtype=dtype)
        found[name] = graph(folder / name / (onnx_graph.INT8 if dtype else onnx_graph.GRAPH))
    export.export(model, folder / "sherpa", format="sherpa-onnx", source=TEACHER)
    found["sherpa-onnx"] = onnx_bundles.recognizer(folder / "sherpa", "sherpa-onnx", len(cpu_numbers()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["teacher", "hedgehog"])
    parser.add_argument("--seconds", nargs="+", type=float, default=[2, 10, 60])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    task = CTCTask.from_pretrained(hub.folder(TEACHER))
    clips = load_rows("bundled:prompts-en/test")
    speech = np.concatenate([clips.audio(i) for i in range(len(clips))])
    packages = {name: importlib.metadata.version(name) for name in ("onnxruntime", "sherpa-onnx")}
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as tmp:
            model = make(name, task)
            runs = engines(model, task, pathlib.Path(tmp))
            for seconds in args.seconds:
                wave = speech[: round(seconds * 16000)]
                times: dict[str, list[float]] = {engine: [] for engine in runs}
                for _ in range(1 + args.repeats):
                    for engine, run in runs.items():
                        started = time.perf_counter()
                        run(wave)
                        times[engine].append(time.perf_counter() - started)
                for engine, t in times.items():
                    rows.append({"model": name, "engine": engine, "audio_seconds": seconds, "first_seconds": t[0],
                                 "steady_seconds": statistics.median(t[1:]), "min_seconds": min(t[1:]),
                                 "max_seconds": max(t[1:]), "runs": args.repeats, "fingerprint": model.fingerprint,
                                 "device": _cpu(), "threads": len(cpu_numbers()),
                                 "versions": _versions("jax", "jaxlib") | packages,
                                 "command": f"python scripts/onnx_speed.py {name}"})
                    print(f"{name:9} {seconds:5g} s  {engine:17} {statistics.median(t[1:]) * 1e3:8.1f} ms", flush=True)
                args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
