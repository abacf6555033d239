"""Makes new sentences of one speaker's recordings by cutting them between words and joining the pieces anew.

    python scripts/splice.py MODEL DATA OUTPUT.parquet [--hours 2] [--max-seconds 14] [--seed 0]

For few recordings of a voice (minutes): a recogniser learns them by heart as sentences, and new orders of their words
make it listen to words. After aligned data augmentation (Lam et al. 2021, "On-the-Fly Aligned Data Augmentation for
Sequence-to-Sequence ASR"), which replaces words by recordings of others; runs of one to four words, joins at the
quietest moment between two words, a fade of 10 ms and pauses are ours. MODEL (CTC) aligns the text; rows without text
are left out.
"""
from __future__ import annotations

import argparse
import collections
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from jaxslim import hub
from jaxslim.alignment import align
from jaxslim.data import load_rows, task_of
from jaxslim.data.rows import DataError

RATE, FADE, SLACK = 16000, 160, 480   # samples; a cut may move by SLACK to where it is quiet
PAUSE = (0.05, 0.35)                  # seconds, before a third of the pieces


def cuts(wave: np.ndarray, words: list[dict]) -> np.ndarray:
    """Samples at which each word begins, and the end of the last: (words + 1,)."""
    power = np.convolve(wave**2, np.ones(FADE) / FADE, mode="same")
    bounds = [max(0, int(words[0]["start"] * RATE) - 4 * SLACK)]
    for left, right in zip(words, words[1:]):
        low = max(int(left["end"] * RATE) - SLACK, bounds[-1] + FADE)
        high = max(int(right["start"] * RATE) + SLACK, low + 1)
        bounds.append(low + int(np.argmin(power[low:high])) if low < len(wave) else len(wave))
    return np.array([*bounds, min(len(wave), int(words[-1]["end"] * RATE) + 6 * SLACK)])


def cut_all(model, data: str, folder: str) -> list[tuple[np.ndarray, list[str], np.ndarray]]:
    """(wave, its words, their cuts) of every clip whose text fits its audio."""
    rows, task, found = load_rows(data), task_of(model.spec, folder), []
    for i in range(len(rows)):
        text = rows[i]["text"]
        if not text:
            continue
        wave = rows.audio(i)
        try:
            words = align(model, wave, text, task)
        except DataError:
            continue
        if len(words) == len(text.split()):
            found.append((wave, text.split(), cuts(wave, words)))
    return found


def sentence(clips: list, places: dict[str, list[tuple[int, int]]], seconds: float, rng) -> tuple[np.ndarray, str]:
    """Pieces up to `seconds`; each begins with a word drawn from the vocabulary, not from the text."""
    out, text = np.zeros(0, np.float32), []
    vocabulary = list(places)
    while len(out) < seconds * RATE:
        where = places[vocabulary[rng.integers(len(vocabulary))]]
        clip, first = where[rng.integers(len(where))]
        wave, words, bounds = clips[clip]
        last = min(len(words), first + int(rng.integers(1, 5)))
        piece = wave[bounds[first]: bounds[last]].copy()
        if len(piece) < 2 * FADE:
            continue
        if len(out) + len(piece) > seconds * RATE and text:
            break
        ramp = np.linspace(0, 1, FADE, dtype=np.float32)
        piece[:FADE] *= ramp
        piece[-FADE:] *= ramp[::-1]
        if text and rng.random() < 1 / 3:
            out = np.concatenate([out, np.zeros(int(rng.uniform(*PAUSE) * RATE), np.float32)])
        if text:
            out[-FADE:] += piece[:FADE]
            piece = piece[FADE:]
        out = np.concatenate([out, piece])
        text += words[first:last]
    return out, " ".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--max-seconds", type=float, default=14.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clips = cut_all(hub.load(args.model), args.data, hub.folder(args.model))
    places = collections.defaultdict(list)
    for k, (_, words, _) in enumerate(clips):
        for j, word in enumerate(words):
            places[word].append((k, j))
    rng, rows, total = np.random.default_rng(args.seed), [], 0.0
    while total < args.hours * 3600:
        wave, text = sentence(clips, places, float(rng.uniform(1.5, args.max_seconds)), rng)
        file = io.BytesIO()
        soundfile.write(file, np.clip(wave, -1, 1), RATE, "OPUS", format="OGG")
        name = f"{len(rows):05}"
        rows.append({"id": f"splice/{name}", "audio": {"bytes": file.getvalue(), "path": f"{name}.opus"}, "text": text,
                     "duration": len(wave) / RATE})
        total += len(wave) / RATE
    pq.write_table(pa.Table.from_pylist(rows), args.output)
    print(f"{args.output}: {len(rows)} clips, {total / 3600:.2f} h from {len(clips)} recordings, {len(places)} words")


if __name__ == "__main__":
    main()
