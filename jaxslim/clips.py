"""Clips to listen to: which ones tell most, their sound in the page, and transcripts with their errors marked."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
from collections.abc import Mapping, Sequence

from etils import epath
from markupsafe import Markup

from jaxslim.figures import ROLES
from jaxslim.train.log import wav_bytes

Predictions = Mapping[str, Mapping[str, Mapping]]  # role -> clip id -> row of a predictions file


def predictions(folder: str | os.PathLike) -> Predictions:
    """predictions-ROLE.jsonl of a run folder, as far as they are there. Raises ValueError that names a broken one."""
    found = {}
    for role in ROLES:
        path = epath.Path(folder) / f"predictions-{role}.jsonl"
        if path.exists():
            try:
                rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            except ValueError as error:
                raise ValueError(f"{path} is not valid JSONL ({error}); evaluate again.") from error
            found[role] = {str(row.get("id", row.get("audio_filepath"))): row for row in rows}
    return found


def save_clips(run_folder: str | os.PathLike, data, n: int = 4) -> list[dict]:
    """Writes clips.json and clips/*.wav: the `n` clips of 1 to 12 s whose transcripts by teacher and student tell most.

    Args:
      data: the test set as evaluated, DATA or data.Rows; predictions-*.jsonl must be in the folder already.
    """
    from jaxslim.data import load_rows

    folder = epath.Path(run_folder)
    rows = load_rows(data)
    where = {name: i for i, name in enumerate(rows.column("id"))}
    chosen = [clip for clip in telling(predictions(folder), len(where)) if clip["id"] in where][:n]
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for k, clip in enumerate(chosen):
        clip["audio"] = f"clips/{k}.wav"
        (folder / clip["audio"]).write_bytes(wav_bytes(rows.audio(where[clip["id"]])))
    (folder / "clips.json").write_text(json.dumps(chosen, ensure_ascii=False, indent=2))
    return chosen


def telling(said: Predictions, n: int, least: float = 1.0, most: float = 12.0) -> list[dict[str, str]]:
    """`n` clips to look at: those on which teacher and student differ first, the better understood before others.

    Returns: dicts of id, reference, and the text of each role.
    """
    teacher, student = said.get("teacher", {}), said.get("student", {})

    def order(name: str) -> tuple:
        a, b = teacher[name], student[name]
        return a["pred_text"] == b["pred_text"], b.get("errors", 0) / max(len(a["text"].split()), 1)

    fit = [i for i, row in teacher.items() if i in student and row["text"] and least <= row.get("duration", 1) <= most]
    texts = {i: {role: rows[i]["pred_text"] for role, rows in said.items() if i in rows} for i in fit}
    return [{"id": i, "reference": teacher[i]["text"], **texts[i]} for i in sorted(fit, key=order)[:n]]


def shown(folder: epath.Path, chosen: Sequence[Mapping]) -> list[dict]:
    """What the page shows of each clip: id, reference, audio (data URI or None), and a marked line for each role."""
    found = []
    for clip in chosen:
        lines = [(role, *marked(clip["reference"], clip[role])) for role in ROLES if clip.get(role) is not None]
        audio = data_uri(folder / clip["audio"]) if clip.get("audio") else None
        found.append({"id": clip["id"], "reference": clip["reference"], "lines": lines, "audio": audio})
    return found


def data_uri(path: epath.Path) -> str | None:
    """The audio file as a data: URI; None if it is not there."""
    if not path.exists():
        return None
    kind = mimetypes.guess_type(path.name)[0] or ""
    kind = kind if kind.startswith("audio/") else "audio/ogg" if path.suffix in (".ogg", ".opus") else "audio/wav"
    return f"data:{kind.replace('x-wav', 'wav')};base64,{base64.b64encode(path.read_bytes()).decode()}"


def marked(reference: str, hypothesis: str) -> tuple[Markup, str]:
    """Hypothesis with wrong, missing and extra words marked, and its count of errors as text."""
    import jiwer

    ref, hyp = reference.split(), hypothesis.split()
    out, errors = [], 0
    for chunk in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0] if ref or hyp else ():
        r, h = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        errors += 0 if chunk.type == "equal" else max(len(r), len(h))
        if chunk.type == "equal":
            out += [Markup("{}").format(" ".join(h))]
        elif chunk.type == "substitute":
            out += [Markup('<mark class="wrong" title="instead of: {}">{}</mark>').format(x, y) for x, y in zip(r, h)]
        elif chunk.type == "delete":
            out += [Markup('<mark class="missing" title="missing">{}</mark>').format(x) for x in r]
        else:
            out += [Markup('<mark class="extra" title="extra">{}</mark>').format(y) for y in h]
    count = f"{errors} of {len(ref)} words wrong" if errors <= len(ref) else f"{errors} errors"
    return Markup(" ").join(out) or Markup("<i>nothing</i>"), count if errors else "no errors"
