"""Query by example: a spoken word finds the sentences that hold it, by subsequence dynamic time warping; no training.

Queries are single words of train, documents the sentences of two words or more. Distances of frames are one minus
the cosine; each query frame's are scaled to 0 to 1 over a document (as s3prl does), and a document's score is minus the
cost of the best path per query frame. The layer is chosen on validation sentences.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.data import DataError
from jaxslim.superb.clips import find
from jaxslim.superb.features import Features
from jaxslim.superb.metrics import average_precision
from jaxslim.superb.tasks import Options, Task

SHORTEST = 3   # letters of a query


@functools.partial(jax.jit)
def subsequence(query, document, length):
    """Least cost per query frame of a path from the query's first to its last frame, anywhere in the document.

    Args: query (N, D); document (T, D), of which `length` frames are valid. Steps: one on in either or both.
    """
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))  # noqa: E731
    cost = 1 - unit(query.astype(jnp.float32)) @ unit(document.astype(jnp.float32)).T                # (N, T)
    valid = jnp.arange(cost.shape[1]) < length
    low = jnp.where(valid, cost, jnp.inf).min(1, keepdims=True)
    high = jnp.where(valid, cost, -jnp.inf).max(1, keepdims=True)
    cost = (cost - low) / jnp.maximum(high - low, 1e-6)
    last = warp(cost, valid)
    return jnp.where(valid, last, jnp.inf).min() / cost.shape[0]


def warp(cost, valid):
    """Last row (T,) of D[n, t] = cost[n, t] + min(D[n-1, t], D[n-1, t-1], D[n, t-1]), D[0, t] = cost[0, t].

    The term D[n, t-1] along a row is undone by sums: with C the running sum of a row's costs,
    D[n, t] = C[t] + min over s <= t of (m[s] - C[s-1]), m[s] = min(D[n-1, s], D[n-1, s-1])."""
    def row(before, cost):
        total = jnp.cumsum(cost)
        best = jnp.minimum(before, jnp.concatenate([jnp.full(1, jnp.inf), before[:-1]]))
        return total + jax.lax.cummin(best - (total - cost)), None

    cost = jnp.where(valid, cost, 1.0)
    return jax.lax.scan(row, cost[0], cost[1:])[0]


@jax.jit
def _layers(query, documents, lengths):
    """query (L, N, D), documents (B, L, T, D) -> (B, L)."""
    one = jax.vmap(subsequence, (0, 0, None))
    return jax.lax.map(lambda x: one(query, *x), (documents, lengths))


def search(features: Features, queries: list[int], documents: list[int]) -> np.ndarray:
    """Scores (L, queries, documents), higher = more alike."""
    out = np.zeros((features.layers, len(queries), len(documents)), np.float32)
    lengths = np.array([features.states(i).shape[1] for i in documents])
    order = np.argsort(lengths)
    cut = [features.states(i)[:, ::1] for i in queries]
    for part in np.array_split(order, max(1, len(order) // 24)):   # documents of about one length
        width = -(-lengths[part].max() // 50) * 50
        stack = np.zeros((len(part), features.layers, width, features.width), np.float16)
        for b, k in enumerate(part):
            stack[b, :, : lengths[k]] = features.states(documents[k])
        stack = jnp.asarray(stack)
        for q, x in enumerate(cut):
            x = _even(x)
            out[:, q, part] = -np.asarray(_layers(x, stack, lengths[part])).T
    return out


def _even(x: np.ndarray) -> np.ndarray:
    """A query of (L, N, D) with N a multiple of 10 (few shapes): frames are taken evenly, the last ones twice."""
    n = -(-x.shape[1] // 10) * 10
    return x[:, np.linspace(0, x.shape[1] - 1, n).round().astype(int)]


def run(features: Features, o: Options):
    clips = features.clips
    words = {}
    for i in find(clips, "sentence", "train"):   # the first clip of each word
        if len(clips[i].text.split()) == 1 and len(clips[i].text) >= SHORTEST:
            words.setdefault(clips[i].text, i)
    scores, hits = {}, {}
    for split in ("validation", "test"):
        docs = [i for i in find(clips, "sentence", split) if len(clips[i].text.split()) > 1]
        holds = {w: np.array([w in clips[d].text.split() for d in docs]) for w in words}
        asked = [w for w in words if holds[w].any()]
        if not asked:
            raise DataError(f"micro-superb query: no single word of train is in a {split} sentence; raise the limit.")
        found = search(features, [words[w] for w in asked], docs)                        # (L, Q, documents)
        scores[split] = np.array([[average_precision(s, holds[w]) for s, w in zip(layer, asked)] for layer in found])
        hits[split] = asked
    best = int(scores["validation"].mean(1).argmax())
    return {"precision": scores["test"][best]}, {"layer": best, "queries": len(hits["test"]), "by_layer": scores[
        "test"].mean(1).round(4).tolist()}


TASK = Task("query", "mAP", "higher", run, lambda a: len(a["precision"]),
            lambda a, rows: float(a["precision"][rows].mean()))
