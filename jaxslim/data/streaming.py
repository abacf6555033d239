"""Training data that is read while it is used: `stream:DATA`, for data sets too large to list or to download.

The rows come from Hugging Face `datasets` in streaming mode: hub data sets, Parquet files (shards are row groups),
WebDataset tar files, local or remote (`gs://`, `hf://`). Every host reads its own shards, audio undecoded, one block of
rows ahead; a block is sorted into the length buckets and shuffled like a small data set. Hosts agree once a block on
how many batches of each bucket follow, so that all run the same shapes at the same time.

A position is (epoch, block, batch) and, for each host, where its reader stood at the start of the block: resuming reads
one block again and no more.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jaxslim.data.loader import Loader, Prefetch
from jaxslim.data.plan import suggest_buckets
from jaxslim.data.rows import DataError, Rows, _rename

PREFIX = "stream:"
BLOCK = 1024  # rows that a host shuffles and sorts at once
LONGER = 1.2  # the last bucket is so much longer than the longest clip of the first block: later ones may be longer
DENSER = 1.3  # and labels are so much wider than the fastest speaker there needs

log = logging.getLogger(__name__)


def open_stream(source: str):
    """`datasets.IterableDataset` of DATA without decoding. Raises DataError."""
    import datasets

    from jaxslim.data import tar

    try:
        if source.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files=tar.expand(source), split="train", streaming=True)
        elif source.endswith(".tar"):
            table = datasets.IterableDataset.from_generator(_tar_rows, gen_kwargs={"paths": tar.expand(source)})
        else:
            name, _, rest = source.removeprefix("hf:").partition(":")
            config, _, split = rest.partition("/")
            table = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # many kinds: network, gated, unknown name, config, split or file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{PREFIX}{source} cannot be opened as a stream: {reason}.") from error
    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Audio):
            table = table.cast_column(column, datasets.Audio(decode=False))
    return table.reshard() if source.endswith(".parquet") else table  # Parquet: a shard is a row group, not a file


class Reader:
    """Blocks of rows of one host, epoch after epoch; where it stands is JSON."""

    def __init__(self, source: str, seed: int, host: int, hosts: int, block: int, shuffle: bool = True):
        from datasets.distributed import split_dataset_by_node

        table = open_stream(source)
        if shuffle:  # the order of the shards only: a larger buffer could not be resumed exactly
            table = table.shuffle(seed=seed, buffer_size=1)
        self.source, self.block = source, block
        self._table = split_dataset_by_node(table, host, hosts)

    def start(self, epoch: int, state: dict | None = None, skip: int = 0) -> None:
        """The next block is the first of `epoch`, or the one at `state`; then `skip` rows on."""
        from datasets.utils import logging as theirs

        self._table.set_epoch(epoch)
        level = theirs.get_verbosity()
        theirs.set_verbosity_error()  # it warns of a shuffle buffer, which is empty here
        try:
            if state is not None:
                self._table.load_state_dict(state)
            self._iterator, self._state = iter(self._table), state
            for _ in range(skip):
                next(self._iterator, None)
        finally:
            theirs.set_verbosity(level)

    def read(self) -> tuple[dict | None, Rows | None]:
        """(state before it, the next block or None at the end of the epoch)."""
        before, records = self._state, []
        try:
            for record in self._iterator:
                records.append(record)
                if len(records) == self.block:
                    break
            self._state = copy.deepcopy(self._table.state_dict())
        except Exception as error:
            raise DataError(f"{PREFIX}{self.source}: reading failed after {len(records)} rows of a block "
                            f"({type(error).__name__}: {str(error)[:200]}).") from error
        return before, Rows(_rename(records, self.source, None, None), PREFIX + self.source) if records else None


def _tar_rows(paths: list[str]):
    from jaxslim.data import tar

    for path in paths:
        yield from tar.records(path)


class StreamBatches:
    """Global batches as `jaxslim.data.batch.Batches` gives them, from a stream of unknown length.

    Bucket shapes are fixed by the first block of the stream (or `buckets`); a later clip that fits none is skipped and
    counted. The same seed, host count and data give the same batches. With another number of hosts the shards fall to
    other hosts: a resumed run then goes on about where it stood, in another order.

    Args: as of Batches; `block` rows are shuffled and sorted at once by a host.
    Raises:
      DataError: see open_stream; no usable row in the first block; too many unusable ones in any.
    """

    def __init__(self, source: str, task, *, batch_size: int | None = None, batch_seconds: float | None = None,
                 multiple_of: int = 1, buckets: Sequence[float] | None = None, seed: int = 0, shuffle: bool = True,
                 epochs: int | None = None, min_seconds: float | None = None, max_seconds: float | None = None,
                 host: int = 0, hosts: int = 1, workers: int = 2, prefetch: int = 2, augment: Callable | None = None,
                 max_skipped: float = 0.05, labels: bool = True, block: int = BLOCK):  # fmt: skip
        source = source.removeprefix(PREFIX)
        if "+" in source or re.match(r"\d+\s*\*", source):
            raise DataError(f"{PREFIX}{source}: a stream is one data set; join and weigh the files beforehand.")
        self.task, self.epochs, self.host, self.hosts = task, epochs, host, hosts
        self._seed, self._shuffle, self._prefetch, self._limits = seed, shuffle, prefetch, (min_seconds, max_seconds)
        self._loaders = lambda rows: Loader(rows, task, seed, 0, 1, workers, augment, 0, max_skipped, labels)
        self._make, self._block = (lambda: Reader(source, seed, host, hosts, block, shuffle)), block
        self._counted, self.skipped = set(), []  # blocks whose skipped rows are listed
        first = Reader(source, seed, 0, 1, block, shuffle)
        first.start(0)
        self.rows = first.read()[1]
        if self.rows is None:
            raise DataError(f"{PREFIX}{source} has no rows.")
        loader = self._loaders(self.rows)
        loader.select(max(buckets) if buckets else math.inf, min_seconds, max_seconds)
        if not loader.seconds:
            raise DataError(f"{self.rows.name}: no row of the first {len(self.rows)} is usable: {loader.examples()}.")
        self._shapes = self._fix(loader, buckets, batch_size or (8 if batch_seconds is None else None), batch_seconds,
                                 multiple_of)
        self._rewind()

    def _rewind(self) -> None:
        self._at: tuple[int, int, int] = (0, 0, 0)
        self._stand: dict | None = None    # of this host's reader before the present block; None: at the epoch's start
        self._skip = 0
        self._reader: Reader | None = None
        self._ahead: Future | None = None  # (state before it, the next block)
        self._pool = ThreadPoolExecutor(1, "jaxslim-stream")
        self._batches = None               # of the present block

    def _fix(self, loader: Loader, buckets, size, seconds, multiple) -> list[tuple[int, int, int]]:
        low, high = self._limits
        lengths = np.maximum(np.array(list(loader.seconds.values())) * loader.stretch, self.task.extractor.window)
        if not buckets:
            found = suggest_buckets(lengths, batch_size=size or 1)
            longest = found[-1] * LONGER if high is None else min(high * loader.stretch, found[-1] * LONGER)
            buckets = (*found[:-1], math.ceil(max(longest, found[-1]) * 50) / 50)
        density = 0.0 if loader.labels is None else max(
            len(loader.labels[i]) / max(s, 0.5) for i, s in loader.seconds.items())
        shapes = []
        for end in sorted(buckets):
            rows = max((size or int(seconds // end)) // multiple, 1) * multiple
            width = 16 * max(math.ceil(end * density * DENSER / 16), 1)
            shapes.append((rows, round(end * self.task.sampling_rate), width))
        return shapes

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(B, S, N) of each bucket: global rows, samples, label width. Ascending in S."""
        return self._shapes

    @property
    def buckets(self) -> tuple[float, ...]:
        return tuple(samples / self.task.sampling_rate for _, samples, _ in self._shapes)

    @property
    def summary(self) -> str:
        shapes = ", ".join(f"{b} x {s / self.task.sampling_rate:.2f} s" for b, s, _ in self._shapes)
        return f"{self.rows.name}: streamed by {self.hosts} host(s), batches of {shapes}."

    def fillers(self) -> dict[str, np.ndarray]:
        """The largest batch there is, of filler rows only: for its shapes."""
        shape = max(self._shapes, key=lambda s: (s[0] * s[1], s[1]))
        return self._loaders(self.rows[:0]).batch(0, self._local(shape), np.empty(0, np.int32))

    def _local(self, shape):
        return (-(-shape[0] // self.hosts), *shape[1:])

    # ---- iteration ----

    def __iter__(self) -> StreamBatches:
        return self

    def __call__(self, epochs: int | None = 1) -> StreamBatches:
        """A second, independent pass from the start."""
        other = copy.copy(self)
        other.epochs = epochs
        other._rewind()
        return other

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            epoch, block, batch = self._at
            if self.epochs is not None and epoch >= self.epochs:
                raise StopIteration
            if self._batches is None and not self._open(epoch, block, batch):
                self._at, self._stand, self._reader, self._ahead = (epoch + 1, 0, 0), None, None, None
                continue
            try:
                made = next(self._batches)
            except StopIteration:
                self._batches, self._at = None, (epoch, block + 1, 0)
                continue
            self._at = (epoch, block, batch + 1)
            return made

    def _open(self, epoch: int, block: int, batch: int) -> bool:
        """The batches of a block from number `batch` on; False when every host is at the end of the epoch."""
        if self._reader is None:
            self._reader = self._make()
            self._reader.start(epoch, self._stand, self._skip)
            self._skip, self._ahead = 0, self._pool.submit(self._reader.read)
        self._stand, rows = self._ahead.result()
        self._ahead = self._pool.submit(self._reader.read)  # read while this block is used
        loader = self._loaders(self.rows[:0] if rows is None else rows)
        loader.select(self.buckets[-1], *self._limits)
        rng = np.random.default_rng([self._seed, epoch, block, self.host])
        members = self._sorted(loader, rng)
        counts = [-(-len(m) // self._local(s)[0]) for m, s in zip(members, self._shapes)]
        counts, any_rows = _most(counts, rows is not None, self.hosts)
        if not any_rows:
            return False
        if rows is not None:
            self.rows = rows
            if (epoch, block) not in self._counted:
                self._counted.add((epoch, block))
                ids = rows.column("id")
                self.skipped += [(ids[i], reason) for i, reason in sorted(loader.skipped.items())]
        chunks = [(k, members[k][i * n:(i + 1) * n]) for k, count in enumerate(counts)
                  for n in (self._local(self._shapes[k])[0],) for i in range(count)]
        if self._shuffle:  # the same order on every host
            chunks = [chunks[i] for i in np.random.default_rng([self._seed, epoch, block]).permutation(len(chunks))]
        made = (loader.batch(epoch, self._local(self._shapes[k]), part) for k, part in chunks[batch:])
        self._batches = Prefetch(made, self._prefetch) if self._prefetch else made
        return True

    def _sorted(self, loader: Loader, rng) -> list[np.ndarray]:
        """Rows of a block by bucket: the first that is long and wide enough."""
        members: list[list[int]] = [[] for _ in self._shapes]
        for i, seconds in loader.seconds.items():
            wide = 0 if loader.labels is None else len(loader.labels[i])
            need = max(seconds * loader.stretch, self.task.extractor.window)
            place = next((k for k, (_, samples, width) in enumerate(self._shapes)
                          if need <= samples / self.task.sampling_rate + 1e-6 and wide <= width), None)
            if place is None:
                loader.skip(i, f"{seconds:.2f} s with {wide} labels fit no bucket of the stream's first block")
            else:
                members[place].append(i)
        return [rng.permutation(m) if self._shuffle else np.array(m, int) for m in members]

    def close(self) -> None:
        """Stops the threads; the position stays."""
        if isinstance(self._batches, Prefetch):
            self._batches.close()
        self._batches = self._reader = self._ahead = None

    # ---- position ----

    def get_state(self) -> dict:
        """The position after the last batch handed out, for JSON. Every process must ask."""
        epoch, block, batch = self._at
        return {"epoch": epoch, "block": block, "batch": batch, "seed": self._seed, "hosts": self.hosts,
                "shapes": [list(s) for s in self._shapes], "readers": _everyones(self._stand, self.hosts)}

    def set_state(self, state: dict) -> None:
        """The next batch is the one that would have come next when `state` was taken.

        Raises:
          DataError: seed or bucket shapes are not those of `state`.
        """
        if (state["seed"], [tuple(s) for s in state["shapes"]]) != (self._seed, self._shapes):
            raise DataError(f"{self.rows.name} cannot be resumed where it stood: the seed, the first rows, or the "
                            "bucket and batch sizes differ from the checkpoint's. Use the same settings.")
        self.close()
        if state["hosts"] == self.hosts:
            self._at = (state["epoch"], state["block"], state["batch"])
            self._stand = state["readers"][self.host]
        else:
            self._at, self._stand = (state["epoch"], state["block"], 0), None
            self._skip = state["block"] * self._block * state["hosts"] // self.hosts
            log.warning("%s: %d hosts instead of %d; goes on %d rows into epoch %d, in another order.", self.rows.name,
                        self.hosts, state["hosts"], self._skip * self.hosts, state["epoch"])


def _most(counts: list[int], some: bool, hosts: int) -> tuple[list[int], bool]:
    """The largest counts of all hosts, and whether any has rows."""
    if hosts == 1:
        return counts, some
    from jax.experimental import multihost_utils

    theirs = np.asarray(multihost_utils.process_allgather(np.array([*counts, some], np.int32))).max(0)
    return theirs[:-1].tolist(), bool(theirs[-1])


def _everyones(state: dict | None, hosts: int) -> list[dict | None]:
    """The readers' states of all hosts, in their order."""
    if hosts == 1:
        return [state]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(np.asarray(multihost_utils.process_allgather(np.int32(len(mine)))).max())
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(mine)] = mine
    return [json.loads(bytes(row).decode()) for row in np.asarray(multihost_utils.process_allgather(padded))]
