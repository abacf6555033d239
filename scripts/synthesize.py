"""Makes synthetic speech for training with public text-to-speech programs: one Parquet file with text.

    apt install flite espeak-ng
    python scripts/synthesize.py SENTENCES.txt synthetic.parquet [--limit 3000] [--heldout 0.05] [--piper VOICE.onnx]

One sentence a line; letters and apostrophes are kept, lower case. Each is spoken once, by a voice drawn from the seed:
flite (slt, awb, kal16, rms), espeak-ng (four English voices) and, with --piper, a Piper voice (`pip install piper-tts`;
its voices are downloads with licences of their own). Rate and pitch vary a little, so that no two readings are alike.
--heldout writes that share of the sentences to NAME-heldout.parquet, for testing only. Clips are Opus at 16 kHz.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import io
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from jaxslim.data.audio import load

FLITE = ("slt", "awb", "kal16", "rms")
ESPEAK = ("en-us", "en-gb", "en-us+m7", "en-us+f4")
SHARES = {"flite": 0.8, "espeak": 0.2}  # without Piper; with it, half of all is Piper's


def commands(text: str, voice: str, rng: np.random.Generator, wav: str, piper: str | None) -> list[str]:
    """The program that speaks `text` into the file `wav`."""
    kind, _, name = voice.partition("-")
    stretch = rng.uniform(0.85, 1.2)
    if kind == "flite":
        return ["flite", "-voice", name, "--setf", f"duration_stretch={stretch:.3f}", "-t", text, "-o", wav]
    if kind == "espeak":
        speed, pitch = round(165 / stretch), rng.integers(35, 65)
        return ["espeak-ng", "-v", name, "-s", str(speed), "-p", str(pitch), "-w", wav, text]
    return [sys.executable, "-m", "piper", "-m", piper, "--length-scale", f"{stretch:.3f}", "-f", wav, "--", text]


def voices(piper: str | None) -> tuple[list[str], list[float]]:
    """Voices of the programs that are installed, and how often each speaks."""
    found = {f"flite-{v}": SHARES["flite"] / len(FLITE) for v in FLITE if shutil.which("flite")}
    found |= {f"espeak-{v}": SHARES["espeak"] / len(ESPEAK) for v in ESPEAK if shutil.which("espeak-ng")}
    if piper:
        found[f"piper-{pathlib.Path(piper).stem}"] = sum(found.values()) or 1.0
    if not found:
        sys.exit("error: neither flite nor espeak-ng is installed; on Debian and Ubuntu: apt install flite espeak-ng")
    total = sum(found.values())
    return list(found), [v / total for v in found.values()]


def speak(i: int, text: str, seed: int, piper: str | None) -> dict:
    rng = np.random.default_rng([seed, i])
    names, shares = voices(piper)
    voice = str(rng.choice(names, p=shares))
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/a.wav"
        subprocess.run(commands(text, voice, rng, wav, piper), check=True, capture_output=True)
        wave = load(wav, 16000)
    file = io.BytesIO()
    soundfile.write(file, np.clip(wave, -1, 1), 16000, "OPUS", format="OGG")
    return {"id": f"synth/{i:05}", "audio": {"bytes": file.getvalue(), "path": f"{i:05}.opus"}, "text": text,
            "speaker": voice, "language": "en", "duration": len(wave) / 16000}


def sentences(path: str, limit: int | None) -> list[str]:
    """Different sentences of 3 to 20 words, lower case, with letters and apostrophes only."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    clean = [" ".join(re.sub(r"[^a-z' ]+", " ", line.lower().replace("’", "'")).split()) for line in lines]
    return [t for t in dict.fromkeys(clean) if 3 <= len(t.split()) <= 20][:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences")
    parser.add_argument("output")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--heldout", type=float, default=0.0)
    parser.add_argument("--piper", metavar="VOICE.onnx")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    texts = sentences(args.sentences, args.limit)
    if not texts:
        sys.exit(f"error: {args.sentences} has no sentence of 3 to 20 words")
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        rows = list(pool.map(lambda i: speak(i, texts[i], args.seed, args.piper), range(len(texts))))
    kept = np.random.default_rng(args.seed).uniform(size=len(rows)) >= args.heldout
    output = pathlib.Path(args.output)
    parts = {output: [r for r, k in zip(rows, kept) if k],
             output.with_name(f"{output.stem}-heldout{output.suffix}"): [r for r, k in zip(rows, kept) if not k]}
    for path, part in parts.items():
        if part:
            pq.write_table(pa.Table.from_pylist(part), path)
            print(f"{path}: {len(part)} clips, {sum(r['duration'] for r in part) / 3600:.2f} h")


if __name__ == "__main__":
    main()
