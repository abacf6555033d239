"""From a row of data to a model's inputs and labels, and back from its output to text.

A task of speech has `extractor` (what the model takes of audio), `encode(text)` and `targets(labels, width)` for what
the loss reads, `transcript(ids)` for what the model said. Here is CTC over characters; tokenized.py has the others, and
`task_of`, which finds that of a model.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxslim.data.extractor import Extractor
from jaxslim.data.extractor import read_json as _json
from jaxslim.data.rows import DataError


class VocabularyError(DataError):
    """A text has characters that the vocabulary lacks; `characters` is the sorted tuple of them."""

    def __init__(self, message: str, characters: tuple[str, ...]):
        super().__init__(message)
        self.characters = characters


@dataclasses.dataclass(frozen=True)
class CTCTask:
    """Characters for CTC, equal to Wav2Vec2CTCTokenizer and Wav2Vec2FeatureExtractor of transformers.

    Two things are kinder: where a vocabulary has a letter in the other case only, `encode` takes that; and the spaces
    beside a token of several characters stay (transformers strips them).
    """

    vocabulary: Mapping[str, int] = dataclasses.field(hash=False)
    pad_token: str = "<pad>"  # also the CTC blank
    unk_token: str = "<unk>"
    word_delimiter: str = "|"
    replace_word_delimiter: str = " "
    do_lower_case: bool = False  # as in transformers: upper case in, lower case out
    extractor: Extractor = Extractor()
    column = "text"  # of the data, which `encode` reads

    def __post_init__(self):
        ids = list(self.vocabulary.values())
        if not ids or not all(isinstance(i, int) and i >= 0 for i in ids) or len(set(ids)) != len(ids):
            raise DataError("The vocabulary must map each token to its own non-negative integer.")
        for what, token in (("pad (blank)", self.pad_token), ("word delimiter", self.word_delimiter)):
            if token not in self.vocabulary:
                raise DataError(f"The vocabulary has no {what} token {token!r}; is it the model's own?")
        special = {self.pad_token, self.unk_token, "<s>", "</s>"}
        long = sorted((t for t in self.vocabulary if len(t) > 1 and t not in special), key=len, reverse=True)
        pieces = re.compile("|".join([*map(re.escape, long), "."]), re.DOTALL)
        object.__setattr__(self, "_pieces", pieces)
        object.__setattr__(self, "_tokens", {i: t for t, i in self.vocabulary.items()})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, family: str = "wav2vec2", language: str | None = None,
                        vocab_size: int | None = None) -> CTCTask:
        """Reads vocab.json, tokenizer_config.json, and what Extractor reads, of a HF folder.

        Args:
          language: of an MMS model; None is the tokenizer's own.
          vocab_size: outputs of the model; None is what config.json says.
        Raises:
          DataError: a file is missing or broken, or the vocabulary does not fit the model's config.json.
        """
        vocabulary = _json(folder, "vocab.json")
        if vocabulary is None:
            raise DataError(f"{folder} has no vocab.json; a CTC model needs its vocabulary (token -> id) there.")
        tokenizer = _json(folder, "tokenizer_config.json") or {}
        kind = tokenizer.get("tokenizer_class", "Wav2Vec2CTCTokenizer")
        if kind != "Wav2Vec2CTCTokenizer":
            raise DataError(f"{folder} uses the tokenizer {kind}; only Wav2Vec2CTCTokenizer (characters) is supported.")
        if language := language or tokenizer.get("target_lang"):
            if language not in vocabulary:
                raise DataError(f"{folder}/vocab.json has no language {language!r}; it has {', '.join(vocabulary)}.")
            vocabulary = vocabulary[language]
        extractor = Extractor.from_pretrained(folder, family)
        size = vocab_size or (_json(folder, "config.json") or {}).get("vocab_size")
        if size is not None and vocabulary and max(vocabulary.values(), default=0) >= size:
            top = max(vocabulary.values())
            raise DataError(f"{folder}/vocab.json has ids up to {top}, but the model has {size} outputs.")

        def token(name, default):  # a string, or the dict of an AddedToken
            value = tokenizer.get(name, default)
            return value["content"] if isinstance(value, dict) else value

        return cls(
            vocabulary=dict(vocabulary),
            pad_token=token("pad_token", "<pad>"),
            unk_token=token("unk_token", "<unk>"),
            word_delimiter=token("word_delimiter_token", "|"),
            replace_word_delimiter=tokenizer.get("replace_word_delimiter_char", " "),
            do_lower_case=tokenizer.get("do_lower_case", False),
            extractor=extractor,
        )

    @property
    def sampling_rate(self) -> int:
        return self.extractor.sampling_rate

    @property
    def blank_id(self) -> int:
        return self.vocabulary[self.pad_token]

    def inputs(self, wave: np.ndarray) -> np.ndarray:
        """(samples,) at `sampling_rate` -> float32 (samples,) as the model wants it."""
        return self.extractor.normalize(wave)

    def targets(self, labels: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
        """Label ids of each row, at most `width` -> what the loss reads: `labels` (B, width), -100 beyond each."""
        return {"labels": padded(labels, width, -100)}

    def transcript(self, ids: np.ndarray) -> str:
        """The best symbol of each frame (T,) -> text."""
        return self.decode(_collapsed(ids), collapse=False)

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (N,); runs of white space count as one space.

        Raises:
          VocabularyError: characters that are not in the vocabulary, listed.
        """
        text = " ".join(text.split())
        pieces = self._pieces.findall((text.upper() if self.do_lower_case else text).replace(" ", self.word_delimiter))
        ids = [self._id(piece) for piece in pieces]
        if None in ids:
            unknown = tuple(sorted({piece for piece, i in zip(pieces, ids) if i is None}))
            shown = " ".join(map(repr, unknown[:20]))
            short = text if len(text) <= 60 else text[:57] + "..."
            raise VocabularyError(
                f"characters outside the vocabulary: {shown} in {short!r}; normalise the text", unknown
            )
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int], collapse: bool = True) -> str:
        """Ids -> text; `collapse` merges repeats (CTC frames); for labels leave it off. Negative ids are padding."""
        tokens = [self._tokens.get(int(i), self.unk_token) for i in ids if i >= 0]
        if collapse:
            tokens = [token for token, _ in itertools.groupby(tokens)]
        text = "".join(
            self.replace_word_delimiter if token == self.word_delimiter else token
            for token in tokens
            if token != self.pad_token
        ).strip()
        return text.lower() if self.do_lower_case else text

    def _id(self, piece: str) -> int | None:
        for form in (piece, piece.lower(), piece.upper()):
            if form in self.vocabulary:
                return self.vocabulary[form]
        return None


def padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> np.ndarray:
    """Rows of ids -> int32 (B, width)."""
    out = np.full((len(rows), width), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _collapsed(ids: np.ndarray) -> np.ndarray:
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep]
