"""Adapters merged into the weights they stand beside, exactly, and taken out again."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxslim import adapters
from jaxslim.adapters import AdapterError
from jaxslim.models import bind
from jaxslim.models.roles import roles
from jaxslim.slim import Slim
from jaxslim.spec import Spec

log = logging.getLogger(__name__)


def merge(model: Slim, name: str | None = None, check: bool = True) -> Slim:
    """The model with one adapter merged into its weights, in fp32; the others are dropped.

    LoRA is added to its linear. A parallel adapter that shares the FFN's normalised input becomes units of the FFN with
    an activation of their own: exact, and `unmerge` gives the adapter back bit for bit (if its scale is a power of 2).

    Args: check: log by how much the logits of a fixed input change.
    Raises: AdapterError: an adapter that is no part of a linear map or FFN (sequential ones, `raw` input, own norm).
    """
    one = adapters.select(model, name)
    spec, params = one.spec, dict(one.params)
    for block in adapters.blocks(spec):
        fields, names = one.spec.blocks[block], roles(spec, block)
        for role, f in fields.get("lora", {}).items():
            _merge_lora(params, names[role], f)
            if role in fields.get("int8", ()):   # sums of int8 weights and LoRA are floats
                left = [r for r in spec.blocks[block]["int8"] if r != role]
                spec = spec.with_block(block, int8=left or None, **({} if left else {"activations": None}))
        spec = spec.with_block(block, lora=None)
        if "adapter" in fields:
            spec = _widen(spec, params, block)
    merged = Slim(spec, params, one.defaults)
    bind.check(spec, params, "The merged model")
    if check:
        log.info("Merged the adapter of %d blocks; largest change of the logits: %s.", len(adapters.blocks(one.spec)),
                 difference(one, merged))
    return merged


def difference(a: Slim, b: Slim) -> str:
    """Largest difference of the outputs of two models on a fixed input, as 'x of at most y'."""
    from jaxslim import export

    inputs = export.example(a.spec)
    d = export._difference(export._ours(a, inputs), export._ours(b, inputs)[0])
    return f"{d['max_difference']:.1e} of at most {d['max_abs']:.3g}"


def _merge_lora(params: dict, linear: str, f: Mapping[str, Any]) -> None:
    a, b = (np.asarray(params.pop(f"{linear}.lora_{x}.weight"), np.float32) for x in "AB")
    delta = np.float32(f["alpha"] / f["rank"]) * (b @ a)
    if f"{linear}.weight" not in params:
        raise AdapterError(f"{linear} is a product of two factors, and LoRA cannot be merged into it; keep it apart.")
    w = np.asarray(params[f"{linear}.weight"], np.float32)
    if (scale := params.pop(f"{linear}.weight_scale", None)) is not None:
        w = w * np.asarray(scale)[:, None]
    params[f"{linear}.weight"] = jnp.asarray(w + delta)


def _widen(spec: Spec, params: dict, block: str) -> Spec:
    """Moves a block's parallel adapter into its FFN, as units at the end."""
    a, f, names = spec.adapter(block), spec.ffn(block), roles(spec, block)
    fields = spec.blocks[block]
    why = ("is sequential, behind a non-linearity of its own" if a.kind != "parallel" else
           "reads the input before its norm (input: raw)" if a.input != "normed" else
           "has a norm of its own" if a.norm else
           "stands beside factored linears" if f.ranks else
           "stands beside int8 linears" if fields.get("int8") else
           "has biases beside linears without" if a.bias and not adapters.has_bias(spec, block) else None)
    if why:
        raise AdapterError(f"Block {block}: its adapter {why}, so it cannot be merged exactly; keep it apart.")
    up, down, own = names["up"], names["down"], names["owner"] + ".adapter."
    width = np.shape(params[own + "up.weight"])[0]
    take = lambda k: jnp.asarray(params.pop(k), jnp.float32)  # noqa: E731
    if not f.units:   # nothing was left of the FFN but its output bias
        params |= {f"{up}.weight": jnp.zeros((0, width)), f"{down}.weight": jnp.zeros((width, 0))}
        params |= {f"{up}.bias": jnp.zeros(0)} if a.bias else {}
    params[f"{up}.weight"] = jnp.concatenate([params[f"{up}.weight"], take(own + "down.weight")])
    params[f"{down}.weight"] = jnp.concatenate([params[f"{down}.weight"], a.scale * take(own + "up.weight")], 1)
    if a.bias:
        params[f"{up}.bias"] = jnp.concatenate([params[f"{up}.bias"], take(own + "down.bias")])
        params[own + "up.bias"] = a.scale * jnp.asarray(params[own + "up.bias"])
    elif adapters.has_bias(spec, block):
        params[f"{up}.bias"] = jnp.concatenate([params[f"{up}.bias"], jnp.zeros(a.width)])
    return spec.with_block(block, units=f.units + a.width, adapter={**fields["adapter"], "kind": "merged"})


def unmerge(model: Slim, name: str = "0") -> Slim:
    """The opposite of `merge` for adapters that became units of an FFN, bit for bit."""
    spec, params = model.spec, dict(model.params)
    found = [b for b, f in spec.blocks.items() if f.get("adapter", {}).get("kind") == "merged"]
    if not found:
        raise AdapterError("No adapter is merged as units of an FFN here. LoRA cannot be taken out again exactly; keep "
                           "the model from before.")
    for block in found:
        a, names = spec.adapter(block), roles(spec, block)
        up, down, own = names["up"], names["down"], names["owner"] + ".adapter."
        rest = spec.ffn(block).units - a.width
        params[own + "down.weight"] = params[f"{up}.weight"][rest:]
        params[own + "up.weight"] = jnp.asarray(params[f"{down}.weight"])[:, rest:] / a.scale
        if a.bias:
            params[own + "down.bias"] = params[f"{up}.bias"][rest:]
            params[own + "up.bias"] = jnp.asarray(params[own + "up.bias"]) / a.scale
        cut = {f"{up}.weight": np.s_[:rest], f"{down}.weight": np.s_[:, :rest], f"{up}.bias": np.s_[:rest]}
        for key, part in cut.items():
            if key in params and rest:
                params[key] = params[key][part]
            elif key in params:
                del params[key]
        plain = spec.replace(blocks={k: v for k, v in spec.blocks.items() if k != block}).ffn(block).units
        spec = spec.with_block(block, units=None if rest == plain else rest,
                               adapter={**spec.blocks[block]["adapter"], "kind": "parallel"})
    out = Slim(spec, params, model.defaults, (name,))
    bind.check(spec, params, "The unmerged model")
    return out
