"""Metrics of the suite that no dependency has: average precision, equal error rate, balanced accuracy. numpy only."""
from __future__ import annotations

import numpy as np


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Mean precision at every relevant item, items in falling order of `scores` (N,); ties share their precision.
    NaN without a relevant item. Equals scikit-learn's average_precision_score."""
    if not relevant.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    last = np.append(np.diff(scores[order]) != 0, True)   # where a group of equal scores ends
    hits, ranks = hits[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) * hits / ranks).sum() / hits[-1])


def mean_average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Mean over columns of (N, W) that have something relevant."""
    each = [average_precision(s, r) for s, r in zip(scores.T, relevant.T) if r.any()]
    return float(np.mean(each)) if each else float("nan")


def equal_error_rate(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The rate at which misses equal false alarms, between two thresholds on the line that joins them.

    Args: scores (P,), higher = more likely the same; same (P,) bool; weights (P,) of the trials, None = 1 each.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    accepted = lambda kind: np.append(0.0, np.cumsum(np.where(kind, weights, 0.0)[order])[last])  # noqa: E731
    hits, alarms = accepted(same), accepted(~same)
    if not (hits[-1] and alarms[-1]):
        return float("nan")
    miss, alarm = 1 - hits / hits[-1], alarms / alarms[-1]
    i = int(np.argmax(alarm >= miss))                     # the first threshold beyond the crossing
    gap = (miss - alarm)[i - 1 : i + 1]
    share = gap[0] / (gap[0] - gap[1])
    return float(alarm[i - 1] + share * (alarm[i] - alarm[i - 1]))


def balanced_accuracy(correct: np.ndarray, group: np.ndarray) -> float:
    """Mean over groups (N,) of the share correct (S, N)."""
    return float(np.mean([correct[:, group == g].mean() for g in np.unique(group)]))
