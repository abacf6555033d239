"""Batches -> what a model says: the most probable symbol of every frame (CTC), a class, or a decoder's tokens.

One executable per model and input shape, kept between calls, so that a second evaluation compiles nothing.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxslim.data import DataError
from jaxslim.slim import Slim, inputs
from jaxslim.train import mesh as meshes

KEPT = 256  # executables


@functools.partial(jax.jit, static_argnames=("dtype", "scores"))
def _argmax(model: Slim, batch: dict[str, jax.Array], dtype: str | None, scores: bool) -> dict[str, jax.Array]:
    out = model(dtype=dtype, **inputs(batch, model))
    ids = jnp.argmax(out.logits, -1).astype(jnp.int32)                                         # (B, T), of classes (B,)
    lengths = jnp.full(ids.shape[0], ids[0].size) if out.lengths is None else out.lengths            # (B,)
    found = {"ids": ids, "lengths": lengths, "row": batch["row"], "samples": batch["samples"]}
    return found | ({"scores": jax.nn.log_softmax(out.logits.astype(jnp.float32))} if scores else {})        # (B, T, V)


_EXECUTABLES: dict[Any, Any] = {}


class Greedy:
    """A batch of numpy arrays -> (dict of numpy arrays ids (B, T), lengths, row, samples (B,); seconds it took).

    With `scores` also the log probabilities (B, T, V). Compiling is apart, in `compile_seconds`. On a mesh a batch
    holds this process's rows, or with `replicate` the same rows in every process; results are those of all rows.
    """

    def __init__(self, model: Slim, mesh=None, dtype=None, scores: bool = False):
        self.scores = scores
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
        key = tree, self.dtype, self.scores, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
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
            return _argmax.lower(self.model, batch, dtype=self.dtype, scores=self.scores).compile()
        everywhere = NamedSharding(self.mesh, PartitionSpec())  # so that every process has every transcript
        function = jax.jit(_argmax, static_argnames=("dtype", "scores"), out_shardings=everywhere)
        return function.lower(self.model, batch, dtype=self.dtype, scores=self.scores).compile()


class Autoregressive:
    """The same of a model with a decoder: ids are the tokens of `generate`, `segments` says when they were said.

    Args:
      options: of `generate`, as in `Seq2SeqTask.generation`.
      timed: run the first batch of a shape twice, to tell compiling from running.
    """

    multiple, replicate = 1, False

    def __init__(self, model: Slim, mesh=None, dtype=None, options: Mapping[str, Any] | None = None,
                 timed: bool = True):
        if jax.process_count() > 1:
            raise ValueError("Decoding with a decoder runs in one process; start it without jax.distributed.")
        params = model.params if mesh is None else meshes.place(model.params, mesh)
        if dtype is not None:  # matrices, as Slim.__call__ does it
            params = {k: v.astype(dtype) if v.ndim > 1 and jnp.issubdtype(v.dtype, jnp.floating) else v
                      for k, v in params.items()}
        self.model, self.mesh, self.options, self.timed = model.replace(params=params), mesh, dict(options or {}), timed
        self.compile_seconds, self.seen = 0.0, set()

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], float]:
        from jaxslim.generate import STRIDE, generate

        features, frames = batch["input_features"], batch["attention_mask"].sum(-1)                     # (B, mels, T)
        window, took, segments = STRIDE * self.model.spec["max_source_positions"], 0.0, [[]] * len(features)
        # Alone, longer clips get timestamps and others do not: neither may depend on what else is in the batch.
        for rows, end in ((np.flatnonzero(frames <= window), window), (np.flatnonzero(frames > window), frames.max())):
            if not len(rows):
                continue
            part, mask = features[rows][:, :, :end], batch["attention_mask"][rows][:, :end]
            run = functools.partial(generate, self.model, part, mask, **self.options)
            start = time.perf_counter()
            out = run()
            seconds = time.perf_counter() - start
            if self.timed and part.shape not in self.seen:
                start = time.perf_counter()
                run()
                seconds, first = time.perf_counter() - start, seconds
                self.compile_seconds += max(first - seconds, 0.0)
            self.seen.add(part.shape)
            took += seconds
            for row, found in zip(rows, out.segments, strict=True):
                segments[row] = found
        texts = [[t for s in each for t in s["tokens"]] for each in segments]
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)   # read up to `lengths`
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        return {"ids": ids, "lengths": np.array([len(t) for t in texts]), "row": batch["row"],
                "samples": batch["samples"], "segments": segments}, took  # fmt: skip


def decoder(model: Slim, task, mesh=None, dtype=None, timed: bool = True,
            scores: bool = False) -> Greedy | Autoregressive:  # fmt: skip
    """What decodes batches of `task` with `model`; `scores`: log probabilities too (CTC)."""
    if model.spec.head == "seq2seq":
        if scores:
            raise ValueError("The CTC beam search is for CTC models; a decoder has its own (num_beams in "
                             "generation_config.json).")
        return Autoregressive(model, mesh, dtype, task.generation, timed)
    return Greedy(model, mesh, dtype, scores)


def long_enough(wave: np.ndarray, task) -> np.ndarray:
    """`wave` (samples,) as it came; raises DataError if it is shorter than one frame."""
    shortest = task.extractor.shortest
    if len(wave) < shortest * task.sampling_rate:
        raise DataError(f"{1000 * len(wave) / task.sampling_rate:.0f} ms of audio, shorter than one frame "
                        f"({1000 * shortest:.0f} ms).")
    return wave


def octave(seconds: float) -> float:
    """The next of eight lengths an octave, at least 1 s: so few programs are compiled for audio of any length."""
    seconds = max(seconds, 1.0)
    step = 2.0 ** (math.floor(math.log2(seconds)) - 3)
    return math.ceil(seconds / step - 1e-9) * step


def single(wave: np.ndarray, task) -> dict[str, np.ndarray]:
    """A batch of one clip (samples,): at its exact length, or with a mask, padded to one of eight lengths an octave."""
    batch, padded = {"row": np.zeros(1, np.int32), "samples": np.array([len(wave)], np.int32)}, len(wave)
    if task.extractor.return_attention_mask:
        padded = round(octave(len(wave) / task.sampling_rate) * task.sampling_rate)
    inputs = task.extractor([wave], padded)
    if not task.extractor.return_attention_mask:
        del inputs["attention_mask"]
    return batch | inputs
