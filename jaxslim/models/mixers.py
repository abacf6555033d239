"""Sequence mixers: what turns (B, T, D) into (B, T, D) in the attention slot of a block.

All keep the projections q, k, v, o of the attention they replace, so a conversion starts from the teacher's weights.

* softmax: multi-head attention.
* hedgehog: non-causal linear attention with learned feature maps phi(x) = [softmax(Wx), softmax(-Wx)] per head
  (Hedgehog, arXiv 2402.04347, section 4; the softmax over features as in LoLCATs, arXiv 2410.10254, section 3):
  y_t = phi(q_t) sum_s phi(k_s) v_s^T / phi(q_t) sum_s phi(k_s). Two matrix products, linear in T.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.models.roles import roles
from jaxslim.spec import Spec, SpecError


class Attention(nnx.Module):
    """An attention block. Mixer, heads and head sizes come from the Spec; submodules carry the family's HF names."""

    def __init__(self, spec: Spec, block: str):
        a, names, width = spec.attention(block), roles(spec, block), spec["hidden_size"]
        self.mixer, self.heads, self.scale, self.rate = a.mixer, len(a.heads), a.scale, spec["attention_dropout"]
        self.names = tuple(names[r].removeprefix(names["owner"] + ".") for r in "qkvo")
        qk, v = self.heads * a.qk_dim, self.heads * a.v_dim
        if not self.heads:  # a block without heads keeps its output bias and nothing else
            setattr(self, self.names[3], L.Bias(width))
            return
        for role, name, (din, dout) in zip("qkvo", self.names, ((width, qk), (width, qk), (width, v), (v, width)),
                                           strict=True):
            setattr(self, name, L.Linear(din, dout, rank=a.ranks.get(role), lora=a.lora.get(role)))
        if a.mixer == "hedgehog":
            if a.options["window"]:
                raise SpecError(f"Block {block}: mixer hedgehog has no softmax window in this release; set window: 0.")
            self.feature_q = L.Weight(self.heads, a.options["features"], a.qk_dim)
            self.feature_k = L.Weight(self.heads, a.options["features"], a.qk_dim)

    def __call__(self, x: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:   # (B, T, D) -> (B, T, D)
        q_proj, k_proj, v_proj, o_proj = (getattr(self, n) if self.heads else None for n in self.names)
        if not self.heads:
            return jnp.broadcast_to(getattr(self, self.names[3])(), x.shape).astype(x.dtype)
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731        (B, T, H K) -> (B, T, H, K)
        q, k, v = split(q_proj(x)), split(k_proj(x)), split(v_proj(x))
        if self.mixer == "softmax":
            y = L.attention(q, k, v, mask, self.scale, call, self.rate)
        else:
            y = linear_attention(hedgehog(q, self.feature_q()), hedgehog(k, self.feature_k()), v, mask)
        return o_proj(y.reshape(*y.shape[:2], -1))


def hedgehog(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (B, T, H, K), weight (H, F, K) -> positive features (B, T, H, 2F), fp32."""
    h = jnp.einsum("bthk,hfk->bthf", x, weight.astype(x.dtype)).astype(jnp.float32)
    return jnp.concatenate([jax.nn.softmax(h, -1), jax.nn.softmax(-h, -1)], -1)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Non-causal linear attention. q, k (B, T, H, F) positive features, v (B, T, H, K), mask (B, T) -> (B, T, H, K)."""
    k = L.zero_padding(k, mask)
    state = jnp.einsum("bthf,bthk->bhfk", k, v.astype(k.dtype))
    total = k.sum(1)                                                                       # (B, H, F)
    y = jnp.einsum("bthf,bhfk->bthk", q, state)
    norm = (q * total[:, None]).sum(-1, keepdims=True)
    return (y / jnp.maximum(norm, 1e-9)).astype(v.dtype)
