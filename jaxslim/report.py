"""One self-contained report.html of a run folder (DESIGN 5), and the same before/after table for the terminal.

Read from the folder, each left out with a sentence where it is missing: `summary.json`; of every stage `stage.json`
and `metrics.jsonl`; `speed.json` (rows of speed.bench; `role`, or the path in `model`, says whose); `clips.json`
(clips.save_clips writes it); `predictions-ROLE.jsonl` (evaluate(..., predictions=)) for paired differences.
Roles: teacher, control, student, baseline.
"""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from jaxslim import clips, figures, versus
from jaxslim._version import __version__
from jaxslim.clips import save_clips
from jaxslim.figures import NBSP, ROLES, memory, seconds
from jaxslim.train import log

__all__ = ["ReportError", "console", "report", "save_clips"]


class ReportError(ValueError):
    """The folder holds no run, or a file in it is broken."""


def report(run_folder: str | os.PathLike, out: str | os.PathLike | None = None) -> str:
    """Writes the page (by default run_folder/report.html) and returns its path. Raises ReportError."""
    folder = epath.Path(run_folder)
    summary = _json(folder / "summary.json", {})
    stages = _stages(folder, summary)
    sensitive = _json(folder / "sensitivity.json", {})
    if not summary and not stages and not sensitive:
        raise ReportError(f"{folder} holds no run: neither summary.json nor metrics.jsonl is there.")
    speed = figures.speed_rows(_json(folder / "speed.json", []), summary)
    said = clips.predictions(folder)
    chosen = _json(folder / "clips.json", None)
    chosen = clips.telling(said, 6) if chosen is None else chosen  # without sound
    page = templates().get_template("report.html.j2").render(
        title=summary.get("recipe") or folder.name,
        summary=summary,
        stages=stages,
        version=__version__,
        models=_models(summary),
        rows=_table(summary),
        compared=_compared(summary),
        tiles=_tiles(summary),
        differences=_differences(said),
        speed_rows=speed,
        speed_charts=figures.speed_charts(speed),
        remarks=figures.remarks(speed, summary),
        conditions=figures.conditions(speed),
        clip_rows=clips.shown(folder, chosen),
        sensitivity_charts=figures.sensitivity_charts(sensitive.get("rows", [])),
        environment=_environment(summary),
        length=figures.length,
        roles=ROLES,
    )
    path = epath.Path(out) if out else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return os.fspath(path)


def templates():
    """The templates of all pages: everything that comes from data is escaped."""
    import jinja2

    return jinja2.Environment(loader=jinja2.PackageLoader("jaxslim", "assets"), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def console(summary: dict[str, Any]):
    """The before/after table of summary.json as a rich.Table."""
    from rich.table import Table

    models = _models(summary)
    table = Table(title=summary.get("recipe") and str(summary["recipe"]))
    if (d := summary.get("student_minus_control")) is not None:
        table.caption = (f"WER of the student less the control's: {100 * d['delta']:+.1f} points (paired 95 % interval "
                         f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f}, 90 % up to {100 * d['upper']:+.1f})")
    table.add_column("")
    for role, _ in models:
        table.add_column(role, justify="right")
    if _compared(summary):
        table.add_column("student vs teacher", justify="right")
    for row in _table(summary):
        cells = [f"{c['text']} {c['note']}".strip() for c in row["cells"]]
        table.add_row(row["label"], *cells, *([row["change"]] if _compared(summary) else []))
    return table


# ---- reading ----


def _stages(folder: epath.Path, summary: dict) -> list[dict]:
    controls = [{"name": p.parent.name} for p in sorted(folder.glob("control-*/stage.json"))]
    stages = [*summary.get("stages", []), *controls]
    if not summary and (folder / log.METRICS).exists():  # a `jaxslim train` run
        stages = [{"name": folder.name, "path": ""}]
    found = []
    for stage in stages:
        place = folder / stage.get("path", stage["name"])
        place = place if place.exists() else folder / place.name  # `path` as seen from where the run was started
        info = _json(place / "stage.json", {})
        found.append({
            "name": stage["name"],
            "line": " · ".join(filter(None, _facts({**info, **stage}))),
            "charts": figures.loss_charts(log.read(place)),
            "details": json.dumps(info, indent=2, ensure_ascii=False) if info else "",
        })  # fmt: skip
    return found


def _facts(info: dict) -> list[str]:
    """Method, time, size and validation score of a stage, as far as stage.json tells."""
    wer, params = (info.get("scores") or {}).get("wer"), info.get("params") or []
    return [
        info.get("method") or info.get("config", {}).get("method", ""),
        seconds(info["seconds"]) if info.get("seconds") else "",
        " → ".join(_count(p) for p in dict.fromkeys(params)) + " parameters" if params else "",
        "" if wer is None else f"validation WER {_percent(wer)}",
    ]


def _json(path: epath.Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text()) if path.exists() else default
    except ValueError as error:
        raise ReportError(f"{path} is not valid JSON ({error}); run the recipe again.") from error


# ---- the table ----


def _percent(value: float) -> str:
    return f"{100 * value:.1f}{NBSP}%"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f}{NBSP}M" if value >= 1e6 else f"{value:,.0f}"


METRICS = (  # key, label, format, smaller is better
    ("wer", "Word error rate", _percent, True),
    ("cer", "Character error rate", _percent, True),
    ("accuracy", "Accuracy", _percent, False),
    ("bits_per_character", "Bits per character", "{:.3f}".format, True),
    ("frame_agreement", "Frames with the teacher's argmax", _percent, False),
    ("retention", "Retention", _percent, False),
    ("n", "Test clips", "{:,.0f}".format, None),
    ("params", "Parameters", _count, True),
    ("trained_params", "Trained parameters", _count, None),
    ("gmacs", f"GMACs at 10{NBSP}s", "{:.2f}".format, True),
    ("rtfx", "Real-time factor RTFx", "{:.1f}".format, False),
    ("seconds_per_second", "Time per second of audio", seconds, True),
    ("peak_bytes", "Peak memory", memory, True),
)


def _models(summary: dict) -> list[tuple[str, dict]]:
    return [(role, summary[role]) for role in ROLES if summary.get(role)]


def _compared(summary: dict) -> bool:
    return bool(summary.get("teacher") and summary.get("student"))


def _table(summary: dict) -> list[dict]:
    models, rows = _models(summary), []
    for key, label, form, smaller in METRICS:
        if all(m.get(key) is None for _, m in models):
            continue
        cells = []
        for role, m in models:
            value, note = m.get(key), ""
            if key == "wer" and m.get("wer_low") is not None:
                note = f"({100 * m['wer_low']:.1f}–{100 * m['wer_high']:.1f})"
            cells.append({"role": role, "text": "–" if value is None else form(value), "note": note})
        change, good = _change(summary, key, form, smaller) if _compared(summary) else ("", "")
        rows.append({"label": label, "cells": cells, "change": change, "good": good})
    return rows


def _change(summary: dict, key: str, form, smaller: bool | None) -> tuple[str, str]:
    """'+1.2 points' or '−43 %', and "good", "bad" or ""."""
    before, after = summary["teacher"].get(key), summary["student"].get(key)
    if smaller is None or before is None or after is None:
        return "", ""
    if form is _percent:
        text, difference = f"{100 * (after - before):+.1f}{NBSP}points", round(100 * (after - before), 1)
    elif not before:
        return "", ""
    else:
        difference = round(100 * (after / before - 1))
        text = f"{difference:+.0f}{NBSP}%" if difference < 100 else f"×{NBSP}{after / before:.1f}"
    good = "" if not difference else "good" if (difference < 0) == smaller else "bad"
    return text.replace("-", "−"), good


def _tiles(summary: dict) -> list[dict]:
    """Headline numbers: the student's large, the teacher's beside it."""
    tiles = []
    if not _compared(summary):
        return tiles
    wanted = {
        "wer": "Word error rate",
        "bits_per_character": "Bits per character",
        "params": "Parameters",
        "seconds_per_second": "Time per second of audio",
        "peak_bytes": "Peak memory",
    }
    for key, label, form, smaller in ((k, wanted[k], f, s) for k, _, f, s in METRICS if k in wanted):
        before, after = (summary[role].get(key) for role in ("teacher", "student"))
        if before is not None and after is not None:
            change, good = _change(summary, key, form, smaller)
            tiles.append({"label": label, "before": form(before), "after": form(after), "change": change, "good": good})
    return tiles


def _differences(said: clips.Predictions) -> list[dict]:
    """Student against control and against teacher, paired, in points of WER."""
    found = []
    for other in ("control", "teacher"):
        result = versus.paired(list(said.get("student", {}).values()), list(said.get(other, {}).values()))
        if result is not None:
            points = {k: f"{100 * v:+.1f}".replace("-", "−") for k, v in result.items() if k != "n"}
            found.append({"other": other, "n": result["n"], "verdict": versus.verdict(result), **points})
    return found


def _environment(summary: dict) -> list[tuple[str, str]]:
    """What summary.json says about where and how the run was made, flat."""
    known = {*ROLES, "stages", "student_minus_control", "speed_of"}  # shown elsewhere, or of no use to a reader
    found = []
    for key, value in summary.items():
        if key in known or value in (None, "", {}, []):
            continue
        pairs = value.items() if isinstance(value, dict) else [(key, value)]
        found += [(str(k), v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in pairs]
    found += [(f"{role} fingerprint", m["fingerprint"]) for role, m in _models(summary) if m.get("fingerprint")]
    return found
