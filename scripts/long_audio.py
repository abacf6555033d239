"""One long recording transcribed, and how exact the word times are.

    python scripts/long_audio.py MODEL [MODEL ...] [--teacher bundled:wav2vec2-ctc-en] [--output FILE.json]

The clips of DATA (default: the bundled validation and training prompts) are joined with half a second of silence
between them and written as one FLAC file, which `jaxslim transcribe` reads in a process of its own: peak memory is that
process's, RTFx is audio seconds per second of the whole command, start and compilation included. Word times: for each
clip, MODEL's words against the forced alignment of the same words by the teacher; medians of the absolute differences.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

from jaxslim import hub
from jaxslim.alignment import align
from jaxslim.data import load_rows, task_of
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers
from jaxslim.transcription import transcribe

DATA = "bundled:prompts-en/validation+bundled:prompts-en/train"


def recording(rows, minutes: float, path: pathlib.Path) -> float:
    """Writes the file, block by block; its seconds."""
    total, silence, k = 0, np.zeros(8000, np.float32), 0
    with soundfile.SoundFile(path, "w", 16000, 1, format="FLAC") as file:
        while total < minutes * 60 * 16000:
            for part in (rows.audio(k % len(rows)), silence):
                file.write(part)
                total += len(part)
            k += 1
    return total / 16000


def whole_file(model: str, minutes: float) -> dict:
    with tempfile.TemporaryDirectory() as tmp:
        path = pathlib.Path(tmp) / "long.flac"
        audio = recording(load_rows(DATA), minutes, path)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "jaxslim.cli", "transcribe", model, str(path), "--output-dir", tmp,
                               "--output-format", "json"], capture_output=True, text=True, env=os.environ)
        took = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found = json.loads((pathlib.Path(tmp) / "long.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"audio_seconds": round(audio, 1), "wall_seconds": round(took, 1), "rtfx": round(audio / took, 1),
            "peak_bytes": peak, "words": len(found["words"]), "last_word_end": found["words"][-1]["end"]}


def word_times(model: str, teacher: str, data: str) -> dict:
    student, other = hub.load(model), hub.load(teacher)
    task, rows = task_of(other.spec, hub.folder(teacher)), load_rows(data)
    starts, ends = [], []
    for i in range(len(rows)):
        heard = transcribe(student, [rows[i]["audio"]["bytes"]], task=task, progress=False)[0]
        if heard["words"]:
            wanted = align(other, rows.audio(i), heard["text"], task)
            starts += [abs(a["start"] - b["start"]) for a, b in zip(heard["words"], wanted, strict=True)]
            ends += [abs(a["end"] - b["end"]) for a, b in zip(heard["words"], wanted, strict=True)]
    return {"clips": len(rows), "words": len(starts), "start_median": round(float(np.median(starts)), 4),
            "end_median": round(float(np.median(ends)), 4), "start_90": round(float(np.quantile(starts, 0.9)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--teacher", default="bundled:wav2vec2-ctc-en")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--data", default="bundled:prompts-en/validation", help="clips for the word times")
    parser.add_argument("--output")
    args = parser.parse_args()
    found = [{"model": model, "fingerprint": hub.load(model).fingerprint, "long": whole_file(model, args.minutes),
              "word_times": word_times(model, args.teacher, args.data), "device": _cpu(), "threads": len(cpu_numbers()),
              "versions": _versions("jax", "jaxlib")} for model in args.models]
    if args.output:
        pathlib.Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
