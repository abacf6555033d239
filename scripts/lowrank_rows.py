"""Rows of the low-rank table: one way of compressing a teacher, several sizes from one calibration.

    python scripts/lowrank_rows.py --way ours --remove 0.1,0.3,0.45 [--steps 150] [--seeds 0,1,2] [--general DATA]
        [--model openai/whisper-tiny.en --normalize whisper-english --max-length 160,32] [--predictions DIR]

Ways: separate (SVD of each matrix), product (SVD of Q-K and V-O), twins (whitened, no FFN), ours (whitened, with
the FFN), uniform (ours without global ranks), prune (whole heads and FFN units by magnitude, of as many MACs as
`ours` of that size), control (the teacher itself, trained on as long by the task's loss alone). `--steps` of the task's
loss and KL to the teacher follow, of the encoder's attention and FFN; 0 scores what the cut left. A window of Whisper
always costs 30 s, so there short clips are trained on joined, and only so, at three speeds. The training prompts are
one speaker; `--train` may mix general speech in against forgetting, `--general` is DATA of it to score on, too.
`--max-length`: tokens that a decoder may say on the one and the other; Whisper repeats itself on some clips, and broken
models on most.

Prints a JSON list: a row for every size, WER and CER (fractions) on the prompts' test set, means over the seeds; with
`--predictions` also the difference to the control of as many steps and seeds, if that has run before, and the upper end
of its paired 90 % interval (utterances resampled, errors summed over the seeds). No test data is seen before scoring.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import pathlib
import tempfile
import time

import jax
import numpy as np

from jaxslim import cost, hub, versus
from jaxslim.config import Group, Train
from jaxslim.data import task_of
from jaxslim.evaluate import evaluate, frame_agreement
from jaxslim.methods.lowrank import LowRank
from jaxslim.methods.prune import Prune
from jaxslim.recipe import training_batches
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers
from jaxslim.train import loop
from jaxslim.train import mesh as M

DATA = "bundled:prompts-en/"
WAYS = {"separate": dict(twin="separate"), "product": dict(twin="product"), "ours": {}, "control": None, "prune": None,
        "twins": dict(kinds=("qk", "vo")), "uniform": dict(allocation="uniform")}


def train(steps: int, seed: int, head: str) -> Train:
    size = dict(per_device_train_batch_size=4, join_seconds=26.0, min_seconds=14.0,
                speed_perturb=(0.9, 1.0, 1.1)) if head == "seq2seq" else dict(
        per_device_batch_seconds=40, buckets=(1.2, 1.8, 3.0, 6.0), max_seconds=6.0)
    return Train(max_steps=steps, **size, seed=seed, save_steps=0,
                 groups={"main": Group(1e-4, warmup_steps=min(10, steps // 4), beta2=0.98)})


def students(way: str, teacher, batches, removes):
    """[(share removed as asked for, model, seconds it took)]"""
    started, out = time.monotonic(), []
    if way == "control":
        return [(0.0, teacher, 0.0)]
    if way != "prune":
        models = LowRank(**WAYS[way]).compress(teacher, batches, removes)
        return [(r, m, time.monotonic() - started) for r, m in zip(removes, models, strict=True)]
    for share, like in zip(removes, LowRank().compress(teacher, batches, removes), strict=True):
        target = cost.macs(like.spec).total / cost.macs(teacher.spec).total
        method = Prune(target={"macs": target}, gates=("heads", "units"), blocks="^encoder", select="magnitude")
        out.append((share, method.start(teacher, batches, jax.random.key(0)), time.monotonic() - started))
    return out


def beside_control(folder: pathlib.Path, name: str, steps: int, seeds: list[int], on: str) -> dict[str, float]:
    """Difference to the control's predictions, errors and words of an utterance summed over the seeds."""
    def pooled(name: str) -> list[dict]:
        total: dict[str, dict] = {}
        for seed in seeds:
            for row in versus.read(folder / f"{name}-{steps}-{seed}.{on}.jsonl"):
                kept = total.setdefault(row["id"], {**row, "errors": 0, "words": 0})
                kept["errors"], kept["words"] = kept["errors"] + row["errors"], kept["words"] + row["words"]
        return list(total.values())

    if not all((folder / f"control-0-{steps}-{seed}.{on}.jsonl").exists() for seed in seeds):
        return {}
    found = versus.paired(pooled(name), pooled("control-0"))
    return {f"{on}_{k}": found[k] for k in ("delta", "upper")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--remove", default="0.1,0.2,0.3,0.45,0.6")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--logit-weight", type=float, default=LowRank.logit_weight, help="of the KL to the teacher")
    parser.add_argument("--train", default=DATA + "train")
    parser.add_argument("--general", default="")
    parser.add_argument("--model", default="bundled:wav2vec2-ctc-en")
    parser.add_argument("--normalize", default="none")
    parser.add_argument("--max-length", default="")
    parser.add_argument("--predictions", type=pathlib.Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    teacher, mesh = hub.load(args.model), M.make()
    task, settings = task_of(teacher.spec, hub.folder(args.model)), functools.partial(train, head=teacher.spec.head)
    score = functools.partial(evaluate, progress=False, normalize=args.normalize)
    seeds = [int(s) for s in args.seeds.split(",")] if args.steps else [0]
    batches = training_batches(args.train, task, settings(1, 0), mesh)
    found = students(args.way, teacher, batches, tuple(float(r) for r in args.remove.split(",")))
    mark = "" if args.logit_weight == LowRank.logit_weight else f"-kl{args.logit_weight:g}"
    rows, tests = [], {"target": DATA + "test"} | ({"general": args.general} if args.general else {})
    tasks = dict.fromkeys(tests, task)
    for on, length in zip(tests, args.max_length.split(",") if args.max_length else ()):
        tasks[on] = dataclasses.replace(task, generation={**task.generation, "max_length": int(length)})
    for share, start, seconds in found:
        scores: dict[str, list[float]] = {}
        for seed in seeds:
            model, began = start, time.monotonic()
            if args.steps:
                cfg = settings(args.steps, seed)
                method = LowRank(objective="task", logit_weight=args.logit_weight)
                method = method.control() if args.way == "control" else method
                with tempfile.TemporaryDirectory() as folder:
                    model = loop.run(method, start, teacher, cfg, training_batches(args.train, task, cfg, mesh), folder,
                                     mesh=mesh, name=f"{args.way} {share:g}")
            took = time.monotonic() - began
            got = {"recover_seconds": took}
            for on, data in tests.items():
                name = f"{args.way}-{share:g}{mark}-{args.steps}-{seed}.{on}.jsonl"
                out = args.predictions and args.predictions / name
                got |= {f"{on}_{k}": v for k, v in score(model, data, task=tasks[on], predictions=out).items()}
            if teacher.spec.head == "ctc":
                got |= {"agreement": frame_agreement(model, teacher, DATA + "test", task=task)}
            for k, v in got.items():
                if k.endswith(("wer", "cer", "wer_low", "wer_high")) or not k.startswith(("target_", "general_")):
                    scores.setdefault(k, []).append(float(v))
        beside = {}
        for on in tests if args.predictions else ():
            beside |= beside_control(args.predictions, f"{args.way}-{share:g}{mark}", args.steps, seeds, on)
        rows.append({"model": args.model, "normalize": args.normalize, "fingerprint": teacher.fingerprint,
                     "way": args.way, "remove": share,
                     "logit_weight": 0.0 if args.way == "control" or not args.steps else args.logit_weight,
                     "steps": args.steps, "seeds": len(seeds), "params": cost.params(start.spec),
                     "gmacs": cost.macs(start.spec).total / 1e9, "compress_seconds": seconds,
                     **{k: float(np.mean(v)) for k, v in scores.items()}, **beside,
                     "max_length": args.max_length, "target_wers": scores["target_wer"],
                     "student_fingerprint": start.fingerprint,
                     "device": _cpu(), "threads": len(cpu_numbers()), "versions": _versions("jax", "jaxlib", "flax")})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
