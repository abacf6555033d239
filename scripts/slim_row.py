"""One flat JSON row of a recipe's run, for scripts/table.py: `jaxslim slim`, then the student's scores and the paired
differences to the teacher and to a control that an earlier run trained.

    python scripts/slim_row.py configs/prune.yaml --output runs/t/macs06 --control runs/t/macs09 control=false KEY=VALUE

Without --control, the run's own control. A stopped run goes on where it stood.
"""
from __future__ import annotations

import argparse
import json
import logging
import pathlib

from jaxslim import recipe, speed, versus
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers

KEYS = ("wer", "wer_low", "wer_high", "cer", "n", "params", "gmacs", "rtfx", "seconds_per_second", "peak_bytes",
        "frame_agreement", "trained_params", "fingerprint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--output", required=True)
    parser.add_argument("--control", help="run folder whose control is compared with")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    summary = recipe.run(args.recipe, args.output, args.overrides)
    other = pathlib.Path(args.control or args.output)
    student, teacher = summary["student"], summary["teacher"]
    weights = pathlib.Path(args.output, student["path"]).glob("*.safetensors")
    row = {"output": args.output, **{f"student_{k}": student[k] for k in KEYS if k in student},
           **{f"teacher_{k}": teacher[k] for k in KEYS if k in teacher},
           "macs_share": student["gmacs"] / teacher["gmacs"], "params_share": student["params"] / teacher["params"],
           "student_bytes": sum(p.stat().st_size for p in weights),
           "train_seconds": sum(s["seconds"] for s in summary["stages"]), "device": _cpu(),
           "threads": len(cpu_numbers()), "versions": _versions("jax", "flax")}
    if "seconds_per_second" in student and "seconds_per_second" in teacher:
        final = str(pathlib.Path(args.output, student["path"]))  # again, by more calls: shares are close
        row |= speed.beside(final, teacher["path"], repeats=25, progress=logging.info)
        measured = json.loads(pathlib.Path(args.output, "speed.json").read_text())
        at = {role: {r["audio_seconds"]: r["steady_seconds"] for r in measured if r["role"] == role and
                     "steady_seconds" in r} for role in ("student", "teacher")}
        row |= {f"time_share_{s:g}": t / at["teacher"][s] for s, t in at["student"].items()
                if s in at["teacher"] and s != 10}
    if "time_share" in row:
        row["time_goal"] = 1 - 0.85 * (1 - row["macs_share"])  # of which 85 % should be seen as time
    if "wer" in student:
        row |= {f"over_teacher_{k}": v for k, v in (versus.paired(*(
            versus.read(args.output, role) for role in ("student", "teacher"))) or {}).items()}
    control = json.loads((other / "summary.json").read_text()).get("control")
    if control and "wer" in control and "wer" in student:
        row["control_wer"] = control["wer"]
        found = versus.paired(versus.read(args.output), versus.read(str(other), "control"))
        row |= {f"delta_{k}": v for k, v in (found or {}).items()}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
