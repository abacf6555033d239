"""Who loses by the slimming when the audio gets worse: the same test in noise, on a telephone, in a room, faster."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxslim import versus
from jaxslim.data import audio, augment
from jaxslim.data.rows import Rows, load_rows

Wave = np.ndarray
Change = Callable[[Wave, np.random.Generator], Wave]


def _speed(wave: Wave, rng: np.random.Generator, factor: float) -> Wave:
    """Played faster (> 1) or slower: pitch and length change."""
    return audio.resample(wave, round(1000 * factor), 1000)


CONDITIONS: dict[str, tuple[Change | None, float]] = {  # name -> (change, factor of the length)
    "clean": (None, 1.0),
    "noise 20 dB": (augment.noise(20.0, 20.0), 1.0),
    "noise 10 dB": (augment.noise(10.0, 10.0), 1.0),
    "noise 5 dB": (augment.noise(5.0, 5.0), 1.0),
    "telephone": (augment.telephone(), 1.0),
    "room 0.5 s": (augment.room(0.5, 0.5), 1.0),
    "speed 0.9": (functools.partial(_speed, factor=0.9), 1 / 0.9),
    "speed 1.1": (functools.partial(_speed, factor=1.1), 1 / 1.1),
}


class Changed(Rows):
    """Rows whose audio is changed as it is decoded, by a generator that depends on (seed, row) only."""

    def __init__(self, rows: Rows, change: Change | None, stretch: float = 1.0, seed: int = 0):
        self.__dict__.update(rows.__dict__)
        self._seconds, self.change, self.stretch, self.seed = {}, change, stretch, seed

    def __getitem__(self, i):
        return Changed(super().__getitem__(i), self.change, self.stretch, self.seed) if isinstance(i, slice) else (
            super().__getitem__(i))

    def audio(self, i: int, sampling_rate: int = 16000) -> Wave:
        wave = super().audio(i, sampling_rate)
        return wave if self.change is None else self.change(wave, np.random.default_rng([self.seed, i]))

    def duration(self, i: int) -> float:
        return super().duration(i) * self.stretch


def sweep(model, data: str | Rows, baseline=None, conditions: Sequence[str] = tuple(CONDITIONS),
          **options: Any) -> list[dict[str, Any]]:
    """WER under each condition; with `baseline` (the teacher) that of both and their paired difference.

    Args:
      model, baseline: as `evaluate` takes them.
      conditions: keys of CONDITIONS.
      **options: of `evaluate`.
    Returns:
      one dict a condition: condition, wer, wer_low, wer_high, cer, n; with a baseline also baseline_wer, delta, low,
      high (model minus baseline, paired 95 %).
    Raises:
      ValueError: an unknown condition.
    """
    from jaxslim.evaluate import evaluate

    if unknown := [c for c in conditions if c not in CONDITIONS]:
        raise ValueError(f"Unknown conditions {unknown}; choose from {', '.join(CONDITIONS)}.")
    rows = load_rows(data)
    found = []
    for name in conditions:
        changed = Changed(rows, *CONDITIONS[name])
        scores = evaluate(model, changed, **options)
        row = {"condition": name, **{k: scores[k] for k in ("wer", "wer_low", "wer_high", "cer", "n")}}
        if baseline is not None:
            other = evaluate(baseline, changed, **options)
            paired = versus.paired(scores.utterances, other.utterances) or {}
            row |= {"baseline_wer": other["wer"], **{k: paired.get(k) for k in ("delta", "low", "high")}}
        found.append(row)
    return found


def render(rows: Sequence[dict[str, Any]]):
    """The rows of `sweep` as a rich.Table."""
    from rich.table import Table

    table = Table("condition", *(("WER", "baseline", "difference") if "baseline_wer" in rows[0] else ("WER",)))
    for r in rows:
        cells = [f"{100 * r['wer']:.1f} % ({100 * r['wer_low']:.1f} to {100 * r['wer_high']:.1f})"]
        if "baseline_wer" in r:
            cells += [f"{100 * r['baseline_wer']:.1f} %",
                      f"{100 * r['delta']:+.1f} ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})"]
        table.add_row(r["condition"], *cells)
    return table
