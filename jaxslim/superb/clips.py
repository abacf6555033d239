"""The clips of the suite: sentences of the English prompts, and one second of each prompt of five languages.

Sentences are whole; those for training at most `max_seconds` long. A piece is the middle second of a clip, cut before
the model hears it, so that no longer context helps. Heads are trained on train, layers are chosen on validation (or
train), scores are of test.
"""
from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from jaxslim.data import DataError, Rows, load_rows

LANGUAGES = ("en", "es", "fr", "it", "ru")
RATE, PIECE = 16000, 1.0   # samples a second; seconds of a piece


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip as the upstreams hear it."""

    rows: Rows = dataclasses.field(repr=False, compare=False)
    row: int
    kind: str           # sentence | piece
    split: str          # train | validation | test
    language: str
    speaker: str
    text: str | None
    seconds: float

    def wave(self) -> np.ndarray:
        """(samples,) at 16 kHz."""
        wave = self.rows.audio(self.row, RATE)
        if self.kind == "sentence":
            return wave
        size = min(len(wave), round(PIECE * RATE))
        start = (len(wave) - size) // 2
        return wave[start : start + size]


def load(prompts: str = "bundled:prompts-{}", max_seconds: float = 6.0, limit: int = 0) -> tuple[list[Clip], str]:
    """All clips of the suite, and a fingerprint of their audio and texts.

    Args:
      prompts: DATA of a language, `{}` stands for its two letters; splits are PROMPTS/train and so on. English needs
        texts and a validation split.
      limit: at most so many clips of a kind, split and language; 0 = all (pieces: 80 and 40).
    Raises:
      DataError: a set is missing or has no texts where they are needed.
    """
    clips, digest = [], hashlib.sha256()
    for language in LANGUAGES:
        for split in ("train", "validation", "test") if language == "en" else ("train", "test"):
            name = f"{prompts.format(language)}/{split}"
            try:
                rows = load_rows(name)
            except DataError as error:
                raise DataError(f"micro-superb needs {name}: {error}") from error
            digest.update(rows.fingerprint.encode())
            index = [i for i in range(len(rows)) if rows.duration(i) >= PIECE]
            index = index[:: max(1, len(index) // (80 if split == "train" else 40))][: 80 if split == "train" else 40]
            chosen = [] if split == "validation" else [("piece", i) for i in index]
            if language == "en":
                if any(not text for text in rows.column("text")):
                    raise DataError(f"micro-superb needs the text of every clip of {name}.")
                whole = [i for i in range(len(rows)) if split == "test" or rows.duration(i) <= max_seconds]
                chosen = [("sentence", i) for i in whole][: limit or None] + chosen[: limit or None]
            voice = rows.column("speaker") if "speaker" in rows.columns else [language] * len(rows)
            clips += [Clip(rows, i, kind, split, language, voice[i], rows.column("text")[i],
                           rows.duration(i) if kind == "sentence" else min(PIECE, rows.duration(i)))
                      for kind, i in chosen[: limit or None if language != "en" else None]]
    digest.update(repr([(c.kind, c.row, c.split, c.language) for c in clips]).encode())
    return clips, digest.hexdigest()


def find(clips: list[Clip], kind: str, split: str, *languages: str) -> list[int]:
    """Numbers of the clips of a kind and split, of these languages (none = all)."""
    return [i for i, c in enumerate(clips) if c.kind == kind and c.split == split
            and (not languages or c.language in languages)]
