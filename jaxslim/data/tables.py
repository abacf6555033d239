"""Readers of every kind of table: one DATA -> dicts under the table's own column names."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from typing import Any

from jaxslim.data.rows import DataError

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
MANIFESTS = (".jsonl", ".json", ".ndjson", ".tsv", ".csv")


def read(source: str) -> tuple[list[dict], Any]:
    """One DATA -> its rows under the table's own column names, and the folder its audio paths start from (or None)."""
    if source.startswith("bundled:"):
        name = source.removeprefix("bundled:")
        path = ASSETS / (f"{name}.parquet" if "/" in name else f"{name}/train.parquet")
        if not path.is_file():
            known = sorted(str(p.relative_to(ASSETS).with_suffix("")) for p in ASSETS.glob("*/*.parquet"))
            raise DataError(f"{source} is not bundled; there is {', '.join('bundled:' + name for name in known)}.")
        return _parquet(path), path.parent
    if source.startswith("hf:"):
        return _hugging_face(source.removeprefix("hf:")), None
    if source.lower().endswith((".tar", ".tar.gz", ".tgz")):
        from jaxslim.data import tar

        return tar.read(source), None
    path = _path(source)
    kind = path.suffix.lower()
    if path.is_dir():
        for name in ("metadata.jsonl", "metadata.csv", "metadata.tsv"):
            if (path / name).exists():
                return _manifest(path / name), path
        if tables := sorted(path.glob("*.parquet")):
            return [record for table in tables for record in _parquet(table)], path
        raise DataError(f"{source} has no metadata.csv (file_name, transcription), metadata.jsonl or Parquet files.")
    if path.exists():
        if kind == ".parquet":
            return _parquet(path), path.parent
        if kind in MANIFESTS:
            return _manifest(path), path.parent
        if kind == ".txt":
            return [{"text": line} for line in _text(path).splitlines() if line.strip()], None
        raise DataError(f"{source} is not a data table; expected .parquet, {', '.join(MANIFESTS)}, .txt or a folder.")
    if kind in (".parquet", ".txt", *MANIFESTS) or source.startswith((".", "/", "~")) or "://" in source:
        raise DataError(f"{source} does not exist.")
    return _hugging_face(source), None


def place(audio: list, folder) -> list:
    """Audio values of a table with relative paths made paths in `folder` (Common Voice: in its clips/)."""
    clips = folder / "clips"
    in_clips, out = clips.is_dir(), []
    for value in audio:
        if hasattr(value, "as_py") and hasattr(value, "keys") and {"bytes", "path"} <= set(value.keys()) and (
                value["bytes"].as_buffer() is None):
            value = value["path"].as_py()  # an Arrow struct that only points to its file
        if isinstance(value, str) and value and "://" not in value and not os.path.isabs(value):
            value = os.fspath(clips / value if in_clips and not (folder / value).exists() else folder / value)
        out.append(value)
    return out


def _path(source: str):
    if "://" in source:
        from etils import epath

        try:
            return epath.Path(source)
        except KeyError:
            raise DataError(f"{source}: no reader for {source.partition('://')[0]}://; download it first.") from None
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
        with path.open("rb") as file:  # if this fails too, load_rows says so
            pointer = file.read(40).startswith(b"version https://git-lfs")
        why = "it is a Git LFS pointer; run `git lfs pull`" if pointer else str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a readable Parquet file: {why}.") from error
    return _arrow(table)


def _arrow(table) -> list[dict]:
    """Structs and binaries stay Arrow scalars: views of the table, copied only when a clip is read."""
    import pyarrow.types as types

    columns = {}
    for name in table.column_names:
        kind, column = table.schema.field(name).type, table.column(name)
        lazy = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        columns[name] = list(column) if lazy else column.to_pylist()
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _text(path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig") if isinstance(path, pathlib.Path) else path.read_text()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it.") from error


def _manifest(path) -> list[dict]:
    text = _text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        tab = path.suffix.lower() == ".tsv"
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {}
        reader = csv.DictReader(io.StringIO(text, newline=""), **options)
        records = list(reader)
        for i, record in enumerate(records):
            if None in record or None in record.values():
                raise DataError(f"{path} line {i + 2} has not the {len(reader.fieldnames)} columns of the header line.")
    else:
        records = []
        for i, line in enumerate(text.split("\n")):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {i + 1} is not valid JSON: {error}.") from error
            if not isinstance(record, dict):
                raise DataError(f"{path} line {i + 1} is not a JSON object; one object a line is expected.")
            records.append(record)
    return records


def _hugging_face(name: str) -> list[dict]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} is no local file or folder; for the Hugging Face Hub, pip install datasets.") from None
    name, _, rest = name.partition(":")
    config, _, split = rest.partition("/")
    if not rest and not os.path.isdir(name) and name.count("/") == 2:
        name, _, split = name.rpartition("/")
    try:
        table = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # many kinds: network, gated, unknown name, config or split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{name} is no local file, and as a Hugging Face data set it fails: {reason}.") from error
    if isinstance(table, dict):
        if len(table) > 1:
            config = config or "default"
            raise DataError(f"{name} has the splits {', '.join(table)}; choose one as hf:{name}:{config}/SPLIT.")
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
