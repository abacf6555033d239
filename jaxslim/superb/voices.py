"""Who speaks and which language, on pieces of one second, with few training clips, so that nothing is saturated.

* `language`: English or Spanish, both of one voice, so that only the language differs.
* `speaker`: four voices; the one that speaks English in test was heard in Spanish only.
* `verification`: no training: cosine of means over time; all trials are across languages, the same voice in English and
  Spanish, different voices in any two. The layer is chosen on the training pieces.
"""
from __future__ import annotations

import numpy as np
import optax
from flax import nnx

from jaxslim.data import DataError
from jaxslim.superb.clips import find
from jaxslim.superb.features import Features
from jaxslim.superb.heads import Head, Pooled, fit
from jaxslim.superb.metrics import balanced_accuracy, equal_error_rate
from jaxslim.superb.tasks import Options, Task


def classify(features: Features, o: Options, train: dict[str, list[int]], test: dict[str, list[int]]):
    """A linear on the mean, from `shots` clips of each class, drawn anew `draws` times."""
    names = sorted(train)
    if least := [n for n in names if not train[n] or not test[n]]:
        raise DataError(f"micro-superb: no clips of {', '.join(least)}; raise the limit.")
    asked = [i for n in names for i in test[n]]
    truth = np.array([k for k, n in enumerate(names) for _ in test[n]])
    x = {"states": features.pooled(asked)[:, :, None], "lengths": np.ones(len(asked), np.int32)}
    correct, shares = [], []
    for seed in range(o.draws):
        rng = np.random.default_rng(seed)
        picked = [[int(i) for i in rng.permutation(train[n])[: o.shots]] for n in names]
        index, labels = sum(picked, []), np.repeat(np.arange(len(names)), list(map(len, picked)))
        given = {"states": features.pooled(index)[:, :, None], "lengths": np.ones(len(index), np.int32),
                 "labels": labels.astype(np.int32)}
        head, share = fit(Head(features.layers, Pooled(features.width, len(names), nnx.Rngs(seed))), entropy,
                          lambda rng, given=given: iter([given]), o.pooled_steps, o.pooled_rate, seed)
        correct.append(head(x).argmax(-1) == truth)
        shares.append(share)
    return {"correct": np.array(correct), "group": truth}, {
        "classes": names, "layer_weights": np.mean(shares, 0).round(4).tolist(), "test_clips": len(asked)}


def entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"]).mean()


def language(features: Features, o: Options):
    of = lambda split: {n: find(features.clips, "piece", split, n) for n in ("en", "es")}  # noqa: E731
    return classify(features, o, of("train"), of("test"))


def speaker(features: Features, o: Options):
    of = lambda split, first: {n: find(features.clips, "piece", split, n if n != "es" else first)  # noqa: E731
                               for n in ("es", "fr", "it", "ru")}
    return classify(features, o, of("train", "es"), of("test", "en"))


def trials(clips, index: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (P,), (P,) of places in `index` in different languages, and whether their voice is the same."""
    tongue, voice = (np.array([getattr(clips[i], a) for i in index]) for a in ("language", "speaker"))
    a, b = np.triu_indices(len(index), 1)
    across = tongue[a] != tongue[b]
    return a[across], b[across], voice[a[across]] == voice[b[across]]


def verification(features: Features, o: Options):
    found = {}
    for split in ("train", "test"):
        index = find(features.clips, "piece", split)
        a, b, same = trials(features.clips, index)
        x = features.pooled(index)                                                       # (N, L, D)
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
        alike = np.einsum("pld,pld->lp", x[a], x[b])
        found[split] = alike, a, b, same
    alike, _, _, same = found["train"]
    best = int(np.argmin([equal_error_rate(s, same) for s in alike]))
    alike, a, b, same = found["test"]
    return {"scores": alike[best], "a": a, "b": b, "same": same}, {
        "layer": best, "trials": len(a), "by_layer": [round(equal_error_rate(s, same), 4) for s in alike]}


def verified(arrays, rows: np.ndarray) -> float:
    """EER of the trials between drawn clips; a clip drawn twice counts twice."""
    times = np.bincount(rows, minlength=int(max(arrays["a"].max(), arrays["b"].max())) + 1)
    return equal_error_rate(arrays["scores"], arrays["same"], (times[arrays["a"]] * times[arrays["b"]]).astype(float))


def accuracy(arrays, rows: np.ndarray) -> float:
    return balanced_accuracy(arrays["correct"][:, rows], arrays["group"][rows])


def _items(arrays) -> int:
    return arrays["correct"].shape[1]


LANGUAGE = Task("language", "accuracy", "higher", language, _items, accuracy, 0.5)
SPEAKER = Task("speaker", "accuracy", "higher", speaker, _items, accuracy, 0.25)
VERIFICATION = Task("verification", "EER", "lower", verification,
                    lambda a: int(max(a["a"].max(), a["b"].max())) + 1, verified, 0.5)
