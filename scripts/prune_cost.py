"""What gates cost in a training step, and how long the cut takes, at the shape of hubert-base, random weights.

    python scripts/prune_cost.py [--shape hubert] [--seconds 5] [--batch-size 4] [--repeats 7]

Both steps (CTC with gates under a budget of MACs; the same without gates) are timed in turn, so that what disturbs one
disturbs both. Prints one JSON object: medians in seconds, `overhead` = gated / plain - 1, `cut_seconds` of slicing and
folding half of all units, `finish_seconds` of the whole end of the stage: settling the gates, the cut, and the check of
the cut model against the masked one, compilation included.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import numpy as np

from jaxslim import cost
from jaxslim.config import Group, Train
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.prune import Prune
from jaxslim.models import gates
from jaxslim.slim import Slim
from jaxslim.spec import Spec
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers, random_model
from jaxslim.train import mesh as M
from jaxslim.train import step as S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="hubert", help="a family, at its default size")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers, to try the script out")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    model = random_model(Spec({"mask_time_prob": 0.0, "layerdrop": 0.0, **changes}, args.shape, "ctc"))
    rng, samples = np.random.default_rng(0), round(args.seconds * 16000)
    rows = {"input_values": rng.standard_normal((args.batch_size, samples)).astype(np.float32),
            "attention_mask": np.ones((args.batch_size, samples), np.int32),
            "labels": rng.integers(4, 30, (args.batch_size, 40)).astype(np.int32)}
    main, extra = {"main": Group(1e-4)}, {"gates": Group(1e-1), "multipliers": Group(1e-1)}
    settings = {"plain": Train(groups=main, max_steps=100), "gated": Train(groups=main | extra, max_steps=100)}
    mesh = M.make("data=1", jax.devices()[:1])
    methods = {"plain": Finetune(), "gated": Prune(target={"macs": 0.5}, seconds=(args.seconds,))}
    runs, times = {}, {name: [] for name in methods}
    for name, method in methods.items():
        student = method.start(model, None, jax.random.key(0))
        state, frozen, tx = S.init(method, student, settings[name], mesh)
        runs[name] = [state, frozen, S.make(method, student.spec, tx, settings[name], state, mesh), student.spec]
    batch = M.batch(rows, mesh)
    for _ in range(2 + args.repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run[0], _ = jax.block_until_ready(run[2](run[0], run[1], None, batch))
            times[name].append(time.perf_counter() - started)
    middle = {k: statistics.median(v[2:]) for k, v in times.items()}
    state, frozen, _, spec = runs["gated"]
    gated = Slim(spec, {k: np.asarray(v) for k, v in {**frozen, **state.params}.items()})
    half = {g.key: np.arange(g.size // 2) for g in gates.groups(spec)}
    plain = {k: v for k, v in gated.params.items() if not k.startswith("aux.")}
    started = time.perf_counter()
    small, _ = gates.cut(spec, plain, gates.masked(spec, half))
    cut = time.perf_counter() - started
    started = time.perf_counter()
    methods["gated"].finish(gated, None)
    print(json.dumps({
        "shape": f"{args.shape}, {spec['num_hidden_layers']} layers", "audio_seconds": args.seconds,
        "batch_size": args.batch_size, "params": cost.params(model.spec), "params_cut": cost.params(small),
        "plain_seconds": middle["plain"], "gated_seconds": middle["gated"],
        "overhead": statistics.median(b / a for a, b in zip(times["plain"][2:], times["gated"][2:])) - 1,
        "cut_seconds": cut, "finish_seconds": time.perf_counter() - started,
        "device": _cpu(), "threads": len(cpu_numbers()), "versions": _versions("jax", "jaxlib", "flax")}))


if __name__ == "__main__":
    main()
