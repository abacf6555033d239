"""Texts for a language model: one long row of tokens, cut into rows of equal length, each with its next tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxslim.data.batch import Batches
from jaxslim.data.plan import Plan
from jaxslim.data.rows import DataError, Rows
from jaxslim.data.tasks import VocabularyError
from jaxslim.data.tokenized import open_tokenizer

END, UNKNOWN = "<|endoftext|>", "<unk>"


@dataclasses.dataclass(frozen=True, eq=False)
class CausalTask:
    """Text and tokens of a causal language model, by the tokenizer.json of its folder."""

    tokenizer: Any          # tokenizers.Tokenizer
    end: int                # stands before the first text and behind each
    unknown: int | None     # of what the tokenizer has no token for
    length: int             # tokens of a row, unless the config says otherwise

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, spec) -> CausalTask:
        """Reads tokenizer.json of a HF folder. Raises DataError for none, or that of another model."""
        path, tokenizer = os.path.join(folder, "tokenizer.json"), open_tokenizer(folder, "language")
        if (top := max(tokenizer.get_vocab().values(), default=0)) >= spec["vocab_size"]:
            raise DataError(f"{path} has ids up to {top}, but the model has {spec['vocab_size']} outputs.")
        end = tokenizer.token_to_id(END)
        if end is None and (end := spec.get("eos_token_id")) is None:
            raise DataError(f"{path} has no {END} and config.json no eos_token_id; one must say how texts end.")
        end = end[0] if isinstance(end, list) else end
        return cls(tokenizer, end, tokenizer.token_to_id(UNKNOWN), min(spec.get("max_position_embeddings", 512), 2048))

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (N,). Raises VocabularyError for a text with characters that the tokenizer lacks."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.unknown is not None and self.unknown in ids:
            raise VocabularyError(f"the tokenizer has no token for a part of {text[:60]!r}; take one of bytes, or "
                                  "normalise the text", ())
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)


class TokenBatches(Batches):
    """Iterator of dicts of numpy arrays, all of one shape:

      input_ids (B, T) int32   attention_mask (B, T) int32, 1 on tokens   labels (B, T) int32, the next tokens, or -100
      row (B,) int32, the text of a row's first token, -1 for a filler row

    The texts stand one behind another with an end token before, between and after them; the whole is cut into rows of T
    tokens, so that each token but the very first is predicted once. What a row's tokens see begins at the row.

    Args:
      rows: the data, with a column `text`; task: a CausalTask; length: T, by default `task.length`.
      batch_size, multiple_of, seed, shuffle, epochs, host, hosts, prefetch, max_skipped: as for Batches.
    Raises:
      DataError: no usable row, too many unusable ones, or options that contradict each other.
    """

    def __init__(self, rows: Rows, task: CausalTask, *, length: int | None = None, batch_size: int = 8,
                 multiple_of: int = 1, seed: int = 0, shuffle: bool = True, epochs: int | None = None, host: int = 0,
                 hosts: int = 1, prefetch: int = 2, max_skipped: float = 0.05):  # fmt: skip
        if not 0 <= host < hosts:
            raise DataError(f"host must be in 0..{hosts - 1}, not {host}.")
        length = task.length if length is None else length
        if seed < 0 or multiple_of < 1 or batch_size < 1 or length < 2:
            raise DataError("seed must not be negative; batch_size and multiple_of must be positive, length above 1.")
        self.rows, self.task, self.epochs, self._prefetch, self.length = rows, task, epochs, prefetch, length
        self._loader = loader = Blocks(rows, task, length, host, hosts, max_skipped)
        count = -(-(len(loader.ids) - 1) // length)
        digest = hashlib.sha256(loader.ids.tobytes()).hexdigest()
        self._plan = Plan.make(np.arange(count), np.full(count, float(length)), np.zeros(count, int), [digest], rate=1,
                               buckets=[float(length)], size=batch_size, seconds=None, multiple=multiple_of, seed=seed,
                               shuffle=shuffle)  # fmt: skip
        self._position, self._stream = (0, 0), None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(B, T)."""
        return [(rows, tokens) for rows, tokens, _ in self._plan.shapes]

    @property
    def buckets(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in an epoch."""
        return len(self._loader.ids) - 1

    @property
    def padding_waste(self) -> float:
        return 1 - self.tokens / (len(self) * self.shapes[0][0] * self.length)

    @property
    def summary(self) -> str:
        """One sentence: texts, tokens, shape, padding, and what was skipped."""
        size, length = self.shapes[0]
        text = f"{self.rows.name}: {self._loader.texts} of {len(self.rows)} texts, {self.tokens} tokens, {len(self)} "
        text += f"batches an epoch ({size} x {length} tokens), {100 * self.padding_waste:.1f} % padding"
        if self._loader.skipped:
            text += f"; {len(self._loader.skipped)} rows skipped: {self._loader.examples()}"
        return text + "."

    @property
    def owners(self) -> np.ndarray:
        """(tokens,) int32: the row that each predicted token belongs to, an end token to the text before it."""
        return self._loader.owners[1:]


class Blocks:
    """The token stream and its rows; remembers which texts were skipped and why."""

    def __init__(self, rows: Rows, task: CausalTask, length: int, host: int, hosts: int, max_skipped: float):
        self.rows, self.task, self.length, self.host, self.hosts = rows, task, length, host, hosts
        self.skipped: dict[int, str] = {}
        parts, owners, bad = [np.array([task.end], np.int32)], [np.zeros(1, np.int32)], 0
        for i, text in enumerate(rows.column("text")):
            if not (text or "").strip():
                self.skipped[i] = "no text"
                continue
            try:
                ids = task.encode(text)
            except DataError as error:
                self.skipped[i], bad = str(error), bad + 1
                continue
            parts.append(np.append(ids, np.int32(task.end)))
            owners.append(np.full(len(ids) + 1, i, np.int32))
        self.texts, self.ids, self.owners = len(parts) - 1, np.concatenate(parts), np.concatenate(owners)
        if bad > max_skipped * len(rows):
            raise DataError(f"{bad} of {len(rows)} rows of {rows.name} are unusable, more than max_skipped = "
                            f"{max_skipped:g} allows: {self.examples()}.")
        if not self.texts:
            raise DataError(f"{rows.name} has no usable row: {self.examples() or 'it is empty'}.")

    def examples(self, n: int = 3) -> str:
        names = self.rows.column("id")
        return "; ".join(f"{names[i]}: {why.rstrip('.')}" for i, why in sorted(self.skipped.items())[:n])

    def batch(self, epoch: int, shape: tuple[int, int, int], members: np.ndarray) -> dict[str, np.ndarray]:
        """This host's part of a global batch (shapes as in TokenBatches)."""
        size, length, _ = shape
        local = -(-size // self.hosts)
        blocks = np.full(local * self.hosts, -1, np.int32)
        blocks[: len(members)] = members
        blocks = blocks[self.host * local : (self.host + 1) * local]
        out = {"input_ids": np.full((local, length), self.task.end, np.int32), "row": np.full(local, -1, np.int32),
               "attention_mask": np.zeros((local, length), np.int32),
               "labels": np.full((local, length), -100, np.int32)}  # fmt: skip
        out["attention_mask"][:, 0] = 1  # a filler row has something to look at
        for b, i in enumerate(blocks):
            if i >= 0:
                piece = self.ids[i * length : (i + 1) * length + 1]
                n = len(piece) - 1
                out["input_ids"][b, :n], out["labels"][b, :n], out["attention_mask"][b, :n] = piece[:-1], piece[1:], 1
                out["row"][b] = self.owners[min(i * length + 1, len(self.owners) - 1)]
        return out


def write_tokenizer(folder, kind: str, texts: Iterable[str]) -> int:
    """Writes tokenizer.json of bytes ("bytes") or of the characters of `texts` ("data") into a folder (an epath.Path);
    returns its number of tokens. Token 0 is the end of a text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if kind == "bytes":
        alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = [END]
    else:
        characters = sorted(set().union(*map(set, texts)))
        table = {c: i for i, c in enumerate([END, UNKNOWN, *characters])}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(table, UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        special = [END, UNKNOWN]
    tokenizer.add_special_tokens(special)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END,
             "clean_up_tokenization_spaces": False} | ({"unk_token": UNKNOWN} if UNKNOWN in special else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1))
    return tokenizer.get_vocab_size()
