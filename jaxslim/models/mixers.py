"""Sequence mixers: what turns (B, T, D) into (B, T, D) in the attention slot of a block.

These keep the projections q, k, v, o of the attention they replace, so a conversion starts from the teacher's weights:

* softmax: multi-head attention.
* linformer: softmax attention over `features` mixtures of the frames (arXiv 2006.04768, section 4), masked: keys and
  values of a row of n frames are K' = E[:n]^T K / sqrt(n), V' = F[:n]^T V / sqrt(n), as in CALD's code. `sharing`:
  none, kv (F = E), layer (one E for all Linformer layers). E has `length` rows, the most frames it can take.
* elu, t2r, hedgehog: linear attention y_t = phi(q_t) sum_s phi(k_s) v_s^T / phi(q_t) sum_s phi(k_s), by feature map:
  elu(x) + 1 (arXiv 2006.16236, section 3.2); learnt relu(W x + b) (T2R, arXiv 2103.13076, section 2.1); learnt
  [softmax(W x), softmax(-W x)] (Hedgehog, arXiv 2402.04347, section 4; softmax over features as in LoLCATs, arXiv
  2410.10254, section 3). `causal`: sums over s <= t. With `window` w > 0, y = g y_near + (1 - g) y, where y_near is
  softmax attention among the frames nearer than w, and g = sigmoid(window_factor) of each head. Two means in place of
  LoLCATs' one sum of both kinds of weights (section 3.2) are ours: softmax attention's own share of near frames is then
  a good g before any training.

Recurrent ones (mamba2, mamba, gated_deltanet, gla) bring projections of their own: recurrent.py.

A causal mixer also works in pieces: `extend` takes frames and a state and gives outputs and the next state.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.models import recurrent, scan
from jaxslim.models.attention import attention
from jaxslim.models.roles import roles
from jaxslim.spec import Attention as Fields
from jaxslim.spec import Spec, SpecError

MAPS = ("elu", "t2r", "hedgehog")   # linear attention
SHARING = ("none", "kv", "layer")
CAUSAL_CHUNK = 64


class Attention(nnx.Module):
    """An attention block. Mixer, heads and head sizes come from the Spec; submodules carry the family's HF names."""

    def __init__(self, spec: Spec, block: str, biasless: tuple[str, ...] = ()):
        a, names, width = spec.attention(block), roles(spec, block), spec.of(block, "hidden_size")
        self.mixer, self.heads, self.scale, self.block = a.mixer, len(a.heads), a.scale, block
        self.sizes = (a.qk_dim, wide(a), a.v_dim)  # of a head's keys, their features and values
        self.rate = spec.of(block, "attention_dropout")
        self.names = tuple(names[r].removeprefix(names["owner"] + ".") for r in "qkvo")
        qk, v = self.heads * a.qk_dim, self.heads * a.v_dim
        if not self.heads:  # a block without heads keeps its output bias and nothing else
            setattr(self, self.names[3], L.Bias(width))
            return
        if a.mixer in recurrent.KINDS:
            if a.ranks or a.lora:
                raise SpecError(f"Block {block}: mixer {a.mixer} has no q, k, v, o, so no rank and no LoRA of them.")
            recurrent.check(a.mixer, width, a.options, block)
            self.direction, parts = a.options["direction"], recurrent.parts(a.mixer, width, a.options)
            for name in parts:
                setattr(self, name, parts[name])
            return
        for role, name, (din, dout) in zip("qkvo", self.names, ((width, qk), (width, qk), (width, v), (v, width)),
                                           strict=True):
            setattr(self, name, L.Linear(din, dout, role not in biasless, a.ranks.get(role), a.lora.get(role)))
        if a.mixer in MAPS:
            self.causal, self.window = a.options["causal"], a.options["window"]
            if self.window < 0:
                raise SpecError(f"Block {block}: window {self.window}; it is a number of frames, 0 for none.")
            if a.mixer != "elu":
                self.feature_q, self.feature_k = (FeatureMap(a, self.heads) for _ in range(2))
            if self.window:
                self.window_factor = L.param(self.heads)
        elif a.mixer == "linformer":
            self.sharing, size = a.options["sharing"], (a.options["length"], a.options["features"])
            if self.sharing not in SHARING:
                raise SpecError(f"Block {block}: sharing {self.sharing!r} of linformer is none of {SHARING}.")
            self.E = L.param(*size)  # of sharing layer: `tie` puts the first one in place of the others
            if self.sharing == "none":
                self.F = L.param(*size)

    def __call__(self, x: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:   # (B, T, D) -> (B, T, D)
        if not self.heads or self.mixer not in (*MAPS, *recurrent.KINDS):
            return self.attend(x, *self.keys(x), mask, call)
        if self.mixer in recurrent.KINDS:
            return recurrent.run(self, x, mask, call)
        if self.causal:
            return self.extend(x, mask, self.state(len(x)), call)[0]
        if call.chunked(x.shape[1]):
            return self.in_chunks(x, mask, call)
        return self.attend(x, *self.keys(x), mask, call)

    def in_chunks(self, x: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:
        """Linear attention over long audio: sum up phi(k) v chunk by chunk, then read with phi(q). With a window, keys
        and values of the frames near a chunk are computed again."""
        mask, count = jnp.ones(x.shape[:2], bool) if mask is None else mask, x.shape[1]
        parts = jax.lax.map(lambda c: self.write(*self.keys(c[0]), c[1]), (L.to_chunks(x), L.to_chunks(mask)))
        state = jax.tree.map(lambda part: part.sum(0), parts)
        if not self.window:
            return L.in_chunks(lambda x: self.join(self.read(x, state)), x, call)
        w, end = self.window, self.window + -x.shape[1] % L.CHUNK
        x, mask = (jnp.pad(h, ((0, 0), (w, end)) + ((0, 0),) * (h.ndim - 2)) for h in (x, mask))

        def piece(start):
            around, seen = (jax.lax.dynamic_slice_in_dim(h, start, L.CHUNK + 2 * w, 1) for h in (x, mask))
            q = self._split(getattr(self, self.names[0])(around[:, w:-w]))
            y = divide(*read(self.features(q, "q"), state))
            return self.join(self.mixed(y, self.near(q, *self.keys(around), seen, both=True)).astype(x.dtype))

        return L.from_chunks(jax.lax.map(piece, jnp.arange(len(parts[0])) * L.CHUNK), count)

    def write(self, k, v, mask) -> tuple[jax.Array, jax.Array]:
        return summary(self.features(k, "k"), v, mask)

    def read(self, x: jax.Array, state: tuple[jax.Array, jax.Array]) -> jax.Array:
        q = self._split(getattr(self, self.names[0])(x))
        return divide(*read(self.features(q, "q"), state)).astype(x.dtype)

    def keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x (B, S, D): what a decoder caches. (B, S, H, K), (B, S, H, Kv)."""
        if not self.heads:
            return (jnp.zeros((*x.shape[:2], 0, 1), x.dtype),) * 2
        return tuple(self._split(getattr(self, self.names[i])(x)) for i in (1, 2))

    def attend(self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:
        """x (B, T, D) looks at keys (B, S, H, K) where mask, (B, S) or (B, T, S), is True -> (B, T, D)."""
        if not self.heads:
            return jnp.broadcast_to(getattr(self, self.names[3])(), x.shape).astype(x.dtype)
        q = self._split(getattr(self, self.names[0])(x))
        if self.mixer in MAPS:
            fq, fk = self.features(q, "q"), self.features(k, "k")
            y = divide(*read(fq, summary(fk, v, mask)))
            if self.window:
                mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
                around = (jnp.pad(h, ((0, 0), (self.window,) * 2) + ((0, 0),) * (h.ndim - 2)) for h in (k, v, mask))
                y = self.mixed(y, self.near(q, *around, both=True))
            return self.join(y.astype(x.dtype))
        if self.mixer == "linformer":
            k, v, mask = *self.project(k, v, mask), None
        return self.join(attention(q, k, v, mask, self.scale, call, self.rate))

    def project(self, k, v, mask) -> tuple[jax.Array, jax.Array]:
        """Linformer's mixtures of the frames: (B, S, H, K), (B, S, H, Kv) -> (B, R, H, K), (B, R, H, Kv)."""
        length, most = k.shape[1], self.E.shape[0]
        if length > most:
            raise ValueError(f"Block {self.block}: {length} frames, but its Linformer projection has {most} rows; cut "
                             "the input, or convert with a larger option `length`.")
        count = length if mask is None else jnp.maximum(mask.sum(-1), 1)[:, None, None, None]
        kind = k.dtype
        mix = lambda x, w: (jnp.einsum("bshk,sr->brhk", L.zero_padding(x, mask), w[:length].astype(kind))  # noqa: E731
                            / jnp.sqrt(count)).astype(kind)
        return mix(k, self.E[...]), mix(v, (self.F if self.sharing == "none" else self.E)[...])

    def features(self, x: jax.Array, side: str) -> jax.Array:
        """x (B, T, H, K) queries or keys -> positive features (B, T, H, F), fp32."""
        if self.mixer == "elu":
            return jax.nn.elu(x.astype(jnp.float32)) + 1.0
        maps = getattr(self, f"feature_{side}")
        return hedgehog(x, maps.weight[...]) if self.mixer == "hedgehog" else jax.nn.relu(maps(x))

    def near(self, q, k, v, mask, both: bool) -> jax.Array:
        """Softmax attention among near frames.

        Args: q (B, T, H, *); k, v (B, w + T [+ w], H, *) and mask, with the w frames before (and after).
        Returns: (B, T, H, Kv), fp32.
        """
        length, w, parts = q.shape[1], self.window, 3 if both else 2
        q = scan.chunks(q, w)                                                                        # (B, n, w, H, K)
        blocks, count = [scan.chunks(x, w) for x in (k, v, mask)], q.shape[1]
        blocks = [jnp.pad(x, ((0, 0), (0, max(count + parts - 1 - x.shape[1], 0))) + ((0, 0),) * (x.ndim - 2))
                  for x in blocks]
        k, v, mask = (jnp.concatenate([x[:, i : i + count] for i in range(parts)], 2) for x in blocks)
        ahead = np.arange(parts * w) - w - np.arange(w)[:, None]                                     # (w, parts w)
        seen = (np.abs(ahead) < w) & (both | (ahead <= 0)) & mask[:, :, None, None, :]               # (B, n, 1, w, *)
        scores = jnp.einsum("bnihk,bnjhk->bnhij", q * self.scale, k).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), -1)
        y = jnp.einsum("bnhij,bnjhk->bnihk", weights, v.astype(jnp.float32))
        return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]

    def mixed(self, y: jax.Array, near: jax.Array) -> jax.Array:
        share = jax.nn.sigmoid(self.window_factor[...].astype(jnp.float32))[:, None]                 # (H, 1)
        return share * near + (1.0 - share) * y

    # ---- causal mixers, in pieces ----

    def state(self, rows: int) -> Any:
        """The state before the first frame. Raises SpecError for a mixer that looks ahead."""
        if self.mixer in recurrent.KINDS and hasattr(self, "fwd") and not hasattr(self, "bwd"):
            return self.fwd.state(rows)
        if not (self.heads and self.mixer in MAPS and self.causal):
            raise SpecError(f"Block {self.block}: mixer {self.mixer} looks at later frames, so it cannot stream; "
                            "convert it to a causal one (direction: causal, or causal: true).")
        _, features, values = self.sizes
        sums = jnp.zeros((rows, self.heads, features, values + 1))
        if not self.window:
            return (sums,)
        last = [jnp.zeros((rows, self.window, self.heads, size)) for size in self.sizes[::2]]
        return sums, *last, jnp.zeros((rows, self.window), bool)

    def extend(self, x, mask, state, call: L.Call) -> tuple[jax.Array, Any]:
        """Frames that follow those of `state`: (B, T, D) -> (B, T, D), state."""
        if self.mixer in recurrent.KINDS:
            return recurrent.extend(self.fwd, x, mask, state, call)
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        if not call.chunked(x.shape[1]):
            return self._extend(x, mask, state, call)
        state, y = scan.segments(lambda s, part: self._extend(*part, s, call)[::-1], state, (x, mask), L.CHUNK)
        return y, state

    def _extend(self, x, mask, state, call):
        q, (k, v) = self._split(getattr(self, self.names[0])(x)), self.keys(x)
        fq, fk = self.features(q, "q"), self.features(k, "k")
        ones = jnp.ones((*v.shape[:3], 1))  # the denominator is the sum of the same weights times 1
        y, sums = scan.causal(fq, L.zero_padding(fk, mask), jnp.concatenate([v.astype(jnp.float32), ones], -1),
                              state[0], CAUSAL_CHUNK, call.on_cpu())
        y = divide(y[..., :-1], y[..., -1:])
        if not self.window:
            return self.join(y.astype(x.dtype)), (sums,)
        kept = tuple(jnp.concatenate([old.astype(new.dtype), new], 1)
                     for old, new in zip(state[1:], (k, v, mask), strict=True))
        last = (new[:, new.shape[1] - self.window :].astype(old.dtype) for old, new in zip(state[1:], kept))
        return self.join(self.mixed(y, self.near(q, *kept, both=False)).astype(x.dtype)), (sums, *last)

    def join(self, y: jax.Array) -> jax.Array:                                            # (B, T, H, K) -> (B, T, D)
        return getattr(self, self.names[3])(y.reshape(*y.shape[:2], -1))

    def _split(self, y: jax.Array) -> jax.Array:                                          # (B, T, H K) -> (B, T, H, K)
        return y.reshape(*y.shape[:2], self.heads, -1)


class FeatureMap(nnx.Module):
    """`feature_q`, `feature_k`: a linear map for each head, T2R's with a bias."""

    def __init__(self, a: Fields, heads: int):
        self.weight = L.param(heads, a.options["features"], a.qk_dim)
        if a.mixer == "t2r":
            self.bias = L.param(heads, a.options["features"])

    def __call__(self, x: jax.Array) -> jax.Array:                                        # (B, T, H, K) -> (B, T, H, F)
        h = jnp.einsum("bthk,hfk->bthf", x, self.weight[...].astype(x.dtype)).astype(jnp.float32)
        return h + self.bias[...].astype(jnp.float32)


def hedgehog(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (B, T, H, K), weight (H, F, K) -> positive features (B, T, H, 2F), fp32."""
    h = jnp.einsum("bthk,hfk->bthf", x, weight.astype(x.dtype)).astype(jnp.float32)
    return jnp.concatenate([jax.nn.softmax(h, -1), jax.nn.softmax(-h, -1)], -1)


def summary(k: jax.Array, v: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """k (B, T, H, F) features, v (B, T, H, K), mask (B, T) -> sum of k v^T (B, H, F, K) and of k (B, H, F), fp32."""
    k = L.zero_padding(k, mask)
    return jnp.einsum("bthf,bthk->bhfk", k, v.astype(k.dtype)), k.sum(1)


def read(q: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """q (B, T, H, F) features with the state of `summary` -> numerator (B, T, H, K), denominator (B, T, H, 1)."""
    values, total = state
    return jnp.einsum("bthf,bhfk->bthk", q, values), (q * total[:, None]).sum(-1, keepdims=True)


def divide(y: jax.Array, total: jax.Array) -> jax.Array:
    return y / jnp.maximum(total, 1e-9)


def tie(module: nnx.Module) -> None:
    """Linformer with sharing: layer: all such blocks use the matrix of the first, stored once under its name."""
    found = [m for _, m in nnx.iter_modules(module) if isinstance(m, Attention) and m.heads and m.mixer == "linformer"]
    found = sorted((m for m in found if m.sharing == "layer"), key=lambda m: int(m.block.split(".")[1]))
    for m in found[1:]:
        if m.E.shape != found[0].E.shape:
            raise SpecError(f"Block {m.block}: sharing layer, but its projection is {m.E.shape} and that of "
                            f"{found[0].block} {found[0].E.shape}.")
        m.E = found[0].E


def wide(a: Fields) -> int:
    """Features of a head's queries and keys in linear attention."""
    return {"t2r": 1, "hedgehog": 2}.get(a.mixer, 0) * a.options.get("features", 0) or a.qk_dim


def macs(a: Fields, width: int, T: int) -> int:
    """Multiply-accumulates of mixing alone, without the projections q, k, v, o; of recurrent mixers, all. One row."""
    o, qk, v = a.options, a.count * a.qk_dim, a.count * a.v_dim
    if a.mixer == "softmax":
        return T * T * (qk + v)                                           # scores, weighted sum
    if not a.heads:
        return 0
    if a.mixer in recurrent.KINDS:
        return recurrent.macs(a.mixer, width, o, T)
    if a.mixer == "linformer":
        return 2 * T * o["features"] * (qk + v)                           # two mixtures; scores, weighted sum
    total = 0 if a.mixer == "elu" else 2 * T * o["features"] * qk         # phi(q), phi(k)
    if o["causal"]:
        total += scan.causal_macs(T, a.count, wide(a), a.v_dim + 1, CAUSAL_CHUNK)
    else:
        total += 2 * T * wide(a) * v                                         # state and its read-out
    if w := o["window"]:
        total += -(-T // w) * w * (2 if o["causal"] else 3) * w * (qk + v)
    return total
