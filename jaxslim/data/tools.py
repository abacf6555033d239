"""`jaxslim data stats|vocab|prepare`, and the page of `data check`."""
from __future__ import annotations

import collections
import io
import json
import os
import re
from typing import Any

import numpy as np
from etils import epath

from jaxslim import figures, svg
from jaxslim._version import __version__
from jaxslim.data import audio
from jaxslim.data.plan import suggest_buckets
from jaxslim.data.rows import DataError, Rows, load_rows

SHOWN = 500  # findings on the page
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "|")  # as the wav2vec2 CTC tokenizers of transformers number them


def stats(data: str | Rows, batch_seconds: float = 160.0) -> dict[str, Any]:
    """Figures from headers and texts alone; nothing is decoded.

    Returns:
      rows, hours, seconds (quantiles), letters, words, characters (character -> count, most frequent first), columns
      (column -> its most frequent values and their counts, of columns with few values), buckets (seconds, as training
      would choose them) and padding (its share of a batch of `batch_seconds`), unreadable (id -> reason).
    """
    rows = load_rows(data)
    lengths, unreadable = [], {}
    for i, name in enumerate(rows.column("id")):
        try:
            lengths.append(rows.duration(i))
        except DataError as error:
            unreadable[name] = str(error)
    texts = [t for t in rows.column("text") if t]
    columns = {}
    for name in rows.columns:
        values = [v for v in rows.column(name) if isinstance(v, (str, int, bool))]
        counts = collections.Counter(values)
        if name not in ("id", "audio", "text") and values and len(counts) <= min(100, len(values) / 2):
            columns[name] = dict(counts.most_common(10))
    buckets = suggest_buckets(lengths) if lengths else ()
    place = np.minimum(np.searchsorted(np.array(buckets) + 1e-6, lengths), max(len(buckets) - 1, 0))
    padded = sum(buckets[k] for k in place)
    return {"data": rows.name, "rows": len(rows), "hours": sum(lengths) / 3600,
            "seconds": dict(zip(("min", "5 %", "median", "95 %", "max"),
                                np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1)).round(2).tolist())) if lengths else {},
            "letters": sum(map(len, texts)), "words": sum(len(t.split()) for t in texts),
            "characters": dict(collections.Counter("".join(texts)).most_common()), "columns": columns,
            "buckets": list(buckets), "padding": 1 - sum(lengths) / padded if padded else None,
            "unreadable": unreadable}


def render_stats(value: dict[str, Any]) -> str:
    lines = [f"{value['data']}: {value['rows']} rows, {value['hours']:.2f} h, {value['words']} words, "
             f"{value['letters']} characters"]
    if value["seconds"]:
        lines.append("seconds: " + ", ".join(f"{k} {v:g}" for k, v in value["seconds"].items()))
        buckets = ", ".join(f"{b:g}" for b in value["buckets"])
        lines.append(f"buckets: {buckets} s ({100 * value['padding']:.1f} % padding)")
    shown = list(value["characters"].items())
    lines.append("characters: " + " ".join(f"{k!r}:{n}" for k, n in shown[:60]) + (" ..." if len(shown) > 60 else ""))
    for name, counts in value["columns"].items():
        lines.append(f"{name}: " + ", ".join(f"{k} {n}" for k, n in counts.items()))
    for name, reason in list(value["unreadable"].items())[:5]:
        lines.append(f"unreadable: {name}: {reason}")
    return "\n".join(lines)


def vocabulary(data: str | Rows, folder: str, min_count: int = 1, lower: bool = False) -> dict[str, int]:
    """Writes vocab.json and tokenizer_config.json of a character CTC tokenizer (Wav2Vec2CTCTokenizer) to `folder`.

    Args:
      min_count: rarer characters are left out; `data check` then names the rows that have them.
      lower: count lower-case letters only.
    Returns:
      token -> id: `<pad>` (the blank) 0, specials, `|` for the space, then the characters in Unicode's order.
    Raises:
      DataError: the data has no text, or the folder holds a vocabulary already.
    """
    rows = load_rows(data)
    texts = [t.lower() if lower else t for t in rows.column("text") if t]
    counts = collections.Counter("".join(texts))
    letters = sorted(c for c, n in counts.items() if n >= min_count and not c.isspace() and c != "|")
    if not letters:
        raise DataError(f"{rows.name} has no text to count characters in.")
    folder = epath.Path(folder)
    if (folder / "vocab.json").exists():
        raise DataError(f"{folder / 'vocab.json'} is there already; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    found = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    (folder / "vocab.json").write_text(json.dumps(found, ensure_ascii=False, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "word_delimiter_token": "|", "do_lower_case": False}, indent=1))
    return found


def prepare(data: str | Rows, folder: str, *, skip: str | None = None, shards: int = 1, seed: int = 0,
            sampling_rate: int = 16000) -> dict[str, Any]:
    """Writes mono 16-bit FLAC at `sampling_rate` in Parquet shards, in random order, with true durations.

    Args:
      skip: a quarantine list of `data check` (JSON lines with `id`); rows that cannot be decoded are left out too.
      shards: number of files; at least as many as there are hosts.
    Returns:
      rows, hours, files, skipped (id -> reason).
    Raises:
      DataError: the folder holds Parquet files already, or no row is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = load_rows(data)
    target = epath.Path(folder)
    if list(target.glob("*.parquet")):
        raise DataError(f"{target} holds Parquet files already; give an empty folder.")
    bad = {}
    if skip:
        bad = {row["id"]: "; ".join(row.get("reasons", ["in the quarantine list"])) for row in _json_lines(skip)}
    skipped = {name: bad[name] for name in rows.column("id") if name in bad}
    order = np.random.default_rng(seed).permutation([i for i, n in enumerate(rows.column("id")) if n not in bad])
    target.mkdir(parents=True, exist_ok=True)
    written, seconds, files = 0, 0.0, []
    for k, part in enumerate(np.array_split(order, max(shards, 1))):
        records = []
        for i in part:
            record = dict(rows.record(i))
            try:
                wave = rows.audio(i, sampling_rate)
            except DataError as error:
                skipped[record["id"]] = str(error)
                continue
            name = re.sub(r"[^\w.-]+", "_", record["id"]) + ".flac"
            record |= {"audio": {"bytes": flac(wave, sampling_rate), "path": name},
                       "duration": len(wave) / sampling_rate}
            record.pop("offset", None)  # the piece is cut out
            records.append(record)
            seconds += record["duration"]
        if records:
            path = target / f"part-{k:05}-of-{max(shards, 1):05}.parquet"
            buffer = io.BytesIO()
            try:
                pq.write_table(pa.Table.from_pylist(records), buffer, row_group_size=256, compression="none")
                path.write_bytes(buffer.getvalue())
            except (pa.ArrowException, TypeError, ValueError, OverflowError, OSError) as error:
                for file in [*files, path]:  # all or nothing
                    epath.Path(file).unlink(missing_ok=True)
                raise DataError(f"{rows.name}: its rows cannot go into {path} ({str(error).splitlines()[0]:.200});"
                                " give every column values of one kind.") from error
            files.append(os.fspath(path))
            written += len(records)
    if not written:
        raise DataError(f"{rows.name} has no usable row: {next(iter(skipped.values()), 'it is empty')}")
    return {"data": rows.name, "rows": written, "hours": seconds / 3600, "files": files, "skipped": skipped}


def flac(wave: np.ndarray, rate: int) -> bytes:
    sf = audio.soundfile()
    if sf is None:
        raise ImportError(audio.INSTALL)
    buffer = io.BytesIO()
    sf.write(buffer, np.clip(wave, -1, 1), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _json_lines(path: str) -> list[dict]:
    try:
        return [json.loads(line) for line in epath.Path(path).read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is no list of JSON lines: {error}.") from error


def page(result: dict[str, Any], path: str) -> None:
    """The result of `check` as one self-contained HTML file."""
    from jaxslim.report import templates

    charts = [_histogram("Length of the clips", "seconds", result["seconds"]),
              _histogram("Letters a second", "letters a second",
                         [n / s for n, s in zip(result["letters"], result["seconds"]) if s])]
    found = result["findings"]
    html = templates().get_template("check.html.j2").render(
        title=result["data"], version=__version__, charts=[c for c in charts if c], kinds=result["kinds"],
        findings=found[:SHOWN], more=max(len(found) - SHOWN, 0),
        tiles=[("rows", result["rows"]), ("usable", result["usable"]), ("hours", f"{result['hours']:.2f}"),
               ("findings", len(found))])
    epath.Path(path).write_text(html)


def _histogram(title: str, unit: str, values) -> dict | None:
    if not values:
        return None
    top = float(np.quantile(values, 0.99)) or 1.0
    counts, edges = np.histogram(np.minimum(values, top), bins=30, range=(0, top))
    steps = [p for n, a, b in zip(counts, edges, edges[1:]) for p in ((float(a), int(n)), (float(b), int(n)))]
    return figures.figure(title, [svg.Series("clips", steps, "var(--student)")], note="the largest 1 % in the last bar",
                          xlabel=unit)
