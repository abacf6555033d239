"""What is wrong with a data set, found before a model sees it: `jaxslim data check`.

Every clip is decoded and every text read. An error makes a row unusable for training (it goes to the quarantine list),
a warning does not. The limits are ours; each message gives the measured value.
"""
from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import io
import os
import re
import struct
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from jaxslim.data import audio
from jaxslim.data.extractor import FLOOR
from jaxslim.data.rows import DataError, Rows, load_rows

FRAME = 0.02               # seconds of a frame where no model says otherwise (wav2vec2: 320 samples at 16 kHz)
SILENT = -60.0             # dBFS: RMS below which there is nothing to hear
CLIPPED, FULL = 1e-3, 0.999  # share of samples at or over this level
OFFSET = 0.05              # mean of the samples (direct current) beyond which a recorder was broken
SLACK = 0.05               # seconds by which stated and decoded length may differ
LETTERS = 35.0, 0.5        # letters a second: faster is not speech, slower is mostly untranscribed


class Finding(NamedTuple):
    """One fault: `row` is the row's number, `level` error or warning, `kind` a fixed word, `message` a sentence."""

    row: int
    id: str
    level: str
    kind: str
    message: str


def check(data: str | Rows, *, task=None, frames=None, against: Sequence[str | Rows] = (), max_seconds: float = 30.0,
          workers: int | None = None, progress: bool = False) -> dict[str, Any]:
    """Decodes and reads everything.

    Args:
      data: DATA, or Rows.
      task: of the model to be trained (`CTCTask`): its vocabulary and rate; without it no character is unknown.
      frames: samples -> CTC frames of the model; by default one each 20 ms.
      against: other splits; a text or clip that occurs there too is a warning.
      max_seconds: longer clips are named.
    Returns:
      rows, usable (rows without an error), hours, kinds (kind -> count), findings (list of Finding), seconds and
      letters (per decodable row, for charts).
    """
    rows = load_rows(data)
    rate = task.sampling_rate if task else 16000
    frames = frames or (lambda samples: samples / rate / FRAME)
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # decoders let threads run
        clips = pool.map(lambda i: _audio(rows, i, rate, max_seconds), range(len(rows)))
        heard = list(track(clips, "checking", total=len(rows), disable=not progress))
    ids, texts, findings = rows.column("id"), rows.column("text"), []
    for i, (clip, faults) in enumerate(heard):
        seconds = clip and clip["seconds"]
        faults = faults + _text(texts[i], task, seconds, frames(seconds * rate) if clip else None)
        findings += [Finding(i, ids[i], *fault) for fault in faults]
    findings += _repeated(rows, ids, heard)
    for other in against:
        findings += _shared(rows, ids, heard, load_rows(other))
    findings.sort(key=lambda f: (f.row, f.level, f.kind))
    bad = {f.row for f in findings if f.level == "error"}
    clips = [(clip["seconds"], len(texts[i] or "")) for i, (clip, _) in enumerate(heard) if clip]
    return {"data": rows.name, "rows": len(rows), "usable": len(rows) - len(bad),
            "hours": sum(s for s, _ in clips) / 3600,
            "kinds": dict(collections.Counter(f.kind for f in findings).most_common()),
            "findings": findings, "seconds": [s for s, _ in clips], "letters": [n for _, n in clips]}


def quarantine(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict for each row with an error: id, row, reasons."""
    reasons = collections.defaultdict(list)
    for f in result["findings"]:
        if f.level == "error":
            reasons[f.row, f.id].append(f"{f.kind}: {f.message}")
    return [{"id": name, "row": row, "reasons": why} for (row, name), why in reasons.items()]


def render(result: dict[str, Any], most: int = 20) -> str:
    """What `check` returned, in a few lines for the terminal."""
    found = result["findings"]
    lines = [f"{result['data']}: {result['usable']} of {result['rows']} rows are usable, {result['hours']:.2f} h"]
    lines += [f"{n:6} {kind}" for kind, n in result["kinds"].items()]
    lines += [f"{f.level}: {f.id}: {f.kind}: {f.message}" for f in found[:most]]
    return "\n".join(lines + [f"and {len(found) - most} more"] * (len(found) > most))


def _audio(rows: Rows, i: int, rate: int, max_seconds: float) -> tuple[dict | None, list[tuple[str, str, str]]]:
    """(what was heard or None, faults) of row i."""
    record = rows.record(i)
    offset, stated, faults = record.get("offset"), record.get("duration"), []
    try:
        data, name = audio.read(*rows.source(i))
        wave, own_rate = audio.decode(data, name)
        piece = rows.audio(i, rate) if offset not in (None, "") else None
    except DataError as error:
        return None, [("error", "unreadable audio", str(error))]
    if not wave.size:
        return None, [("error", "unreadable audio", f"{name} holds no audio samples.")]
    if bad := int(np.count_nonzero(~np.isfinite(wave))):
        return None, [("error", "unreadable audio", f"{bad} samples are NaN or infinite.")]
    clip = {"seconds": len(wave) / own_rate, "digest": hashlib.sha256(data).digest()}
    if piece is not None:  # a piece of a long file: the file's own length says nothing
        clip = {"seconds": len(piece) / rate, "digest": clip["digest"] + repr(offset).encode()}
        wave, stated = piece[:, None], None
    if why := _cut(data, len(wave), own_rate) if piece is None else None:
        faults.append(("error", "truncated", why))
    try:
        stated = float(stated or 0)
    except (TypeError, ValueError):
        faults.append(("warning", "duration", f"the stated duration {stated!r} is no number."))
        stated = 0.0
    if stated and abs(stated - clip["seconds"]) > SLACK:
        faults.append(("error", "duration", f"stated as {stated:.2f} s, decoded {clip['seconds']:.2f} s."))
    if clip["seconds"] < FLOOR:
        faults.append(("error", "too short", f"{1000 * clip['seconds']:.0f} ms, less than one frame "
                                             f"({1000 * FLOOR:.0f} ms)."))
    if clip["seconds"] > max_seconds:
        faults.append(("warning", "too long", f"{clip['seconds']:.1f} s, more than {max_seconds:g} s."))
    if own_rate < rate:
        faults.append(("warning", "low rate", f"recorded at {own_rate} Hz: nothing above {own_rate // 2} Hz."))
    return clip, faults + _level(wave)


def _level(wave: np.ndarray) -> list[tuple[str, str, str]]:              # (samples, channels)
    faults = []
    rms = np.sqrt(np.mean(np.square(wave, dtype=np.float64), 0))         # (channels,)
    loud = 20 * np.log10(np.maximum(rms.max(), 1e-10))
    if loud < SILENT:
        said = "all samples are zero" if rms.max() == 0 else f"the level is {loud:.0f} dBFS"
        return [("error", "silent", f"{said}; nothing can be heard.")]
    if len(rms) > 1 and 20 * np.log10(max(rms.min(), 1e-10)) < SILENT:
        faults.append(("warning", "dead channel", f"channel {int(rms.argmin())} of {len(rms)} is silent; mixing the "
                                                  "channels halves the level."))
    if (share := float(np.mean(np.abs(wave) >= FULL))) > CLIPPED:
        faults.append(("warning", "clipped", f"{100 * share:.1f} % of the samples are at full scale."))
    if (mean := float(np.abs(wave.mean(0)).max())) > OFFSET:
        faults.append(("warning", "offset", f"the samples' mean is {mean:.2f} of full scale."))
    return faults


def _cut(data: bytes, samples: int, rate: int) -> str | None:
    """Says that the file ends before its header's end; libsndfile reads such files without a word."""
    if data[:4] == b"RIFF" and (at := data.find(b"data", 12)) >= 0:
        (promised,) = struct.unpack("<I", data[at + 4 : at + 8])
        if promised not in (0, 0xFFFFFFFF) and (there := len(data) - at - 8) < promised:
            return f"the header promises {promised} bytes of samples, {there} are there."
    elif data[:4] == b"OggS" and (at := data.rfind(b"OggS")) >= 0 and not data[at + 5] & 4:
        return "the stream has no end mark."
    elif data[:4] == b"fLaC" and (sf := audio.soundfile()) is not None:
        if 0 < samples < (frames := sf.info(io.BytesIO(data)).frames) - SLACK * rate:
            return f"the header promises {frames} samples, {samples} could be decoded."
    return None


def _text(text: str | None, task, seconds: float | None, frames: float | None) -> list[tuple[str, str, str]]:
    if text is None:
        return [("error", "no text", "the row has no text.")]
    words = re.sub(r"[^\w]+", "", text.replace("_", ""))
    if not words:
        return [("error", "empty text", f"the text {text!r} has no letter.")]
    faults = []
    if odd := sorted({c for c in text if unicodedata.category(c)[0] == "C" and c not in "\t\n\r"}):
        faults.append(("warning", "control character", f"{', '.join(f'U+{ord(c):04X}' for c in odd)} in the text."))
    if unicodedata.normalize("NFC", text) != text:
        faults.append(("warning", "not normalised", "the text is not in Unicode's NFC form: the same letter may be "
                                                    "written in two ways."))
    if tag := re.search(r"</?[a-zA-Z][^<>]*>|&[a-z]+;|\[[^\]]*\]", text):
        faults.append(("warning", "markup", f"{tag[0][:40]!r} looks like markup, not speech."))
    if re.search(r"\d", text):
        faults.append(("warning", "digits", f"numbers are not spelled out in {_short(text)}."))
    labels = None
    if task is not None:
        try:
            labels = task.encode(text)
        except DataError as error:
            faults.append(("error", "unknown characters", str(error)))
    if seconds and seconds >= FLOOR:
        labels = list(" ".join(text.split())) if labels is None else labels
        need = len(labels) + sum(a == b for a, b in zip(labels, labels[1:]))
        speed = len(words) / seconds
        if need > frames:
            faults.append(("error", "too few frames", f"CTC needs {need} frames for the text, the clip has "
                                                      f"{int(frames)}."))
        elif speed > LETTERS[0]:
            faults.append(("warning", "fast", f"{speed:.0f} letters a second; is the clip cut?"))
        if speed < LETTERS[1] and seconds > 2:
            faults.append(("warning", "slow", f"{speed:.2f} letters a second; is the text complete?"))
    return faults


def _repeated(rows: Rows, ids, heard) -> list[Finding]:
    """Ids and clips that occur twice within the data."""
    found, names, clips = [], {}, {}
    same = lambda a, b: all(rows.record(a).get(k) == rows.record(b).get(k) for k in ("text", "audio", "offset"))  # noqa: E731
    for i, (clip, _) in enumerate(heard):
        if names.setdefault(ids[i], i) != i and not same(names[ids[i]], i):  # 3*DATA takes rows three times
            found.append(Finding(i, ids[i], "error", "repeated id", f"row {names[ids[i]]} has this id too."))
        first = i if clip is None else clips.setdefault(clip["digest"], i)
        if ids[first] != ids[i]:
            found.append(Finding(i, ids[i], "warning", "repeated clip", f"the same audio as {ids[first]}."))
    return found


def _shared(rows: Rows, ids, heard, other: Rows) -> list[Finding]:
    """Texts and clips that are in `other` too: a test on what was trained."""
    texts = {_plain(t): name for t, name in zip(other.column("text"), other.column("id")) if t}
    clips, mine = {}, rows.column("text")
    for i, name in enumerate(other.column("id")):
        try:
            clips[hashlib.sha256(audio.read(*other.source(i))[0]).digest()] = name
        except DataError:
            pass
    found = []
    for i, (clip, _) in enumerate(heard):
        if (text := mine[i]) and (twin := texts.get(_plain(text))) is not None:
            message = f"{_short(text)} is also {twin} of {other.name}."
            found.append(Finding(i, ids[i], "warning", "text in both", message))
        if clip and (twin := clips.get(clip["digest"])) is not None:
            found.append(Finding(i, ids[i], "error", "clip in both", f"the same audio is {twin} of {other.name}."))
    return found


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w' ]+", " ", unicodedata.normalize("NFKC", text).lower()).split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 50 else text[:47] + "...")

