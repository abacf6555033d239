"""From a row of data to a model's inputs and labels, and back from its output to text.

A task has `sampling_rate`, `inputs(wave)`, `encode(text)` and `decode(ids)`; Batches asks for nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxslim.data import audio
from jaxslim.data.rows import DataError

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")


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
    sampling_rate: int = 16000
    do_normalize: bool = True
    return_attention_mask: bool = True  # False: the model was trained on zero-padded audio without a mask

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
    def from_pretrained(cls, folder: str | os.PathLike) -> CTCTask:
        """Reads vocab.json, tokenizer_config.json, preprocessor_config.json or processor_config.json of a HF folder.

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
        if language := tokenizer.get("target_lang"):
            if language not in vocabulary:
                raise DataError(f"{folder}/vocab.json has no language {language!r}; it has {', '.join(vocabulary)}.")
            vocabulary = vocabulary[language]
        features = _json(folder, "preprocessor_config.json")
        if features is None:
            features = (_json(folder, "processor_config.json") or {}).get("feature_extractor")
        if features is None:
            raise DataError(
                f"{folder} has neither preprocessor_config.json nor a feature_extractor in processor_config.json; "
                "they say how the model wants its audio (rate, normalisation)."
            )
        size = (_json(folder, "config.json") or {}).get("vocab_size")
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
            sampling_rate=features.get("sampling_rate", 16000),
            do_normalize=features.get("do_normalize", True),
            return_attention_mask=features.get("return_attention_mask", False),  # the default of transformers
        )

    @property
    def blank_id(self) -> int:
        return self.vocabulary[self.pad_token]

    def inputs(self, wave: np.ndarray) -> np.ndarray:
        """(samples,) at `sampling_rate` -> float32 (samples,) as the model wants it."""
        return audio.normalize(wave) if self.do_normalize else wave.astype(np.float32, copy=False)

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


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask:
    """Texts with one label each, for a text encoder's classification head; the tokenizer is transformers' own."""

    tokenizer: Any
    labels: Mapping[str, int]  # name -> class
    max_length: int = 512  # tokens; longer texts are cut, as transformers does with truncation=True

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, max_length: int | None = None) -> TextTask:
        """Reads a HF folder's tokenizer and the classes (label2id) of its config.json.

        Raises:
          DataError: there is no tokenizer, or none with a padding token.
        """
        from transformers import AutoTokenizer  # lazy: a second, and only text needs it

        config = _json(folder, "config.json") or {}
        if not any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZERS):  # else it is made empty
            raise DataError(f"{folder} has no tokenizer; a text model needs one of {', '.join(TOKENIZERS)} there.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DataError(f"{folder} has no tokenizer that transformers can open: {reason}.") from error
        if tokenizer.pad_token_id is None:
            raise DataError(f"{folder}: its tokenizer has no padding token.")
        names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
        longest = config.get("max_position_embeddings", 512)
        if config.get("model_type") == "roberta":  # positions start behind that of padding
            longest -= config.get("pad_token_id", 1) + 1
        longest = min(longest, tokenizer.model_max_length)
        return cls(tokenizer, {name: int(i) for i, name in names.items()}, min(max_length or longest, longest))

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (T,) with the special tokens, at most `max_length`."""
        return np.array(self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"], np.int32)

    def label(self, value: Any) -> int:
        """Name or number of a class -> its number. Raises DataError for one that the model does not know."""
        if value in self.labels:
            return self.labels[value]
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if number not in self.labels.values():
            known = ", ".join(list(self.labels)[:10])
            raise DataError("no label" if value in (None, "") else f"label {value!r} is none of {known}")
        return number

    def decode(self, number: int) -> str:
        """Number of a class -> its name."""
        return next(name for name, i in self.labels.items() if i == number)


def _json(folder, name: str):
    from etils import epath

    path = epath.Path(folder) / name
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value
