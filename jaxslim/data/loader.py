"""What moves under Batches: rows -> padded arrays, a cache of decoded clips, and a thread that works ahead."""

from __future__ import annotations

import collections
import math
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxslim.data.rows import DataError, Rows

SLACK = 0.05  # seconds by which a clip may exceed its bucket (rounded durations); so much of its end is cut


class Loader:
    """Decodes, augments, normalises and pads; remembers which rows were skipped and why."""

    def __init__(self, rows: Rows, task, seed: int, host: int, hosts: int, workers: int, augment: Callable | None,
                 cache_bytes: int, max_skipped: float, labels: bool):  # fmt: skip
        self.rows, self.task, self.seed, self.host, self.hosts = rows, task, seed, host, hosts
        self.augment, self.max_skipped = augment, max_skipped
        self.stretch: float = getattr(augment, "stretch", 1.0)
        self.seconds: dict[int, float] = {}  # of the usable rows
        self.labels: dict[int, np.ndarray] | None = {} if labels else None
        ids = rows.column("adapter_id")  # which adapter of a model with several a row trains or uses; none = the base
        self.adapter_ids = None if all(i is None for i in ids) else np.array([-1 if i is None else i for i in ids])
        self.skipped: dict[int, str] = {}
        self._bad: set[int] = set()  # skipped, but not because the user asked for it
        self._cache: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._room, self._lock = cache_bytes, threading.Lock()
        self._map = ThreadPoolExecutor(workers, "jaxslim-decode").map if workers else map

    def durations(self) -> list[float | DataError]:
        """Seconds of every row, or the error that says why there are none."""

        def one(i):
            try:
                return self.rows.duration(i)
            except DataError as error:
                return error

        return list(self._map(one, range(len(self.rows))))

    def skip(self, i: int, reason: str, asked: bool = False) -> None:
        with self._lock:
            self.skipped[i] = reason
            if not asked:
                self._bad.add(i)

    def select(self, longest: float, low: float | None, high: float | None, unknown: str = "drop_row") -> None:
        """Every row becomes a length (and labels) or an entry of `skipped`."""
        texts, shortest = self.rows.column(self.task.column), self.task.extractor.shortest
        for i, length in enumerate(self.durations()):
            if isinstance(length, DataError):
                self.skip(i, str(length))
            elif not (low or 0) - 1e-6 <= length <= (high or math.inf) + 1e-6:
                self.skip(i, f"{length:.3f} s long, outside min_seconds to max_seconds", asked=True)
            elif length < shortest:
                self.skip(i, f"{length * 1000:.0f} ms long, shorter than one frame ({shortest * 1000:.0f} ms)")
            elif length * self.stretch > longest + SLACK:
                self.skip(i, f"{length:.2f} s long, over the largest bucket; drop such rows by max_seconds")
            elif self.labels is not None and not str("" if texts[i] is None else texts[i]).strip():
                self.skip(i, f"no {self.task.column}")
            else:
                try:
                    if self.labels is not None:
                        self.labels[i] = self.task.encode(texts[i])
                    self.seconds[i] = length
                except DataError as error:
                    if unknown == "error":
                        raise DataError(f"Row {self.rows.column('id')[i]!r} of {self.rows.name}: {error}.") from error
                    self.skip(i, str(error))
        self.check()

    def check(self) -> None:
        """Raises DataError once too many rows proved unusable."""
        if len(self._bad) > self.max_skipped * len(self.rows):
            raise DataError(
                f"{len(self._bad)} of {len(self.rows)} rows of {self.rows.name} are unusable, more than max_skipped = "
                f"{self.max_skipped:g} allows: {self.examples()}."
            )

    def examples(self, n: int = 3) -> str:
        names = self.rows.column("id")
        shown = [f"{names[i]}: {reason.rstrip('.')}" for i, reason in sorted(self.skipped.items())[:n]]
        more = len(self.skipped) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more else "")

    def batch(self, epoch: int, shape: tuple[int, int, int], members: np.ndarray) -> dict[str, np.ndarray]:
        """This host's part of a global batch (shapes as in Batches)."""
        size, samples, width = shape
        local = -(-size // self.hosts)
        rows = np.full(local * self.hosts, -1, np.int32)
        rows[: len(members)] = members
        rows = rows[self.host * local : (self.host + 1) * local].copy()
        waves = list(self._map(lambda i: None if i < 0 else self._wave(int(i), epoch, samples), rows))
        rows[[wave is None for wave in waves]] = -1
        out = self.task.extractor(waves, samples)
        out |= {"row": rows, "samples": np.array([0 if wave is None else len(wave) for wave in waves], np.int32)}
        if self.labels is not None:
            out |= self.task.targets([self.labels[int(i)] if i >= 0 else () for i in rows], width)
        if self.adapter_ids is not None:
            out["adapter_ids"] = np.where(rows >= 0, self.adapter_ids[rows], -1).astype(np.int32)
        self.check()
        return out

    def _wave(self, i: int, epoch: int, samples: int) -> np.ndarray | None:
        """Decoded and augmented clip (at most samples,), or None after noting why there is none."""
        if i in self.skipped:
            return None
        rate = self.task.sampling_rate
        try:
            wave = self._decoded(i)
        except DataError as error:
            self.skip(i, str(error))
            return None
        # judged before augmentation: whether a row is skipped must not depend on the epoch
        if len(wave) < self.task.extractor.shortest * rate or len(wave) * self.stretch > samples + SLACK * rate:
            self.skip(i, f"{len(wave) / rate:.3f} s of audio where its duration says {self.seconds[i]:.3f} s")
            return None
        if self.augment is not None:
            wave = self.augment(wave, np.random.default_rng([self.seed, epoch, i]))
        return wave[:samples]

    def _decoded(self, i: int) -> np.ndarray:
        with self._lock:
            if i in self._cache:
                self._cache.move_to_end(i)
                return self._cache[i]
        wave = self.rows.audio(i, self.task.sampling_rate)
        with self._lock:
            if i not in self._cache and wave.nbytes <= self._room:
                # once full, what is in stays: evicting in a fixed cycle over the data would never hit again
                self._cache[i] = wave
                self._room -= wave.nbytes
        return wave


def generate(plan, loader: Loader, position: tuple[int, int], epochs: int | None) -> Iterator[tuple]:
    """(position after it, batch) from `position` = (epoch, batch) on."""
    epoch, first = position
    while epochs is None or epoch < epochs:
        order = plan.order(epoch)
        for k in range(first, len(order)):
            bucket, members = order[k]
            after = (epoch, k + 1) if k + 1 < len(order) else (epoch + 1, 0)
            yield after, loader.batch(epoch, plan.shapes[bucket], members)
        epoch, first = epoch + 1, 0


class Prefetch:
    """Runs an iterator in a daemon thread, up to `depth` items ahead; its errors arrive in order."""

    def __init__(self, source: Iterator, depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        # the thread knows the queue and the event only: a forgotten Prefetch is collected and stops its thread
        args = (source, self._queue, self._stop)
        threading.Thread(target=_run, args=args, name="jaxslim-prefetch", daemon=True).start()

    def __next__(self):
        value, error = self._queue.get()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        self._stop.set()

    __del__ = close


def _run(source: Iterator, out: queue.Queue, stop: threading.Event) -> None:
    def put(item) -> bool:
        while not stop.is_set():
            try:
                out.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    try:
        for value in source:
            if not put((value, None)):
                return
        put((None, StopIteration()))
    except BaseException as error:
        put((None, error))
