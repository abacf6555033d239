"""Classes by name: what a classifier of clips or texts learns and says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxslim.data.extractor import Extractor, read_json
from jaxslim.data.rows import DataError
from jaxslim.data.tasks import CTCTask


def read(config: Mapping[str, Any]) -> dict[str, int]:
    """Name -> class of a Hugging Face config.json, which counts two classes unless it says otherwise."""
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return {name: int(i) for i, name in names.items()}


class Classes:
    """Of a task with `labels`: name -> class."""

    labels: Mapping[str, int]

    def label(self, value: Any) -> int:
        """Name or number of a class -> its number. Raises DataError for one that the model does not know."""
        if str(value) in self.labels:  # a name that is a number comes first
            return self.labels[str(value)]
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if number not in self.labels.values():
            known = ", ".join(list(self.labels)[:10])
            raise DataError("no label" if value in (None, "") else f"label {value!r} is none of {known}")
        return number

    def decode(self, number: int) -> str:
        """Number of a class -> its name."""
        return next(name for name, i in self.labels.items() if i == number)


@dataclasses.dataclass(frozen=True, eq=False)
class AudioTask(Classes):
    """Clips with one label each (keyword, language, speaker), for a speech encoder's classification head.

    Where a CTC task reads the column `text`, this one reads `label`.
    """

    labels: Mapping[str, int]
    extractor: Extractor = Extractor()
    column = "label"
    sampling_rate = CTCTask.sampling_rate

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, family: str) -> AudioTask:
        """Reads the classes (id2label) of a HF folder's config.json and what Extractor reads."""
        return cls(read(read_json(folder, "config.json") or {}), Extractor.from_pretrained(folder, family))

    def encode(self, value: Any) -> np.ndarray:
        """Name or number of a class -> int32 (1,)."""
        return np.array([self.label(value)], np.int32)

    def targets(self, labels: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
        """Classes of the rows -> `labels` (B,), -100 for a filler row."""
        return {"labels": np.array([row[0] if len(row) else -100 for row in labels], np.int32)}
