"""Batches of texts with one label each: order, resumption and host slices of `Batches`, tokens in place of audio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxslim.data.batch import Batches
from jaxslim.data.loader import Loader
from jaxslim.data.plan import STEP, Plan
from jaxslim.data.rows import DataError, Rows


class TextBatches(Batches):
    """Iterator of dicts of numpy arrays, of one fixed shape per bucket (`shapes`: rows, tokens):

      input_ids (B, T) int32, the padding id beyond each text    attention_mask (B, T) int32, 1 on tokens of the text
      labels (B,) int32, -100 for a filler row                   row (B,) int32, index into rows, -1 for a filler row

    Filler rows complete the last batch of a bucket; their mask is 0 but for the first token, so that attention has
    something to look at.

    Args:
      rows: the data, with columns `text` and `label`.
      task: gives `encode(text)`, `label(value)` and `pad_id` (tasks.TextTask).
      batch_size: rows per global batch, at most; a multiple of `multiple_of`, at least once.
      buckets: lengths in tokens, or how many at most (each is a compiled shape); by default as `suggest_buckets` says.
      labels: False leaves the labels out, and rows without one are then not skipped.
      seed, shuffle, epochs, host, hosts, prefetch, max_skipped: as for Batches.
    Raises:
      DataError: no usable row, too many unusable ones, or options that contradict each other.
    """

    def __init__(self, rows: Rows, task, *, batch_size: int = 8, multiple_of: int = 1,
                 buckets: Sequence[int] | int | None = None, seed: int = 0, shuffle: bool = True,
                 epochs: int | None = None, host: int = 0, hosts: int = 1, prefetch: int = 2,
                 max_skipped: float = 0.05, labels: bool = True):  # fmt: skip
        if not 0 <= host < hosts:
            raise DataError(f"host must be in 0..{hosts - 1}, not {host}.")
        if seed < 0 or multiple_of < 1 or batch_size < 1:
            raise DataError("seed must not be negative; batch_size and multiple_of must be positive.")
        self.rows, self.task, self.epochs, self._prefetch = rows, task, epochs, prefetch
        self._loader = loader = TextLoader(rows, task, seed, host, hosts, max_skipped, labels)
        loader.select(max(buckets) if isinstance(buckets, Sequence) else None)
        index, ids = np.array(list(loader.tokens)), rows.column("id")
        lengths = np.array([len(t) for t in loader.tokens.values()])
        if isinstance(buckets, Sequence):
            buckets = [b * STEP for b in buckets]
        # a token takes the place of a step of the plan, which is made for seconds
        self._plan = Plan.make(index, lengths * STEP, np.zeros(len(index), int), [ids[i] for i in index],
                               rate=1 / STEP, buckets=buckets, size=batch_size, seconds=None, multiple=multiple_of,
                               seed=seed, shuffle=shuffle)  # fmt: skip
        self._position, self._stream = (0, 0), None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(B, T) of each bucket: global rows, tokens. Ascending in T."""
        return [(rows, tokens) for rows, tokens, _ in self._plan.shapes]

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths in tokens, ascending."""
        return tuple(tokens for _, tokens in self.shapes)

    @property
    def tokens(self) -> int:
        return sum(map(len, self._loader.tokens.values()))

    @property
    def padding_waste(self) -> float:
        """Fraction of an epoch's tokens that are padding or filler rows."""
        return 1 - self.tokens / sum(self.shapes[k][0] * self.shapes[k][1] for k, _ in self._plan.chunks())

    @property
    def summary(self) -> str:
        """One sentence: rows, tokens, shapes, padding, and what was skipped."""
        shapes = ", ".join(f"{b} x {t} tokens" for b, t in self.shapes)
        text = f"{self.rows.name}: {len(self._loader.tokens)} of {len(self.rows)} rows, {self.tokens} tokens, "
        text += f"{len(self)} batches an epoch ({shapes}), {100 * self.padding_waste:.1f} % padding"
        if self._loader.skipped:
            text += f"; {len(self._loader.skipped)} rows skipped: {self._loader.examples()}"
        return text + "."


class TextLoader(Loader):
    """Encodes every row once; remembers which were skipped and why."""

    def __init__(self, rows: Rows, task, seed: int, host: int, hosts: int, max_skipped: float, labels: bool):
        super().__init__(rows, task, seed, host, hosts, 0, None, 0, max_skipped, labels)
        self.tokens: dict[int, np.ndarray] = {}  # of the usable rows

    def select(self, longest: int | None) -> None:
        """Every row becomes tokens (and a label) or an entry of `skipped`."""
        for i, (text, label) in enumerate(zip(self.rows.column("text"), self.rows.column("label"))):
            if not (text or "").strip():
                self.skip(i, "no text")
                continue
            try:
                if self.labels is not None:
                    self.labels[i] = np.int32(self.task.label(label))
            except DataError as error:
                self.skip(i, str(error))
                continue
            tokens = self.task.encode(text)
            if longest is not None and len(tokens) > longest:
                self.skip(i, f"{len(tokens)} tokens, over the largest bucket")
            else:
                self.tokens[i] = tokens
        self.check()
        if not self.tokens:
            raise DataError(f"{self.rows.name} has no usable row: {self.examples() or 'it is empty'}.")

    def batch(self, epoch: int, shape: tuple[int, int, int], members: np.ndarray) -> dict[str, np.ndarray]:
        """This host's part of a global batch (shapes as in TextBatches)."""
        size, length, _ = shape
        local = -(-size // self.hosts)
        rows = np.full(local * self.hosts, -1, np.int32)
        rows[: len(members)] = members
        rows = rows[self.host * local : (self.host + 1) * local].copy()
        out = {"input_ids": np.full((local, length), self.task.pad_id, np.int32),
               "attention_mask": np.zeros((local, length), np.int32), "row": rows}  # fmt: skip
        out["attention_mask"][:, 0] = 1
        if self.labels is not None:
            out["labels"] = np.full(local, -100, np.int32)
        for b, i in enumerate(rows):
            if i >= 0:
                tokens = self.tokens[int(i)]
                out["input_ids"][b, : len(tokens)], out["attention_mask"][b, : len(tokens)] = tokens, 1
                if self.labels is not None:
                    out["labels"][b] = self.labels[int(i)]
        return out
