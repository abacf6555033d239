"""JSON rows of a distilled student, for scripts/table.py: `jaxslim slim`, then micro-SUPERB on the model of one stage.

    python scripts/generate_row.py configs/generate.yaml --output runs/t/previous --stage free [--every] KEY=VALUE

A row has size, MACs at 10 s, steady time (of a second of audio, at 10 s, batch 1, the teacher's in the same run), the
error of each generated layer in a free and a forced run, every task of the student and of its baselines, and the
retention. --every adds a row for each smaller number of generated layers (the anytime curve). A stopped run goes on
where it stood. Options of the suite: --suite asr_steps=100.
"""
from __future__ import annotations

import argparse
import json
import logging
import pathlib

from jaxslim import hub, recipe, speed, superb
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers


def row(result: dict, name: str, layers: int) -> dict:
    """Flat values of a suite's result."""
    out = {"student": name, "generated_layers": layers, "fingerprint": result["fingerprint"],
           "params": result["params"], "gmacs": result["gmacs"], "suite_seconds": sum(result["seconds"].values())}
    for task, values in result["tasks"].items():
        out |= {f"{role.replace('-', '_')}_{task}": values[role] for role in superb.suite.ROLES}
        out[f"retention_{task}"] = result["retention"]["tasks"][task]["retention"]
    kept = result["retention"]
    out |= {"retention": kept["mean"], "retention_low": kept["low"], "retention_high": kept["high"],
            "retention_of": " ".join(kept["of"])}
    out |= {f"fidelity_{k}": v for k, v in result["fidelity"]["model"]["mean"].items()}
    for step in result["fidelity"].get("rollout") or []:
        out |= {f"{k}_{step['layer']}": step[k] for k in ("l1", "forced_l1", "gap", "cosine", "cka")}
    return {k: v for k, v in out.items() if v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--output", required=True)
    parser.add_argument("--stage", help="name of the stage whose model is judged (default: the last)")
    parser.add_argument("--name", help="in the column `student` (default: the output folder's)")
    parser.add_argument("--every", action="store_true", help="also with fewer generated layers")
    parser.add_argument("--suite", action="append", default=[], metavar="KEY=VALUE", help="option of the suite; again "
                        "for more")
    parser.add_argument("--suite-output", default="runs/micro-superb", help="where features and results are kept")
    parser.add_argument("--tasks", default="", help="only these tasks, with commas")
    parser.add_argument("--no-bench", action="store_true", help="no timing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    summary = recipe.run(args.recipe, args.output, args.overrides)
    stages = {s["name"]: s for s in summary["stages"]}
    if args.stage and args.stage not in stages:
        parser.error(f"no stage {args.stage!r} in {args.recipe}; it has {', '.join(stages)}")
    folder = str(pathlib.Path(args.output) / (stages[args.stage]["path"] if args.stage else "final"))
    teacher, spec = summary["teacher"]["path"], hub.load(folder).spec
    whole = len(spec.generator.targets) if spec.generator else 0
    trained = sum(s["seconds"] for s in list(stages.values())[: list(stages).index(args.stage or list(stages)[-1]) + 1])
    timed = {} if args.no_bench else speed.beside(folder, teacher, repeats=5, progress=logging.info)
    rows = []
    for layers in range(1, whole + 1) if args.every and whole else [whole]:
        result = superb.evaluate(folder, teacher=teacher, output=args.suite_output, options=superb.options(args.suite),
                                 tasks=args.tasks.split(",") if args.tasks else (), generated_layers=layers)
        rows.append(row(result, args.name or pathlib.Path(args.output).name, layers) | {
            "teacher_params": summary["teacher"]["params"], "train_seconds": trained, "device": _cpu(),
            "threads": len(cpu_numbers()), "versions": _versions("jax", "flax"),
            **(timed if layers == whole else {})})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
