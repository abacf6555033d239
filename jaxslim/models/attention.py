"""Softmax attention: all scores at once, in blocks on a CPU, or a kernel. Shapes as in layers.py."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxslim.models import kernels
from jaxslim.models import layers as L

BLOCK = 512          # query rows whose scores exist at the same time on CPU,
FEW_SCORES = 2**20   # unless there are no more of them than this


def attention(q, k, v, mask, scale: float, call: L.Call, rate: float = 0.0, bias: jax.Array | None = None,
              causal: bool = False) -> jax.Array:
    """Softmax attention. q (B, T, H, K), k (B, S, H, K), v (B, S, H, Kv), mask (B, [T,] S) -> (B, T, H, Kv).

    `causal`: query t sees keys up to t, of as many (S = T). `bias` (B, H, T, S) is added to the scores, which then all
    exist at once. Without it, on CPU, unless all scores are few, one head and BLOCK queries at a time: the scores stay
    in the cache and memory is linear in T. On TPU and GPU a kernel takes its place where the recorded table says so
    (kernels.py).
    """
    if call.attention == "auto" and (kernel := kernels.attention(q, k, v, mask, call.key is not None and rate, bias,
                                                                 causal)):
        return kernel(scale)
    few = FEW_SCORES if call.key is None else 4 * FEW_SCORES  # the gradient of the map is slower
    whole = bias is not None or mask is not None and mask.ndim == 3
    if whole or not call.on_cpu() or q[..., 0].size * k.shape[1] <= few:
        scores = jnp.einsum("bthk,bshk->bhts", q * scale, k).astype(jnp.float32)
        scores = scores if bias is None else scores + bias
        if mask is not None:
            seen = mask[:, None] if mask.ndim == 3 else mask[:, None, None]
            scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, jnp.finfo(jnp.float32).min)
        weights, total = _exponential(scores)
        y = jnp.einsum("bhts,bshk->bthk", L.dropout(weights, rate, call, 0).astype(v.dtype), v)
        return (y / jnp.swapaxes(total, 1, 2)).astype(v.dtype)
    rows, length, heads, _ = q.shape
    blocks = -(-length // BLOCK)
    size = -(-length // blocks)
    q = jnp.pad(q * scale, ((0, 0), (0, blocks * size - length), (0, 0), (0, 0)))
    q = q.reshape(rows, blocks, size, heads, -1).transpose(0, 3, 1, 2, 4).reshape(rows * heads, blocks, size, -1)
    k, v = (x.transpose(0, 2, 1, 3).reshape(rows * heads, x.shape[1], -1) for x in (k, v))
    bias = None if mask is None else jnp.repeat(jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min), heads, 0)

    def head(x):
        q, k, v, bias, i = x

        def block(x):
            q, j = x
            scores = L.matmul(q, k).astype(jnp.float32)                                  # (size, S)
            scores = scores if bias is None else scores + bias
            if causal:
                later = jnp.arange(k.shape[0]) > (j * size + jnp.arange(size))[:, None]
                scores = jnp.where(later, jnp.finfo(jnp.float32).min, scores)
            weights, total = _exponential(scores)
            return (L.dropout(weights, rate, call.fold(i).fold(j), 0).astype(v.dtype) @ v / total).astype(v.dtype)

        return jax.lax.map(jax.checkpoint(block) if blocks > 1 else block, (q, jnp.arange(blocks)))

    y = jax.lax.map(head, (q, k, v, bias, jnp.arange(rows * heads)))                     # (B H, blocks, size, Kv)
    return y.reshape(rows, heads, blocks * size, -1).transpose(0, 2, 1, 3)[:, :length]


def _exponential(scores):
    """exp(scores - max) and its sum over the last axis: softmax, with the division left for after the product."""
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights, weights.sum(-1, keepdims=True)
