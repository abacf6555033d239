"""Rows of the low-rank table: one way of compressing a teacher, several sizes from one calibration.

    python scripts/lowrank_rows.py --way ours --remove 0.1,0.3,0.45 [--steps 150] [--seeds 0,1,2] [--general DATA]
        [--model openai/whisper-tiny.en --normalize whisper-english]

Ways: separate (SVD of each matrix), product (SVD of Q-K and V-O), twins (whitened, no FFN), ours (whitened, with
the FFN), uniform (ours without global ranks), prune (whole heads and FFN units by magnitude, of as many MACs as
`ours` of that size), control (the teacher itself, trained on as long). `--steps` of the task's loss and KL to the
teacher follow, all parameters but the front end (of Whisper only the control's is fixed, as LowRank's freeze_frontend
does not know its names; its short clips come joined too, to fill the window); 0 scores what the cut left. The training
prompts are one speaker; `--general` is any other DATA to score on. Prints a JSON list: a row for every size, WER and
CER (fractions) on the prompts' test set, means over the seeds. No test data is seen before the scores.
"""
from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import time

import jax
import numpy as np

from jaxslim import cost, hub
from jaxslim.config import Group, Train
from jaxslim.data import task_of
from jaxslim.evaluate import evaluate, frame_agreement
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.lowrank import LowRank
from jaxslim.methods.prune import Prune
from jaxslim.recipe import training_batches
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers
from jaxslim.train import loop
from jaxslim.train import mesh as M

DATA = "bundled:prompts-en/"
FRONT = ("feature_extractor", "encoder.conv", "encoder.embed_positions")
WAYS = {"separate": dict(twin="separate"), "product": dict(twin="product"), "ours": {}, "control": None, "prune": None,
        "twins": dict(kinds=("qk", "vo")), "uniform": dict(allocation="uniform")}


def train(steps: int, seed: int, head: str) -> Train:
    size = dict(per_device_train_batch_size=4, join_seconds=28.0) if head == "seq2seq" else dict(
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
        method = Prune(target={"macs": target}, gates=("heads", "units"), select="magnitude")
        out.append((share, method.start(teacher, batches, jax.random.key(0)), time.monotonic() - started))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--remove", default="0.1,0.2,0.3,0.45,0.6")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--general", default="")
    parser.add_argument("--model", default="bundled:wav2vec2-ctc-en")
    parser.add_argument("--normalize", default="none")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    teacher, mesh = hub.load(args.model), M.make()
    task, settings = task_of(teacher.spec, hub.folder(args.model)), functools.partial(train, head=teacher.spec.head)
    score = functools.partial(evaluate, task=task, progress=False, normalize=args.normalize)
    seeds = [int(s) for s in args.seeds.split(",")] if args.steps else [0]
    batches = training_batches(DATA + "train", task, settings(1, 0), mesh)
    found = students(args.way, teacher, batches, tuple(float(r) for r in args.remove.split(",")))
    rows = []
    for share, start, seconds in found:
        scores: dict[str, list[float]] = {}
        for seed in seeds:
            model, began = start, time.monotonic()
            if args.steps:
                cfg = settings(args.steps, seed)
                method = Finetune(freeze=FRONT) if args.way == "control" else LowRank(
                    objective="task", trained="all")
                with tempfile.TemporaryDirectory() as folder:
                    model = loop.run(method, start, teacher, cfg, training_batches(DATA + "train", task, cfg, mesh),
                                     folder, mesh=mesh, name=f"{args.way} {share:g}")
            took = time.monotonic() - began
            got = {f"target_{k}": v for k, v in score(model, DATA + "test").items()}
            if args.general:
                got |= {f"general_{k}": v for k, v in score(model, args.general).items()}
            got |= {"recover_seconds": took}
            if teacher.spec.head == "ctc":
                got |= {"agreement": frame_agreement(model, teacher, DATA + "test", task=task)}
            for k, v in got.items():
                if k.endswith(("wer", "cer", "wer_low", "wer_high")) or not k.startswith(("target_", "general_")):
                    scores.setdefault(k, []).append(float(v))
        rows.append({"model": args.model, "normalize": args.normalize, "fingerprint": teacher.fingerprint,
                     "way": args.way, "remove": share,
                     "steps": args.steps, "seeds": len(seeds), "params": cost.params(start.spec),
                     "gmacs": cost.macs(start.spec).total / 1e9, "compress_seconds": seconds,
                     **{k: float(np.mean(v)) for k, v in scores.items()}, "student_fingerprint": start.fingerprint,
                     "device": _cpu(), "threads": len(cpu_numbers()), "versions": _versions("jax", "jaxlib", "flax")})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
