"""Word times from CTC frames, and transcripts as txt, json, srt, vtt or tsv (the formats of Whisper's command line).

A word lasts from the first frame of its first letter to the end of the last frame of its last letter. CTC models spike:
a letter is often one frame long, so a word is lengthened to the middle of the blanks around it, by PAD at most (ours).
"""
from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

PAD = 0.06            # seconds
LINE, LINES = 42, 2   # characters a line, lines a cue: what broadcasters' style guides ask for
LONGEST, PAUSE = 7.0, 0.8  # seconds of a cue; silence that ends one
FORMATS = ("txt", "json", "srt", "vtt", "tsv")

Word = dict[str, Any]  # word, start, end (seconds)


def words(task, ids: np.ndarray, frame: float, start: float = 0.0) -> list[Word]:
    """Greedy CTC ids (T,) of frames `frame` seconds apart -> words with their times; `start` is that of frame 0."""
    ids = np.asarray(ids)
    first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.array([], int)
    last = np.append(first[1:], len(ids))
    blank, gap = task.blank_id, task.vocabulary[task.word_delimiter]
    found, letters = [], []
    for a, b, i in [*zip(first, last, ids[first]), (len(ids), len(ids), gap)]:
        if i == gap and letters:
            text = task.decode([i for _, _, i in letters], collapse=False)
            if text:
                found.append([text, letters[0][0], letters[-1][1]])
            letters = []
        elif i not in (gap, blank):
            letters.append((a, b, i))
    pad, out = PAD / frame, []
    for k, (text, a, b) in enumerate(found):
        before = found[k - 1][2] if k else 0
        after = found[k + 1][1] if k + 1 < len(found) else len(ids)
        a, b = max(a - pad, (a + before) / 2), min(b + pad, (b + after) / 2)
        out.append({"word": text, "start": round(start + a * frame, 3), "end": round(start + b * frame, 3)})
    return out


def cues(found: Sequence[Word]) -> list[dict[str, Any]]:
    """Words -> cues of at most two lines and seven seconds: dicts of start, end, text, lines."""
    groups: list[list[Word]] = []
    for word in found:
        group = groups[-1] if groups else None
        if group and word["start"] - group[-1]["end"] < PAUSE and word["end"] - group[0]["start"] <= LONGEST and (
                len(_lines([*group, word])) <= LINES):
            group.append(word)
        else:
            groups.append([word])
    return [{"start": g[0]["start"], "end": g[-1]["end"], "text": " ".join(w["word"] for w in g), "lines": _lines(g)}
            for g in groups]


def _lines(group: Sequence[Word]) -> list[str]:
    lines = [""]
    for word in group:
        longer = f"{lines[-1]} {word['word']}".strip()
        if lines[-1] and len(longer) > LINE:
            lines.append(word["word"])
        else:
            lines[-1] = longer
    return lines


def write(row: dict[str, Any], form: str) -> str:
    """One transcript (`text`, `words` or `segments`, as `transcribe` returns it) in a format of FORMATS.

    Raises:
      ValueError: another format, or subtitles of a transcript without word times.
    """
    if form == "txt":
        return row["text"] + "\n"
    if form == "json":
        return json.dumps(row, ensure_ascii=False, indent=1) + "\n"
    if form not in FORMATS:
        raise ValueError(f"Output format {form!r} is not known; choose from {', '.join(FORMATS)}.")
    if "words" not in row and "segments" not in row:
        raise ValueError(f"{row.get('file', 'The transcript')} has no word times, which {form} needs.")
    found = cues(row["words"]) if "words" in row else [
        {**s, "lines": textwrap.wrap(s["text"], LINE) or [""]} for s in row["segments"]]
    if form == "tsv":  # milliseconds, as Whisper's
        lines = [f"{1000 * c['start']:.0f}\t{1000 * c['end']:.0f}\t{c['text']}" for c in found]
        return "\n".join(["start\tend\ttext", *lines]) + "\n"
    if form == "vtt":
        escape = lambda text: text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # noqa: E731
        blocks = ["WEBVTT", *(f"{_clock(c['start'], '.')} --> {_clock(c['end'], '.')}\n" + escape("\n".join(c["lines"]))
                              for c in found)]
        return "\n\n".join(blocks) + "\n"
    return "\n".join(f"{k}\n{_clock(c['start'], ',')} --> {_clock(c['end'], ',')}\n" + "\n".join(c["lines"]) + "\n"
                     for k, c in enumerate(found, 1))


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
