"""Latency tables: what heads, units and channels cost in time on this device; for the latency budget of `prune`.

`build` times the whole forward pass with all blocks of a kind cut to a few widths; the difference to none at all,
shared among the blocks, is the time of one block at that width. Front-end convolutions, whose time depends on two
widths, are timed alone on a grid. What is left is constant. Between grid points the time is interpolated, and it never
falls with the width. A model cut to half everywhere is timed too, and its prediction error stands in the table.

A table belongs to one device, audio length, batch and dtype. Ours; the papers count MACs only.
"""
from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.formulas import inputs, lengths
from jaxslim.models import bind, gates, roles
from jaxslim.slim import Slim
from jaxslim.spec import GATES, Spec, SpecError, canonical, kind
from jaxslim.speed_worker import _cpu, _versions, cpu_numbers, random_model

VERSION = 1
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)   # of the units of a block, beside none
FRONT = (1 / 8, 1 / 2, 1)                  # of the channels of a convolution


def device() -> dict[str, Any]:
    """What a table is measured on."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return {"platform": "cpu", "device": _cpu(), "threads": len(cpu_numbers())}
    return {"platform": first.platform, "device": first.device_kind, "threads": None}


def build(model: Slim | Spec, *, seconds: float = 10.0, batch: int = 1, dtype: str | None = None, repeats: int = 5,
          progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The latency table of a model's shape, in seconds (weights do not matter and are random).

    Args:
      seconds, batch, dtype: of the forward pass that is timed.
      repeats: timed calls of each shape, in turn with the others; the fastest counts.
    """
    spec = gates.plain(model.spec if isinstance(model, Slim) else model)
    say = progress or (lambda line: None)
    batches = {k: np.zeros(x.shape, x.dtype) for k, x in inputs(spec, seconds, batch).items()}
    kin: dict[str, list[str]] = {}
    for block in roles.blocks(spec):
        if kind(block) in GATES and kind(block) != "frontend" and gates.size(spec, block):
            kin.setdefault(_kin(block), []).append(block)
    if spec.family == "whisper":
        kin["frontend.0"] = ["frontend.0"]
    variants: dict[tuple[str, int], Spec] = {("", 0): spec, ("half", 0): spec}
    for name, blocks in kin.items():
        sizes = [gates.size(spec, b) for b in blocks]
        for width in grid(max(sizes), least=int(name.startswith("frontend"))):
            variants[name, width] = _cut(spec, {b: min(width, n) for b, n in zip(blocks, sizes, strict=True)})
        variants["half", 0] = _cut(variants["half", 0], {b: max(1, n // 2) for b, n in zip(blocks, sizes, strict=True)})
    front = {} if spec.family == "whisper" else {
        i: [[max(1, round(r * spec.channels(j))) for r in FRONT] if j >= 0 else [1] for j in (i - 1, i)]
        for i in range(len([b for b in roles.blocks(spec) if kind(b) == "frontend"]))}
    variants["half", 0] = _cut(variants["half", 0], {f"frontend.{i}": out[1] for i, (_, out) in front.items()})
    say(f"{len(variants)} shapes of the whole model, {repeats} calls each")
    whole = dict(zip(variants, _race([_forward(v, batches, dtype) for v in variants.values()], repeats), strict=True))
    table: dict[str, Any] = {"version": VERSION, **device(), "versions": _versions("jax", "jaxlib", "flax"),
                             "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "shape": shape(spec),
                             "seconds": seconds, "batch": batch, "dtype": dtype or "float32", "blocks": {}}
    for name, blocks in kin.items():
        widths = [w for n, w in variants if n == name]
        times = np.array([whole[name, w] for w in widths]) - (0.0 if len(blocks) == 1 else whole[name, widths[0]])
        times = times - times[0] if len(blocks) == 1 else times
        table["blocks"][name] = {"widths": widths,
                                 "seconds": np.maximum.accumulate(np.maximum(times / len(blocks), 0.0)).tolist()}
    for i, (ins, outs) in front.items():
        say(f"frontend.{i}: {len(ins) * len(outs)} shapes")
        calls = [_convolution(spec, i, a, b, seconds, batch, dtype) for a in ins for b in outs]
        times = np.array(_race(calls, repeats)).reshape(len(ins), len(outs))
        times = np.maximum.accumulate(np.maximum.accumulate(times, 0), 1)
        table["blocks"][f"frontend.{i}"] = {"widths": [ins, outs], "seconds": times.tolist()}
    table["rest"] = 0.0
    every = {b: float(gates.size(spec, b)) for blocks in kin.values() for b in blocks}
    every |= {f"frontend.{i}": float(spec.channels(i)) for i in front}
    table["rest"] = max(0.0, whole["", 0] - float(_total(table, every)))
    half = {b: float(gates.size(variants["half", 0], b)) for b in every}
    table["whole"], table["check"] = whole["", 0], {"predicted": float(_total(table, half)),
                                                    "measured": whole["half", 0]}
    return table


def save(table: Mapping[str, Any], path: str | os.PathLike) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


@functools.lru_cache(maxsize=8)
def load(path: str, spec: Spec) -> dict[str, Any]:
    """The table in file `path`. Raises SpecError when it is of another device or model."""
    if not path:
        raise SpecError("latency: `table` must name a file made by `jaxslim bench MODEL --table FILE` on this device.")
    try:
        table = json.loads(pathlib.Path(path).read_text())
        version, blocks = table["version"], table["blocks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"latency: {path} is no latency table ({type(error).__name__}: {error}).") from None
    here = device()
    if version != VERSION or any(table.get(k) != here[k] for k in here):
        there = {k: table.get(k) for k in here}
        raise SpecError(f"latency: {path} was measured on {there}, this is {here}; make one here with `jaxslim bench "
                        "MODEL --table FILE`.")
    lacking = [g.block for g in gates.groups(spec) if g.block not in blocks and _kin(g.block) not in blocks]
    if table["shape"] != shape(spec) or lacking:
        raise SpecError(f"latency: {path} was measured for another shape of model than this {spec.family}; make one "
                        "for its config.")
    return table


def expected(table: Mapping[str, Any], spec: Spec, counts: Mapping[str, Any]) -> jax.Array:
    """Seconds of the forward pass with `counts` (block -> expected units), interpolated, (), differentiable."""
    plain = gates.plain(spec)
    every = {b: float(gates.size(plain, b)) for b in roles.blocks(plain)
             if b in table["blocks"] or _kin(b) in table["blocks"]}
    return _total(table, every | dict(counts))


def shape(spec: Spec) -> str:
    """Digest of the stock shape that a table is for: all arrays, and the strides that no array shows."""
    stock = bind.shapes(Spec(spec.config, spec.family, spec.head))
    text = canonical([spec.family, spec.get("conv_stride"), {name: x.shape for name, x in stock.items()}])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def grid(size: int, least: int = 0) -> list[int]:
    return sorted({least, *(max(1, round(r * size)) for r in SHARES)})


def _total(table: Mapping[str, Any], counts: Mapping[str, Any]) -> jax.Array:
    total = jnp.float32(table["rest"])
    for block, count in counts.items():
        entry = table["blocks"].get(block) or table["blocks"][_kin(block)]
        seconds = np.asarray(entry["seconds"], np.float32)
        if seconds.ndim == 1:
            total = total + jnp.interp(count, np.asarray(entry["widths"], np.float32), seconds)
            continue
        ins, outs = (np.asarray(w, np.float32) for w in entry["widths"])
        before = counts.get(f"frontend.{int(block.split('.')[1]) - 1}", 1.0)
        by_in = jnp.stack([jnp.interp(count, outs, row) for row in seconds])
        total = total + (by_in[0] if len(ins) == 1 else jnp.interp(before, ins, by_in))
    return total


def _kin(block: str) -> str:
    """encoder.3.ffn1 -> encoder.ffn1: blocks that take the same time."""
    words = block.split(".")
    return f"{words[0]}.{words[2]}" if len(words) == 3 else block


def _cut(spec: Spec, widths: Mapping[str, int]) -> Spec:
    for block, width in widths.items():
        spec = gates.with_units(spec, block, range(width))
    return spec


def _forward(spec: Spec, batch, dtype) -> Callable[[], Any]:
    model = random_model(spec)
    return lambda: model(dtype=dtype, **batch)


def _convolution(spec: Spec, i: int, ins: int, outs: int, seconds: float, batch: int, dtype) -> Callable[[], Any]:
    """One front-end convolution with `ins` and `outs` channels, in a model without transformer layers."""
    small = Spec({**spec.config, "num_hidden_layers": 0}, spec.family, "none")
    small = small.with_block(f"frontend.{i}", channels=outs)
    small = small if i == 0 else small.with_block(f"frontend.{i - 1}", channels=ins)
    params = random_model(small).params
    before = lengths(spec, seconds)[i - 1] if i else inputs(spec, seconds, 1)["input_values"].shape[1]
    x = np.zeros((batch, before, ins), dtype or np.float32)
    owner = roles.roles(small, f"frontend.{i}")["owner"]
    call = jax.jit(lambda params, x: bind.submodule(bind.bind(small, params), owner)(x))
    return lambda: call(params, x)


def _race(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each call, the fastest of `repeats` rounds in which all have their turn; compiled before."""
    for call in calls:
        jax.block_until_ready(call())
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            started = time.perf_counter()
            jax.block_until_ready(call())
            best[i] = min(best[i], time.perf_counter() - started)
    return best
