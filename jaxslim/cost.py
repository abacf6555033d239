"""Exact parameter and MAC counts of a Spec, without building the model.

`macs` counts by formula what `traced_macs` counts in the program itself: every multiply-accumulate of a matrix product
(`dot_general`) or convolution. The two are equal for any Spec and any audio length; tests hold them to it. Elementwise
work (norms, softmax, activations, weight norm, sums over time) is not counted. A tap of a convolution that reads its
zero padding counts like any other, because the program computes it.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxslim.formulas import FORMULAS, inputs, lengths, parts
from jaxslim.models import bind, kernels
from jaxslim.models.roles import FAMILIES, blocks, prefix, roles
from jaxslim.slim import Slim
from jaxslim.spec import Spec, SpecError


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass."""

    total: int
    blocks: dict[str, int]  # block id, 'projection', 'positional' -> MACs; empty when counted `as_run`


def params(spec: Spec) -> int:
    """Number of floats in a model with this Spec; tied parameters count once."""
    return sum(params_by_block(spec).values())


def params_by_block(spec: Spec) -> dict[str, int]:
    """Block id -> parameters, front to back, with 'projection', 'positional' and 'other' (the encoder's own norm, the
    mask embedding). Norms inside a transformer layer count with the sub-layer that roles.py gives them to."""
    table, found = dict.fromkeys(parts(spec), 0), bind.shapes(spec)
    for name, part in block_of(spec).items():
        table[part] = table.get(part, 0) + math.prod(found[name].shape)
    return table


def block_of(spec: Spec) -> dict[str, str]:
    """Parameter (floats only) -> the block or part it counts with."""
    owners = {name: b for b in blocks(spec) for name in roles(spec, b).values()}
    inner, table = prefix(spec), {}
    owners |= {inner + name: part for part, name in FAMILIES[spec.family].rest.items()}
    for name, leaf in bind.shapes(spec).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.int8:
            ends = (i for i, c in enumerate(name) if c == ".")
            other = "other" if name.startswith(inner) else "head"
            table[name] = next((owners[name[:i]] for i in ends if name[:i] in owners), other)
    return table


def macs(spec: Spec, seconds: float = 10.0, batch: int = 1, *, as_run: bool = False) -> Macs:
    """MACs of one forward pass over `batch` clips of `seconds` s.

    Args:
      as_run: count the program that the CPU runs (blocked attention, convolutions as written for speed) by tracing it;
        then there is only a total. Otherwise the formula, which equals the plain program's count.
    Raises:
      ValueError: the audio is shorter than one frame. SpecError: the family has no formula.
    """
    frames = lengths(spec, seconds)  # also the check of `seconds`
    if as_run:
        return Macs(traced_macs(spec, seconds, batch, attention="blocked"), {})
    if spec.family not in FORMULAS:
        raise SpecError(f"MACs: no formula for family {spec.family!r}; known are {sorted(FORMULAS)}.")
    table = {}
    for block, n, *once in FORMULAS[spec.family](spec, frames):  # `once`: MACs that do not grow with the batch
        table[block] = table.get(block, 0) + batch * n + sum(once)
    return Macs(sum(table.values()), table)


def per_layer_rows(spec: Spec, seconds: float = 10.0) -> list[dict[str, Any]]:
    """One row a block, front to back: {block, changes, params, macs}; `changes` is what differs from the config."""
    counts, sizes = macs(spec, seconds).blocks, params_by_block(spec)
    return [{"block": b, "changes": dict(spec.blocks.get(b, {})), "params": sizes.get(b, 0), "macs": counts.get(b, 0)}
            for b in dict.fromkeys([*parts(spec), *sizes])]


def per_layer_table(spec: Spec, seconds: float = 10.0):
    """`per_layer_rows` as a rich.Table with shares of the total, for `jaxslim info MODEL`."""
    from rich.table import Table

    table = Table(title=f"{spec.family}, {seconds:g} s of audio, batch 1")
    for column in ("block", "params", "%", "MMACs", "%", "changes"):
        table.add_column(column, justify="left" if column in ("block", "changes") else "right")
    rows = per_layer_rows(spec, seconds)
    p, m = sum(r["params"] for r in rows), sum(r["macs"] for r in rows)
    for r in [*rows, {"block": "total", "params": p, "macs": m, "changes": {}}]:
        changes = ", ".join(f"{k}={v}" for k, v in r["changes"].items())
        table.add_row(r["block"], f"{r['params']:,}", f"{100 * r['params'] / p:.1f}", f"{r['macs'] / 1e6:,.1f}",
                      f"{100 * r['macs'] / m:.1f}", changes, end_section=r is rows[-1])
    return table


def traced_macs(spec: Spec, seconds: float = 10.0, batch: int = 1, *, attention: str = "dense") -> int:
    """MACs of the program that `Slim.__call__` runs, counted in its jaxpr; nothing is computed.

    Args:
      attention: "dense" is the plain program, "blocked" the one for long audio on CPU.
    """
    lengths(spec, seconds)
    forward = functools.partial(_forward, attention=attention)
    with kernels.PLAIN(True):
        return jaxpr_macs(jax.make_jaxpr(forward)(Slim(spec, dict(bind.shapes(spec))), inputs(spec, seconds, batch)))


def jaxpr_macs(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """MACs of all dot_general and conv_general_dilated in a jaxpr, inner programs included.

    Raises:
      ValueError: a matrix product under `while` (no known trip count), or branches of `cond` that differ.
    """
    return sum(times * eqn_macs(eqn) for eqn, times in products(jaxpr))


def products(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Iterator[tuple[core.JaxprEqn, int]]:
    """The dot_general and conv_general_dilated of a jaxpr, and how often each runs. Raises as `jaxpr_macs`."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            yield eqn, 1
            continue
        inner = [list(products(j)) for j in _inner(eqn.params)]
        if name == "cond":
            if len({sum(times * eqn_macs(e) for e, times in branch) for branch in inner}) > 1:
                raise ValueError("MACs: the work of a `cond` depends on data, so it cannot be counted.")
            inner = inner[:1]
        if name == "while" and any(inner):
            raise ValueError("MACs: the work of a `while` depends on data, so it cannot be counted.")
        for e, times in (found for part in inner for found in part):
            yield e, times * (eqn.params["length"] if name == "scan" else 1)


def eqn_macs(eqn: core.JaxprEqn) -> int:
    """MACs of one dot_general or conv_general_dilated, run once."""
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contract)
    _, dims, _ = eqn.params["dimension_numbers"]  # (out, in / groups, *window)
    return eqn.outvars[0].aval.size * math.prod(rhs[i] for i in dims[1:])


def _inner(parameters: dict[str, Any]) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    for value in parameters.values():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, (core.ClosedJaxpr, core.Jaxpr)):
                yield v


def _forward(model: Slim, inputs: dict[str, jax.Array], attention: str):
    rows = next(iter(inputs.values())).shape[0]
    ids = jnp.zeros(rows, jnp.int32) if model.spec.slots > 1 else None   # one adapter a row
    out = model(**inputs, attention=attention, adapter_ids=ids)
    return (out.last_hidden_state, out.pooler_output) if out.logits is None else out.logits
