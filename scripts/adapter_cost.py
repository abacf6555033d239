"""Memory and time of adapter training, overhead of adapters in use, and time of a swap, at the full size of a model.

    python scripts/adapter_cost.py --shape wav2vec2-bert --kinds full,tpa,lora --seconds 10 --batch-size 8

Random weights; the loss is the mean square of the output, so that models without a head can be measured too. Each kind
runs in a process of its own, one after another. JSON rows: `peak_bytes` is the device's peak (on CPU the largest RSS of
the process), `temporary_bytes` and `argument_bytes` what XLA plans for it, `step_seconds` the median of --repeats
steps after two; `forward_seconds` of the base, with the adapter beside it and merged, taken in turn; `swap_seconds` is
`adapters.put` of a second adapter of the same shape, until its arrays are there, and `swap_compiles` what it compiled.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time

SHAPES = {"wav2vec2-bert": "ctc", "gemma3n_audio": "none", "wav2vec2-conformer": "ctc", "parakeet_ctc": "ctc"}


def measure(args) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxslim import adapter_merge, adapters, cost, formulas
    from jaxslim.config import Group, Train
    from jaxslim.methods.adapter import FORM, Adapter
    from jaxslim.slim import Slim, Term, _forward, inputs
    from jaxslim.spec import Spec
    from jaxslim.speed_worker import random_model
    from jaxslim.train import mesh as M
    from jaxslim.train import step as S

    @dataclasses.dataclass(frozen=True)
    class Probe(Adapter):
        """Any kind of adapter, with a loss that needs no labels."""

        def loss(self, student, targets, batch, key, step):
            out = student(key=key, **inputs(batch, student))
            y = (out.last_hidden_state if out.logits is None else out.logits).astype(jnp.float32)
            return {"square": Term((y * y).mean(), jnp.ones(()))}

    changes = {"vocab_size": 32} if SHAPES[args.shape] == "ctc" else {}
    if args.layers:
        changes |= {"num_hidden_layers": args.layers, "conf_num_hidden_layers": args.layers}
    spec = Spec({"mask_time_prob": 0.0, "layerdrop": 0.0, **changes}, args.shape, SHAPES[args.shape])
    model = random_model(spec)
    method = Probe(kind=args.kind, width=args.width, rank=args.rank, base=args.base)
    student = method.start(model, None, jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = {k: rng.standard_normal(x.shape).astype(np.float32)
            for k, x in formulas.inputs(spec, args.seconds, args.batch_size).items()}
    result = {"shape": args.shape, "kind": args.kind, "width": args.width, "base": args.base, "seconds": args.seconds,
              "batch_size": args.batch_size, "dtype": args.dtype, "remat": args.remat, "params": cost.params(spec),
              "trained": sum(v.size for k, v in student.params.items() if method.group(k) != "frozen"),
              "device": jax.devices()[0].device_kind}

    if not args.forward_only:
        cfg = Train(groups={"main": Group(1e-4)}, max_steps=100, dtype=args.dtype, remat=args.remat)
        mesh = M.make("data=1", jax.devices()[:1])
        state, frozen, tx = S.init(method, student, cfg, mesh)
        step = S.make(method, student.spec, tx, cfg, state, mesh)
        del model, student
        batch, times = M.batch(rows, mesh), []
        plan = step.lower(state, frozen, None, batch).compile().memory_analysis()
        for _ in range(2 + args.repeats):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, frozen, None, batch))
            times.append(time.perf_counter() - started)
        result |= {"step_seconds": statistics.median(times[2:]), "min_seconds": min(times[2:]),
                   "max_seconds": max(times[2:]), "loss": float(metrics["loss"])}
        if plan is not None:
            result |= {"argument_bytes": plan.argument_size_in_bytes, "temporary_bytes": plan.temp_size_in_bytes}
        stats = jax.devices()[0].memory_stats() or {}
        result["peak_bytes"] = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return result

    one = Slim(student.spec, student.params, (("dtype", args.dtype),))
    models = {"base": adapters.base(one), "adapter": one}
    if args.kind == "lora" or args.kind in FORM and FORM[args.kind]["kind"] == "parallel":
        models["merged"] = adapter_merge.merge(one, check=False).replace(defaults=one.defaults)
    rows = {k: jnp.asarray(v) for k, v in rows.items()}
    times = {name: [] for name in models}
    for _ in range(2 + args.repeats):   # in turn: what disturbs one disturbs all
        for name, m in models.items():
            started = time.perf_counter()
            jax.block_until_ready(m(**rows))
            times[name].append(time.perf_counter() - started)
    result["forward_seconds"] = {k: statistics.median(v[2:]) for k, v in times.items()}
    result["gmacs"] = {k: cost.macs(m.spec, args.seconds, args.batch_size).total / 1e9 for k, m in models.items()}
    other, swaps = adapters.extract(one), []
    before = _forward._cache_size()
    for _ in range(2 + args.repeats):
        started = time.perf_counter()
        one = adapters.put(one, "0", other)
        jax.block_until_ready([one.params[k] for k in other.params])
        swaps.append(time.perf_counter() - started)
    jax.block_until_ready(one(**rows))
    return result | {"swap_seconds": statistics.median(swaps[2:]), "swap_compiles": _forward._cache_size() - before}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=sorted(SHAPES), default="wav2vec2-bert", help="a family, at its default size")
    p.add_argument("--kinds", default="full,tpa", help="comma separated, of methods.adapter.Adapter")
    p.add_argument("--kind", help=argparse.SUPPRESS)
    p.add_argument("--layers", type=int, default=0, help="fewer layers, to try the script out")
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--base", choices=("float32", "bfloat16", "int8"), default="float32", help="of the frozen weights")
    p.add_argument("--seconds", type=float, default=10.0)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--forward-only", action="store_true", help="overhead in use and the swap, in place of training")
    p.add_argument("--json", action="store_true", help="no effect: the output is JSON")
    args = p.parse_args()
    if args.kind:
        print(json.dumps(measure(args)))
        return
    rows = []
    for kind in args.kinds.split(","):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--kind", kind], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{kind}: {done.stderr[-1500:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
