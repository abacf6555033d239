"""What a gated model is expected to cost: parameters, MACs, latency; differentiable in the expected counts.

A cost is named `params`, `macs` or `latency`; `params` and `macs` also for a part of the model: `params.frontend`,
`params.encoder`, `macs.attention` (the first word of a block id, or its kind). Gates of different blocks are
independent, so the expectation of a product of counts is the product of expectations, and at whole counts a cost equals
what cost.py says of the sliced model (tests). An array that vanishes with the last unit of its block, without being
made of units (WavLM's gate, factors), counts with min(1, expected count): exact at whole counts, ours in between.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jaxslim import cost
from jaxslim.formulas import FORMULAS, lengths
from jaxslim.models import bind, gates
from jaxslim.spec import Spec, SpecError, kind, nearest

KINDS = ("params", "macs", "latency")


def check(name: str, spec: Spec) -> None:
    """Raises SpecError for a cost that is not known or not of this model."""
    what, _, part = name.partition(".")
    if what not in KINDS or what == "latency" and part:
        raise SpecError(f"prune: unknown cost {name!r}; known are params, macs, latency, and params.PART, macs.PART."
                        f"{nearest(what, KINDS)}")
    known = sorted({word for b in cost.params_by_block(spec) for word in (b.split(".")[0], kind(b))})
    if part and part not in known:
        raise SpecError(f"prune: {name!r}: this {spec.family} model has no part {part!r}.{nearest(part, known)} "
                        f"Its parts are {known}.")


def expected(name: str, spec: Spec, counts: Mapping[str, Any], seconds: Sequence[float] = (10.0,),
             table: Mapping[str, Any] | None = None) -> jax.Array:
    """Cost `name` of the gated model `spec` with `counts` (gates.Group.key -> expected number of units), () fp32.

    Args:
      seconds: audio lengths for MACs; the mean over them counts.
      table: for latency, what latency.load gave.
    """
    what, _, part = name.partition(".")
    if what == "params":
        return params(spec, counts, part)
    if what == "macs":
        return sum(macs(spec, counts, s, part) for s in seconds) / len(seconds)
    from jaxslim import latency

    return latency.expected(table, spec, counts)


def full(spec: Spec) -> dict[str, float]:
    """Counts with every gate open."""
    return {g.key: float(g.size) for g in gates.groups(spec)}


def floor(spec: Spec) -> dict[str, float]:
    """Counts with every gate closed; a front-end convolution keeps one channel, ranks one."""
    return {g.key: float(gates.least(g.key)) for g in gates.groups(spec)}


def params(spec: Spec, counts: Mapping[str, Any], part: str = "") -> jax.Array:
    total = jnp.float32(0)
    for (linear, needed), size in _monomials(spec, part).items():
        term = jnp.float32(size)
        for block in linear:
            term = term * counts[block]
        for block in needed:
            term = term * jnp.minimum(counts[block], 1.0)
        total = total + term
    return total


@functools.lru_cache(maxsize=64)
def _monomials(spec: Spec, part: str) -> dict[tuple, float]:
    """(blocks whose counts are factors, blocks that must not be empty) -> coefficient."""
    plain = gates.plain(spec)
    have, owner = bind.shapes(plain), cost.block_of(plain)
    axes: dict[str, list[str]] = {}
    needs: dict[str, list[str]] = {}
    sizes = {}
    for group in gates.groups(spec):
        sizes[group.key] = group.size
        for place in {*group.rows, *group.reads}:
            axes.setdefault(place.name, []).append(group.key)
        for name in group.gone:
            needs.setdefault(name, []).append(group.key)
    table: dict[tuple, float] = {}
    for name, block in owner.items():
        if part and part not in (block.split(".")[0], kind(block)):
            continue
        linear = tuple(sorted(axes.get(name, ())))
        needed = tuple(b for b in needs.get(name, ()) if b not in linear)
        size = math.prod(have[name].shape) / math.prod(sizes[b] for b in linear)
        table[linear, needed] = table.get((linear, needed), 0.0) + size
    for name, leaf in bind.shapes(gates.emptied(spec)).items():  # a bias that only an empty block has
        if name not in have:
            raise SpecError(f"prune: {name} {leaf.shape} exists only where a block is empty; {spec.family} models "
                            "without biases cannot be pruned in this release.")
    return table


def macs(spec: Spec, counts: Mapping[str, Any], seconds: float, part: str = "") -> jax.Array:
    plain = gates.plain(spec)
    view = _View(plain, counts)
    total = jnp.float32(0)
    for block, *numbers in FORMULAS[spec.family](view, lengths(plain, seconds)):
        if not part or part in (block.split(".")[0], kind(block)):
            for n in numbers:
                total = total + (float(n) if isinstance(n, int) else n)  # a large int is no jax number
    return total


class _View:
    """A Spec whose counts are expectations, for the formulas."""

    def __init__(self, spec: Spec, counts: Mapping[str, Any]):
        self.spec, self.counts = spec, counts

    def __getattr__(self, name):
        return getattr(self.spec, name)

    def __getitem__(self, key):
        return self.spec[key]

    def channels(self, i: int):
        return self.counts.get(f"frontend.{i}", self.spec.channels(i))

    def conv(self, block: str):
        return self.counts.get(block, self.spec.conv(block))

    def attention(self, block: str):
        a = self.spec.attention(block)
        dims = {field: self.counts.get(f"{block}:{what}", getattr(a, field)) for what, field in gates.DIMS.items()}
        return SimpleNamespace(**(a._asdict() | dims), count=self.counts.get(block, a.count))

    def ffn(self, block: str):
        f = self.spec.ffn(block)
        return f._replace(units=self.counts.get(block, f.units))
