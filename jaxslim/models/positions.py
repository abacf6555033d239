"""Attention that knows positions by itself: by what is added to its scores or done to its queries and keys.

* gated: WavLM's bucketed relative bias, shared by all layers and gated by each (arXiv 2110.13900, section 3.1; buckets
  as in T5, arXiv 1910.10683).
* relative: Transformer-XL's four terms (arXiv 1901.02860, section 3.3), as Conformers have them.
* relative_key: an embedding of the clipped distance per query (arXiv 1803.02155).
* rotary: rotated inputs of the query and key projections (arXiv 2104.09864), as wav2vec2-conformer applies them.

Linear mixers have none of these: the convolutions before and between the layers carry positions then.
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import layers as L
from jaxslim.models import mixers
from jaxslim.models.attention import attention
from jaxslim.models.roles import roles
from jaxslim.spec import Spec

GATES = 8  # WavLM: outputs of the gate's linear, two sums of four


def kind(spec: Spec) -> str | None:
    """How the attention of a family knows positions; None = not at all, or before the first layer."""
    if spec.family == "wavlm":
        return "gated"
    if spec.family.startswith("parakeet"):
        return "relative"
    if spec.family == "gpt_neox":
        return "rotary"                                                  # of queries and keys: gpt_neox.py
    if spec.family in ("wav2vec2-conformer", "wav2vec2-bert"):
        return spec["position_embeddings_type"]
    return None


class Attention(mixers.Attention):
    """An attention block whose softmax knows positions. Heads that a Spec leaves out keep their numbers: WavLM's
    embedding and gate constants stay whole and are selected by head, the other parameters are cut with q and k."""

    def __init__(self, spec: Spec, block: str, biasless: tuple[str, ...] = ()):
        super().__init__(spec, block, biasless)
        a, names, width = spec.attention(block), roles(spec, block), spec["hidden_size"]
        self.position, self.kept, self.total = kind(spec), a.heads, spec["num_attention_heads"]
        extra = ("pos", "bias_u", "bias_v")
        self.extra = tuple(names[r].removeprefix(names["owner"] + ".") for r in extra if r in names)
        if self.position == "gated" and block == "encoder.0.attention":  # for all layers, whatever is left of this one
            self.rel_attn_embed = L.Weight(spec["num_buckets"], self.total)
            self.buckets = (spec["num_buckets"], spec["max_bucket_distance"])
        if not self.heads or self.mixer != "softmax":
            return
        if self.position == "gated":
            self.gru_rel_pos_const = L.param(1, self.total, 1, 1)
            self.gru_rel_pos_linear = L.Linear(width // self.total, GATES)
        elif self.position == "relative":
            pos, u, v = self.extra
            setattr(self, pos, L.Linear(width, self.heads * a.qk_dim, bias=False))
            setattr(self, u, L.param(self.heads, a.qk_dim))
            setattr(self, v, L.param(self.heads, a.qk_dim))
        elif self.position == "relative_key":
            self.clip = (spec["left_max_position_embeddings"], spec["right_max_position_embeddings"])
            self.distance_embedding = L.Weight(sum(self.clip) + 1, a.qk_dim)

    def __call__(self, x, mask, call: L.Call, shared=None):              # (B, T, D) -> (B, T, D)
        """`shared` is what the encoder holds for all layers: WavLM's bias (H, T, T), or the rotary rates (K/2,)."""
        if not self.heads or self.mixer != "softmax":
            return super().__call__(x, mask, call)
        z = rotate(x, shared) if self.position == "rotary" else x
        q, k, v = (getattr(self, name)(h).reshape(*x.shape[:2], self.heads, -1)                       # (B, T, H, K)
                   for name, h in zip(self.names, (z, z, x)))
        q, bias = self.bias(x, q, shared)
        y = attention(q, k, v, mask, self.scale, call, self.rate, bias)
        return getattr(self, self.names[3])(y.reshape(*y.shape[:2], -1))

    def bias(self, x, q, shared):
        """The queries as the content scores see them, and what is added to the scores, (B, H, T, T) or None."""
        if self.position == "gated":
            kept = np.array(self.kept)
            h = x.reshape(*x.shape[:2], self.total, -1)[:, :, kept]                                   # (B, T, H, K)
            g = gate(h, self.gru_rel_pos_linear, self.gru_rel_pos_const[...].reshape(-1)[kept])
            return q, g.transpose(0, 2, 1)[..., None] * shared[kept]
        if self.position == "relative":
            pos, u, v = (getattr(self, name) for name in self.extra)
            keys = pos(sinusoids(x.shape[1], x.shape[2]).astype(x.dtype))
            keys = keys.reshape(keys.shape[0], self.heads, -1)                                        # (2T-1, H, K)
            scores = jnp.einsum("bthk,phk->bhtp", (q + v[...].astype(q.dtype)) * self.scale, keys)
            return q + u[...].astype(q.dtype), shift(scores.astype(jnp.float32))
        if self.position == "relative_key":
            scores = jnp.einsum("bthk,pk->bhtp", q * self.scale, self.distance_embedding().astype(q.dtype))
            return q, by_distance(scores.astype(jnp.float32), *self.clip)
        return q, None

    def shared(self, length: int):                                       # -> (heads of the config, T, T)
        """WavLM's first layer: the position bias of all layers."""
        return toeplitz(self.rel_attn_embed().astype(jnp.float32)[buckets(length, *self.buckets)], length)


def buckets(length: int, count: int, farthest: int) -> jax.Array:
    """Bucket of each distance key - query from 1 - length to length - 1: exact near by, logarithmic far away."""
    half, near = count // 2, count // 4
    size = np.arange(farthest + 1)                                       # a table, so that `length` may be left open
    far = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(farthest / near))
    far = np.minimum((near + far * np.float32(half - near)).astype(np.int32), half - 1)
    distance = jnp.arange(1 - length, length)
    return (distance > 0) * half + jnp.asarray(np.where(size < near, size, far))[jnp.minimum(abs(distance), farthest)]


def toeplitz(values: jax.Array, length: int) -> jax.Array:
    """(2 T - 1, H) by distance -> (H, T, T) by query and key."""
    steps = jnp.arange(length)
    return jnp.moveaxis(values[steps[None, :] - steps[:, None] + length - 1], -1, 0)


def gate(x: jax.Array, linear: L.Linear, constant: jax.Array) -> jax.Array:
    """WavLM's gate of the position bias: x (B, T, H, K) the block's input, constant (H,) -> (B, T, H) fp32."""
    h = linear(x).astype(jnp.float32)
    a, b = jnp.moveaxis(jax.nn.sigmoid(h.reshape(*h.shape[:-1], 2, GATES // 2).sum(-1)), -1, 0)
    return a * (b * constant - 1.0) + 2.0


def sinusoids(length: int, width: int) -> jax.Array:
    """Embeddings of the distances query - key from length - 1 down to 1 - length: (2 T - 1, D), sin and cos in turn."""
    rate = np.exp(np.arange(0, width, 2, dtype=np.float32) * np.float32(-math.log(10000.0) / width))
    angle = jnp.arange(length - 1, -length, -1, dtype=jnp.float32)[:, None] * rate                    # (2T-1, D/2)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(2 * length - 1, width)


def shift(scores: jax.Array) -> jax.Array:
    """(B, H, T, 2 T - 1) by query and `sinusoids` row -> (B, H, T, T) by query and key."""
    *lead, length, count = scores.shape
    padded = jnp.pad(scores, ((0, 0),) * (scores.ndim - 1) + ((1, 0),)).reshape(*lead, count + 1, length)
    return padded[..., 1:, :].reshape(scores.shape)[..., :length]


def by_distance(scores: jax.Array, left: int, right: int) -> jax.Array:
    """(B, H, T, left + right + 1) by query and clipped distance key - query -> (B, H, T, T)."""
    steps = jnp.arange(scores.shape[2])
    index = jnp.clip(steps[None, :] - steps[:, None], -left, right) + left
    return jnp.take_along_axis(scores, index[None, None], -1)


def rates(spec: Spec) -> np.ndarray:
    """Rotary frequencies of a config (K/2,)."""
    width = spec["hidden_size"] // spec["num_attention_heads"]
    power = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(spec["rotary_embedding_base"]) ** power).astype(np.float32)


def rotate(x: jax.Array, rate: jax.Array) -> jax.Array:
    """x (B, T, D) with every head's halves rotated by position times `rate` (K/2,)."""
    h = x.reshape(*x.shape[:2], -1, 2 * rate.shape[0])                                                # (B, T, H, K)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * jnp.concatenate([rate, rate])
    a, b = jnp.split(h, 2, -1)
    y = h * jnp.cos(angle).astype(x.dtype) + jnp.concatenate([-b, a], -1) * jnp.sin(angle).astype(x.dtype)
    return y.reshape(x.shape)
