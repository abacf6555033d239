"""What a training step costs beside its compute: a 24-layer model of width 8 is all dispatch.

    python scripts/bench_dispatch.py [--steps 100] [--json]

Wall time of a step of the loop (batch to the device, step, nothing fetched) and of a bare jitted AdamW update of as
many arrays, medians of --steps; `host_ms` is the part of the step until the call returns, which hides behind the
device's work where that takes longer. Run it on a quiet machine.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxslim.config import Train
from jaxslim.methods.finetune import Finetune
from jaxslim.models import bind
from jaxslim.slim import Slim
from jaxslim.spec import Spec
from jaxslim.train import mesh as M
from jaxslim.train import step as S


def median(run, steps: int, wait: bool = True) -> float:
    """Milliseconds of `run`, until what it returns is there or, without `wait`, until it returns."""
    times = []
    for _ in range(steps + 10):
        start = time.perf_counter()
        out = run()
        if wait:
            jax.block_until_ready(out)
        times.append(time.perf_counter() - start)
        jax.block_until_ready(out)
    return 1000 * statistics.median(times[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config(hidden_size=8, num_hidden_layers=24, num_attention_heads=2, intermediate_size=8,
                            conv_dim=[8, 8], conv_kernel=[10, 8], conv_stride=[5, 8], num_feat_extract_layers=2,
                            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=8,
                            mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
                            activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0).to_dict()
    spec, rng = Spec(config, "wav2vec2", "ctc"), np.random.default_rng(0)
    model = Slim(spec, {k: 0.1 * rng.standard_normal(v.shape).astype(np.float32) for k, v in bind.shapes(spec).items()})
    mesh, cfg = M.make("data=1", jax.devices()[:1]), Train(max_steps=10**6)
    state, frozen, tx = S.init(Finetune(), model, cfg, mesh)
    step = S.make(Finetune(), spec, tx, cfg, state, mesh)
    rows = {"input_values": rng.standard_normal((1, 800)).astype(np.float32),
            "attention_mask": np.ones((1, 800), np.int32), "labels": np.array([[3, 4]], np.int32)}

    def ours():
        nonlocal state
        state, metrics = step(state, frozen, None, M.batch(rows, mesh))
        return metrics

    params = {k: jnp.array(v) for k, v in model.params.items()}
    opt = optax.adamw(1e-3)

    def bare_update(params, moments):
        updates, moments = opt.update(params, moments, params)
        return optax.apply_updates(params, updates), moments

    bare, moments = jax.jit(bare_update, donate_argnums=(0, 1)), opt.init(params)

    def update():
        nonlocal params, moments
        params, moments = bare(params, moments)
        return params

    found = {"arrays": len(params), "step_ms": round(median(ours, args.steps), 2),
             "host_ms": round(median(ours, args.steps, wait=False), 2),
             "bare_update_ms": round(median(update, args.steps), 2), "device": jax.devices()[0].device_kind}
    found["difference_ms"] = round(found["step_ms"] - found["bare_update_ms"], 2)
    print(json.dumps(found) if args.json else
          f"{found['arrays']} arrays: step {found['step_ms']} ms (host {found['host_ms']} ms), bare AdamW update "
          f"{found['bare_update_ms']} ms, difference {found['difference_ms']} ms")


if __name__ == "__main__":
    main()
