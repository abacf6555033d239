"""How near a student's hidden states are to the teacher's, without labels, on the test clips of all languages.

Which states are compared: of a generative student those it generates, with the teacher's of those numbers; of a model
of the teacher's depth and width each with each; else, for the teacher's states at a third, two thirds and the end, the
student's most alike by CKA, which needs no equal width (L1 and cosine are left out then).
"""
from __future__ import annotations

from typing import Any

import numpy as np

from jaxslim.methods import generate
from jaxslim.slim import Slim
from jaxslim.superb.clips import LANGUAGES, find
from jaxslim.superb.features import Features


def fidelity(student: Slim | None, have: Features, want: Features) -> dict[str, Any]:
    """`layers`: a row for each of the teacher's states that is compared: {layer, from, cka and, where widths fit, l1,
    cosine, scale = mean absolute value of the teacher's}, means over frames (CKA: over clips); `cka_LANGUAGE` means
    over the rows; generative students also `rollout`: rows of methods.generate.fidelity with `gap` = l1 - forced_l1.
    """
    clips = have.clips
    index = find(clips, "piece", "test") + find(clips, "sentence", "test")
    pairs, equal = _pairs(student, have, want)
    rows = []
    for t, candidates in pairs:
        cka = np.array([[linear_cka(have.raw(i)[s], want.raw(i)[t]) for s in candidates] for i in index])
        best = int(cka.mean(0).argmax())
        row = {"layer": t, "from": candidates[best], "cka": float(cka[:, best].mean())}
        for name in LANGUAGES:
            row[f"cka_{name}"] = float(np.mean([c for c, i in zip(cka[:, best], index) if clips[i].language == name]))
        if equal:
            row |= _distances(have, want, index, candidates[best], t)
        rows.append(row)
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k not in ("layer", "from")}
    return {"layers": rows, "mean": mean}


def _pairs(student: Slim | None, have: Features, want: Features) -> tuple[list[tuple[int, list[int]]], bool]:
    """[(teacher's state, candidates of the student)], whether their widths are equal."""
    if student is not None and student.spec.generator:
        numbers = generate.generated(student)
        return [(t, [have.layers - len(numbers) + k]) for k, t in enumerate(numbers)], have.width == want.width
    if (have.layers, have.width) == (want.layers, want.width):
        return [(t, [t]) for t in range(want.layers)], True
    last = want.layers - 1
    wanted = sorted({max(1, round(last * k / 3)) for k in (1, 2, 3)})
    return [(t, list(range(have.layers))) for t in wanted], False


def _distances(have: Features, want: Features, index: list[int], s: int, t: int) -> dict[str, float]:
    total, frames = np.zeros(3), 0
    for i in index:
        x, y = (f.raw(i)[k].astype(np.float32) for f, k in ((have, s), (want, t)))       # (T, D)
        n = min(len(x), len(y))
        x, y = x[:n], y[:n]
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        total += [np.abs(x - y).mean(-1).sum(), ((x * y).sum(-1) / np.maximum(norms, 1e-9)).sum(), np.abs(y).mean(
            -1).sum()]
        frames += n
    return dict(zip(("l1", "cosine", "scale"), (total / frames).tolist()))


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA (Kornblith et al., arXiv 1905.00414, section 3) of (T, D) and (T, D')."""
    n = min(len(x), len(y))
    x, y = (v[:n].astype(np.float32) - v[:n].astype(np.float32).mean(0) for v in (x, y))
    if n < min(x.shape[1], y.shape[1]):
        a, b = x @ x.T, y @ y.T
        return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / max(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y), 1e-12))


def rollout(student: Slim, teacher: Slim, extractor, clips) -> list[dict[str, float]]:
    """Rows of methods.generate.fidelity on the test pieces of all languages, and `gap`: what reading its own layers
    costs in L1."""
    index, batches = find(clips, "piece", "test"), []
    waves = [clips[i].wave() for i in index]
    size = min(20, len(waves))
    for start in range(0, len(waves), size):
        part = waves[start : start + size]
        batches.append(extractor([*part, *part[:1] * (size - len(part))], 16000))
    rows = generate.fidelity(student, teacher, batches)
    return [row | {"gap": row["l1"] - row["forced_l1"]} for row in rows]
