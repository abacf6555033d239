"""Adapters that checkpoints bring along: conv adapters behind an encoder, attention adapters inside its layers (MMS).

`add_adapter` shortens the encoder's output by strided gated convolutions (XLS-R translation models, arXiv 2111.09296);
`adapter_attn_dim` puts a small bottleneck behind each feed-forward block, one set a language (MMS, arXiv 2305.13516).
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.spec import Spec

PADDING = 1  # of each strided convolution, whatever its width


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
