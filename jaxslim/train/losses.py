"""Losses as (sum, count) pairs in fp32, so that microbatches, hosts and padding never change a mean."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxslim.slim import Term

IGNORE = -100  # label padding, as in transformers


def ctc(logits: jax.Array, lengths: jax.Array, labels: jax.Array, blank: int) -> tuple[Term, jax.Array]:
    """CTC loss per label unit.

    Args: logits (B, T, V); lengths (B,) valid frames; labels (B, N), IGNORE beyond each text; blank id.
    Returns: the term (sum of -log p, number of labels) over rows whose labels fit their frames, and the number of
      rows that do not fit. Such rows weigh nothing: optax gives them about 1e5 with finite gradients.
    """
    valid = labels >= 0
    sizes = valid.sum(-1)
    repeats = ((labels[:, 1:] == labels[:, :-1]) & valid[:, 1:]).sum(-1)
    fits = (sizes + repeats <= lengths) & (sizes > 0)
    padding = (jnp.arange(logits.shape[1]) >= lengths[:, None]).astype(jnp.float32)
    losses = optax.ctc_loss(logits.astype(jnp.float32), padding, jnp.where(valid, labels, 0),
                            (~valid).astype(jnp.float32), blank_id=blank)
    losses = jnp.where(fits, jnp.maximum(losses, 0.0), 0.0)  # rounding can make a confident row slightly negative
    count = jnp.where(fits, sizes, 0).sum().astype(jnp.float32)
    return Term(losses.sum(), count), ((sizes > 0) & ~fits).sum()


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Term:
    """Classification: sum over the labelled of -log p, count = how many are. logits (B, [T,] V), labels (B, [T]),
    IGNORE where there is none."""
    valid = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(valid, labels, 0))
    return Term(jnp.where(valid, losses, 0.0).sum(), valid.sum().astype(jnp.float32))


def hidden(student: jax.Array, teacher: jax.Array, mask: jax.Array, distance: str = "ln_mse") -> Term:
    """Distance of hidden states (B, T, D) over valid frames of mask (B, T): sum over frames, count = frames.

    `mse`: mean over channels; `ln_mse`: the same after affine-free LayerNorm of both (CALD's speech setting);
    `cosine`: 1 - cosine similarity.
    """
    s, t = student.astype(jnp.float32), jax.lax.stop_gradient(teacher.astype(jnp.float32))
    if distance == "ln_mse":
        s, t = standardize(s), standardize(t)
    if distance in ("mse", "ln_mse"):
        d = ((s - t) ** 2).mean(-1)
    elif distance == "cosine":
        d = 1.0 - (s * t).sum(-1) * jax.lax.rsqrt((s * s).sum(-1) * (t * t).sum(-1) + 1e-12)
    else:
        raise ValueError(f"distance {distance!r}: use mse, ln_mse or cosine.")
    return Term(jnp.where(mask, d, 0.0).sum(), mask.sum().astype(jnp.float32))


def standardize(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """LayerNorm without weights over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


def kl(student: jax.Array, teacher: jax.Array, mask: jax.Array, temperature: float = 1.0) -> Term:
    """KL(teacher || student) of logits (B, T, V) at a temperature, over valid frames; times temperature squared."""
    t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher.astype(jnp.float32)) / temperature, -1)
    s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, -1)
    d = (jnp.exp(t) * (t - s)).sum(-1) * temperature**2
    return Term(jnp.where(mask, d, 0.0).sum(), mask.sum().astype(jnp.float32))
