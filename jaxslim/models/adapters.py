"""Adapters: those of a Spec's blocks, and those that checkpoints bring along (conv adapters, MMS).

A block's `adapter` is a bottleneck up(act(down(x))) on a frozen model, of one of three kinds:

* parallel: its output is added to the sub-layer's, before a Conformer's half-step weight: x + 0.5 (FFN(LN x) + A(.)).
  Two in a Conformer block are TPA (arXiv 2306.08131). It reads the sub-layer's input un-normalised (`raw`, as the
  first author's Praxis code) or normalised (`normed`, which can be merged exactly).
* sequential: behind the sub-layer, before its residual (`output`: Houlsby, arXiv 1902.00751), or behind the whole layer
  (`layer`: Bapna & Firat, arXiv 1909.08478), with a residual of its own.
* merged: a parallel one that has become more units of the FFN; only its output bias is left to add.

`add_adapter` shortens the encoder's output by strided gated convolutions (XLS-R translation models, arXiv 2111.09296);
`adapter_attn_dim` puts a small bottleneck behind each feed-forward block, one set a language (MMS, arXiv 2305.13516).
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.models.roles import roles
from jaxslim.spec import Adapter, Spec

PADDING = 1  # of each strided convolution, whatever its width


class Bottleneck(nnx.Module):
    """The adapter of one block; `adapter_ids` is set by bind: a slot for all (), by example (B,), by frame (B, T)."""

    def __init__(self, a: Adapter, width: int):
        lead = (a.slots,) if a.slots > 1 else ()
        self.input, self.scale, self.slots, self.adapter_ids = a.input, a.scale, a.slots, None
        self.act, self.merged = L.activation(a.act), a.kind == "merged"
        if self.merged:
            self.up = L.Bias(width) if a.bias else None
            return
        self.norm = L.LayerNorm(width) if a.norm else None
        if a.norm and lead:
            self.norm.weight, self.norm.bias = L.param(*lead, width), L.param(*lead, width)
        self.down, self.up = nnx.Module(), nnx.Module()
        self.down.weight, self.up.weight = L.param(*lead, a.width, width), L.param(*lead, width, a.width)
        self.down.bias, self.up.bias = (L.param(*lead, n) if a.bias else None for n in (a.width, width))

    def __call__(self, x: jax.Array, call: L.Call) -> jax.Array:         # (B, T, D) -> (B, T, D)
        if self.merged:
            return 0 if self.up is None else self.up().astype(x.dtype)
        return L.in_chunks(self.transform, x, call)

    def transform(self, x: jax.Array) -> jax.Array:
        ids = self.adapter_ids
        bias = [None if b is None else b[...] for b in (self.down.bias, self.up.bias)]
        x = x if self.norm is None else self.normalize(x)
        y = L.bottleneck(x, self.down.weight[...], self.up.weight[...], ids, self.act, *bias)
        return y if self.scale == 1 else self.scale * y

    def normalize(self, x: jax.Array) -> jax.Array:
        if self.slots == 1:
            return self.norm(x)
        g, b = (p[...][jnp.maximum(self.adapter_ids, 0)] for p in (self.norm.weight, self.norm.bias))
        g, b = (jnp.expand_dims(p, 1) if self.adapter_ids.ndim == 1 else p for p in (g, b))
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + self.norm.eps)
        return (h * g + b).astype(x.dtype)


def attach(layer: nnx.Module, spec: Spec, block: str) -> None:
    """Gives block `block` of a layer its adapter, under the name of the block's owner."""
    a = spec.adapter(block)
    if a is None:
        return
    inside, part = roles(spec, block.rpartition(".")[0])["owner"] + ".", block.rpartition(".")[2]
    owner = roles(spec, block)["owner"].removeprefix(inside)
    setattr(layer, f"{owner}.adapter", Bottleneck(a, spec.of(block, "hidden_size")))
    layer.adapters = (*getattr(layer, "adapters", ()), (part, f"{owner}.adapter"))
    if a.kind == "merged":
        holder = layer if hasattr(layer, "act") else getattr(layer, owner)
        holder.act = L.two_activations(holder.act, L.activation(a.act), a.width)


def find(layer: nnx.Module, part: str, behind: bool) -> Bottleneck | None:
    name = dict(getattr(layer, "adapters", ())).get(part)
    adapter = None if name is None else getattr(layer, name)
    return adapter if adapter is not None and (adapter.input == "layer") == behind else None


def adapt(layer: nnx.Module, part: str, raw: jax.Array, normed: jax.Array, out: jax.Array, call: L.Call) -> jax.Array:
    """`out` (B, T, D) of a sub-layer with what its adapter adds; `raw` and `normed` are the sub-layer's input."""
    adapter = find(layer, part, behind=False)
    if adapter is None:
        return out
    return out + adapter({"raw": raw, "normed": normed, "output": out}[adapter.input], call)


def adapt_layer(layer: nnx.Module, part: str, y: jax.Array, call: L.Call) -> jax.Array:
    """A layer's output with what the adapter behind it adds."""
    adapter = find(layer, part, behind=True)
    return y if adapter is None else y + adapter(y, call)


class GatedConv(nnx.Module):
    """Strided convolution to twice the width, half of it the gate of the other."""

    def __init__(self, spec: Spec, width: int):
        self.stride = spec["adapter_stride"]
        self.conv = L.Conv(width, 2 * width, spec["adapter_kernel_size"])

    def __call__(self, x):                                               # (B, T, D) -> (B, T', D)
        return glu(self.conv(x, self.stride, PADDING))


class ConvAdapter(nnx.Module):
    """`Wav2Vec2Adapter`. Like transformers it does not mask between its layers."""

    def __init__(self, spec: Spec):
        width, self.drop, self.stride = output_width(spec), spec["layerdrop"], spec["adapter_stride"]
        self.narrows = width != spec["hidden_size"]
        if self.narrows:
            self.proj, self.proj_layer_norm = L.Linear(spec["hidden_size"], width), L.LayerNorm(width)
        self.layers = nnx.List([GatedConv(spec, width) for _ in range(spec["num_adapter_layers"])])

    def __call__(self, x):                                               # (B, T, D) -> (B, T', D')
        x = self.proj_layer_norm(self.proj(x)) if self.narrows else x
        for layer in self.layers:
            x = layer(x)
        return x

    def frames(self, lengths):
        """Valid frames behind the adapter for (B,) valid frames before it; 0 stays 0."""
        for _ in self.layers:
            lengths = (lengths - 1) // self.stride + 1
        return lengths


class AttnAdapter(nnx.Module):
    """`Wav2Vec2AttnAdapterLayer`: x + up(relu(down(norm(x)))), without the x."""

    def __init__(self, spec: Spec):
        width, inner = spec["hidden_size"], spec["adapter_attn_dim"]
        self.norm, self.linear_1, self.linear_2 = L.LayerNorm(width), L.Linear(width, inner), L.Linear(inner, width)

    def __call__(self, x):
        return self.linear_2(jax.nn.relu(self.linear_1(self.norm(x))))


def output_width(spec: Spec) -> int:
    return spec.get("output_hidden_size") or spec["hidden_size"]


def glu(x: jax.Array) -> jax.Array:
    """First half of the features times the sigmoid of the second."""
    a, b = jnp.split(x, 2, -1)
    return a * jax.nn.sigmoid(b)
