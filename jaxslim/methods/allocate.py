"""How much of every block to keep under one budget: greedy over convex frontiers, by error per cost saved.

A group of curves (Q-K of a layer; V-O of a layer; its FFN) offers points: what is saved, what is lost, which ranks. Its
lower convex hull makes greedy choice optimal: all edges of all hulls, flattest first, until enough is saved (Lagrange's
argument for separable convex losses). The losses of different groups are made comparable by a sensitivity each, the
divergence of the model's outputs that a unit of the group's own error was measured to cause.
"""
from __future__ import annotations

import functools
import itertools
import math
import time
from typing import NamedTuple

import jax
import numpy as np

from jaxslim import cost as costs
from jaxslim.formulas import inputs
from jaxslim.methods.factor import FIELD, Curve
from jaxslim.models import bind
from jaxslim.models.roles import prefix, roles
from jaxslim.spec import Spec, kind
from jaxslim.speed_worker import random_model

Setting = tuple[tuple[Curve, int], ...]   # ranks to keep; curves that are not named stay whole


class Point(NamedTuple):
    saved: float
    loss: float
    setting: Setting


class Step(NamedTuple):
    """A point of the frontier: what all groups together save and lose."""

    saved: float
    loss: float
    group: int
    point: Point


def fields(curve: Curve, r: int) -> dict[str, int]:
    """What the Spec says of a block whose `curve` is cut to r."""
    return {FIELD.get(curve.kind, f"{curve.kind}_rank"): r}


class Prices(NamedTuple):
    of: dict[tuple[str, str], np.ndarray]   # block, kind -> (2, n): ranks, and the cost of the block when they are kept
    whole: float                            # seconds of the model where the cost is latency, else 0


def prices(spec: Spec, params, found: list[Curve], cost: str, seconds: float, minimum: int) -> Prices:
    """What ranks cost, in parameters, MACs or seconds."""
    if cost == "latency":
        return latencies(spec, params, found, seconds, minimum)
    table = {}
    for c in found:
        slope, whole = price(spec, params, c, cost, seconds)
        ends = (0, c.full) if c.kind in FIELD else (0, whole / slope)   # factors cost as much as the matrix there
        table[c.block, c.kind] = np.array([ends, [whole - slope * (ends[1] - r) for r in ends]])
    return Prices(table, 0.0)


def price(spec: Spec, params, curve: Curve, cost: str, seconds: float) -> tuple[float, float]:
    """(cost of one rank, cost as it is) of what `curve` cuts, in parameters or MACs."""
    names, block = roles(spec, curve.block), curve.block
    if cost == "macs":
        at = lambda r: costs.macs(spec.with_block(block, **fields(curve, r)), seconds).blocks[block]  # noqa: E731
        whole, slope = costs.macs(spec, seconds).blocks[block], float(at(2) - at(1))
        return slope, whole - (at(1) - slope)          # both less what no rank changes
    if curve.kind not in FIELD:
        out, into = np.shape(params[f"{names[curve.kind]}.weight"])
        return float(out + into), float(out * into)
    shrinks = {"qk": ("q.weight", "q.bias", "k.weight", "k.bias", "pos.weight", "bias_u", "bias_v"),
               "vo": ("v.weight", "v.bias", "o.weight"), "units": ("up.weight", "up.bias", "down.weight")}[curve.kind]
    keys = [".".join([names[role], *part]) for role, *part in (s.split(".") for s in shrinks) if role in names]
    size = float(sum(np.size(params[k]) for k in keys if k in params))
    return size / curve.full, size


def latencies(spec: Spec, params, found: list[Curve], seconds: float, minimum: int, repeats: int = 5) -> Prices:
    """Seconds by rank, measured: whole models with random weights in which one kind is cut alike in all its blocks; the
    fastest of `repeats` calls in turn. The difference to the uncut model is shared among the blocks. Times that grow as
    the rank falls are levelled."""
    shapes, kinds = {("", 0): spec}, {}
    for c in found:
        kinds.setdefault((kind(c.block), c.kind), []).append(c)
    for name, cs in kinds.items():
        most = min(c.full for c in cs)
        for r in sorted({minimum, most // 4, most // 2, 3 * most // 4} - {0}):
            shapes[name, r] = functools.reduce(lambda s, c: s.with_block(c.block, **fields(c, r)), cs, spec)  # noqa: B023
    batch = {k: np.zeros(x.shape, x.dtype) for k, x in inputs(spec, seconds, 1).items()}
    models, best = [random_model(s) for s in shapes.values()], [math.inf] * len(shapes)
    for i in range(repeats + 1):
        for j, model in enumerate(models):
            started = time.perf_counter()
            jax.block_until_ready(model(**batch))
            best[j] = min(best[j], time.perf_counter() - started) if i else math.inf     # the first one compiles
    if jax.process_count() > 1:  # all hosts must choose the same ranks
        from jax.experimental import multihost_utils

        best = multihost_utils.broadcast_one_to_all(np.array(best))
    times, table = dict(zip(shapes, best, strict=True)), {}
    whole = times["", 0]
    for name, cs in kinds.items():
        at = [r for n, r in shapes if n == name]
        gained = np.minimum.accumulate([max(whole - times[name, r], 0.0) / len(cs) for r in at])
        for c in cs:
            slope, size = price(spec, params, c, "params", seconds)
            table[c.block, c.kind] = np.array([[*at, max(at[-1] + 1, size / slope)],
                                               [whole - g for g in [*gained, 0.0]]])
    return Prices(table, whole)


def ranks(curve: Curve, multiple_of: int, minimum: int) -> list[int]:
    """Ranks that may be kept, falling, without the full one."""
    return [r for r in range((curve.full - 1) // multiple_of * multiple_of, 0, -multiple_of) if r >= minimum]


def points(curve: Curve, price: np.ndarray, weight: float, allowed: list[int]) -> list[Point]:
    """What keeping each of `allowed` saves and loses; ranks that save nothing are left out."""
    found = [Point(float(price[1, -1] - np.interp(r, *price)), weight * float(curve.tail[r]), ((curve, r),))
             for r in allowed]
    return [p for p in found if p.saved > 0]


def both(first: list[Point], second: list[Point]) -> list[Point]:
    """Points that cut two curves of a block independently, along their common frontier."""
    at, out = [Point(0.0, 0.0, ())] * 2, []
    for step in path([first, second]):
        at[step.group] = step.point
        out.append(Point(at[0].saved + at[1].saved, at[0].loss + at[1].loss, at[0].setting + at[1].setting))
    return out


def hull(found: list[Point]) -> list[Point]:
    """Lower convex hull of points and the origin, by what is saved."""
    best: list[Point] = [Point(0.0, 0.0, ())]
    for p in sorted(found, key=lambda p: (p.saved, p.loss)):
        if p.saved <= best[-1].saved:
            continue
        while len(best) > 1 and slope(best[-2], p) <= slope(best[-2], best[-1]):
            best.pop()
        best.append(p)
    return best


def slope(a: Point, b: Point) -> float:
    return (b.loss - a.loss) / (b.saved - a.saved)


def path(groups: list[list[Point]]) -> list[Step]:
    """The frontier from nothing saved to the floor: edges of all hulls, flattest first."""
    edges = [(slope(a, b), i, j, a, b) for i, g in enumerate(groups)
             for j, (a, b) in enumerate(itertools.pairwise(hull(g)))]
    saved = loss = 0.0
    steps = []
    for _, i, _, a, b in sorted(edges, key=lambda e: e[:3]):
        saved, loss = saved + b.saved - a.saved, loss + b.loss - a.loss
        steps.append(Step(saved, loss, i, b))
    return steps


def choose(groups: list[list[Point]], target: float) -> tuple[Setting, float, float]:
    """(ranks, saved, loss) of the least loss that saves `target` (all there is, if less); the last edge is cut where it
    is enough."""
    at: dict[int, Point] = {}
    saved = loss = 0.0
    for step in path(groups):
        if saved >= target:
            break
        before = at.get(step.group, Point(0.0, 0.0, ()))
        enough = [p for p in groups[step.group]
                  if saved + p.saved - before.saved >= target and p.loss <= step.point.loss]
        now = min(enough, key=lambda p: p.loss, default=step.point)
        saved, loss, at[step.group] = saved + now.saved - before.saved, loss + now.loss - before.loss, now
    return tuple(itertools.chain.from_iterable(p.setting for p in at.values())), saved, loss


def uniform(groups: list[list[Point]], target: float) -> tuple[Setting, float, float]:
    """The same share of the largest saving everywhere (ablation of `choose`)."""
    largest = [max((p.saved for p in g), default=0.0) for g in groups]
    share = min(target / max(sum(largest), 1e-30), 1.0)
    picked = [min((p for p in g if p.saved >= share * most), key=lambda p: (p.saved, p.loss))
              for g, most in zip(groups, largest, strict=True) if g and share > 0]
    return (tuple(itertools.chain.from_iterable(p.setting for p in picked)), sum(p.saved for p in picked),
            sum(p.loss for p in picked))


def total(spec: Spec, cost: str, seconds: float, sides: tuple[str, ...], of: str) -> float:
    """What the budget is a share of: the model, or its layers and front end without head, embeddings, other side."""
    if cost == "macs":
        counts = costs.macs(spec, seconds).blocks
        left_out = ("head", "embedding", "pooler")
        return float(sum(n for b, n in counts.items() if of == "model" or b not in left_out and
                         not (b.split(".")[0] in ("encoder", "decoder") and b.split(".")[0] not in sides)))
    shapes = bind.shapes(spec)
    if of == "model":
        return float(sum(int(np.prod(x.shape)) for x in shapes.values()))
    inner = prefix(spec)
    starts = tuple(f"{inner}{side}." for side in sides) if spec.family == "whisper" else (inner,)
    return float(sum(int(np.prod(x.shape)) for name, x in shapes.items()
                     if name.startswith(starts) and "embed" not in name.removeprefix(inner).split(".")[0]
                     and ".embed_tokens." not in name))


def group_points(found: list[Curve], weights, prices: Prices, multiple_of: int, minimum: int) -> list[list[Point]]:
    """Groups of points from curves and the sensitivity of each (`weights`, by block and kind)."""
    made = {(c.block, c.kind): points(c, prices.of[c.block, c.kind], weights[c.block, c.kind],
                                      ranks(c, multiple_of, minimum)) for c in found}
    groups = []
    for block in dict.fromkeys(c.block for c in found):
        of = {k: p for (b, k), p in made.items() if b == block}
        if kind(block) in ("attention", "cross"):
            groups += list(of.values())
        else:
            groups.append(of.get("units", []) + both(of.get("up", []), of.get("down", [])))
    return groups


def frontier(groups: list[list[Point]], whole: float, every: float = 0.05) -> list[dict[str, float]]:
    """Rows {removed, divergence} along the path, one for every share `every` of `whole`, and the floor."""
    rows, due, steps = [], every, path(groups)
    for step in steps:
        if step.saved / whole >= due or step is steps[-1]:
            rows.append({"removed": step.saved / whole, "divergence": step.loss})
            due = (step.saved / whole // every + 1) * every
    return rows
