"""How much of the teacher's advantage over log-mel a model keeps, with a bootstrap over test items.

Retention of a task = (model - log-mel) / (teacher - log-mel): 1 = the teacher, 0 = log-mel, above 1 better than the
teacher. A task on which the teacher is not resolved to be better than log-mel (the lower end of the paired 95 %
interval is not above 0) says nothing of retention and is left out of the mean. Every resample draws the items of each
task once for all models.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxslim.superb.tasks import Arrays, Task

RESAMPLES = 500


def retention(tasks: Sequence[Task], found: Mapping[str, Mapping[str, Arrays]], model: str = "model",
              resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """
    Args:
      found: role ("log-mel", "teacher", `model`) -> task name -> arrays of the task.
    Returns:
      {"tasks": {name: {retention, low, high, resolved}}, "mean", "low", "high", "of": names in the mean}; `mean` is
      None without a resolved task.
    """
    out, drawn = {}, []
    for number, task in enumerate(tasks):
        arrays = [found[role][task.name] for role in ("log-mel", "teacher", model)]
        count, rng = task.items(arrays[1]), np.random.default_rng([seed, number])
        sign = 1.0 if task.better == "higher" else -1.0
        values = np.array([[sign * task.value(a, rows) for a in arrays] for rows in
                           [np.arange(count), *rng.integers(0, count, (resamples, count))]])         # (1 + R, 3)
        ahead, kept = values[:, 1] - values[:, 0], values[:, 2] - values[:, 0]
        share = kept / np.where(ahead == 0, np.nan, ahead)
        resolved = bool(np.nanquantile(ahead[1:], 0.025) > 0 and ahead[0] > 0)
        low, high = (np.nanquantile(share[1:], q) if resolved else np.nan for q in (0.025, 0.975))
        out[task.name] = {"retention": _number(share[0] if resolved else np.nan), "low": _number(low),
                          "high": _number(high), "resolved": resolved}
        if resolved:
            drawn.append(share)
    if not drawn:
        return {"tasks": out, "mean": None, "low": None, "high": None, "of": []}
    mean = np.mean(drawn, 0)
    low, high = np.nanquantile(mean[1:], [0.025, 0.975])
    return {"tasks": out, "mean": float(mean[0]), "low": float(low), "high": float(high),
            "of": [n for n, row in out.items() if row["resolved"]]}


def _number(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
