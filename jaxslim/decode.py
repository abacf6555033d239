"""Greedy CTC: batches -> the most probable symbol of every frame (on the device), frames -> text (on the host).

One executable per model and input shape, kept between calls, so that a second evaluation compiles nothing.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxslim.data import CTCTask, DataError
from jaxslim.data.batch import FLOOR
from jaxslim.slim import Slim, inputs
from jaxslim.train import mesh as meshes

KEPT = 256  # executables


@functools.partial(jax.jit, static_argnames="dtype")
def _argmax(model: Slim, batch: dict[str, jax.Array], dtype: str | None) -> dict[str, jax.Array]:
    out = model(dtype=dtype, **inputs(batch))
    ids = jnp.argmax(out.logits, -1).astype(jnp.int32)                                              # (B, T)
    lengths = jnp.full(ids.shape[0], ids.shape[1]) if out.lengths is None else out.lengths           # (B,)
    return {"ids": ids, "lengths": lengths, "row": batch["row"], "samples": batch["samples"]}


_EXECUTABLES: dict[Any, Any] = {}


class Greedy:
    """A batch of numpy arrays -> (dict of numpy arrays ids (B, T), lengths, row, samples (B,); seconds it took).

    Compiling is apart, in `compile_seconds`. On a mesh a batch holds this process's rows, or with `replicate` the same
    rows in every process; results are those of all rows.
    """

    def __init__(self, model: Slim, mesh=None, dtype=None):
        self.dtype = None if dtype is None else jnp.dtype(dtype).name
        if mesh is None:  # that of the parameters, if they are on one
            shardings = (x.sharding for x in jax.tree.leaves(model) if isinstance(x, jax.Array))
            mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
        self.mesh, self.replicate, self.compile_seconds = mesh, False, 0.0
        self.multiple = 1 if mesh is None else meshes.shards(mesh)  # of the rows of a global batch
        params = jax.device_put(model.params) if mesh is None else meshes.place(model.params, mesh)
        self.model = model.replace(params=params)

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
        batch = self._place(batch)
        leaves, tree = jax.tree.flatten((self.model, batch))
        key = tree, self.dtype, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        if key not in _EXECUTABLES:
            if len(_EXECUTABLES) >= KEPT:
                _EXECUTABLES.clear()
            start = time.perf_counter()
            _EXECUTABLES[key] = self._compile(batch)
            self.compile_seconds += time.perf_counter() - start
        start = time.perf_counter()
        out = jax.device_get(_EXECUTABLES[key](self.model, batch))
        return out, time.perf_counter() - start

    def _place(self, batch):
        if self.mesh is None:
            return batch
        if self.replicate:
            return {k: meshes.put(v, NamedSharding(self.mesh, PartitionSpec())) for k, v in batch.items()}
        return meshes.batch(batch, self.mesh)

    def _compile(self, batch):
        if self.mesh is None:
            return _argmax.lower(self.model, batch, dtype=self.dtype).compile()
        everywhere = NamedSharding(self.mesh, PartitionSpec())  # so that every process has every transcript
        function = jax.jit(_argmax, static_argnames="dtype", out_shardings=everywhere)
        return function.lower(self.model, batch, dtype=self.dtype).compile()


def text(task: CTCTask, ids: np.ndarray) -> str:
    """Frame ids (T,) -> text."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return task.decode(ids[keep], collapse=False)


def long_enough(wave: np.ndarray, task: CTCTask) -> np.ndarray:
    """`wave` (samples,) as it came; raises DataError if it is shorter than one frame."""
    if len(wave) < FLOOR * task.sampling_rate:
        raise DataError(f"{1000 * len(wave) / task.sampling_rate:.0f} ms of audio, shorter than one frame "
                        f"({1000 * FLOOR:.0f} ms).")
    return wave


def single(wave: np.ndarray, task: CTCTask) -> dict[str, np.ndarray]:
    """A batch of one clip (samples,): at its exact length, or with a mask, padded to one of eight lengths an octave."""
    batch = {"row": np.zeros(1, np.int32), "samples": np.array([len(wave)], np.int32)}
    values = task.inputs(wave)
    if task.return_attention_mask:
        seconds = max(len(wave) / task.sampling_rate, 1.0)
        step = 2.0 ** (math.floor(math.log2(seconds)) - 3)
        padded = round(math.ceil(seconds / step - 1e-9) * step * task.sampling_rate)
        batch["attention_mask"] = (np.arange(padded) < len(wave)).astype(np.int32)[None]
        values = np.pad(values, (0, padded - len(wave)))
    return batch | {"input_values": values[None]}
