"""Compiles training steps for TPU pods that are not there and records what they need: docs/results/tpu_compile.json
and, as a table, tpu_compile.md.

    python scripts/tpu_compile.py [--only PATTERN]     # resumable: rows that are recorded are not compiled again
    python scripts/tpu_compile.py --table              # only the table, from what is recorded

Takes libtpu (the `tpu` extra), no TPU, minutes a row on one core. Weights are shapes only. See docs/training.md.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

from jaxslim.shapes import LARGE

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/tpu_compile.json"
MODELS = {"wav2vec2-base": ("wav2vec2", {}), "wav2vec2-large": ("wav2vec2", LARGE),
          "w2v-bert-2.0": ("wav2vec2-bert", {}),
          "whisper-large-v3-encoder": ("whisper", dict(  # behind it a decoder of next to nothing
              d_model=1280, encoder_layers=32, decoder_layers=1, encoder_attention_heads=20,
              decoder_attention_heads=20, encoder_ffn_dim=5120, decoder_ffn_dim=8, num_mel_bins=128, vocab_size=64,
              pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
              begin_suppress_tokens=None))}
PODS = {"v5e:4x4": "fsdp=16", "v5e:16x16": "data=16,fsdp=16", "v5p:4x4x4": "data=4,fsdp=16",
        "v6e:16x16": "data=16,fsdp=16"}
# rows of 30 s per device: (model, step) -> by kind of chip
ROWS = {("whisper-large-v3-encoder", "distill"): {"v5e": 4},
        ("wav2vec2-base", "ctc"): {"v5e": 8}, ("wav2vec2-base", "distill"): {"v5e": 8},
        ("wav2vec2-base", "prune"): {"v5e": 8, "v5p": 16, "v6e": 16},
        ("wav2vec2-large", "ctc"): {"v5e": 4, "v5p": 16, "v6e": 8},
        ("wav2vec2-large", "distill"): {"v5e": 4, "v5p": 16, "v6e": 8},
        ("w2v-bert-2.0", "ctc"): {"v5e": 4, "v5p": 16, "v6e": 8},
        ("w2v-bert-2.0", "distill"): {"v5e": 4, "v5p": 16, "v6e": 8}}


def matrix() -> list[dict]:
    """Settings of every row, small and early ones first."""
    rows = [dict(model="wav2vec2-base", step=step, topology="v5e:4x4", mesh=mesh)
            for step in ("ctc", "distill", "prune") for mesh in ("data=16", "fsdp=16")]
    rows += [dict(model="wav2vec2-base", step="prune", topology=pod, mesh=mesh) for pod, mesh in PODS.items()
             if pod != "v5e:4x4"]
    rows += [dict(model="whisper-large-v3-encoder", step="distill", topology="v5e:4x4", mesh="fsdp=16")]
    rows += [dict(model=model, step=step, topology=pod, mesh=mesh) for pod, mesh in PODS.items()
             for model in ("wav2vec2-large", "w2v-bert-2.0") for step in ("ctc", "distill")]
    return [{**r, "rows_per_device": ROWS[r["model"], r["step"]][r["topology"].split(":")[0]], "seconds": 30.0,
             "remat": "full"} for r in rows]


def compile_row(row: dict) -> dict:
    """One row, in this process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np
    from transformers import CONFIG_MAPPING

    from jaxslim import __version__
    from jaxslim.config import Group, Train
    from jaxslim.methods.finetune import Finetune
    from jaxslim.methods.linearize import Linearize
    from jaxslim.methods.prune import Prune
    from jaxslim.models import bind
    from jaxslim.slim import Slim
    from jaxslim.spec import Spec
    from jaxslim.train import dryrun
    from jaxslim.train import mesh as M

    family, changes = MODELS[row["model"]]
    whisper = family == "whisper"
    spec = Spec(CONFIG_MAPPING[family](**changes).to_dict(), family, "none" if whisper else "ctc")
    teacher = Slim(spec, dict(bind.shapes(spec)))
    mesh = M.make(row["mesh"], dryrun.topology(row["topology"]))
    cfg = Train(dtype="bfloat16", teacher_dtype="bfloat16", remat=row["remat"], layers="scan", prng="hash")
    frozen = ("feature_extractor",)  # the convolutions stay fixed, as in the recipes of the papers
    # an encoder has no task: four of its states, as in DPHuBERT
    distill = Prune(objective="distill", project=False) if whisper else Linearize(layers=(), logit_weight=1.0)
    student = teacher
    if row["step"] == "prune":  # gates and multipliers on layers of three widths, as in a second round
        distill = Prune(target={"macs": 0.6}, objective="both", freeze=frozen)
        for i in range(spec["num_hidden_layers"]):
            spec = spec.with_block(f"encoder.{i}.attention", heads=list(range(12 - i // 4)))
            spec = spec.with_block(f"encoder.{i}.ffn", units=3072 - 512 * (i // 4))
        cfg = dataclasses.replace(cfg, groups={k: Group() for k in ("main", "gates", "multipliers")})
        student = dryrun.shapes_of(distill.start(Slim(spec, dict(bind.shapes(spec))), None, jax.random.key(0)))
    method = Finetune(freeze=frozen) if row["step"] == "ctc" else distill
    batch = dryrun.audio_batch(spec, row["rows_per_device"] * M.shards(mesh), row["seconds"], 256)
    if whisper:
        batch["decoder_input_ids"] = jax.ShapeDtypeStruct((batch["labels"].shape[0], 1), np.int32)
    import importlib.metadata

    found = dryrun.report(method, student, None if row["step"] == "ctc" else teacher, cfg, batch, mesh,
                          row["seconds"], row["topology"].split(":")[0])
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {**row, **found, "mesh": row["mesh"], "jaxslim": __version__, **versions}


def same(a: dict, b: dict) -> bool:
    return all(a.get(k) == v for k, v in b.items())


def table(rows: list[dict]) -> str:
    """Markdown of the recorded rows."""
    head = ("model", "step", "pod", "mesh", "rows x 30 s a chip", "GiB of a chip", "collectives MB (by arithmetic)",
            "FLOPs run / model", "predicted ms", "compile s")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        cells = [r["model"], r["step"], r["topology"], r["mesh"], r["rows_per_device"]]
        if "error" in r:
            cells += [f"does not fit in {r['available_bytes'] / 2**30:.0f}", "", "", "", ""]
        else:
            cells += [f"{r['total_bytes'] / 2**30:.1f} of {r['available_bytes'] / 2**30:.0f}",
                      f"{r['collective_bytes'] / 1e6:,.0f} ({r['expected_bytes'] / 1e6:,.0f})", r["flops_ratio"],
                      f"{1000 * r['predicted_seconds']:,.0f}", f"{r['compile_seconds']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(rows: list[dict]) -> None:
    order = matrix()
    rows.sort(key=lambda r: next((i for i, m in enumerate(order) if same(r, m)), len(order)))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(
        "# Training steps compiled for TPU pods that were not there\n\nMade by `python scripts/tpu_compile.py` from "
        "[tpu_compile.json](tpu_compile.json): bfloat16, rows of 30 s, remat full. The time is a bound made of peak "
        "numbers, no measurement.\n\n" + table(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on 'model step topology mesh'")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row as JSON, in a process of its own
    args = parser.parse_args()
    if args.row:
        print(json.dumps(compile_row(json.loads(args.row))))
        return
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if args.table:
        write(recorded)
        return
    for row in matrix():
        name = " ".join(row[k] for k in ("model", "step", "topology", "mesh"))
        if not re.search(args.only, name) or any(same(r, row) for r in recorded):
            continue
        print(name, flush=True)
        done = subprocess.run([sys.executable, __file__, "--row", json.dumps(row)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1"})
        if done.returncode:
            print(f"  failed: {done.stderr[-1500:]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        found["command"] = f"python scripts/tpu_compile.py --only '{name}'"
        recorded = [r for r in recorded if not same(r, {k: row[k] for k in ("model", "step", "topology", "mesh")})]
        recorded.append(found)
        write(recorded)
        print("  " + json.dumps({k: found.get(k) for k in ("total_bytes", "collectives", "flops_ratio", "error",
                                                           "predicted_seconds", "compile_seconds")}), flush=True)


if __name__ == "__main__":
    main()
