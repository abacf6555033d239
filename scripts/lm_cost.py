"""Tokens a second, and bytes kept between two tokens, against the length of the text: one row a model and length.

    python scripts/lm_cost.py runs/lm/final runs/lm-mamba2/final [--lengths 10 100 1000 10000] [--tokens 64]

Batch 1. A softmax model reads its whole cache for every token, so a cache of LENGTH `places` is made, room for what is
timed at least, and --tokens of it are timed (median of a token, the first 8 left out). A model without softmax layers
generates LENGTH tokens in truth.
`live_bytes` is what JAX holds in all at the end, weights included.
"""
from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time

import jax
import numpy as np

from jaxslim import causal, cost, hub
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers


def rows(name: str, lengths: list[int], tokens: int) -> list[dict]:
    model, found = hub.load(name), []
    model = model.replace(params=jax.device_put(model.params))
    grows = bool(causal.softmax_layers(model))
    for length in lengths:
        prompt, times = np.full((1, 8), 97, np.int32), []
        count = tokens + 8 if grows else max(length, 10)
        places = max(length, 32 + count) if grows else length                # prompts are padded to 32 tokens
        stream = causal.stream(model, prompt, places=places)
        last = time.perf_counter()
        for _ in itertools.islice(stream, count):
            now = time.perf_counter()
            times.append(now - last)
            last = now
        live = sum(x.nbytes for x in jax.live_arrays())
        middle = statistics.median(times[8:] or times)
        found.append({"model": name, "params": cost.params(model.spec), "softmax_layers": causal.softmax_layers(model),
                      "length": length, "places": places if grows else 0, "generated": count,
                      "token_seconds": middle, "tokens_per_second": 1 / middle,
                      "state_bytes": causal.state_bytes(model, 1, places), "live_bytes": live,
                      "fingerprint": model.fingerprint, "device": _cpu(), "threads": len(cpu_numbers()),
                      "versions": _versions("jax", "jaxlib")})
        del stream
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--lengths", nargs="+", type=int, default=[10, 100, 1000, 10000])
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    print(json.dumps([r for name in args.models for r in rows(name, args.lengths, args.tokens)], indent=1))


if __name__ == "__main__":
    main()
