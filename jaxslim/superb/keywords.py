"""Which words a sentence holds (stands for SUPERB's keyword spotting): a linear on the mean over time.

Words: of at least LEAST letters, in eight sentences of train and four of test or more.
"""
from __future__ import annotations

from collections import Counter

import numpy as np
import optax
from flax import nnx

from jaxslim.data import DataError
from jaxslim.superb.clips import find
from jaxslim.superb.features import Features
from jaxslim.superb.heads import Head, Pooled, fit
from jaxslim.superb.metrics import mean_average_precision
from jaxslim.superb.tasks import Options, Task

LEAST, TRAIN, TEST = 3, 8, 4
COMMON = {"the", "for", "and", "you", "your", "this", "are", "has"}   # said of anything: left out


def words_of(clips, train: list[int], test: list[int], share: float = 1.0) -> list[str]:
    """The words that are asked for, `share` of the usual counts being enough in a smaller set."""
    count = lambda index: Counter(w for i in index for w in set(clips[i].text.split()))  # noqa: E731
    a, b = count(train), count(test)
    return sorted(w for w in a if len(w) >= LEAST and w not in COMMON and a[w] >= max(2, TRAIN * share)
                  and b[w] >= max(1, TEST * share))


def binary(outputs, batch):
    return optax.sigmoid_binary_cross_entropy(outputs, batch["labels"]).mean()


def run(features: Features, o: Options):
    clips = features.clips
    train, test = (find(clips, "sentence", split) for split in ("train", "test"))
    words = words_of(clips, train, test, min(1.0, o.limit / 400) if o.limit else 1.0)
    if not words:
        raise DataError("micro-superb keyword: no word is in enough training and test sentences; raise the limit.")
    present = lambda index: np.array([[w in clips[i].text.split() for w in words] for i in index])  # noqa: E731
    x, y = features.pooled(train)[:, :, None], present(train).astype(np.float32)
    given = {"states": x, "lengths": np.ones(len(x), np.int32), "labels": y}
    asked = {"states": features.pooled(test)[:, :, None], "lengths": np.ones(len(test), np.int32)}
    scores, shares = [], []
    for seed in range(o.draws):
        head, share = fit(Head(features.layers, Pooled(features.width, len(words), nnx.Rngs(seed))), binary,
                          lambda rng: iter([given]), o.pooled_steps, o.pooled_rate, seed)
        scores.append(head(asked))
        shares.append(share)
    return {"scores": np.array(scores), "present": present(test)}, {
        "words": words, "layer_weights": np.mean(shares, 0).round(4).tolist(), "test_clips": len(test)}


def value(a, rows: np.ndarray) -> float:
    return float(np.mean([mean_average_precision(s[rows], a["present"][rows]) for s in a["scores"]]))


TASK = Task("keyword", "mAP", "higher", run, lambda a: a["scores"].shape[1], value)
