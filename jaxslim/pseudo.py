"""`jaxslim data label MODEL DATA DST`: speech with a model's transcripts as its texts, those too far off left out.

Distil-Whisper (arXiv 2311.00430, section 3.2) trains on what its teacher says, of the clips whose word error rate
against the given text is at most 10 %, both normalised. Clips without a text cannot be judged; they are kept.

    DST/part-00000.parquet    clips of 256 rows: id, audio, text (pseudo-label), reference, wer, and the other columns
    DST/labels.json           counts, written last; run again, parts that are there are not made again
"""
from __future__ import annotations

import io
import json
import os
from typing import Any

from etils import epath

from jaxslim.data import DataError, Rows
from jaxslim.data.tools import flac
from jaxslim.decode import decoder
from jaxslim.evaluate import batches_of, resolve
from jaxslim.score import score
from jaxslim.slim import Slim

PART = 256   # rows of a file


def label(model: Slim | str, data: str | Rows, folder: str | os.PathLike, *, task: Any = None, max_wer: float = 0.1,
          normalize: str = "whisper", batch_size: int = 8, language: str | None = None, part: int = PART,
          progress=None) -> dict[str, Any]:
    """Transcribes DATA and writes what is kept.

    Args:
      model, task, batch_size, language: as in evaluate.
      max_wer: word errors per reference word above which a clip is left out.
      normalize: of both texts before they are compared (score.NORMALIZERS); the pseudo-label is written as it was said.
    Returns:
      rows, kept, unjudged (without a text), too_far, empty (nothing was said), unreadable, wer (pooled, of those that
      have a text, before the filter).
    Raises:
      DataError: the folder is of another model, data or filter, or holds other Parquet files; no clip is left.
    """
    model, rows, task = resolve(model, data, task, None, None, language)
    folder = epath.Path(folder)
    made = {"model": model.fingerprint, "data": rows.fingerprint, "max_wer": max_wer, "normalize": normalize,
            "part": part}
    about = folder / "meta.json"
    if about.exists():
        if (old := json.loads(about.read_text())) != made:
            differs = next(k for k in made if old.get(k) != made[k])
            raise DataError(f"{folder} holds labels made with another {differs}; choose another folder.")
    elif folder.exists() and any(folder.glob("*.parquet")):
        raise DataError(f"{folder} holds Parquet files already; give an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    about.write_text(json.dumps(made, indent=1))
    forward, counts = decoder(model, task, timed=False), []
    for k, start in enumerate(range(0, len(rows), part)):
        path = folder / f"counts-{k:05}.json"
        if not path.exists():
            found = _part(rows[start : start + part], task, forward, batch_size, max_wer, normalize,
                          folder / f"part-{k:05}.parquet")
            path.write_text(json.dumps(found))
        counts.append(json.loads(path.read_text()))
        if progress:
            progress(f"{min(start + part, len(rows))} of {len(rows)} clips labelled")
    total = {key: sum(c[key] for c in counts) for key in counts[0]} if counts else {}
    if not total.get("kept"):
        raise DataError(f"No clip of {rows.name} is kept: {total}. Raise max_wer, or look at the model.")
    words = total.pop("words")
    result = {"rows": len(rows), **total, "wer": total.pop("errors") / words if words else None}
    result.pop("errors")
    (folder / "labels.json").write_text(json.dumps(result, indent=1))
    return result


def _part(rows: Rows, task, forward, batch_size: int, max_wer: float, normalize: str, path) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said: dict[int, str] = {}
    batches, _ = batches_of(rows, task, forward, batch_size, None, None, 1.0)
    for batch in batches:
        out, _ = forward(batch)
        said |= {int(i): task.transcript(out["ids"][b, : out["lengths"][b]])
                 for b, i in enumerate(out["row"]) if i >= 0}
    counts = dict.fromkeys(("kept", "unjudged", "too_far", "empty", "unreadable", "words", "errors"), 0)
    records = []
    for i in range(len(rows)):
        record = dict(rows.record(i))
        text, reference = said.get(i), record["text"]
        rate = None
        if text is None:
            counts["unreadable"] += 1
            continue
        if (reference or "").strip():
            one = score([reference], [text], normalize)
            counts["words"] += one["words"]
            counts["errors"] += one.utterances[0]["errors"]
            rate = one["wer"]
        counts["unjudged"] += rate is None
        if not text.strip() or rate is not None and rate > max_wer:
            counts["empty" if not text.strip() else "too_far"] += 1
            continue
        wave = rows.audio(i, task.sampling_rate)
        record |= {"audio": {"bytes": flac(wave, task.sampling_rate), "path": record["id"].replace("/", "_") + ".flac"},
                   "text": text, "reference": reference, "wer": rate, "duration": len(wave) / task.sampling_rate}
        record.pop("offset", None)
        records.append(record)
        counts["kept"] += 1
    if records:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), buffer, compression="none")
        temporary = path.parent / f".{path.name}.tmp"
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    return counts


def render(result: dict[str, Any]) -> str:
    wer = "" if result["wer"] is None else f"; WER against the texts {100 * result['wer']:.1f} %"
    return (f"{result['kept']} of {result['rows']} clips kept: {result['too_far']} too far from their text, "
            f"{result['empty']} empty, {result['unreadable']} unreadable, {result['unjudged']} without a text{wer}")
