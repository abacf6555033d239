"""`--dry-run`: compiles the largest step, runs nothing, and says what it needs: memory, collectives, FLOPs, time.

With `--topology v5e:4x4` the real TPU compiler does it for a pod that is not there; that takes libtpu (the `tpu`
extra) and works on any Linux machine. The predicted time is an estimate from three numbers of the compiled program,
printed with its assumptions; it knows nothing of latencies, of input, or of work that overlaps.
"""
from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxslim import cost
from jaxslim.config import ConfigError, Train
from jaxslim.formulas import TOKEN_RATE
from jaxslim.models import bind
from jaxslim.slim import Method, Slim
from jaxslim.spec import Spec
from jaxslim.train import hlo
from jaxslim.train import mesh as M
from jaxslim.train import step as S

GIB = 2.0**30


class Chip(NamedTuple):
    """Peak numbers of one chip from its maker's public data sheet."""

    tflops: float     # bf16, dense, 1e12 per second
    memory: float     # GiB
    bandwidth: float  # of the memory, 1e9 bytes per second
    links: float      # between chips, all links of one chip together, 1e9 bytes per second


CHIPS = {"v4": Chip(275, 32, 1228, 300), "v5e": Chip(197, 16, 819, 200), "v5p": Chip(459, 95, 2765, 600),
         "v6e": Chip(918, 32, 1640, 448)}  # cloud.google.com/tpu/docs, system architecture
INSTALL = "--topology needs the TPU compiler: pip install 'jaxslim[tpu]' (libtpu; Linux on x86, no TPU needed)."


def topology(name: str) -> list:
    """Devices of a pod that is not there, e.g. 'v5e:4x4' (16 chips). Raises ConfigError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(INSTALL)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks a cloud server that is not there for minutes
    jax.config.update("jax_platforms", "cpu")         # the compiler alone, no TPU
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:  # jaxlib's, of several kinds
        why = str(error).splitlines()[0][:200]
        if "already in use" in str(error):
            why = "another process uses the TPU compiler; one at a time"
        raise ConfigError(f"--topology {name!r} is not known to the TPU compiler ({why}); e.g. v5e:4x4, v5p:4x4x4, "
                          "v6e:16x16.") from None


def run(path: str, overrides: Sequence[str] = (), pod: str | None = None) -> dict[str, Any]:
    """`jaxslim train CONFIG --dry-run [--topology POD]`: `report` of the largest bucket of the config's data."""
    from jaxslim import config, hub, recipe
    from jaxslim.data import task_of
    from jaxslim.methods import METHODS

    cfg = config.load(config.Run, path, overrides)
    if not (cfg.model and cfg.data.train):
        raise ConfigError(f"{path}: model and data.train must be set.")
    mesh = M.make(cfg.mesh, topology(pod) if pod else None)
    with tempfile.TemporaryDirectory() as folder:  # of a new model, if it is one
        name = recipe.source(cfg, folder)
        model = hub.load(name)
        task = task_of(model.spec, hub.folder(name), cfg.data.language)
    method = config.build(METHODS["train"], cfg.options, f"{path}: options")
    batches = recipe.training_batches(cfg.data.train, task, cfg, mesh)
    batch = {k: v for k, v in batches.fillers().items() if k not in ("row", "samples")}
    length = max(batches.shapes, key=lambda s: (s[0] * s[1], s[1]))[1]
    seconds = length / getattr(task, "sampling_rate", TOKEN_RATE)
    return report(method, shapes_of(model), None, cfg, batch, mesh, seconds, pod.split(":")[0] if pod else None)


def abstract(method: Method, student: Slim, cfg: Train, mesh) -> tuple[S.State, dict, Any]:
    """What step.init returns, as shapes with shardings: nothing is allocated."""
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in student.params.items()}
    labels, where = S.groups(method, shapes, cfg), M.sharding(shapes, mesh)
    tx = S.optimizer(cfg, labels)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    trained = {k: place(jax.ShapeDtypeStruct(shapes[k].shape, jnp.float32), where[k]) for k in labels}
    moments = jax.eval_shape(tx.init, trained)
    moments = jax.tree.map(place, moments, M.like_params(moments, {k: where[k] for k in labels}, mesh))
    zero = place(jax.ShapeDtypeStruct((), jnp.int32), M.NamedSharding(mesh, M.P()))
    average = trained if cfg.ema_decay else None
    return (S.State(trained, moments, zero, zero, zero, average),
            {k: place(v, where[k]) for k, v in shapes.items() if k not in labels}, tx)


def placed(model: Slim, cfg: Train, mesh) -> Slim:
    """A teacher as shapes with shardings, stored as `teacher_dtype` says."""
    where = M.sharding(model.params, mesh)
    dtype = lambda v: cfg.teacher_dtype if jnp.issubdtype(v.dtype, jnp.floating) else v.dtype  # noqa: E731
    return model.replace(params={k: jax.ShapeDtypeStruct(v.shape, dtype(v), sharding=where[k])
                                 for k, v in model.params.items()})


def audio_batch(spec: Spec, rows: int, seconds: float, labels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `rows` clips of `seconds` s with `labels` labels each."""
    inputs = {k: v for k, v in cost.inputs(spec, seconds, rows).items() if k != "decoder_input_ids"}
    values = next(iter(inputs.values()))
    if spec.family != "whisper":
        inputs["attention_mask"] = jax.ShapeDtypeStruct(values.shape[:2], jnp.int32)
    return inputs | {"labels": jax.ShapeDtypeStruct((rows, labels), jnp.int32)}


def model_flops(method: Method, student: Slim, teacher: Slim | None, seconds: float, rows: int) -> int:
    """FLOPs that a step cannot do without, by the formulas of `cost`: 2 a MAC, forward once; the backward pass twice
    more where parameters are trained, once more where only a gradient passes through, not at all before them."""
    table, owners = cost.macs(student.spec, seconds, rows).blocks, cost.block_of(student.spec)
    trained = {b for k, v in student.params.items() if jnp.issubdtype(v.dtype, jnp.floating)
               and method.group(k) != "frozen" and (b := owners.get(k)) is not None}
    total, behind = 0, False
    for block, macs in table.items():
        learns = block in trained
        total += 2 * macs * (1 + learns * (1 + behind) if learns or not behind else 2)
        behind = behind or learns
    if teacher is not None:
        total += 2 * cost.macs(teacher.spec, seconds, rows).total
    return total


def compile_step(method: Method, student: Slim, teacher: Slim | None, cfg: Train, batch: Mapping[str, Any], mesh,
                 options: Mapping[str, str] | None = None) -> tuple[Any, float]:
    """(compiled step, seconds it took) for a global `batch` of shapes."""
    state, frozen, tx = abstract(method, student, cfg, mesh)
    step = S.make(method, student.spec, tx, cfg, state, mesh)
    split = M.NamedSharding(mesh, M.BATCH)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split) for k, v in batch.items()}
    guide = None if teacher is None else placed(teacher, cfg, mesh)
    platform = mesh.devices.flat[0].platform
    started = time.monotonic()
    lowered = step.trace(state, frozen, guide, batch).lower(lowering_platforms=(platform,))
    return lowered.compile(compiler_options=dict(options or {})), time.monotonic() - started


def report(method: Method, student: Slim, teacher: Slim | None, cfg: Train, batch: Mapping[str, Any], mesh,
           seconds: float, chip: str | None = None, options: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Compiles the step for `batch` (global shapes; rows of `seconds` s) and measures the program.

    Args:
      chip: a key of CHIPS, for the predicted time and the memory that is there.
    Returns:
      per device: bytes (arguments, temporaries, program, total, available), bytes_accessed; per step: collectives,
      collective_bytes (expected from parameters and gradients: expected_bytes), model_flops, flops_run;
      predicted_seconds and what it was made of; compile_seconds. A step that does not fit has `error`.
    """
    rows = next(iter(batch.values())).shape[0]
    size = {"devices": mesh.size, "mesh": {k: v for k, v in mesh.shape.items() if v > 1}, "rows": rows,
            "seconds": seconds, "dtype": cfg.dtype, "remat": cfg.remat, "layers": cfg.layers}
    known = CHIPS.get(chip or "")
    if known:
        size |= {"chip": chip, "available_bytes": known.memory * GIB}
    try:
        compiled, took = compile_step(method, student, teacher, cfg, batch, mesh, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return size | {"error": " ".join(str(error).split())[:300]}
    memory, module = compiled.memory_analysis(), hlo.Module.parse(compiled.as_text())
    found = hlo.collectives(module)
    run, model = hlo.flops(module) * mesh.size, model_flops(method, student, teacher, seconds, rows)
    accessed = hlo.bytes_accessed(module)
    result = size | {
        "argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "total_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "collectives": hlo.by_kind(found), "collective_bytes": sum(c.bytes * c.times for c in found),
        "expected_bytes": expected_bytes(method, student, teacher, cfg, mesh),
        "moved_bytes": round(sum(c.moved for c in found)), "bytes_accessed": accessed, "model_flops": model,
        "flops_run": run, "flops_ratio": round(run / model, 3), "compile_seconds": round(took, 1)}
    if known:
        parts = {"compute": run / mesh.size / (known.tflops * 1e12), "memory": accessed / (known.bandwidth * 1e9),
                 "collectives": result["moved_bytes"] / (known.links * 1e9)}
        result |= {"predicted": {k: round(v, 5) for k, v in parts.items()},
                   "predicted_seconds": round(max(parts["compute"], parts["memory"]) + parts["collectives"], 5)}
    return result


def expected_bytes(method: Method, student: Slim, teacher: Slim | None, cfg: Train, mesh) -> int:
    """Collective bytes by arithmetic for meshes of data and fsdp: parameters split over fsdp are collected whole once
    and their gradients scattered once in the compute dtype, then summed over data; the others' gradients are summed."""
    wide, total = jnp.dtype(cfg.dtype).itemsize, 0
    shapes = {k: v for k, v in student.params.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    where = M.sharding(shapes, mesh)
    for name, x in shapes.items():
        width = wide if len(x.shape) > 1 else 4
        bytes_ = math.prod(x.shape) * width
        split, trained = "fsdp" in where[name].spec, method.group(name) != "frozen"
        total += bytes_ * (split + (trained if split or M.shards(mesh) > 1 else 0))
        total += bytes_ // mesh.shape["fsdp"] if split and trained and mesh.shape["data"] > 1 else 0
    if teacher is not None:
        total += sum(math.prod(x.shape) * wide for k, x in teacher.params.items()
                     if "fsdp" in M.sharding({k: x}, mesh)[k].spec)
    return total * cfg.gradient_accumulation_steps


def render(r: Mapping[str, Any]) -> str:
    """What `report` returned, for the terminal."""
    mesh = " x ".join(f"{k} {v}" for k, v in r["mesh"].items()) or "1 device"
    lines = [f"{r['devices']} devices ({mesh}){', ' + r['chip'] if 'chip' in r else ''}; step of {r['rows']} rows x "
             f"{r['seconds']:g} s, {r['dtype']}, remat {r['remat']}"]
    if "error" in r:
        return "\n".join([*lines, f"does not fit: {r['error']}", f"try remat full, fewer rows per device (now "
                          f"{r['rows'] // r['devices']}), shorter buckets, or more fsdp."])
    room = f" of {r['available_bytes'] / GIB:.1f}" if "available_bytes" in r else ""
    lines.append(f"memory per device   {r['total_bytes'] / GIB:.2f}{room} GiB: {r['argument_bytes'] / GIB:.2f} state "
                 f"and batch, {r['temporary_bytes'] / GIB:.2f} temporary, {r['program_bytes'] / GIB:.2f} program")
    for kind, row in sorted(r["collectives"].items()):
        lines.append(f"{kind:19} {row['count']} with {row['bytes'] / 1e6:,.1f} MB")
    lines.append(f"collective bytes    {r['collective_bytes'] / 1e6:,.1f} MB; parameters and gradients alone are "
                 f"{r['expected_bytes'] / 1e6:,.1f} MB")
    lines.append(f"FLOPs               {r['flops_run'] / 1e12:,.2f} T run, {r['model_flops'] / 1e12:,.2f} T of the "
                 f"model (ratio {r['flops_ratio']:.2f})")
    if "predicted" in r:
        chip, p = CHIPS[r["chip"]], r["predicted"]
        lines.append(f"predicted step      {1000 * r['predicted_seconds']:,.1f} ms = max(compute "
                     f"{1000 * p['compute']:,.1f}, memory {1000 * p['memory']:,.1f}) + collectives "
                     f"{1000 * p['collectives']:,.1f}")
        lines.append(f"assuming            {chip.tflops:g} TFLOP/s, {chip.bandwidth:g} GB/s of memory and "
                     f"{chip.links:g} GB/s between chips, all at their peak and collectives not hidden")
    else:
        lines.append("predicted step      none: the peak speed of this device is not known; give --topology")
    return "\n".join([*lines, f"compiled in         {r['compile_seconds']:.0f} s"])


def shapes_of(student: Slim) -> Slim:
    """The same model as shapes; parameters that are no part of it (aux., teacher/) keep theirs."""
    known = bind.shapes(student.spec)
    return student.replace(params={k: known.get(k) or jax.ShapeDtypeStruct(v.shape, v.dtype)
                                   for k, v in student.params.items()})

