"""Batches of fixed shapes: a few length buckets, exact resume, the same global order on any number of hosts.

The order of batches depends on (seed, epoch) only, so a position is two numbers. A row that cannot be used is counted
and named in `Batches.skipped`; if that shows only when it is decoded, a filler row stands where it stood.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxslim.data.loader import Loader, Prefetch, generate
from jaxslim.data.plan import Plan, suggest_buckets
from jaxslim.data.rows import DataError, Rows

__all__ = ["Batches", "suggest_buckets"]


class Batches:
    """Iterator of dicts of numpy arrays, of one fixed shape per bucket (`shapes`):

      what the task's extractor makes of clips of S samples, such as
      input_values (B, S) float32, zero beyond each clip       attention_mask (B, S) int32, 1 on samples of the clip
      what its `targets` makes of their texts, such as
      labels (B, N) int32, -100 beyond each text
      samples (B,) int32, the clips' lengths                   row (B,) int32, index into rows, -1 for a filler row

    Filler rows (mask all 0, labels all -100) complete the last batch of a bucket and stand for rows that turn out
    unusable, so a batch may consist of nothing else: weight by counts. Several hosts share the B rows out; each
    gets ceil(B / hosts).

    Args:
      rows: the data; rows without text are skipped unless `labels=False`, which leaves the labels out.
      task: gives `sampling_rate`, `extractor`, `encode(text)` and `targets(labels, width)` (tasks.CTCTask).
      batch_size: rows per global batch, at most; the batches of a bucket are equally large so that few are fillers.
      batch_seconds: instead of batch_size: seconds of audio per global batch, padding included.
      multiple_of: B is a multiple of it, at least once (devices of the mesh times microbatches).
      buckets: lengths in seconds, or how many at most (each is a compiled shape); by default as `suggest_buckets` says.
      epochs: None never ends.
      min_seconds, max_seconds: rows outside are left out (counted and named, not held against `max_skipped`).
      host, hosts: this process and how many there are; each gets its rows of every global batch.
      workers: decoding threads; prefetch: batches made ahead (0: none, no thread).
      augment: (wave, numpy Generator) -> wave, as augment.speed_perturb; the generator depends on (seed, epoch, row).
      cache_bytes: decoded clips are kept up to this size.
      max_skipped: more unusable rows than this fraction raise DataError.
      unknown: "drop_row" skips rows with characters outside the vocabulary, "error" raises.
    Raises:
      DataError: no usable row, too many unusable ones, or options that contradict each other.
    """

    def __init__(self, rows: Rows, task, *, batch_size: int | None = None, batch_seconds: float | None = None,
                 multiple_of: int = 1, buckets: Sequence[float] | int | None = None, seed: int = 0,
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
        longest = max(buckets) if isinstance(buckets, Sequence) else math.inf
        self._loader.select(longest, min_seconds, max_seconds, unknown)
        if not self._loader.seconds:
            raise DataError(f"{rows.name} has no usable row: {self._loader.examples() or 'it is empty'}.")
        seconds, labels = self._loader.seconds, self._loader.labels
        index, ids = np.array(list(seconds)), rows.column("id")
        self._plan = Plan.make(
            index, np.maximum(np.array(list(seconds.values())) * self._loader.stretch, task.extractor.window),
            np.array([0 if labels is None else len(labels[i]) for i in seconds]), [ids[i] for i in index],
            rate=task.sampling_rate, buckets=buckets, size=batch_size or (8 if batch_seconds is None else None),
            seconds=batch_seconds, multiple=multiple_of, seed=seed, shuffle=shuffle,
        )  # fmt: skip
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
        """(row id, reason) of every row left out so far; rows with corrupt audio join when they are decoded."""
        return [(self.rows.column("id")[i], reason) for i, reason in sorted(self._loader.skipped.items())]

    @property
    def summary(self) -> str:
        """One sentence: rows, hours, shapes, padding, and what was skipped."""
        shapes = ", ".join(f"{b} x {s / self.task.sampling_rate:.2f} s" for b, s, _ in self.shapes)
        text = f"{self.rows.name}: {len(self._loader.seconds)} of {len(self.rows)} rows, {self.hours:.2f} h, "
        text += f"{len(self)} batches an epoch ({shapes}), {100 * self.padding_waste:.1f} % padding"
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

    def fillers(self) -> dict[str, np.ndarray]:
        """The largest batch there is, of filler rows only: for its shapes."""
        return self._loader.batch(0, max(self._plan.shapes, key=lambda s: (s[0] * s[1], s[1])), np.empty(0, np.int32))

    def get_state(self) -> dict:
        """The position after the last batch handed out, for JSON."""
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, "seed": self._plan.seed, "plan": self._plan.digest}

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
