"""Which rows form which batch, and of what shape: length buckets, and an order that depends on (seed, epoch) only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

STEP = 0.02  # bucket lengths are multiples of one frame
ENOUGH, MOST = 0.095, 16  # by default as few buckets as keep padding under ENOUGH, at most MOST


def suggest_buckets(durations: Sequence[float], n: int | None = None, batch_size: int = 1) -> tuple[float, ...]:
    """Ascending lengths in seconds, the last at least the longest clip, that pad `durations` least.

    At most `n` of them; by default as few as keep padding (with filler rows in batches of `batch_size`) below 9.5 %,
    at most 16. Exact (dynamic programming) over up to 512 candidate lengths.
    """
    return _search(np.asarray(durations, float), n, lambda seconds: np.full(len(seconds), batch_size), 1)


def _search(lengths: np.ndarray, n: int | None, most, multiple: int) -> tuple[float, ...]:
    """suggest_buckets, where `most(seconds)` gives the largest batch of buckets that long."""
    lengths = np.sort(lengths)
    if not lengths.size:
        return ()
    ends = np.unique(np.ceil(lengths / STEP - 1e-6).astype(int))  # candidates, in steps
    if len(ends) > 512:
        ends = np.unique(np.append(ends[:: -(-len(ends) // 511)], ends[-1]))
    upto = np.searchsorted(lengths, ends * STEP + 1e-8, side="right")  # clips that fit candidate j
    upto[-1] = len(lengths)
    limit = most(ends * STEP)

    def price(clips):  # steps of audio, padding and fillers in a bucket that ends at j
        count, size = balance(clips, limit, multiple)
        return ends * count * size

    clips = upto[None, :] - upto[:, None]  # [i, j]: in a bucket that ends at j after one that ends at i
    prices = np.where(clips > 0, price(np.maximum(clips, 1)), np.inf)
    cost = price(upto).astype(float)  # of all clips up to j; each round allows one bucket more
    came, least, enough = [], lengths.sum() / STEP, ENOUGH if n is None else 0.0
    while len(came) + 1 < min(n or MOST, len(ends)) and least < cost[-1] * (1 - enough):
        total = cost[:, None] + prices
        before = np.argmin(total, axis=0)
        best = total[before, np.arange(len(ends))]
        came.append(np.where(best < cost, before, -1))  # -1: no gain by another bucket
        cost = np.minimum(cost, best)
    j, chosen = len(ends) - 1, [len(ends) - 1]
    for back in reversed(came):
        if back[j] >= 0:
            j = int(back[j])
            chosen.append(j)
    return tuple(round(float(ends[j] * STEP), 2) for j in reversed(chosen))


def balance(rows, most, multiple: int = 1):
    """(number of batches, rows in each): as few batches as `most` allows, equally large: few fillers."""
    count = -(-rows // most)
    return count, -(-rows // (count * multiple)) * multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of every epoch."""

    shapes: list[tuple[int, int, int]]  # per bucket: rows B, samples S, label width N
    members: list[np.ndarray]  # per bucket: indices of its rows
    seed: int
    shuffle: bool
    digest: str  # of all that decides what a batch holds, but for the seed

    @classmethod
    def make(cls, index: np.ndarray, need: np.ndarray, widths: np.ndarray, ids: list[str], *, rate: int, buckets, size,
             seconds, multiple: int, seed: int, shuffle: bool) -> Plan:  # fmt: skip
        """`index` (n,): rows; they need `need` (n,) seconds and `widths` (n,) labels. The rest as in Batches."""

        def most(length):
            rows = np.full(np.shape(length), size) if size is not None else np.asarray(seconds // length, int)
            return np.maximum(rows // multiple, 1) * multiple

        ends = np.array(sorted(buckets) if isinstance(buckets, Sequence) else _search(need, buckets, most, multiple))
        place = np.minimum(np.searchsorted(ends + 1e-6, need), len(ends) - 1)
        shapes, members = [], []
        for k, end in enumerate(ends):
            inside = place == k
            if inside.any():
                _, rows = balance(int(inside.sum()), int(most(end)), multiple)
                shapes.append((rows, round(end * rate), max(-(-int(widths[inside].max()) // 16), 1) * 16))
                members.append(index[inside])
        what = json.dumps([shapes, shuffle, [part.tolist() for part in members], ids])
        return cls(shapes, members, seed, shuffle, hashlib.sha256(what.encode()).hexdigest()[:16])

    def chunks(self, rng: np.random.Generator | None = None) -> list[tuple[int, np.ndarray]]:
        """(bucket, rows of a batch), bucket after bucket; the last batch of a bucket may be short."""
        members = [part if rng is None else rng.permutation(part) for part in self.members]
        sizes = [rows for rows, _, _ in self.shapes]
        return [(k, m[i : i + sizes[k]]) for k, m in enumerate(members) for i in range(0, len(m), sizes[k])]

    def order(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The global batches of an epoch in their order."""
        if not self.shuffle:
            return self.chunks()
        rng = np.random.default_rng([self.seed, epoch])
        batches = self.chunks(rng)
        return [batches[i] for i in rng.permutation(len(batches))]
