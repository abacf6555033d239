"""A data set as an immutable sequence of rows: `load_rows` reads every kind of DATA; audio is decoded only when asked for."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
ALIASES = {  # first match wins
    "id": ("id", "utt_id", "utterance_id", "key"),
    "audio": ("audio", "audio_filepath", "file_name", "path", "wav", "file"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text"),
}
MANIFESTS = (".jsonl", ".json", ".ndjson", ".tsv", ".csv")


class DataError(ValueError):
    """The data cannot be used as it is: the message says what is wrong, where, and what to do."""


class Rows(Sequence):
    """Rows of a data set: `rows[i]` is a dict with `id`, `audio`, `text` and whatever other columns there are.

    `audio` is {"bytes", "path"} (one may be None) or None, `text` a string or None. A slice is again a Rows. Nothing is
    decoded before `audio(i)`.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], name: str = "the data"):
        """`records` have `id`, `audio` ({"bytes", "path"}, encoded bytes, or a path), `text`; missing ones become None."""
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

    def audio(self, i: int, sampling_rate: int = 16000) -> np.ndarray:
        """Decodes row i: float32 (samples,), mono. Raises AudioError naming the row and its file."""
        from jaxslim.data import audio

        source, name = self._source(i)
        wave = audio.load(source, sampling_rate, name)
        record = self._records[i]
        if offset := float(record.get("offset") or 0):  # NeMo: a piece of a long file
            start, length = round(offset * sampling_rate), record.get("duration")
            wave = wave[start : start + round(float(length) * sampling_rate) if length else None]
            if not wave.size:
                raise audio.AudioError(f"{name} is shorter than the row's offset of {offset:g} s.")
        return wave

    def duration(self, i: int) -> float:
        """Seconds of row i: the `duration` column if it has one, else from the file's header. Raises AudioError."""
        try:
            value = float(self._records[i].get("duration") or 0)
        except (TypeError, ValueError):
            value = 0.0
        if math.isfinite(value) and value > 0:
            return value
        if i not in self._seconds:
            from jaxslim.data import audio

            source, name = self._source(i)
            self._seconds[i] = audio.seconds(source, name) - float(self._records[i].get("offset") or 0)
        return self._seconds[i]

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, texts and audio (the bytes, or path and size), for caches."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for record in self._records:
                audio, text = record["audio"] or {"bytes": None, "path": None}, record["text"]
                digest.update(json.dumps([record["id"], text, record.get("label"), record.get("offset")], default=str).encode())
                if (data := _bytes(audio["bytes"])) is not None:
                    digest.update(hashlib.sha256(data).digest())
                elif audio["path"] is not None:
                    size = os.path.getsize(audio["path"]) if os.path.exists(audio["path"]) else -1
                    digest.update(f"{audio['path']}:{size}".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _source(self, i: int) -> tuple[Any, str]:
        record = self._records[i]
        audio = record["audio"]
        if audio is None:
            raise _audio_error(f"Row {record['id']!r} of {self.name} has no audio.")
        data = _bytes(audio["bytes"])
        if data is None:
            return audio["path"], audio["path"]
        return data, f"{record['id']} ({audio['path'] or 'bytes'} in {self.name})"


def load_rows(data: str | os.PathLike, *, text_column: str | None = None, audio_column: str | None = None,
              limit: int | None = None) -> Rows:  # fmt: skip
    """Reads DATA.

    Args:
      data: `bundled:prompts-en/train` (package data), a Parquet file, a folder with metadata.csv or metadata.jsonl (or
        Parquet files), a JSONL, TSV or CSV manifest (NeMo and Common Voice columns are known), `hf:NAME[:CONFIG][/SPLIT]` or
        the plain name of a Hugging Face data set. Several joined with `+`; `3*DATA` takes its rows three times an epoch.
        Relative audio paths are relative to the manifest.
      text_column, audio_column: names to use where the usual ones (see ALIASES) do not fit.
      limit: keep the first `limit` rows only.
    Raises:
      DataError: nothing found, no usable columns, or a broken table.
    """
    data = os.fspath(data)
    parts = [data] if "+" not in data or os.path.exists(data) else [part.strip() for part in data.split("+")]
    records = []
    for part in parts:
        repeat, source = (1, part) if os.path.exists(part) else _repeat(part)
        table = _read(source)
        if not table:
            raise DataError(f"{source} has no rows.")
        records += _rename(table, source, text_column, audio_column) * repeat
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


def _read(source: str) -> list[dict]:
    """One DATA -> its rows, columns still under their own names, paths resolved."""
    if source.startswith("bundled:"):
        path = ASSETS / (source.removeprefix("bundled:") + ".parquet")
        if not path.is_file():
            known = sorted(str(p.relative_to(ASSETS).with_suffix("")) for p in ASSETS.glob("*/*.parquet"))
            raise DataError(f"{source} is not bundled; there is {', '.join('bundled:' + name for name in known)}.")
        return _parquet(path)
    if source.startswith("hf:"):
        return _hugging_face(source.removeprefix("hf:"))
    path = _path(source)
    kind = path.suffix.lower()
    if path.is_dir():
        for name in ("metadata.jsonl", "metadata.csv", "metadata.tsv"):
            if (path / name).exists():
                return _manifest(path / name)
        if tables := sorted(path.glob("*.parquet")):
            return [record for table in tables for record in _parquet(table)]
        raise DataError(f"{source} has no metadata.csv, metadata.jsonl or Parquet files; list file_name and transcription there.")
    if path.exists():
        if kind == ".parquet":
            return _parquet(path)
        if kind in MANIFESTS:
            return _manifest(path)
        raise DataError(f"{source} is not a data table; expected .parquet, {', '.join(MANIFESTS)} or a folder.")
    if kind in (".parquet", *MANIFESTS) or source.startswith((".", "/", "~")) or "://" in source:
        raise DataError(f"{source} does not exist.")
    return _hugging_face(source)


def _path(source: str):
    if "://" in source:
        from etils import epath

        return epath.Path(source)
    return pathlib.Path(source).expanduser()


def _parquet(path) -> list[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if "://" in str(path):
            table = pq.read_table(pa.BufferReader(path.read_bytes()))
        else:
            table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        why = "it is a Git LFS pointer; run `git lfs pull`" if pointer else str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a readable Parquet file: {why}.") from error
    return _resolve(_arrow(table), path.parent)


def _arrow(table) -> list[dict]:
    """Structs and binaries stay Arrow scalars: views of the table, copied only when a clip is read."""
    import pyarrow.types as types

    columns = {}
    for name in table.column_names:
        kind, column = table.schema.field(name).type, table.column(name)
        lazy = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        columns[name] = list(column) if lazy else column.to_pylist()
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _manifest(path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig") if isinstance(path, pathlib.Path) else path.read_text()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it.") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        tab = path.suffix.lower() == ".tsv"
        reader = csv.DictReader(text.splitlines(), delimiter="\t" if tab else ",", quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL)
        records = list(reader)
        for i, record in enumerate(records):
            if None in record or None in record.values():
                raise DataError(f"{path} line {i + 2} has not the {len(reader.fieldnames)} columns of the header line.")
    else:
        records = []
        for i, line in enumerate(text.splitlines()):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path} line {i + 1} is not valid JSON ({error}); one object a line is expected.") from error
            if not isinstance(record, dict):
                raise DataError(f"{path} line {i + 1} is not a JSON object; one object a line is expected.")
            records.append(record)
    return _resolve(records, path.parent)


def _resolve(records: list[dict], folder) -> list[dict]:
    """Relative audio paths -> paths beside the table (Common Voice: in its clips/)."""
    for record in records:
        for name in ALIASES["audio"]:
            value = record.get(name)
            if isinstance(value, str) and value and "://" not in value and not os.path.isabs(value):
                beside, clips = folder / value, folder / "clips" / value
                record[name] = os.fspath(clips if not beside.exists() and clips.exists() else beside)
    return records


def _hugging_face(name: str) -> list[dict]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} is no local file or folder; to load it from the Hugging Face Hub, pip install datasets.") from None
    name, _, rest = name.partition(":")
    config, _, split = rest.partition("/")
    if not rest and not os.path.isdir(name) and name.count("/") == 2:
        name, _, split = name.rpartition("/")
    try:
        table = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # many kinds: network, gated, unknown name, config or split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{name} is no local file or folder, and loading it as a Hugging Face data set failed: {reason}.") from error
    if isinstance(table, dict):
        if len(table) > 1:
            raise DataError(f"{name} has several splits; write hf:{name}:{config or 'default'}/SPLIT with one of {', '.join(table)}.")
        table = next(iter(table.values()))
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Audio):  # its own decoding needs torchcodec
            table = table.cast_column(column, datasets.Audio(decode=False))
    records = _arrow(table.with_format("arrow")[:])
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for record in records:
                if record[column] is not None:
                    record[column] = feature.int2str(record[column])
    return records


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
        {**{role: record.get(name) for role, name in chosen.items()}, **{k: v for k, v in record.items() if k not in taken}}
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
    elif isinstance(audio, (str, os.PathLike)) and os.fspath(audio):
        audio = {"bytes": None, "path": os.fspath(audio)}
    elif audio is not None and not isinstance(audio, str):
        audio = {"bytes": audio, "path": None}
    if not audio or (not getattr(audio["bytes"], "is_valid", audio["bytes"] is not None) and not audio["path"]):
        audio = None
    name = record.get("id")
    if name is None or not str(name).strip():
        stem = audio and audio["path"] and os.path.splitext(os.path.basename(audio["path"]))[0]
        name = stem or f"row {i}"
    text = None if text is None else str(text)
    return {**record, "id": str(name), "audio": audio, "text": text}


def _bytes(data) -> bytes | None:
    """Encoded audio from bytes or an Arrow scalar."""
    if hasattr(data, "as_buffer"):
        buffer = data.as_buffer()
        return None if buffer is None else buffer.to_pybytes()
    return None if data is None else bytes(data)


def _audio_error(message: str) -> DataError:
    from jaxslim.data import audio

    return audio.AudioError(message)
