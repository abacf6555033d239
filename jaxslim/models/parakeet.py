"""Parakeet CTC, a FastConformer (arXiv 2305.05084), `Parakeet...` in transformers: Conformer layers behind separable
convolutions that keep one of eight log-mel frames."""
from __future__ import annotations

import math

import jax
from flax import nnx

from jaxslim.models import heads, wav2vec2
from jaxslim.models import layers as L
from jaxslim.models.conformer import Layer
from jaxslim.slim import Outputs
from jaxslim.spec import Spec


def build(spec: Spec) -> nnx.Module:
    return heads.build(spec, ParakeetEncoder(spec))


class ParakeetEncoder(nnx.Module):
    """`ParakeetEncoder`: `input_features` (B, T, mels), `attention_mask` (B, T) of the same frames."""

    def __init__(self, spec: Spec):
        self.spec, self.subsampling = spec, Subsampling(spec)
        self.layers = nnx.List([Layer(spec, i) for i in range(spec["num_hidden_layers"])])

    def __call__(self, call: L.Call, input_features, attention_mask=None) -> Outputs:
        spec = self.spec
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        x = input_features.astype(self.subsampling.linear.weight.dtype)
        x, lengths = self.subsampling(x, lengths)
        mask = L.frame_mask(lengths, x.shape[1])
        projected = x
        x = x * math.sqrt(spec["hidden_size"]) if spec["scale_input"] else x
        x = L.dropout(x, spec["dropout"], call, wav2vec2.EMBEDDING)
        x, states, taps = L.run(self.layers, x, mask, call, shared=None)
        taps |= call.keep({"projection": projected}, mask)
        return Outputs(None, x, tuple(states) if call.hidden else None, taps or None, lengths)


class Conv2d(nnx.Module):
    """Over time and mel bins: (B, T, M, C) -> (B, T', M', C'), weight (out, in / groups, W, W)."""

    def __init__(self, din: int, dout: int, width: int, stride: int, groups: int = 1):
        self.stride, self.padding, self.groups = stride, (width - 1) // 2, groups
        self.weight, self.bias = L.param(dout, din // groups, width, width), L.param(dout)

    def __call__(self, x):
        y = jax.lax.conv_general_dilated(
            x, self.weight[...].astype(x.dtype), (self.stride,) * 2, [(self.padding,) * 2] * 2,
            feature_group_count=self.groups, dimension_numbers=("NHWC", "OIHW", "NHWC"))
        return y + self.bias[...].astype(y.dtype)


class Subsampling(nnx.Module):
    """Strided convolutions over time and mel bins, all but the first separable; padding is zero after each."""

    def __init__(self, spec: Spec):
        channels, width, stride = (spec[f"subsampling_conv_{k}"] for k in ("channels", "kernel_size", "stride"))
        steps = int(math.log2(spec["subsampling_factor"]))
        convs = {0: Conv2d(1, channels, width, stride)}
        for i in range(1, steps):  # numbers of transformers' list, which holds the activations too
            convs[3 * i - 1] = Conv2d(channels, channels, width, stride, channels)
            convs[3 * i] = Conv2d(channels, channels, 1, 1)
        self.order = tuple(convs)
        self.layers = nnx.Dict({str(i): conv for i, conv in convs.items()})
        self.linear = L.Linear(channels * (spec["num_mel_bins"] // stride**steps), spec["hidden_size"])

    def __call__(self, x, lengths):                                      # (B, T, M) -> (B, T', D), lengths
        x = x[..., None]
        for i in self.order:
            conv = self.layers[str(i)]
            x = conv(x)
            if lengths is not None and conv.stride > 1:
                lengths = (lengths + 2 * conv.padding - conv.weight.shape[2]) // conv.stride + 1
            x = L.zero_padding(x, L.frame_mask(lengths, x.shape[1]))
            if i % 3 == 0:  # the first convolution and every pointwise one
                x = jax.nn.relu(x)
        return self.linear(x.transpose(0, 1, 3, 2).reshape(*x.shape[:2], -1)), lengths


def subsampled(spec: Spec, frames: int) -> list[int]:
    """Frames after each strided convolution of Parakeet."""
    width, stride = spec["subsampling_conv_kernel_size"], spec["subsampling_conv_stride"]
    lengths = []
    for _ in range(int(math.log2(spec["subsampling_factor"]))):
        frames = (frames + 2 * ((width - 1) // 2) - width) // stride + 1
        lengths.append(frames)
    return lengths
