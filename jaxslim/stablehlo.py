"""A model as one StableHLO program (`jax.export`) for CPU, GPU and TPU, with the batch and the time left open.

The folder also is the model's own (config.json, model.safetensors, tokenizer); the program runs without jaxslim:

    program = jax.export.deserialize(open("model.stablehlo", "rb").read())
    out = program.call(weights, {"input_values": ..., "attention_mask": ...})    # weights: safetensors.numpy, float32
"""
from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import hub
from jaxslim.dense import ExportError
from jaxslim.models import kernels
from jaxslim.slim import Slim
from jaxslim.stream import geometry

PROGRAM = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
INSTALL = "StableHLO programs need flatbuffers: pip install jaxslim[export]"


def write(model: Slim, folder: str | os.PathLike, inputs: Mapping[str, np.ndarray]) -> int:
    """Writes the program of `model` and returns its size in bytes.

    Args:
      inputs: an example, rows first; axis 1 of everything but Whisper's features is time (a multiple of nothing).
    Raises:
      ExportError: the model cannot be traced with open shapes; flatbuffers is missing.
    """
    batch, time = jax.export.symbolic_shape("batch, time", constraints=[f"time >= {least(model)}"])
    fixed = ("input_features",) if model.spec.family == "whisper" else ()
    shapes = {k: jax.ShapeDtypeStruct((batch, *(v.shape[1:] if k in fixed else (time, *v.shape[2:]))), v.dtype)
              for k, v in inputs.items()}
    weights = {k: jax.ShapeDtypeStruct(v.shape, _single(v.dtype)) for k, v in model.params.items()}

    def forward(params, inputs):  # the simple programs: those for long audio on a CPU choose by length
        out = model.replace(params=params)(**inputs, attention="dense")
        found = {"logits": out.logits, "last_hidden_state": out.last_hidden_state, "lengths": out.lengths}
        return {k: v for k, v in found.items() if v is not None}

    try:
        with kernels.PLAIN(True):  # a kernel is for one kind of device, the program for all
            program = jax.export.export(jax.jit(forward), platforms=PLATFORMS)(weights, shapes)
    except Exception as error:  # jax names the shape that it cannot leave open
        raise ExportError(f"stablehlo: this {model.spec.family} model needs fixed shapes "
                          f"({str(error).strip().splitlines()[0][:200]}).") from error
    try:
        data = program.serialize()
    except ImportError as error:
        raise ExportError(INSTALL) from error
    (pathlib.Path(folder) / PROGRAM).write_bytes(data)
    return len(data)


def read(folder: str | os.PathLike) -> Callable[..., dict[str, jax.Array]]:
    """The program of a folder with its weights: (**inputs) -> dict of logits, last_hidden_state, lengths (as there).

    Raises:
      ExportError: the folder holds no program, or one that this jax cannot read.
    """
    path = pathlib.Path(folder) / PROGRAM
    if not path.exists():
        raise ExportError(f"{folder} has no {PROGRAM}; make one with `jaxslim export MODEL DST --format stablehlo`.")
    try:
        program = jax.export.deserialize(path.read_bytes())
    except ImportError as error:
        raise ExportError(INSTALL) from error
    except Exception as error:
        raise ExportError(f"{path} is not a program that jax {jax.__version__} can read: "
                          f"{str(error).strip().splitlines()[0][:200]}.") from error
    weights = {k: jnp.asarray(v, _single(v.dtype)) for k, v in hub.load(folder).params.items()}
    call = jax.jit(program.call)
    return lambda **inputs: call(weights, inputs)


def least(model: Slim) -> int:
    """The shortest input that gives a frame."""
    return geometry(model.spec)[1] if model.spec.get("conv_dim") else 1


def _single(dtype):
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype
