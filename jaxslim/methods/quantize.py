"""int8: a quarter of the bytes, products in floating point or in int8 (round to nearest, no calibration, ours).

The weight W of a linear becomes round(W / s) in int8 with one scale s = max |W| / 127 for each output. Convolutions,
embeddings, norms and the head stay.

* `activations: float` (weight-only): the product is taken with the int8 weight cast to the activations' type and
  multiplied by s. This saves memory and loading time, not time: the products are as large as before.
* `activations: int8` (dynamic): each frame x becomes round(x / t), t = max |x| / 127, the product is summed in int32
  and multiplied by s t (layers.int8_matmul).

Not Qwix: it quantises live Flax modules by intercepting their operations and keeps arrays of a class of its own; here
a model is a flat dict of arrays under Hugging Face names, and modules live in a trace only.
"""
from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxslim.models.roles import blocks as every_block
from jaxslim.models.roles import roles
from jaxslim.slim import Method, Slim
from jaxslim.spec import LINEARS, SpecError, kind


@dataclasses.dataclass(frozen=True)
class Quantize(Method):
    blocks: str = ""                      # regular expression on block ids; "" = all
    activations: Literal["float", "int8"] = "float"   # int8: dynamic, by frame

    def start(self, teacher: Slim, batches, key) -> Slim:
        out = quantize(teacher, self.blocks, self.activations)
        if out.spec == teacher.spec:
            raise SpecError(f"quantize: no linear of this {teacher.spec.family} model is in a block that fits "
                            f"{self.blocks!r} and in floating point.")
        return out


def quantize(model: Slim, blocks: str = "", activations: str = "float") -> Slim:
    """The model with the unfactored linears of its layers in int8; everything else as it was. Blocks that are in int8
    already take the `activations` too."""
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
        if done := sorted({*spec.blocks.get(block, {}).get("int8", ()), *done}):
            spec = spec.with_block(block, int8=done, activations="int8" if activations == "int8" else None)
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
            spec = spec.with_block(block, int8=None, activations=None)
    return model.replace(spec=spec, params=params)
