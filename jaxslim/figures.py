"""What a report shows beside its table: loss curves, time and memory against audio length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxslim import svg
from jaxslim.train.log import duration

ROLES = {  # role -> (colour, marker)
    "teacher": ("var(--teacher)", "circle"),
    "control": ("var(--control)", "square"),
    "student": ("var(--student)", "diamond"),
    "baseline": ("var(--baseline)", "triangle"),
}
SPARE = (("var(--spare1)", "triangle"), ("var(--spare2)", "square"), ("var(--spare3)", "circle"))
NBSP = "\u00a0"  # between a number and its unit
ORDINARY = 10.0  # seconds of audio up to which fixed costs, not length, rule the time


def seconds(value: float) -> str:
    """0.0123 -> '12.3 ms', 3.21 -> '3.21 s', 200 -> '3 min 20 s'."""
    if value < 0.9995:
        return f"{1e3 * value:.3g}{NBSP}ms"
    return f"{value:.3g}{NBSP}s" if value < 59.95 else duration(value).replace(" ", NBSP)


def memory(value: float) -> str:
    """Bytes -> '512 kB', '93.4 MB', '1.2 GB'."""
    power, unit = (9, "GB") if value >= 1e9 else (6, "MB") if value >= 1e6 else (3, "kB")
    return f"{value / 10**power:.3g}{NBSP}{unit}"


def length(value: float) -> str:
    """Audio length as a tick: '10 s', '5 min'."""
    return f"{value:g}{NBSP}s" if value < 60 else f"{value / 60:g}{NBSP}min"


def figure(title: str, series: Sequence[svg.Series], note: str = "", ramp: tuple = (), **axes: Any) -> dict[str, Any]:
    """A chart for the template; {} if there is nothing to draw. `ramp`: names of the ends of a scale of colours."""
    picture = svg.chart(series, label=title, **axes)
    entries = [{"name": s.name, "color": s.color, "marker": s.marker, "dash": s.dash} for s in series]
    return {"title": title, "note": note, "svg": picture, "series": entries, "ramp": ramp} if picture else {}


# ---- training ----


def loss_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """metrics.jsonl -> total and single terms; one chart per family of terms that differ by a number; WER."""
    curves: dict[str, list] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)) and (key == "loss" or "/" in key):
                curves.setdefault(key, []).append((row["step"], value))
    families: dict[str, list[str]] = {}
    for key in curves:
        if key.startswith("loss/") and key != "loss/unfit":  # a share of rows, no loss
            families.setdefault(re.sub(r"\d+", "#", key.removeprefix("loss/")), []).append(key)
    single = ["loss", *(keys[0] for keys in families.values() if len(keys) == 1)]
    found = [
        figure(
            "Loss",
            [
                svg.Series(
                    "total" if key == "loss" else key.removeprefix("loss/"),
                    curves[key],
                    "var(--ink)" if key == "loss" else SPARE[i % 3][0],
                    dash=key != "loss",
                )
                for i, key in enumerate(k for k in single if k in curves)
            ],
            **_loss_axes(curves, single),
        )
    ]
    for family, keys in families.items():
        if len(keys) > 1:
            keys.sort(key=lambda k: [int(d) for d in re.findall(r"\d+", k)])
            layers = [
                svg.Series(key.removeprefix("loss/"), curves[key], _ramp(i / (len(keys) - 1)))
                for i, key in enumerate(keys)
            ]
            ends = [re.findall(r"\d+", key) for key in (keys[0], keys[-1])]
            ramp = tuple(f"{family.split('.')[0]} {'.'.join(end)}" for end in ends)
            name = family.split("#")[-1].strip(".")
            found.append(
                figure("Loss by layer" + (f": {name}" if name else ""), layers, ramp=ramp, **_loss_axes(curves, keys))
            )
    validated = [k for k in ("validation/wer", "validation/cer") if k in curves]
    found.append(
        figure(
            "Validation",
            [
                svg.Series(key.split("/")[1].upper(), [(s, 100 * v) for s, v in curves[key]], color, marker)
                for key, (color, marker) in zip(validated, (ROLES["student"], ROLES["control"]))
            ],
            note="%",
            xlabel="step",
        )
    )
    return [f for f in found if f]


def _loss_axes(curves, keys) -> dict[str, Any]:
    values = [v for key in keys for _, v in curves.get(key, [])]
    log = bool(values) and min(values) > 0 and max(values) > 8 * min(values)
    return {"xlabel": "step", "note": "log scale" if log else "", "ylog": log}


def _ramp(share: float) -> str:
    return f"color-mix(in oklab, var(--ramp1) {100 * share:.0f}%, var(--ramp0))"


# ---- speed ----


SPEED_COLUMNS = (
    ("compile_seconds", seconds),
    ("first_seconds", seconds),
    ("steady_seconds", seconds),
    ("seconds_per_second", seconds),
    ("peak_bytes", memory),
)


def speed_rows(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[dict]:
    """Rows of speed.bench with `who` (a role, or model and engine), `audio` (seconds), `cells`; by who and audio."""
    paths = {summary[role].get("path"): role for role in reversed(ROLES) if summary.get(role)}
    found = []
    for row in rows:
        name = row.get("role") or paths.get(row.get("model")) or row.get("model", "")
        engine = row.get("engine", "jaxslim")
        name = name if name in ROLES else str(name).rstrip("/").split("/")[-1]
        who = name if engine == "jaxslim" else f"{name}, {engine.replace('torch', 'PyTorch')}"
        cells = [f(row[k]) if row.get(k) else "–" for k, f in SPEED_COLUMNS] if "error" not in row else []
        found.append({**row, "who": who, "cells": cells, "audio": row.get("audio_seconds", row.get("seconds"))})
    order = {who: i for i, who in enumerate([*ROLES, *(r["who"] for r in found)])}
    return sorted(found, key=lambda r: (order[r["who"]], r["audio"]))


def speed_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Steady time and peak memory against audio length, both logarithmic; `rows` as speed_rows gives them."""
    names, spare = list(dict.fromkeys(r["who"] for r in rows)), iter(SPARE * 9)
    styles = {name: ROLES.get(name) or next(spare) for name in names}
    lengths = sorted({r["audio"] for r in rows})
    ticks = lengths if len(lengths) <= 7 else None

    def draw(title, key, form):
        series = [
            svg.Series(
                name,
                [(r["audio"], r.get(key)) for r in rows if r["who"] == name],
                *styles[name],
                dash=name not in ROLES,
            )
            for name in names
        ]
        series = [s for s in series if any(value for _, value in s.points)]
        return figure(
            title,
            series,
            note="log scale",
            xlabel="length of the audio",
            xlog=True,
            ylog=True,
            xticks=ticks,
            xformat=length,
            yformat=form,
        )

    charts = draw("Steady time", "steady_seconds", seconds), draw("Peak memory", "peak_bytes", memory)
    return [c for c in charts if c]


def sensitivity_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """sensitivity.json -> for each kind of block, the change of the loss by layer and by what is removed."""
    kinds: dict[str, dict[str, list]] = {}
    for row in rows:
        words = row["block"].split(".")
        kind = f"{words[0]} {words[2]}" if len(words) == 3 else words[0]
        kinds.setdefault(kind, {}).setdefault(row["removed"], []).append((int(words[1]), row["change"]))
    charts = []
    for kind, curves in kinds.items():
        series = [svg.Series(name, points, _ramp(i / max(len(curves) - 1, 1)), "circle")
                  for i, (name, points) in enumerate(curves.items())]
        layers = sorted({x for points in curves.values() for x, _ in points})
        charts.append(figure(f"{kind}: loss without it, less that of the whole model", series, xlabel="layer",
                             xticks=layers if len(layers) <= 12 else None))
    return [c for c in charts if c]


def remarks(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """What the speed rows say, in sentences."""
    timed = [r for r in rows if r.get("steady_seconds")]
    by = {role: {r["audio"]: r for r in timed if r["who"] == role} for role in ("teacher", "student")}
    found, common = [], sorted(by["teacher"].keys() & by["student"].keys())
    if common:
        most = common[-1]
        t, s = by["teacher"][most], by["student"][most]
        text = (
            f"At {length(most)} of audio the student takes {seconds(s['steady_seconds'])}, "
            f"the teacher {seconds(t['steady_seconds'])}"
        )
        if s.get("peak_bytes") and t.get("peak_bytes"):
            text += f"; at their peak they need {memory(s['peak_bytes'])} and {memory(t['peak_bytes'])}"
        found.append(text + ".")
    for role in ("student", "teacher"):
        long = sorted(a for a in by[role] if a >= ORDINARY)
        if len(long) > 1:
            first, last = (by[role][a]["steady_seconds"] / a for a in (long[0], long[-1]))
            change = f"{100 * (last / first - 1):+.0f}{NBSP}%".replace("-", "−")
            found.append(
                f"From {length(long[0])} to {length(long[-1])} the {role}'s time per second of audio changes "
                f"by {change}."
            )
    a, b = summary.get("teacher") or {}, summary.get("student") or {}
    if all(m.get("gmacs") and m.get("seconds_per_second") for m in (a, b)):
        if b["gmacs"] < 0.98 * a["gmacs"] and b["seconds_per_second"] > 0.98 * a["seconds_per_second"]:
            found.append(
                f"The student needs {100 * (1 - b['gmacs'] / a['gmacs']):.0f}{NBSP}% fewer multiply-accumulates "
                f"at 10{NBSP}s of audio, but no less time: the saving is not a measured one at this length."
            )
    return found


def conditions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Device, batch, dtype, threads and versions of speed rows, each combination once."""
    found = []
    for row in rows:
        parts = [
            row.get("device"),
            row.get("threads") and f"{row['threads']} threads",
            row.get("batch") and f"batch {row['batch']}",
            row.get("dtype"),
            *(f"{k} {v}" for k, v in (row.get("versions") or {}).items()),
        ]
        found.append(", ".join(str(p) for p in parts if p))
    return [f for f in dict.fromkeys(found) if f]
