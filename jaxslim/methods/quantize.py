"""int8 weights: a quarter of the bytes, products in floating point (weight-only, round to nearest, ours).

The weight W of a linear becomes round(W / s) in int8 with one scale s = max |W| / 127 for each output; the product is
taken with the int8 weight cast to the activations' type and multiplied by s. Convolutions, embeddings, norms and the
head stay. On a CPU or GPU this saves memory and loading time, not time: the products are as large as before.
"""
from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np

from jaxslim.models.roles import blocks as every_block
from jaxslim.models.roles import roles
from jaxslim.slim import Method, Slim
from jaxslim.spec import LINEARS, SpecError, kind


@dataclasses.dataclass(frozen=True)
class Quantize(Method):
    blocks: str = ""                      # regular expression on block ids; "" = all

    def start(self, teacher: Slim, batches, key) -> Slim:
        out = quantize(teacher, self.blocks)
        if out.spec == teacher.spec:
            raise SpecError(f"quantize: no linear of this {teacher.spec.family} model is in a block that fits "
                            f"{self.blocks!r} and in floating point.")
        return out


def quantize(model: Slim, blocks: str = "") -> Slim:
    """The model with the unfactored linears of its layers in int8; everything else as it was."""
    spec, params = model.spec, dict(model.params)
    for block in [b for b in every_block(spec) if kind(b) in LINEARS and re.search(blocks, b)]:
        names, done = roles(spec, block), []
        for role in LINEARS[kind(block)]:
            w = params.get(f"{names[role]}.weight")
            if w is None or w.dtype == jnp.int8:
                continue
            w = np.asarray(w, np.float32)
            scale = np.maximum(np.abs(w).max(1, initial=0.0), 1e-12) / np.float32(127)
            params[f"{names[role]}.weight"] = jnp.asarray(np.round(w / scale[:, None]).astype(np.int8))
            params[f"{names[role]}.weight_scale"] = jnp.asarray(scale)
            done.append(role)
        if done:
            spec = spec.with_block(block, int8=sorted({*spec.blocks.get(block, {}).get("int8", ()), *done}))
    return model.replace(spec=spec, params=params)


def dequantize(model: Slim) -> Slim:
    """The same function with float weights: what formats without int8 are written from."""
    spec, params = model.spec, dict(model.params)
    for block, fields in model.spec.blocks.items():
        for role in fields.get("int8", ()):
            name = roles(spec, block)[role]
            scale = np.asarray(params.pop(f"{name}.weight_scale"), np.float32)
            params[f"{name}.weight"] = np.asarray(params[f"{name}.weight"], np.float32) * scale[:, None]
        if "int8" in fields:
            spec = spec.with_block(block, int8=None)
    return model.replace(spec=spec, params=params)
