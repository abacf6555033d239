"""What the teacher costs in a distillation step, and how much audio a step takes in.

    python scripts/distill_cost.py bundled:wav2vec2-ctc-en --students previous,axial,heads --seconds 3 --batch-size 8

Each student's step is timed three ways, in turn so that what disturbs one disturbs all: with the teacher in the step,
with cached features of it (train/cached.py), and the teacher's forward pass alone. JSON rows: median seconds of
--repeats rounds after two; `teacher_share` = 1 - cached / online; audio-hours per hour with the teacher and without.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import numpy as np

from jaxslim import cost, hub
from jaxslim.config import Group, Train
from jaxslim.methods.generate import Generate
from jaxslim.slim import Slim
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers
from jaxslim.train import cached
from jaxslim.train import mesh as M
from jaxslim.train import step as S


def row(name: str, teacher: Slim, args) -> dict:
    """Times of one student."""
    method = Generate(student=name, forcing=args.forcing)
    student = method.start(teacher, None, jax.random.key(0))
    samples = round(args.seconds * 16000)
    wave = np.random.default_rng(0).standard_normal((args.batch_size, samples)).astype(np.float32)
    batch = {"input_values": wave, "attention_mask": np.ones(wave.shape, np.int32)}
    features = jax.jit(lambda t, b: method.targets(t, b, None, 0))
    known = {cached.CACHED + k: np.asarray(v, np.float16) for k, v in features(teacher, batch).items()}
    cfg, mesh = Train(groups={"main": Group(1e-4)}, dtype=args.dtype), M.make("data=1", jax.devices()[:1])
    state, frozen, tx = S.init(method, student, cfg, mesh)
    step = S.make(method, student.spec, tx, cfg, state, mesh)
    placed = Slim(teacher.spec, M.place(teacher.params, mesh))
    ways = {"online": (placed, M.batch(batch, mesh)), "cached": (None, M.batch(batch | known, mesh))}
    times: dict[str, list[float]] = {"online": [], "cached": [], "teacher": []}
    for _ in range(2 + args.repeats):
        for way, (guide, rows) in ways.items():
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, frozen, guide, rows))
            times[way].append(time.perf_counter() - started)
        started = time.perf_counter()
        jax.block_until_ready(features(placed, batch))
        times["teacher"].append(time.perf_counter() - started)
    middle = {k: statistics.median(v[2:]) for k, v in times.items()}
    hours = args.batch_size * args.seconds
    return {"student": name, "forcing": args.forcing, "seconds": args.seconds, "batch_size": args.batch_size,
            "dtype": args.dtype, "params": cost.params(student.spec), **{f"{k}_seconds": v for k, v in middle.items()},
            "teacher_share": 1 - middle["cached"] / middle["online"], "hours_per_hour": hours / middle["online"],
            "hours_per_hour_cached": hours / middle["cached"], "loss": float(metrics["loss"]),
            "device": _cpu() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
            "threads": len(cpu_numbers()), "versions": _versions("jax", "flax")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="bundled:NAME, a folder, or a hub id")
    parser.add_argument("--students", default="previous,full,axial,heads", help="of methods.generate.Generate")
    parser.add_argument("--forcing", choices=("teacher", "free"), default="teacher")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    teacher = hub.load(args.teacher)
    print(json.dumps([row(name, teacher, args) for name in args.students.split(",")], indent=1))


if __name__ == "__main__":
    main()
