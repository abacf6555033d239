"""Compiles the Pallas kernels and their XLA versions for TPUs that are not there, and records which one to use.

    python scripts/kernels_tpu.py [--topology v5e:2x2 ...] [--only OPERATION ...] [--table]

Takes libtpu (the `tpu` extra), no TPU. Of every problem, forward and with gradients: bytes accessed, FLOPs, VMEM of a
program, and the time that these predict on the chip (max of both by its data sheet). Rows go to
docs/results/kernels_tpu.json; jaxslim/assets/kernels.json then names a kernel as the choice for a device kind and
operation where the predicted time of every one of its problems is at least 1.2 times shorter than XLA's.
"""
from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, CHOICES = ROOT / "docs/results/kernels_tpu.json", ROOT / "jaxslim/assets/kernels.json"
GAIN = 1.2
# operation, what it is of, (B, T, H, G, P, N) of 30 s of audio in batches of 8
PROBLEMS = [("ssd", "Mamba-2 of CALD, width 1024", (8, 1500, 16, 1, 64, 128)),
            ("ssd", "Mamba-2 from attention, width 768", (8, 1500, 12, 12, 64, 64)),
            ("causal", "Hedgehog, width 768", (8, 1500, 12, 12, 65, 128)),
            ("causal", "elu, width 768", (8, 1500, 12, 12, 65, 64)),
            ("gla", "gated linear attention, width 768", (8, 1500, 12, 12, 64, 64)),
            ("attention", "splash, width 768", (8, 1500, 12, 12, 64, 64))]


def functions(op: str, problem: tuple[int, ...]):
    """(XLA version, kernel, shapes of the arguments), all differentiable in all arguments."""
    import jax
    import jax.numpy as jnp

    from jaxslim.models import attention, attention_kernels, layers, pallas_gla, pallas_scan, scan

    rows, frames, heads, groups, size, width = problem
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    if op == "attention":
        args = (*[f32(rows, frames, heads, width)] * 2, f32(rows, frames, heads, size))
        plain = lambda *v: (attention.attention(*v, None, 0.125, layers.Call(attention="dense")),)  # noqa: E731
        return plain, lambda *v: (attention_kernels.splash(*v, None, 0.125),), args, None
    cut = (pallas_gla if op == "gla" else pallas_scan).shape(*problem)
    if isinstance(cut, str):
        raise SystemExit(f"{op} {problem}: {cut}")
    split = lambda v, n: v.reshape(rows, frames, n, -1)  # noqa: E731
    if op == "gla":  # as ssd's: heads side by side

        def flat(fn, *args):
            y, last = fn(*(split(v, heads) for v in args))
            return y.reshape(rows, frames, -1), last

        both = scan.plain_gla, functools.partial(pallas_gla.gla, cut=cut)
        sizes = (width, width, size, width)
        return *(functools.partial(flat, fn) for fn in both), tuple(f32(rows, frames, heads * n) for n in sizes), cut
    if op == "ssd":  # x, b and c come out of a projection, heads side by side, and y goes into one
        args = (f32(rows, frames, heads * size), f32(rows, frames, heads), f32(heads),
                *[f32(rows, frames, groups * width)] * 2)

        def side_by_side(fn, x, dt, a, b, c):
            y, last = fn(split(x, heads), dt, a, split(b, groups), split(c, groups))
            return y.reshape(rows, frames, -1), last

        both = scan.plain_ssd, functools.partial(pallas_scan.ssd, cut=cut)
        return *(functools.partial(side_by_side, fn) for fn in both), args, cut
    args = (*[f32(rows, frames, heads, width)] * 2, f32(rows, frames, heads, size))
    return scan.plain_causal, lambda *v: pallas_scan.causal(*v, cut=cut), args, cut


def measure(fn, args, device, backward: bool) -> dict:
    import jax

    def run(*v):
        if not backward:
            return fn(*v)[0]
        return jax.value_and_grad(lambda *v: (fn(*v)[0] ** 2).sum(), tuple(range(len(v))))(*v)

    where = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in args]
    compiled = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    found = compiled.cost_analysis()
    return {"bytes": int(found["bytes accessed"]), "flops": int(found["flops"]),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2", "v6e:2x2"])
    parser.add_argument("--only", nargs="+", metavar="OPERATION", help="compile only these, keep the other rows")
    parser.add_argument("--table", action="store_true", help="print the recorded rows as Markdown, compile nothing")
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for pod in () if args.table else args.topology:
        rows = [r for r in rows if r["topology"] != pod or args.only and r["op"] not in args.only]
        rows += compile_all(pod, args.only)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        CHOICES.write_text(json.dumps(choices(rows), indent=1) + "\n")
    print(table(rows))


def compile_all(pod: str, only) -> list[dict]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import importlib.metadata

    from jaxslim.train.dryrun import CHIPS, topology

    device, chip, rows = topology(pod)[0], CHIPS[pod.split(":")[0]], []
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    for op, what, problem in (p for p in PROBLEMS if not only or p[0] in only):
        xla, kernel, shapes, cut = functions(op, problem)
        for backward in (False, True):
            row = {"topology": pod, "device_kind": device.device_kind, "op": op, "what": what,
                   "problem": dict(zip(("B", "T", "H", "G", "P", "N"), problem, strict=True)),
                   "pass": "forward and gradients" if backward else "forward",
                   "chunk": cut and cut.chunk, "vmem_bytes": cut and int(cut.vmem(backward))}
            for name, fn in (("xla", xla), ("pallas", kernel)):
                row[name] = found = measure(fn, shapes, device, backward)
                if op == "attention" and name == "pallas":  # its makers give the compiler no count
                    found |= by_arithmetic(problem, backward, found)
                found["predicted_seconds"] = max(found["flops"] / (chip.tflops * 1e12),
                                                 found["bytes"] / (chip.bandwidth * 1e9))
            row["gain"] = row["xla"]["predicted_seconds"] / row["pallas"]["predicted_seconds"]
            rows.append({**row, **versions, "command": f"python scripts/kernels_tpu.py --topology {pod}"})
            print(f"{pod} {what}, {row['pass']}: {row['gain']:.2f} times", flush=True)
    return rows


def by_arithmetic(problem: tuple[int, ...], backward: bool, found: dict) -> dict:
    """FLOPs and bytes of splash attention, which the compiler sees as a black box: two products of T x T x K forward,
    seven more for the gradients (scores again in both of its kernels); keys and values, or queries and gradients, are
    read again for every block."""
    rows, frames, heads, _, size, width = problem
    padded, blocks = -(-frames // 128) * 128, -(-frames // 512)
    flops = (9 if backward else 2) * 2 * rows * heads * padded**2 * (size + width) // 2
    again = (blocks - 1) * 4 * rows * heads * padded * (size + width) * (3 if backward else 1)
    return {"flops": max(flops, found["flops"]), "bytes": found["bytes"] + again}


def choices(rows: list[dict]) -> dict:
    """Device kind -> operation -> xla or kernel."""
    found: dict = collections.defaultdict(dict)
    for row in rows:
        kept = found[row["device_kind"]].get(row["op"], "kernel") == "kernel" and row["gain"] >= GAIN
        found[row["device_kind"]][row["op"]] = "kernel" if kept else "xla"
    return dict(found)


def table(rows: list[dict]) -> str:
    head = ("chip", "operation", "pass", "MB XLA", "MB kernel", "GFLOP XLA", "GFLOP kernel", "VMEM MiB", "ms XLA",
            "ms kernel", "gain")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        x, p = r["xla"], r["pallas"]
        vmem = f"{r['vmem_bytes'] / 2**20:.1f}" if r["vmem_bytes"] else ""
        cells = [r["device_kind"], f"{r['op']}: {r['what']}", r["pass"], *(f"{v['bytes'] / 1e6:,.0f}" for v in (x, p)),
                 *(f"{v['flops'] / 1e9:,.1f}" for v in (x, p)), vmem,
                 *(f"{1e3 * v['predicted_seconds']:.2f}" for v in (x, p)), f"{r['gain']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
