"""Word and character error rates, pooled over a test set, with bootstrap intervals. Texts in, numbers out; no JAX."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

RESAMPLES = 10_000


def _letters(text: str) -> str:  # as most leaderboards: no case, no punctuation but the apostrophe within a word
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    return re.sub(r"[^\w\s']|_|(?<!\w)'|'(?!\w)", " ", text)


def _whisper(text: str) -> str:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()(text)


def _english(text: str) -> str:  # numbers, contractions, fillers; without the list of British spellings
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})(text)


NORMALIZERS = {"none": str, "letters": _letters, "whisper": _whisper, "whisper-english": _english}
PROBE = ("Mr. Smith\u2019s caf\u00e9 -- isn't it 21st? [noise] \u00bd \u20ac5, uhm, I'll pay five (o'clock)\u2026 "
         "\ufb01ne_ok")


def normalizer_hash(name: str) -> str:
    """What the normaliser makes of a fixed text, hashed: two results compare only where it is equal."""
    return hashlib.sha256(NORMALIZERS[name](PROBE).encode()).hexdigest()[:12]


class Result(dict):
    """Scores by name (DESIGN 5); `utterances` has one dict per scored clip, `skipped_rows` the clips left out."""

    utterances: list[dict[str, Any]]
    skipped_rows: list[tuple[str, str]]

    def write(self, path: str | os.PathLike) -> None:
        """`utterances` as JSONL."""
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.utterances))


def score(references: Sequence[str], hypotheses: Sequence[str], normalize: str = "none", seed: int = 0) -> Result:
    """Pooled WER and CER as fractions, and their parts.

    Args:
      normalize: applied to both texts: "none"; "letters" (lower case, no punctuation); "whisper" and "whisper-english",
        the two of transformers' Whisper, the latter without its list of British spellings.
    Returns:
      wer, wer_low, wer_high (95 % bootstrap over utterances), cer, n, words, substitutions, deletions, insertions,
      characters, character_errors; `utterances` with words, errors, characters, character_errors of each. An empty
      reference counts no words, and each word of its hypothesis as an insertion. Rates are None without any reference.
    """
    import jiwer

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses.")
    if normalize not in NORMALIZERS:
        raise ValueError(f"normalize={normalize!r} is not known; choose from {', '.join(NORMALIZERS)}.")
    clean = NORMALIZERS[normalize]
    refs, hyps = ([" ".join(clean(text).split()) for text in texts] for texts in (references, hypotheses))
    parts = {"substitute": 0, "delete": 0, "insert": 0}
    utterances = [{"words": len(r.split()), "errors": 0, "characters": len(r), "character_errors": 0} for r in refs]
    if refs:
        words, letters = jiwer.process_words(refs, hyps), jiwer.process_characters(refs, hyps)
        for row, word_chunks, letter_chunks in zip(utterances, words.alignments, letters.alignments):
            row["errors"] = sum(_length(c) for c in word_chunks if c.type != "equal")
            row["character_errors"] = sum(_length(c) for c in letter_chunks if c.type != "equal")
            for chunk in word_chunks:
                if chunk.type != "equal":
                    parts[chunk.type] += _length(chunk)
    total = {key: sum(row[key] for row in utterances) for key in ("words", "errors", "characters", "character_errors")}
    low, high = bootstrap([u["errors"] for u in utterances], [u["words"] for u in utterances], seed)
    result = Result(
        wer=total["errors"] / total["words"] if total["words"] else None, wer_low=low, wer_high=high,
        cer=total["character_errors"] / total["characters"] if total["characters"] else None, n=len(refs),
        words=total["words"], substitutions=parts["substitute"], deletions=parts["delete"],
        insertions=parts["insert"], characters=total["characters"], character_errors=total["character_errors"],
        normalize=normalize, normalize_hash=normalizer_hash(normalize))  # fmt: skip
    result.utterances, result.skipped_rows = utterances, []
    return result


def _length(chunk) -> int:
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def bootstrap(errors: Sequence[int], words: Sequence[int], seed: int = 0, level: float = 0.95) -> tuple:
    """Percentile interval (low, high) of the pooled WER, over resampled utterances; (None, None) without words."""
    if not sum(words):
        return None, None
    sums = _resample(np.array([errors, words], float), seed)                                       # (2, R)
    return _interval(sums[0] / np.maximum(sums[1], 1), level)


def paired_bootstrap(errors_a: Sequence[int], errors_b: Sequence[int], words: Sequence[int], level: float = 0.95,
                     seed: int = 0) -> tuple[float, float, float]:  # fmt: skip
    """WER of a minus WER of b on the same utterances, and its percentile interval: (delta, low, high).

    Give the student as a and the control as b; "within d" needs `high < d` at level 0.90 (DESIGN 6).
    """
    if not len(errors_a) == len(errors_b) == len(words):
        raise ValueError(f"Paired scores need the same utterances: {len(errors_a)}, {len(errors_b)}, {len(words)}.")
    if not sum(words):
        raise ValueError("No reference words, so there is no WER to compare.")
    difference = np.asarray(errors_a, float) - np.asarray(errors_b, float)
    sums = _resample(np.array([difference, words], float), seed)
    return float(difference.sum() / sum(words)), *_interval(sums[0] / np.maximum(sums[1], 1), level)


def _resample(columns: np.ndarray, seed: int) -> np.ndarray:
    """(k, n) per utterance -> (k, RESAMPLES) sums over n utterances drawn with replacement."""
    n, rng = columns.shape[1], np.random.default_rng(seed)
    step = max(1, 2_000_000 // n)  # bounds the memory
    sizes = [min(step, RESAMPLES - at) for at in range(0, RESAMPLES, step)]
    return np.concatenate([columns[:, rng.integers(n, size=(size, n))].sum(-1) for size in sizes], axis=1)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
