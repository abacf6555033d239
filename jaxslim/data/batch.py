"""Fixed-shape batches: a few length buckets, exact resume, the same global order on any number of hosts, nothing lost in silence.

The order of batches depends on (seed, epoch) only, so a position is two numbers. A row that cannot be used becomes a filler
row where it stood, and is counted and named in `Batches.skipped`.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxslim.data.loader import SLACK, Loader, Prefetch, generate
from jaxslim.data.rows import DataError, Rows

FLOOR = 0.025  # seconds: shorter than the first frame of every wav2vec2-like front end (400 samples at 16 kHz)
STEP = 0.02  # bucket lengths are multiples of one frame


def suggest_buckets(durations: Sequence[float], n: int = 6) -> tuple[float, ...]:
    """At most `n` ascending lengths in seconds, the last at least the longest clip, that pad `durations` least.

    Exact (dynamic programming) over up to 512 candidate lengths.
    """
    lengths = np.sort(np.asarray(durations, float))
    if not lengths.size:
        return ()
    ends = np.unique(np.ceil(lengths / STEP - 1e-6).astype(int))  # candidates, in steps
    if len(ends) > 512:
        ends = np.unique(np.append(ends[:: -(-len(ends) // 511)], ends[-1]))
    count = np.searchsorted(lengths, ends * STEP + 1e-9, side="right").astype(float)  # clips up to each candidate
    count[-1] = len(lengths)
    cost = ends * count  # one bucket for all clips up to candidate j; then allow one more bucket each round
    came = []
    for _ in range(min(n, len(ends)) - 1):
        total = cost[:, None] + ends[None, :] * (count[None, :] - count[:, None])  # last bucket holds clips i+1 .. j
        total[np.tril_indices(len(ends))] = np.inf
        came.append(np.argmin(total, axis=0))
        came[-1][total.min(axis=0) >= cost] = -1  # no gain: keep the solution with fewer buckets
        cost = np.minimum(cost, total.min(axis=0))
    chosen, j = [len(ends) - 1], len(ends) - 1
    for back in reversed(came):
        if back[j] >= 0:
            j = int(back[j])
            chosen.append(j)
    return tuple(round(float(ends[j] * STEP), 2) for j in reversed(chosen))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows form which global batch."""

    shapes: list[tuple[int, int, int]]
    members: list[np.ndarray]  # per bucket: indices of its rows
    seed: int
    shuffle: bool
    digest: str

    def chunks(self, rng: np.random.Generator | None = None) -> list[tuple[int, np.ndarray]]:
        """(bucket, rows of a batch), bucket after bucket; the last batch of a bucket may be short."""
        members = [m if rng is None else rng.permutation(m) for m in self.members]
        return [(k, m[i : i + b]) for k, (m, (b, _, _)) in enumerate(zip(members, self.shapes)) for i in range(0, len(m), b)]

    def order(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The global batches of an epoch in their order."""
        if not self.shuffle:
            return self.chunks()
        rng = np.random.default_rng([self.seed, epoch])
        batches = self.chunks(rng)
        return [batches[i] for i in rng.permutation(len(batches))]


class Batches:
    """Iterator of dicts of numpy arrays, in global batches of fixed shape per bucket (`shapes`), B rows shared by the hosts:

      input_values (B, S) float32, zero beyond each clip       attention_mask (B, S) int32, 1 on samples of the clip
      labels (B, N) int32, -100 beyond each text               row (B,) int32, index into rows, -1 for a filler row

    Filler rows (mask all 0, labels all -100) complete the last batch of a bucket and stand for rows that turn out unusable, so a
    batch may consist of nothing else: weight by counts.

    Args:
      rows: the data; rows without text are skipped unless `labels=False`, which leaves the labels out.
      task: gives `sampling_rate`, `inputs(wave)`, `encode(text)` (tasks.CTCTask).
      batch_size: rows per global batch, at most; a bucket with few rows gets smaller batches so that few rows are fillers.
      batch_seconds: instead of batch_size: seconds of audio per global batch, padding included.
      multiple_of: B is a multiple of it (devices of the mesh times microbatches).
      balance: False makes B exactly batch_size in every bucket.
      buckets: lengths in seconds; by default `suggest_buckets` over the data.
      epochs: None never ends.
      min_seconds, max_seconds: rows outside are left out (counted and named, not held against `max_skipped`).
      host, hosts: this process and how many there are; each gets its rows of every global batch.
      workers: decoding threads; prefetch: batches made ahead (0: none, no thread).
      augment: (wave, numpy Generator) -> wave, see audio.speed_perturb; the generator depends on (seed, epoch, row) only.
      cache_bytes: decoded clips are kept up to this size.
      max_skipped: more unusable rows than this fraction raise DataError.
      unknown: "drop_row" skips rows with characters outside the vocabulary, "error" raises.
    Raises:
      DataError: no usable row, too many unusable ones, or options that contradict each other.
    """

    def __init__(self, rows: Rows, task, *, batch_size: int | None = None, batch_seconds: float | None = None,
                 multiple_of: int = 1, balance: bool = True, buckets: Sequence[float] | None = None, seed: int = 0,
                 shuffle: bool = True, epochs: int | None = None, min_seconds: float | None = None,
                 max_seconds: float | None = None, host: int = 0, hosts: int = 1, workers: int = 2, prefetch: int = 2,
                 augment: Callable | None = None, cache_bytes: int = 2**30, max_skipped: float = 0.05,
                 unknown: str = "drop_row", labels: bool = True):  # fmt: skip
        if batch_size is not None and batch_seconds is not None:
            raise DataError("Give batch_size or batch_seconds, not both.")
        if not 0 <= host < hosts:
            raise DataError(f"host must be in 0..{hosts - 1}, not {host}.")
        if unknown not in ("drop_row", "error"):
            raise DataError(f"unknown must be 'drop_row' or 'error', not {unknown!r}.")
        if seed < 0 or multiple_of < 1 or min(batch_size or 1, batch_seconds or 1) <= 0:
            raise DataError("seed must not be negative; batch_size, batch_seconds and multiple_of must be positive.")
        self.rows, self.task, self.epochs = rows, task, epochs
        self._prefetch = prefetch
        self._loader = Loader(rows, task, seed, host, hosts, workers, augment, cache_bytes, max_skipped, labels)
        if batch_seconds is None:
            batch_size = batch_size or 8
        self._select(buckets, min_seconds, max_seconds, unknown)
        self._plan = self._place(batch_size, batch_seconds, multiple_of, balance, buckets, seed, shuffle)
        self._position, self._stream = (0, 0), None

    # ---- what there is ----

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(B, S, N) of each bucket: global rows, samples, label width. Ascending in S."""
        return self._plan.shapes

    @property
    def buckets(self) -> tuple[float, ...]:
        """Lengths in seconds, ascending."""
        return tuple(samples / self.task.sampling_rate for _, samples, _ in self.shapes)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(row id, reason) of every row left out so far; rows whose audio turns out corrupt join when they are decoded."""
        return [(self.rows.column("id")[i], reason) for i, reason in sorted(self._loader.skipped.items())]

    @property
    def summary(self) -> str:
        """One sentence: rows, hours, shapes, padding, and what was skipped."""
        shapes = ", ".join(f"{b} x {s / self.task.sampling_rate:.2f} s" for b, s, _ in self.shapes)
        text = (
            f"{self.rows.name}: {len(self._loader.seconds)} of {len(self.rows)} rows, {self.hours:.2f} h in {len(self)} batches "
            f"an epoch ({shapes}), {100 * self.padding_waste:.1f} % padding"
        )
        if self._loader.skipped:
            text += f"; {len(self._loader.skipped)} rows skipped: {self._loader.examples()}"
        return text + "."

    @property
    def hours(self) -> float:
        return sum(self._loader.seconds.values()) / 3600

    @property
    def padding_waste(self) -> float:
        """Fraction of an epoch's samples that are padding or filler rows."""
        total = sum(self.shapes[k][0] * self.shapes[k][1] for k, _ in self._plan.chunks())
        return 1 - self.hours * 3600 * self.task.sampling_rate / total

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self._plan.chunks())

    # ---- iteration ----

    def __iter__(self) -> Batches:
        if self.epochs is not None and self._position[0] >= self.epochs:
            self._restart((0, 0))  # a finished pass starts again
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._stream is None:
            make = generate(self._plan, self._loader, self._position, self.epochs)
            self._stream = Prefetch(make, self._prefetch) if self._prefetch else make
        try:
            self._position, batch = next(self._stream)
        except BaseException:
            self._restart(self._position)
            raise
        return batch

    def __call__(self, epochs: int | None = 1) -> Batches:
        """A second, independent pass over the same batches from the start; plan and cache are shared."""
        other = copy.copy(self)
        other.epochs, other._position, other._stream = epochs, (0, 0), None
        return other

    def close(self) -> None:
        """Stops the background thread; the position stays."""
        self._restart(self._position)

    def get_state(self) -> dict:
        """The position after the last batch handed out, for JSON."""
        return {"epoch": self._position[0], "batch": self._position[1], "seed": self._plan.seed, "plan": self._plan.digest}

    def set_state(self, state: dict) -> None:
        """The next batch is the one that would have come next when `state` was taken.

        Raises:
          DataError: seed, rows, buckets or batch size are not those of `state`.
        """
        if (state["seed"], state["plan"]) != (self._plan.seed, self._plan.digest):
            raise DataError(
                f"{self.rows.name} cannot be resumed where it stood: the seed, the rows, or the bucket and batch sizes "
                "differ from the checkpoint's. Use the same settings, or start the data anew."
            )
        self._restart((int(state["epoch"]), int(state["batch"])))

    def _restart(self, position: tuple[int, int]) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._position = None, position

    # ---- the plan ----

    def _select(self, buckets, low, high, unknown) -> None:
        """Every row becomes a length (and labels) or an entry of `skipped`."""
        loader, stretch = self._loader, self._loader.stretch
        for i, length in enumerate(loader.durations()):
            text = self.rows._records[i]["text"]
            if isinstance(length, DataError):
                loader.skip(i, str(length))
            elif not (low or 0) <= length <= (high or math.inf):
                loader.skip(i, f"{length:.3f} s long, outside min_seconds to max_seconds", asked=True)
            elif length < FLOOR:
                loader.skip(i, f"{length * 1000:.0f} ms long, shorter than {FLOOR * 1000:.0f} ms, one frame")
            elif buckets is not None and length * stretch > max(buckets) + SLACK:
                loader.skip(i, f"{length:.2f} s long, over the largest bucket; set max_seconds to drop such rows on purpose")
            elif loader.labels is not None and not (text or "").strip():
                loader.skip(i, "no text")
            else:
                try:
                    if loader.labels is not None:
                        loader.labels[i] = self.task.encode(text)
                    loader.seconds[i] = length
                except DataError as error:
                    if unknown == "error":
                        raise DataError(f"Row {self.rows._records[i]['id']!r} of {self.rows.name}: {error}.") from error
                    loader.skip(i, str(error))
        loader.check()
        if not loader.seconds:
            raise DataError(f"{self.rows.name} has no usable row: {loader.examples()}.")

    def _place(self, size, seconds, multiple, balance, buckets, seed, shuffle) -> Plan:
        """Rows into buckets, and the shape of each bucket's batches."""
        loader, rate = self._loader, self.task.sampling_rate
        index = np.array(list(loader.seconds))
        need = np.array(list(loader.seconds.values())) * loader.stretch
        steps = sorted(buckets) if buckets is not None else suggest_buckets(need)
        place = np.minimum(np.searchsorted(np.array(steps) + 1e-6, need), len(steps) - 1)
        shapes, parts = [], []
        for k, step in enumerate(steps):
            members = index[place == k]
            if not len(members):
                continue
            most = size if size is not None else int(seconds // step)
            most = max(most // multiple, 1) * multiple
            b = most
            if balance:  # as many batches, of nearly equal size: few filler rows
                b = -(-len(members) // -(-len(members) // most))
                b = -(-b // multiple) * multiple
            width = max((len(loader.labels[i]) for i in members), default=0) if loader.labels is not None else 0
            shapes.append((b, round(step * rate), -(-max(width, 1) // 16) * 16))
            parts.append(members)
        ids = [self.rows._records[i]["id"] for i in index]
        digest = hashlib.sha256(json.dumps([shapes, shuffle, [p.tolist() for p in parts], ids]).encode()).hexdigest()[:16]
        return Plan(shapes, parts, seed, shuffle, digest)
