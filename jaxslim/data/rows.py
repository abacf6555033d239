"""A data set as an immutable sequence of rows; `load_rows` reads every kind of DATA. Audio is decoded on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxslim.errors import ClearError

ALIASES = {  # first match wins
    "id": ("id", "utt_id", "utterance_id", "key"),
    "audio": ("audio", "audio_filepath", "file_name", "path", "wav", "file"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text"),
}


class DataError(ClearError):
    """The data cannot be used as it is: the message says what is wrong, where, and what to do."""


class Rows(Sequence):
    """Rows of a data set: `rows[i]` is a dict with `id`, `audio`, `text` and whatever other columns there are.

    `audio` is {"bytes", "path"} (one may be None) or None, `text` a string or None. A slice is again a Rows. Nothing is
    decoded before `audio(i)`.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], name: str = "the data"):
        """`records` have `id`, `audio` ({"bytes", "path"}, encoded bytes, or a path) and `text`, or None."""
        self.name = name
        self._records = [_tidy(i, record) for i, record in enumerate(records)]
        self._seconds: dict[int, float] = {}
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self._records[i], self.name)
        record = self._records[i]
        audio = record["audio"]
        return {**record, "audio": audio and {"bytes": _bytes(audio["bytes"]), "path": audio["path"]}}

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Rows) -> Rows:
        return Rows([*self._records, *other._records], f"{self.name}+{other.name}")

    @property
    def columns(self) -> tuple[str, ...]:
        """All column names; `audio` and `text` only where at least one row has them."""
        names = dict.fromkeys(name for record in self._records for name in record)
        empty = {n for n in ("audio", "text") if n in names and all(r[n] is None for r in self._records)}
        return tuple(name for name in names if name not in empty)

    def column(self, name: str) -> list:
        """The values of one column (None where a row has none), without touching audio."""
        return [record.get(name) for record in self._records]

    def record(self, i: int) -> Mapping[str, Any]:
        """Row i as it is kept: without reading its audio's bytes."""
        return self._records[i]

    def audio(self, i: int, sampling_rate: int = 16000) -> np.ndarray:
        """Decodes row i: float32 (samples,), mono. Raises AudioError naming the row and its file."""
        from jaxslim.data import audio

        source, name = self.source(i)
        wave = audio.load(source, sampling_rate, name)
        if self._records[i].get("offset") not in (None, ""):  # NeMo: a piece of a long file
            offset, length = self._seconds_of(i, "offset"), self._seconds_of(i, "duration")
            start = round(offset * sampling_rate)
            wave = wave[start : start + round(length * sampling_rate) if length else None]
            if not wave.size:
                raise audio.AudioError(f"{name} is shorter than the row's offset of {offset:g} s.")
        return wave

    def _seconds_of(self, i: int, column: str) -> float:
        value = self._records[i].get(column)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if 0 <= (seconds := float(value or 0)) < 1e9:
                return seconds
        raise _audio_error(f"Row {self._records[i]['id']!r} of {self.name}: {column} {str(value)[:80]!r} is no number "
                           "of seconds.")

    def duration(self, i: int) -> float:
        """Seconds of row i: the `duration` column if it has one, else from the file's header. Raises AudioError."""
        if self._records[i]["audio"] is None:
            self.source(i)  # raises
        try:
            value = float(self._records[i].get("duration") or 0)
        except (TypeError, ValueError, OverflowError):
            value = 0.0
        if math.isfinite(value) and value > 0:
            return value
        if i not in self._seconds:
            from jaxslim.data import audio

            source, name = self.source(i)
            self._seconds[i] = audio.seconds(source, name) - self._seconds_of(i, "offset")
        return self._seconds[i]

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, texts and audio (the bytes, or path and size), for caches."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for record in self._records:
                audio, text = record["audio"] or {"bytes": None, "path": None}, record["text"]
                rest = [record["id"], text, record.get("label"), record.get("offset")]
                digest.update(json.dumps(rest, default=str).encode())
                if (data := _bytes(audio["bytes"])) is not None:
                    digest.update(hashlib.sha256(data).digest())
                elif audio["path"] is not None:
                    size = os.path.getsize(audio["path"]) if os.path.exists(audio["path"]) else -1
                    digest.update(f"{audio['path']}:{size}".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def source(self, i: int) -> tuple[Any, str]:
        """Encoded bytes or path of row i, and its name for messages. Raises AudioError if the row has no audio."""
        record = self._records[i]
        audio = record["audio"]
        if audio is None:
            raise _audio_error(f"Row {record['id']!r} of {self.name} has no audio.")
        data = _bytes(audio["bytes"])
        if data is None:
            return audio["path"], audio["path"]
        return data, f"{record['id']} ({audio['path'] or 'bytes'} in {self.name})"


def load_rows(data: str | os.PathLike | Rows, *, text_column: str | None = None, audio_column: str | None = None,
              limit: int | None = None) -> Rows:  # fmt: skip
    """Reads DATA; Rows are given back as they are.

    Args:
      data: `bundled:prompts-en/train` (package data; without a split: train), a Parquet file, a folder with
        metadata.csv or metadata.jsonl (or Parquet files), WebDataset tar files (`part-{000..015}.tar`), a JSONL, TSV or
        CSV manifest (NeMo and Common Voice columns are known), a .txt file of one text a line, or a Hugging Face data
        set as `hf:NAME[:CONFIG][/SPLIT]` or by its plain name. Several are joined with `+`; `3*DATA` takes its rows
        three times an epoch. Relative audio paths are relative to the manifest.
      text_column, audio_column: names to use where the usual ones (see ALIASES) do not fit.
      limit: keep the first `limit` rows only.
    Raises:
      DataError: nothing found, no usable columns, or a broken table.
    """
    if isinstance(data, Rows):
        return data if limit is None else data[:limit]
    data = os.fspath(data)
    parts = [data] if "+" not in data or os.path.exists(data) else [part.strip() for part in data.split("+")]
    from jaxslim.data import tables  # it needs DataError

    records = []
    for part in parts:
        repeat, source = (1, part) if os.path.exists(part) else _repeat(part)
        try:
            table, folder = tables.read(source)
        except (OSError, ImportError) as error:  # ImportError: what gs:// or s3:// needs
            raise DataError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if not table:
            raise DataError(f"{source} has no rows.")
        table = _rename(table, source, text_column, audio_column)
        if folder is not None and "audio" in table[0]:
            paths = tables.place([record["audio"] for record in table], folder)
            table = [record | {"audio": path} for record, path in zip(table, paths)]
        records += table * repeat
    return Rows(records[:limit], data)


def _repeat(part: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d+)\s*\*\s*(.+)", part)
    if match is None:
        if not part or re.match(r"[\d.]+\s*\*", part):
            raise DataError(f"Cannot read {part!r} as DATA; a weight is a whole number, as in 3*train.parquet.")
        return 1, part
    if not int(match[1]):
        raise DataError(f"The weight of {match[2]} is 0; leave it out instead.")
    return int(match[1]), match[2]


def _rename(records: list[dict], source: str, text_column, audio_column) -> list[dict]:
    names = list(dict.fromkeys(name for record in records for name in record))
    chosen = {}
    for role, asked in (("id", None), ("audio", audio_column), ("text", text_column)):
        if asked is not None and asked not in names:
            raise DataError(f"{source} has no column {asked!r}; it has {', '.join(names)}.")
        found = asked or next((alias for alias in ALIASES[role] if alias in names), None)
        if found is not None:
            chosen[role] = found
    if "audio" not in chosen and "text" not in chosen:
        wanted = " or ".join([*ALIASES["audio"], *ALIASES["text"]])
        raise DataError(f"{source} has neither audio nor text; expected a column {wanted}, found {', '.join(names)}.")
    taken = set(chosen.values()) | set(chosen)
    return [
        {role: record.get(name) for role, name in chosen.items()} | {k: v for k, v in record.items() if k not in taken}
        for record in records
    ]


def _tidy(i: int, record: Mapping[str, Any]) -> dict:
    """One row as Rows keeps it."""
    audio, text = record.get("audio"), record.get("text")
    if hasattr(audio, "as_py") and not hasattr(audio, "as_buffer"):  # an Arrow struct; its bytes stay in the table
        audio = {name: audio[name] for name in audio} if audio.is_valid else None
    if isinstance(audio, Mapping):
        path = audio.get("path")
        audio = {"bytes": audio.get("bytes"), "path": path.as_py() if hasattr(path, "as_py") else path}
        if audio["bytes"] is not None and not _encoded(audio["bytes"]):
            audio = {"bytes": None, "path": str(audio["path"] or audio["bytes"])}
        elif not isinstance(audio["path"], str | None):
            audio["path"] = os.fspath(audio["path"]) if isinstance(audio["path"], os.PathLike) else str(audio["path"])
    elif isinstance(audio, (str, os.PathLike)) and os.fspath(audio):
        audio = {"bytes": None, "path": os.fspath(audio)}
    elif audio is not None and not isinstance(audio, str):  # a number or list: a path that is not there, one bad row
        audio = {"bytes": audio, "path": None} if _encoded(audio) else {"bytes": None, "path": str(audio)}
    if not audio or (not getattr(audio["bytes"], "is_valid", audio["bytes"] is not None) and not audio["path"]):
        audio = None
    name = record.get("id")
    if name is None or not str(name).strip():
        stem = audio and audio["path"] and os.path.splitext(os.path.basename(audio["path"]))[0]
        name = stem or f"row {i}"
    text = None if text is None else str(text)
    return {**record, "id": str(name), "audio": audio, "text": text}


def _encoded(value) -> bool:
    return hasattr(value, "as_buffer") or isinstance(value, (bytes, bytearray, memoryview))


def _bytes(data) -> bytes | None:
    """Encoded audio from bytes or an Arrow scalar."""
    if hasattr(data, "as_buffer"):
        buffer = data.as_buffer()
        return None if buffer is None else buffer.to_pybytes()
    return None if data is None else bytes(data)


def _audio_error(message: str) -> DataError:
    from jaxslim.data import audio

    return audio.AudioError(message)
