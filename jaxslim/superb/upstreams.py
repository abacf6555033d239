"""What is judged: a model, and the baselines beside it (log-mel, the teacher, a model with random weights)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxslim import hub, scratch
from jaxslim.data import mel
from jaxslim.data.extractor import Extractor
from jaxslim.slim import Slim
from jaxslim.upstream import Upstream

MELS, FRAME, HALF = 80, 320, mel.RATE // 2   # bins; samples a frame; of half a second


class LogMel:
    """Whisper's log-mel, two frames of 10 ms side by side, so that it has about a model's frame rate: (1, T, 160)."""

    fingerprint = "log-mel-80x2"

    def features(self, waves: Sequence[np.ndarray], rows: int = 0, samples: int = 0) -> list[np.ndarray]:
        samples = samples or -(-max(map(len, waves)) // HALF) * HALF
        present = [*waves, *[waves[0][:1]] * (rows - len(waves))]
        values, _ = mel.features(present, MELS, samples=samples)
        values = np.asarray(values).transpose(0, 2, 1)                                   # (B, T, 80)
        values = values.reshape(len(present), -1, 2 * MELS)
        return [x[None, : max(len(w) // FRAME, 1)] for x, w in zip(values, waves)]


class Model(Upstream):
    """A Slim, or a model by name."""

    def __init__(self, model: Slim | str, extractor: Extractor | None = None):
        super().__init__(model, extractor)
        self.fingerprint = model.fingerprint if isinstance(model, Slim) else self.model.fingerprint


def random(model: Slim | str, seed: int = 0) -> Slim:
    """The same shape with random weights: what the architecture alone gives."""
    spec = model.spec if isinstance(model, Slim) else hub.load(model).spec
    return Slim(spec, scratch.initial(spec, seed))
