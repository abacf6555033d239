"""Short clips joined to long ones, for models that must hear longer audio than their training clips are."""
from __future__ import annotations

import numpy as np

from jaxslim.data.rows import Rows

GAP = (0.1, 0.4)   # seconds of silence between two clips


class Joined(Rows):
    """The rows of `rows`, and behind them rows that are several of them, one after another.

    `parts`: for each of those the numbers of its rows; `gaps`: seconds of silence before each part but the first.
    """

    def __init__(self, rows: Rows, parts: list[list[int]], gaps: list[list[float]]):
        ids, texts = rows.column("id"), rows.column("text")
        more = [{**rows.record(part[0]), "id": "+".join(ids[i] for i in part),
                 "text": None if any(texts[i] is None for i in part) else " ".join(texts[i] for i in part),
                 "duration": sum(rows.duration(i) for i in part) + sum(gap)} for part, gap in zip(parts, gaps)]
        super().__init__([*(rows.record(i) for i in range(len(rows))), *more], rows.name)
        self.rows, self.parts, self.gaps = rows, parts, gaps
        for i in range(len(rows), len(self)):   # a name, so that it does not pass for a row without audio
            self._records[i]["audio"] = {"bytes": None, "path": self._records[i]["id"]}

    def audio(self, i: int, sampling_rate: int = 16000) -> np.ndarray:
        if i < len(self.rows):
            return self.rows.audio(i, sampling_rate)
        k = i - len(self.rows)
        waves = []
        for j, gap in zip(self.parts[k], [0.0, *self.gaps[k]], strict=True):
            waves += [np.zeros(round(gap * sampling_rate), np.float32), self.rows.audio(j, sampling_rate)]
        return np.concatenate(waves)


def joined(rows: Rows, seconds: float, seed: int = 0) -> Rows:
    """`rows`, and their clips up to half of `seconds` again in joined ones, most of them nearly `seconds` long.

    Only clips of one `speaker` (and `adapter_id`) are joined, where the data has such columns.

    Which clips meet depends on the seed only. Clips that cannot be read join nothing and are reported as they are.
    """
    rng = np.random.default_rng(seed)
    speakers: dict = {}
    for i in rng.permutation(len(rows)):
        try:
            if rows.duration(int(i)) <= seconds / 2:
                record = rows.record(int(i))
                speakers.setdefault((record.get("speaker"), record.get("adapter_id")), []).append(int(i))
        except ValueError:
            continue
    parts, gaps = [], []
    for clips in speakers.values():
        part: list[int] = []
        gap: list[float] = []
        length = 0.0
        for i in clips:
            pause = float(rng.uniform(*GAP))
            if part and length + pause + rows.duration(i) > seconds:
                parts.append(part)
                gaps.append(gap)
                part, gap, length = [], [], 0.0
            if part:
                gap.append(pause)
                length += pause
            part.append(i)
            length += rows.duration(i)
        parts.append(part)
        gaps.append(gap)
    keep = [k for k, part in enumerate(parts) if len(part) > 1]
    return Joined(rows, [parts[k] for k in keep], [gaps[k] for k in keep])
