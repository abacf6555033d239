"""One flat JSON row of an adapted model, for scripts/table.py: `jaxslim slim` of an adapter recipe, then what the table
of adaptation asks for.

    python scripts/adapter_row.py configs/adapter.yaml --output runs/t/tpa --general DATA --full runs/t/full KEY=VALUE
    python scripts/adapter_row.py configs/adapter.yaml --output runs/t/tpa --languages runs/t/languages KEY=VALUE

`adapter_params` and `head_params` are what was trained; `adapter_bytes` is the file that a user would keep of it. With
--general also the score on other speech, with the adapter, with it switched off, and of the base. --full is the run of
full fine-tuning: `gain` is the share of its gain. --languages: the task is to tell English prompts from Spanish ones
of the same voice; the clips and the base with a new head for the two are written there once. Peak memory is this
process's, so it is there only if the stage was trained now.
"""
from __future__ import annotations

import argparse
import json
import logging
import pathlib
import statistics
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from jaxslim import adapter_files, config, hub, recipe, scratch
from jaxslim.data import load_rows, task_of
from jaxslim.evaluate import evaluate
from jaxslim.models.roles import FAMILIES
from jaxslim.speed_worker import _cpu, _rss, _versions, cpu_numbers

KEYS = ("wer", "wer_low", "wer_high", "cer", "accuracy", "accuracy_low", "accuracy_high", "n", "fingerprint")
CLIPS = {"train": 80, "test": 40}   # of a language; there are no more in Spanish


def languages(folder: pathlib.Path, base: str) -> list[str]:
    """Overrides for the task of two languages; its data and its base are made if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in CLIPS.items():
        if (folder / f"{split}.parquet").exists():
            continue
        rows = []
        for language in ("en", "es"):
            source = load_rows(f"bundled:prompts-{language}/{split}")
            for i in np.random.default_rng(0).permutation(len(source))[:count]:
                record = source.record(int(i))
                rows.append({"id": record["id"], "audio": record["audio"], "label": language})
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    train = str(folder / "train.parquet")
    return [f"teacher={scratch.with_labels(base, folder / 'base', train, 0)}", f"data.train={train}",
            f"data.test={folder / 'test.parquet'}", "data.validation=null"]


def kept_bytes(model, changed: dict) -> int:
    """Of the adapter's file, or of the arrays that a method without one changed."""
    if not model.adapters:
        return sum(v.nbytes for v in changed.values())
    with tempfile.TemporaryDirectory() as folder:
        adapter_files.save(model, folder)
        return sum(p.stat().st_size for p in pathlib.Path(folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--output", required=True)
    parser.add_argument("--general", help="DATA of other speech, scored too")
    parser.add_argument("--full", help="run folder of full fine-tuning")
    parser.add_argument("--languages", type=pathlib.Path, help="folder for the task of two languages")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = list(args.overrides)
    if args.languages:
        overrides += languages(args.languages, config.load(config.Recipe, args.recipe, overrides).teacher)
    trained_now = not pathlib.Path(args.output, "final").exists()
    summary = recipe.run(args.recipe, args.output, [*overrides, "control=false"])
    final, base = str(pathlib.Path(args.output, "final")), summary["teacher"]["path"]
    model, old = hub.load(final), hub.load(base)
    head = FAMILIES[model.spec.family].heads[model.spec.head]
    changed = {k: v for k, v in model.params.items() if not np.array_equal(v, old.params.get(k))}
    in_head = sum(v.size for k, v in changed.items() if k.startswith((head, "projector")))
    in_adapter = sum(v.size for v in changed.values()) - in_head
    log = [json.loads(line) for line in pathlib.Path(args.output, summary["stages"][0]["path"],
                                                     "metrics.jsonl").read_text().splitlines()]
    times = [(r["seconds"], r["step"]) for r in log if "loss" in r]
    row = {**{f"base_{k}": v for k, v in summary["teacher"].items() if k in KEYS},
           **{k: v for k, v in summary["student"].items() if k in KEYS},
           "adapter_params": in_adapter, "head_params": in_head,
           "adapter_share": in_adapter / sum(v.size for v in old.params.values()),
           "adapter_bytes": kept_bytes(model, changed), "train_seconds": summary["stages"][0]["seconds"],
           "steps": times[-1][1], "device": _cpu(), "threads": len(cpu_numbers()), "versions": _versions("jax", "flax"),
           "step_seconds": statistics.median((b - a) / (j - i) for (a, i), (b, j) in zip(times, times[1:]))}
    if trained_now:
        row["peak_bytes"] = _rss(peak=True)
    if args.full:
        best = json.loads(pathlib.Path(args.full, "summary.json").read_text())["student"]
        measure = "wer" if "wer" in row else "accuracy"
        row["gain"] = (row[f"base_{measure}"] - row[measure]) / (row[f"base_{measure}"] - best[measure])
    if args.general:
        models = {"general_base": old, "general": model} | ({"general_off": model.disable_adapter()} if model.adapters
                                                            else {})
        task = task_of(old.spec, hub.folder(base))
        for name, each in models.items():
            scores = evaluate(each, args.general, task=task, progress=False)
            row |= {f"{name}_wer": scores["wer"]}
        if "general_off_wer" in row:
            row["forgotten_when_off"] = row["general_off_wer"] - row["general_base_wer"]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
