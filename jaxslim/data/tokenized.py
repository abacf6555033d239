"""Tasks whose text goes through a tokenizer (CTC over pieces, a decoder, classes of texts), and `task_of` a model."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxslim.data import classes
from jaxslim.data.classes import AudioTask, Classes
from jaxslim.data.extractor import KINDS, Extractor
from jaxslim.data.extractor import read_json as _json
from jaxslim.data.rows import DataError
from jaxslim.data.tasks import CTCTask, VocabularyError, padded
from jaxslim.spec import Spec

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")


def open_tokenizer(folder: str | os.PathLike, kind: str):
    """tokenizers.Tokenizer of a HF folder of a `kind` model. Raises DataError for none, or a broken one."""
    import tokenizers  # lazy: comes with transformers

    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        raise DataError(f"{folder} has no tokenizer.json; a {kind} model needs its tokenizer there.")
    try:
        return tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is no tokenizer that can be opened: {error}.") from error


@dataclasses.dataclass(frozen=True, eq=False)
class PieceTask:
    """CTC over the pieces of a tokenizer, as ParakeetTokenizer of transformers."""

    tokenizer: Any              # tokenizers.Tokenizer
    blank_id: int
    unknown: int | None         # id of a piece that stands for what the tokenizer does not know
    extractor: Extractor

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, family: str, blank_id: int) -> PieceTask:
        """Reads tokenizer.json and what Extractor reads of a HF folder. Raises DataError."""
        tokenizer = open_tokenizer(folder, family)
        names = _json(folder, "tokenizer_config.json") or {}
        unknown = names.get("unk_token", "<unk>")
        unknown = tokenizer.token_to_id(unknown["content"] if isinstance(unknown, dict) else unknown or "")
        return cls(tokenizer, blank_id, unknown, Extractor.from_pretrained(folder, family))

    sampling_rate, targets, transcript = CTCTask.sampling_rate, CTCTask.targets, CTCTask.transcript
    column = CTCTask.column

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (N,). Raises VocabularyError for a text that the tokenizer has no pieces for."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.unknown in ids:
            raise VocabularyError(f"the tokenizer has no pieces for {text[:60]!r}; normalise the text", ())
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int], collapse: bool = True) -> str:
        """Ids -> text, as CTCTask.decode."""
        ids = [int(i) for i in ids if i >= 0]
        ids = [i for i, _ in itertools.groupby(ids)] if collapse else ids
        return self.tokenizer.decode([i for i in ids if i != self.blank_id], skip_special_tokens=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2SeqTask:
    """Transcripts as token sequences for a decoder (Whisper); the tokenizer is transformers' own."""

    tokenizer: Any
    generation: Mapping[str, Any]   # options of generate.generate: what generation_config.json says, language, task
    longest: int                    # tokens that the decoder takes
    extractor: Extractor

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, family: str = "whisper", language: str | None = None,
                        task: str | None = None) -> Seq2SeqTask:
        """Reads tokenizer, generation_config.json and what Extractor reads of a HF folder.

        Args:
          language: name or code; None: found by the model when it transcribes, and no language in training labels.
          task: "transcribe" or "translate".
        Raises:
          DataError: a file is missing or broken, or the tokenizer knows no such language.
        """
        from jaxslim.generate import generation_config

        tokenizer = _tokenizer(folder, "a Whisper model")
        try:
            if language or task:
                tokenizer.set_prefix_tokens(language=language, task=task or "transcribe", predict_timestamps=False)
            tokenizer("")  # here it says that there is no such language
        except ValueError as error:
            raise DataError(f"{folder}: {' '.join(str(error).split()).rstrip('.')}.") from error
        chosen = {k: v for k, v in (("language", language), ("task", task)) if v}
        longest = (_json(folder, "config.json") or {}).get("max_target_positions", 448)
        return cls(tokenizer, {**generation_config(folder), **chosen}, longest,
                   Extractor.from_pretrained(folder, family))

    sampling_rate, column = CTCTask.sampling_rate, CTCTask.column

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (N,): start tokens, text, end. Raises DataError for a text that the decoder cannot hold."""
        ids = self.tokenizer(" ".join(text.split())).input_ids
        if len(ids) > self.longest:
            raise DataError(f"{len(ids)} tokens of text, more than the decoder's {self.longest}")
        return np.array(ids, np.int32)

    def targets(self, labels: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
        """Ids of each row -> `decoder_input_ids` and, one token ahead, `labels` (B, width), as in fine-tuning with
        transformers: the decoder is told the first token and learns the others."""
        labels = [np.asarray(row, np.int32) for row in labels]
        inputs = padded([row[:-1] for row in labels], width, self.tokenizer.pad_token_id or 0)
        return {"decoder_input_ids": inputs, "labels": padded([row[1:] for row in labels], width, -100)}

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True).strip()

    transcript = decode


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask(Classes):
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
        config, tokenizer = _json(folder, "config.json") or {}, _tokenizer(folder, "a text model")
        longest = config.get("max_position_embeddings", 512)
        if config.get("model_type") == "roberta":  # positions start behind that of padding
            longest -= config.get("pad_token_id", 1) + 1
        longest = min(longest, tokenizer.model_max_length)
        return cls(tokenizer, classes.read(config), min(max_length or longest, longest))

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids (T,) with the special tokens, at most `max_length`."""
        return np.array(self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"], np.int32)


def task_of(spec: Spec, folder: str | os.PathLike, language: str | None = None) -> Any:
    """The task of a model, by its family and head, with the files of `folder`.

    Raises:
      DataError: files are missing or broken, belong to another model, or the head has no task here.
    """
    if spec.head == "classification" and spec.family in ("bert", "roberta", "distilbert"):
        return TextTask.from_pretrained(folder)
    if spec.head == "causal":
        from jaxslim.data.language import CausalTask

        return CausalTask.from_pretrained(folder, spec)
    if spec.head == "seq2seq":
        task = Seq2SeqTask.from_pretrained(folder, spec.family, language)
    elif spec.head == "ctc" and spec.family.startswith("parakeet"):
        task = PieceTask.from_pretrained(folder, spec.family, spec["pad_token_id"])
    elif spec.head == "ctc":
        task = CTCTask.from_pretrained(folder, spec.family, spec.get("target_lang"), spec["vocab_size"])
    elif spec.head == "classification":
        task = AudioTask.from_pretrained(folder, spec.family)
    else:
        raise DataError(f"This {spec.family} model has the head {spec.head!r}; needed is 'ctc', 'seq2seq', 'causal' or "
                        "'classification'.")
    want = spec.get("feature_projection_input_dim") or spec.get("num_mel_bins") or 1
    if spec.family in KINDS and task.extractor.size != want:
        raise DataError(f"{folder}: its feature extractor makes {task.extractor.size} features a frame, the model "
                        f"takes {want}; it is that of another model.")
    return task


def _tokenizer(folder: str | os.PathLike, what: str):
    from transformers import AutoTokenizer  # lazy: a second, and only some tasks need it

    if not any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZERS):  # else it is made empty
        raise DataError(f"{folder} has no tokenizer; {what} needs one of {', '.join(TOKENIZERS)} there.")
    try:
        return AutoTokenizer.from_pretrained(os.fspath(folder))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{folder} has no tokenizer that transformers can open: {reason}.") from error
