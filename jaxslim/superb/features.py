"""Hidden states of all clips, computed once for an upstream and kept as fp16; heads read them standardised.

Every channel of every layer gets mean 0 and variance 1 over the training clips, the same way for all upstreams, so
that one learning rate fits hidden states of any scale (s3prl leaves them as they are).
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxslim.data.store import Store, plan
from jaxslim.superb.clips import RATE, Clip


class Features:
    """States of the suite's clips; `states(i)` and `pooled(i)` are standardised, `raw(i)` is what the model gave."""

    def __init__(self, store: Store, clips: list[Clip], keep: bool = True):
        self.store, self.clips, self._kept = store, clips, {} if keep else None
        total = square = frames = 0.0
        for i, clip in enumerate(clips):
            if clip.split == "train":
                x = self.raw(i).astype(np.float32)                                       # (L, T, D)
                total, square, frames = total + x.sum(1, np.float64), square + (x * x).sum(1, np.float64), (
                    frames + x.shape[1])
        mean = total / frames
        self.mean = mean[:, None].astype(np.float32)                                     # (L, 1, D)
        self.scale = (1 / np.sqrt(np.maximum(square / frames - mean**2, 1e-8)))[:, None].astype(np.float32)

    def release(self) -> None:
        """Forgets the standardised copies; they are made again when asked for."""
        if self._kept is not None:
            self._kept.clear()

    @property
    def layers(self) -> int:
        return self.mean.shape[0]

    @property
    def width(self) -> int:
        return self.mean.shape[2]

    def raw(self, i: int) -> np.ndarray:
        """(L, T, D), as stored."""
        return self.store.get(i)["states"]

    def states(self, i: int) -> np.ndarray:
        """(L, T, D) fp16, standardised."""
        if self._kept is not None and i in self._kept:
            return self._kept[i]
        x = ((self.raw(i).astype(np.float32) - self.mean) * self.scale).clip(-100, 100).astype(np.float16)
        if self._kept is not None:
            self._kept[i] = x
        return x

    def pooled(self, index: Sequence[int]) -> np.ndarray:
        """Means over time of these clips (N, L, D), fp32."""
        return np.stack([self.states(i).mean(1, dtype=np.float32) for i in index])


def extract(upstream, clips: list[Clip], data: str, folder) -> Store:
    """The store of an upstream's hidden states; what is missing is computed."""
    shards = plan({i: clip.seconds for i, clip in enumerate(clips)})
    store = Store(folder, {"upstream": upstream.fingerprint, "data": data}, [s[0] for s in shards])
    shape = {s[0][0]: s[1:] for s in shards}

    def make(members: list[int]) -> list[dict[str, np.ndarray]]:
        rows, end = shape[members[0]]
        waves = [clips[i].wave()[: round(end * RATE)] for i in members]   # stated lengths are rounded
        return [{"states": x} for x in upstream.features(waves, rows, round(end * RATE))]

    store.fill(make)
    return store
