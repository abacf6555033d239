"""What a task is, and the options that all tasks share."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """The same for every upstream. Two results compare only where all of these are equal."""

    seeds: tuple[int, ...] = (0, 1, 2)     # of the heads of `char` and `asr`
    draws: int = 10                        # keyword, language, speaker: heads; the last two draw their clips each time
    shots: int = 5                         # language, speaker: training clips of a class
    prompts: str = "bundled:prompts-{}"    # DATA of a language
    max_seconds: float = 6.0               # of sentences that heads are trained on
    limit: int = 0                         # clips of a kind, split and language, for quick tries; 0 = all
    batch_seconds: float = 48.0            # of sentences in a step
    char_steps: int = 400
    char_rate: float = 1e-2
    asr_steps: int = 250
    asr_rate: float = 3e-3
    asr_stack: int = 2                     # frames that are read at once
    asr_units: int = 128                   # of a direction
    asr_layers: int = 2
    pooled_steps: int = 300
    pooled_rate: float = 1e-2


class Task(NamedTuple):
    """`run` gives arrays of what happened to each test item; `value` the metric of the items `rows` (repeats count as
    often as they come up), which is what the bootstrap draws. `info` of a run is for people."""

    name: str
    metric: str
    better: str                                              # higher | lower
    run: Callable[[Any, Options], tuple[Arrays, dict[str, Any]]]
    items: Callable[[Arrays], int]
    value: Callable[[Arrays, np.ndarray], float]
    chance: float | None = None                              # of a guess, where it is a number
