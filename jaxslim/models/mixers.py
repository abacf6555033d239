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

    def __init__(self, spec: Spec, block: str, biasless: tuple[str, ...] = ()):
        a, names, width = spec.attention(block), roles(spec, block), spec.of(block, "hidden_size")
        self.mixer, self.heads, self.scale = a.mixer, len(a.heads), a.scale
        self.rate = spec.of(block, "attention_dropout")
        self.names = tuple(names[r].removeprefix(names["owner"] + ".") for r in "qkvo")
        qk, v = self.heads * a.qk_dim, self.heads * a.v_dim
        if not self.heads:  # a block without heads keeps its output bias and nothing else
            setattr(self, self.names[3], L.Bias(width))
            return
        for role, name, (din, dout) in zip("qkvo", self.names, ((width, qk), (width, qk), (width, v), (v, width)),
                                           strict=True):
            setattr(self, name, L.Linear(din, dout, role not in biasless, a.ranks.get(role), a.lora.get(role)))
        if a.mixer == "hedgehog":
            if a.options["window"]:
                raise SpecError(f"Block {block}: mixer hedgehog has no softmax window in this release; set window: 0.")
            self.feature_q = L.Weight(self.heads, a.options["features"], a.qk_dim)
            self.feature_k = L.Weight(self.heads, a.options["features"], a.qk_dim)

    def __call__(self, x: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:   # (B, T, D) -> (B, T, D)
        if self.mixer == "hedgehog" and self.heads and call.chunked(x.shape[1]):
            return self.in_chunks(x, mask, call)
        return self.attend(x, *self.keys(x), mask, call)

    def in_chunks(self, x: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:
        """Linear attention over long audio: sum up phi(k) v chunk by chunk, then read with phi(q)."""
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        parts = jax.lax.map(lambda c: self.write(*self.keys(c[0]), c[1]), (L.to_chunks(x), L.to_chunks(mask)))
        state = jax.tree.map(lambda part: part.sum(0), parts)
        return L.in_chunks(lambda x: self.join(self.read(x, state)), x, call)

    def write(self, k, v, mask) -> tuple[jax.Array, jax.Array]:
        return summary(hedgehog(k, self.feature_k()), v, mask)

    def read(self, x: jax.Array, state: tuple[jax.Array, jax.Array]) -> jax.Array:
        q = self._split(getattr(self, self.names[0])(x))
        return read(hedgehog(q, self.feature_q()), state).astype(x.dtype)

    def keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x (B, S, D): what a decoder caches. (B, S, H, K), (B, S, H, Kv)."""
        if not self.heads:
            return (jnp.zeros((*x.shape[:2], 0, 1), x.dtype),) * 2
        return tuple(self._split(getattr(self, self.names[i])(x)) for i in (1, 2))

    def attend(self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:
        """x (B, T, D) looks at keys (B, S, H, K) where mask, (B, S) or (B, T, S), is True -> (B, T, D)."""
        if not self.heads:
            return jnp.broadcast_to(getattr(self, self.names[3])(), x.shape).astype(x.dtype)
        if self.mixer == "hedgehog":
            return self.join(self.read(x, self.write(k, v, mask)))
        q = self._split(getattr(self, self.names[0])(x))
        return self.join(L.attention(q, k, v, mask, self.scale, call, self.rate))

    def join(self, y: jax.Array) -> jax.Array:                                            # (B, T, H, K) -> (B, T, D)
        return getattr(self, self.names[3])(y.reshape(*y.shape[:2], -1))

    def _split(self, y: jax.Array) -> jax.Array:                                          # (B, T, H K) -> (B, T, H, K)
        return y.reshape(*y.shape[:2], self.heads, -1)


def hedgehog(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (B, T, H, K), weight (H, F, K) -> positive features (B, T, H, 2F), fp32."""
    h = jnp.einsum("bthk,hfk->bthf", x, weight.astype(x.dtype)).astype(jnp.float32)
    return jnp.concatenate([jax.nn.softmax(h, -1), jax.nn.softmax(-h, -1)], -1)


def summary(k: jax.Array, v: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """k (B, T, H, F) features, v (B, T, H, K), mask (B, T) -> sum of k v^T (B, H, F, K) and of k (B, H, F), fp32."""
    k = L.zero_padding(k, mask)
    return jnp.einsum("bthf,bthk->bhfk", k, v.astype(k.dtype)), k.sum(1)


def read(q: jax.Array, state: tuple[jax.Array, jax.Array]) -> jax.Array:
    """q (B, T, H, F) features with the state of `summary` -> (B, T, H, K)."""
    values, total = state
    norm = (q * total[:, None]).sum(-1, keepdims=True)
    return jnp.einsum("bthf,bhfk->bthk", q, values) / jnp.maximum(norm, 1e-9)
