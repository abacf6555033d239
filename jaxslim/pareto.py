"""What slimming cost and bought over any set of runs: word error rate against parameters, MACs, time and memory.

A run is a folder with summary.json (`jaxslim slim`), or a JSON file with models by name or in a list, under the keys of
a summary (`wer`, `params`, `gmacs`, `seconds_per_second`, `peak_bytes`). A model is on the frontier of a cost when no
other one has a lower error at the same or a lower cost, nor the same error at a lower cost.
"""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from jaxslim import figures, svg
from jaxslim._version import __version__
from jaxslim.figures import NBSP, ROLES, memory, seconds

MILLIONS = lambda n: f"{n / 1e6:.3g}{NBSP}M" if n >= 1e6 else f"{n / 1e3:.3g}{NBSP}k"  # noqa: E731
COSTS = (  # key, title, format
    ("params", "Parameters", MILLIONS), ("gmacs", f"GMACs at 10{NBSP}s", "{:.3g}".format),
    ("seconds_per_second", "Time per second of audio", seconds), ("peak_bytes", "Peak memory", memory),
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One model of a run."""

    run: str
    role: str
    values: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run}, {self.role}" if self.run else self.role


def page(runs: Sequence[str | os.PathLike], out: str | os.PathLike = "pareto.html") -> str:
    """Writes one self-contained page over all runs and returns its path. Raises ReportError."""
    from jaxslim.report import ReportError, templates

    found = points(runs)
    if not found:
        raise ReportError(f"None of {', '.join(map(str, runs))} has a model with a word error rate; run `jaxslim "
                          "slim`, or give JSON files with wer and params.")
    edges = {key: frontier(found, key) for key, *_ in COSTS}
    rows = [{"run": p.run, "role": p.role, "color": _style(p.role)[0], "wer": _wer(p.values), "cells": [
        {"text": form(p.values[key]) if _known(p, key) else "–", "best": p in edges[key]} for key, _, form in COSTS]}
        for p in sorted(found, key=lambda p: p.values["wer"])]
    sizes = sorted({p.values["n"] for p in found if p.values.get("n")})
    charts = [c for key, title, form in COSTS if (c := chart(found, key, title, form, edges[key]))]
    html = templates().get_template("pareto.html.j2").render(
        title=f"{len(found)} models of {len(runs)} runs", version=__version__, charts=charts, rows=rows,
        titles=[title for _, title, _ in COSTS], sizes=sizes)
    path = epath.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    return os.fspath(path)


def points(runs: Sequence[str | os.PathLike]) -> list[Point]:
    """The models of all runs that have a word error rate, a teacher of several runs once. Raises ReportError."""
    from jaxslim.report import ReportError

    found: dict[Any, Point] = {}
    for run in runs:
        path = epath.Path(run)
        path, name = (path / "summary.json", path.name) if path.is_dir() else (path, path.stem)
        try:
            tree = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ReportError(f"{run} is no run folder with summary.json, and no JSON file: "
                              f"{getattr(error, 'strerror', None) or error}.") from error
        models = ([(role, tree[role]) for role in ROLES if tree.get(role)] if isinstance(tree, dict) and (
            ROLES.keys() & tree.keys()) else list(tree.items()) if isinstance(tree, dict) else
            [(str(m.get("name", i)), m) for i, m in enumerate(tree) if isinstance(m, dict)])
        for role, values in models:
            if isinstance(values, dict) and isinstance(values.get("wer"), int | float):
                same = values.get("fingerprint") if role == "teacher" else None
                point = Point("" if same else name, role, values)
                found.setdefault((role, same, values["wer"]) if same else (name, role, len(found)), point)
    return list(found.values())


def frontier(found: Sequence[Point], cost: str) -> list[Point]:
    """Those that no other beats in this cost and in error, cheapest first; equal ones all stay."""
    known = [p for p in found if _known(p, cost)]
    at = lambda p: (p.values[cost], p.values["wer"])  # noqa: E731
    beaten = lambda p: any(at(q) != at(p) and at(q)[0] <= at(p)[0] and at(q)[1] <= at(p)[1] for q in known)  # noqa: E731
    return sorted((p for p in known if not beaten(p)), key=at)


def chart(found: Sequence[Point], key: str, title: str, form, edge: Sequence[Point]) -> dict[str, Any]:
    """A figure of the template; {} when fewer than two models have this cost."""
    known = [p for p in found if _known(p, key)]
    if len(known) < 2:
        return {}
    costs = [p.values[key] for p in known]
    log = min(costs) > 0 and max(costs) > 8 * min(costs)
    line = svg.Series("frontier", [(p.values[key], 100 * p.values["wer"]) for p in edge], "var(--soft)", dash=True)
    marks = [svg.Series(p.name, [(p.values[key], 100 * p.values["wer"])], *_style(p.role)) for p in known]
    picture = svg.chart([line, *marks] if len(edge) > 1 else marks, label=f"Word error rate against {title}",
                        xlabel=title + (", log scale" if log else ""), xlog=log, xformat=form)
    legend = {s.color: s for s in (svg.Series(p.role if p.role in ROLES else "model", [], *_style(p.role))
                                   for p in known)}
    series = [dict(name=s.name, color=s.color, marker=s.marker, dash=s.dash) for s in (*legend.values(), line)]
    return {"title": title, "note": "word error rate, %", "svg": picture, "series": series, "ramp": ()}


def _known(p: Point, key: str) -> bool:
    return isinstance(p.values.get(key), int | float) and p.values[key] > 0


def _style(role: str) -> tuple[str, str]:
    return ROLES.get(role, figures.SPARE[0])


def _wer(values: dict[str, Any]) -> str:
    text = f"{100 * values['wer']:.1f}{NBSP}%"
    low, high = values.get("wer_low"), values.get("wer_high")
    return text if low is None or high is None else f"{text} ({100 * low:.1f}–{100 * high:.1f})"
