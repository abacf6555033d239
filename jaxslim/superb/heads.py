"""The heads that learn on frozen features: a softmax-weighted sum of the hidden states, then a small network.

The sum's weights start equal (SUPERB, Yang et al., arXiv 2105.01051, section 3.2). Heads, learning rates, steps and
seeds are the same for every upstream.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Head(nnx.Module):
    """Weighted sum of layers, then `body`: called with hidden states (B, L, T, D) and frames (B,)."""

    def __init__(self, layers: int, body: nnx.Module):
        self.weights, self.body = nnx.Param(jnp.zeros(layers)), body

    def __call__(self, states, lengths):
        mix = jax.nn.softmax(self.weights[...])
        return self.body(jnp.einsum("l,bltd->btd", mix, states.astype(jnp.float32)), lengths)


class Linear(nnx.Module):
    """Frame by frame (character recognition; SUPERB's phone recognition)."""

    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        self.out = nnx.Linear(width, out, rngs=rngs)

    def __call__(self, x, lengths):                                      # (B, T, D) -> (B, T, out)
        return self.out(x)


class BiLSTM(nnx.Module):
    """`stack` frames side by side, a linear, bidirectional LSTM layers (SUPERB's speech recognition, smaller)."""

    def __init__(self, width: int, out: int, units: int, layers: int, stack: int, rngs: nnx.Rngs):
        self.stack, self.project = stack, nnx.Linear(stack * width, 2 * units, rngs=rngs)
        cell = lambda: nnx.RNN(nnx.OptimizedLSTMCell(2 * units, units, rngs=rngs))  # noqa: E731
        self.lstm = nnx.List([nnx.Bidirectional(cell(), cell(), rngs=rngs) for _ in range(layers)])
        self.out = nnx.Linear(2 * units, out, rngs=rngs)

    def __call__(self, x, lengths):                                      # (B, T, D) -> (B, T / stack, out)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.stack), (0, 0)))
        x, lengths = self.project(x.reshape(len(x), -1, self.stack * x.shape[2])), -(-lengths // self.stack)
        zero = jnp.zeros((x.shape[0], x.shape[2] // 2), x.dtype)         # given, else nnx draws it inside the scan
        for layer in self.lstm:
            x = layer(x, initial_carry=((zero, zero), (zero, zero)), seq_lengths=lengths)
        return self.out(x)


class Pooled(nnx.Module):
    """Of clips that are pooled already (T = 1): a linear."""

    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        self.out = nnx.Linear(width, out, rngs=rngs)

    def __call__(self, x, lengths):                                      # (B, 1, D) -> (B, out)
        return self.out(x[:, 0])


Batch = dict[str, np.ndarray]


def fit(head: Head, loss: Callable[[Any, Batch], jax.Array], batches: Callable[[np.random.Generator], Iterator[Batch]],
        steps: int, learning_rate: float, seed: int) -> tuple[Callable[[Batch], np.ndarray], np.ndarray]:
    """Trains a head with Adam, the rate falling to zero on a cosine.

    Args:
      loss: (outputs, batch) -> scalar; outputs are the head's of batch["states"], batch["lengths"].
      batches: generator of numbers -> an epoch of batches.
    Returns:
      (batch -> outputs of the trained head; share of each layer (L,)).
    """
    graph, params, rest = nnx.split(head, nnx.Param, ...)
    tx, step, run = _programs(graph, loss, steps, learning_rate)
    state, rng, done = tx.init(params), np.random.default_rng(seed), 0
    while done < steps:
        for batch in batches(rng):
            params, state = step(params, rest, state, batch)
            done += 1
            if done == steps:
                break
    shares = np.asarray(jax.nn.softmax(params["weights"].get_value()))
    return lambda batch: np.asarray(run(params, rest, batch)), shares


@functools.lru_cache(maxsize=8)   # the seeds of a task share its programs
def _programs(graph, loss, steps: int, learning_rate: float):
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def outputs(params, rest, batch):
        return nnx.merge(graph, params, rest)(batch["states"], batch["lengths"])

    @jax.jit
    def step(params, rest, state, batch):
        grads = jax.grad(lambda p: loss(outputs(p, rest, batch), batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step, jax.jit(outputs)
