"""Audio encoder of Gemma 3n, `Gemma3nAudioEncoder` in transformers: the open relative of USM (arXiv 2303.01037).

Conformer blocks with RMS norms before and behind every part, causal convolutions, and attention to a few frames back
with relative positions and capped logits, behind two strided convolutions with a norm over all that was heard so far.
One of 16 log-mel frames is left at the end. An adapter beside a half-step feed-forward adds to its output before the
norm behind it (our choice: USM's blocks have no such norm), so that it merges exactly.

As in transformers, the last frame of a clip sees some padding behind it; that is zero here, whatever is given.
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxslim.models import adapters
from jaxslim.models import layers as L
from jaxslim.models.conformer import Depthwise
from jaxslim.models.roles import roles
from jaxslim.slim import Outputs
from jaxslim.spec import Spec, SpecError

EPS, TIMESCALES = 1e-6, 1e4


def build(spec: Spec) -> nnx.Module:
    if spec.head != "none":
        raise SpecError(f"gemma3n_audio has no head {spec.head!r}; it is an encoder.")
    return AudioEncoder(spec)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float = EPS):
        self.weight, self.eps = L.param(dim), eps

    def __call__(self, x):                                               # (..., D)
        h = x.astype(jnp.float32)
        return (h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + self.eps) * self.weight[...]).astype(x.dtype)


class ConvBlock(nnx.Module):
    """Strided convolution over time and mel bins, norm, ReLU; padding behind in time, on both sides of the bins."""

    def __init__(self, spec: Spec, i: int, din: int):
        self.stride, self.kernel = tuple(spec["sscp_conv_stride_size"][i]), tuple(spec["sscp_conv_kernel_size"][i])
        self.conv, self.norm = nnx.Module(), nnx.Module()
        self.conv.weight = L.param(spec["sscp_conv_channel_size"][i], din, *self.kernel)
        self.norm.weight, self.eps = L.param(spec["sscp_conv_channel_size"][i]), spec["sscp_conv_group_norm_eps"]

    def __call__(self, x):                                               # (B, T, M, C) -> (B, T', M', C')
        y = jax.lax.conv_general_dilated(
            x, self.conv.weight[...].astype(x.dtype), self.stride, [(0, self.kernel[0] - 1), (1, 1)],
            dimension_numbers=("NHWC", "OIHW", "NHWC")).astype(jnp.float32)
        count = jnp.arange(1, y.shape[1] + 1)[:, None, None] * (y.shape[2] * y.shape[3])
        total = lambda h: jnp.cumsum(h.sum((2, 3), keepdims=True), 1) / count  # noqa: E731  over all bins so far
        h = y - total(y)
        h = h * jax.lax.rsqrt(total(h * h) + self.eps) * self.norm.weight[...]
        return jax.nn.relu(h).astype(x.dtype)


class Subsampling(nnx.Module):
    """(B, T, mels) -> (B, ceil(T / 4), D)."""

    def __init__(self, spec: Spec):
        self.conv_0, self.conv_1 = ConvBlock(spec, 0, 1), ConvBlock(spec, 1, spec["sscp_conv_channel_size"][0])
        width = bins(spec)[-1] * spec["sscp_conv_channel_size"][-1]
        self.input_proj_linear = L.Linear(width, spec["hidden_size"], bias=False)

    def __call__(self, x):
        x = self.conv_1(self.conv_0(x[..., None]))
        return self.input_proj_linear(x.reshape(*x.shape[:2], -1))


class LocalAttention(nnx.Module):
    """Softmax over the `past` frames before, the frame itself and `future` ones after, in blocks of `chunk` queries."""

    def __init__(self, spec: Spec, block: str):
        a, names, width = spec.attention(block), roles(spec, block), spec["hidden_size"]
        if a.mixer != "softmax" or len(a.heads) != spec["conf_num_attention_heads"] or (
                a.qk_dim, a.v_dim) != (width // len(a.heads),) * 2:
            raise SpecError(f"Block {block}: Gemma 3n's attention keeps its mixer, heads and head sizes here.")
        self.heads, self.scale, self.cap = len(a.heads), a.scale / math.log(2.0), spec["conf_attention_logit_cap"]
        self.chunk, self.future = spec["conf_attention_chunk_size"], spec["conf_attention_context_right"]
        self.past, self.clip = max(0, spec["conf_attention_context_left"] - 1), spec["gradient_clipping"]
        self.names = tuple(names[r].removeprefix(names["owner"] + ".") for r in (*"qkvo", "pos", "per_dim"))
        for role, name in zip("qkvo", self.names):
            setattr(self, name, L.Linear(width, width, False, a.ranks.get(role), a.lora.get(role)))
        setattr(self, self.names[4], L.Linear(width, width, bias=False))
        setattr(self, self.names[5], L.param(width // self.heads))
        self.pre_attn_norm, self.post_norm = RMSNorm(width), RMSNorm(width)

    def __call__(self, x, mask):                                         # (B, T, D), (B, T) -> (B, T, D)
        q, k, v = (getattr(self, n)(x).reshape(*x.shape[:2], self.heads, -1) for n in self.names[:3])
        (rows, length), width = x.shape[:2], self.chunk + self.past + self.future
        q = q * (self.scale * jax.nn.softplus(getattr(self, self.names[5])[...])).astype(q.dtype)
        blocks = -(-length // self.chunk)
        rest, at = blocks * self.chunk - length, np.arange(blocks)[:, None] * self.chunk + np.arange(width)  # (U, C)
        pad = lambda h, n, m: jnp.pad(h, ((0, 0), (n, m)) + ((0, 0),) * (h.ndim - 2))  # noqa: E731
        q = pad(q, 0, rest).reshape(rows, blocks, self.chunk, self.heads, -1)                         # (B, U, W, H, K)
        k, v, seen = (pad(h, self.past, rest + self.future)[:, at] for h in (k, v, mask))             # (B, U, C, ...)
        back = np.arange(width) - np.arange(self.chunk)[:, None]         # (W, C): 0 = the furthest back, past = itself
        near = (back >= 0) & (back <= self.past + self.future)
        scores = jnp.einsum("buwhk,buchk->bhuwc", q, k)
        far = jnp.einsum("buwhk,fhk->bhuwf", q, self.distances(q.dtype))
        where = np.broadcast_to(np.clip(back, 0, self.past + self.future), (1, 1, 1, *back.shape))
        scores = (scores + jnp.take_along_axis(far, jnp.asarray(where), -1)).astype(jnp.float32)
        scores = jnp.tanh(scores / self.cap) * self.cap
        scores = jnp.where(near & seen[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
        y = jnp.einsum("bhuwc,buchk->buwhk", jax.nn.softmax(scores, -1).astype(v.dtype), v)
        return getattr(self, self.names[3])(y.reshape(rows, -1, x.shape[-1])[:, :length])

    def distances(self, dtype):
        """Embeddings of the distances from `past` back to `future` ahead: (F, H, K)."""
        pos = getattr(self, self.names[4])
        half = pos.weight.shape[1] // 2
        rates = np.exp(-np.arange(half) * (math.log(TIMESCALES) / max(half - 1, 1)))
        angle = np.arange(self.past, -self.future - 1, -1)[:, None] * rates
        table = jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], -1), dtype)
        return pos(table).reshape(len(angle), self.heads, -1)


class FeedForward(nnx.Module):
    def __init__(self, spec: Spec, block: str):
        f, width = spec.ffn(block), spec["hidden_size"]
        self.units, self.act, self.clip = f.units, jax.nn.silu, spec["gradient_clipping"]
        self.pre_layer_norm, self.post_layer_norm = RMSNorm(width), RMSNorm(width)
        if f.units:
            self.ffw_layer_1 = L.Linear(width, f.units, False, f.ranks.get("up"), f.lora.get("up"))
            self.ffw_layer_2 = L.Linear(f.units, width, False, f.ranks.get("down"), f.lora.get("down"))

    def __call__(self, x, call: L.Call):                                 # (B, T, D) -> (B, T, D), normed input
        if not self.units:
            return jnp.zeros_like(x)
        return L.in_chunks(lambda x: self.ffw_layer_2(self.act(self.ffw_layer_1(x))), x, call)


class Convolution(nnx.Module):
    def __init__(self, spec: Spec, block: str):
        width, channels, eps = spec["hidden_size"], spec.conv(block), spec["rms_norm_eps"]
        self.pre_layer_norm, self.conv_norm = RMSNorm(width, eps), RMSNorm(channels, eps)
        self.linear_start = L.Linear(width, 2 * channels, bias=False)
        self.linear_end = L.Linear(channels, width, bias=False)
        self.depthwise_conv1d = Depthwise(channels, spec["conf_conv_kernel_size"], bias=False)
        self.clip = spec["gradient_clipping"]

    def __call__(self, x, call: L.Call):                                 # (B, T, D), normed -> (B, T, D)
        h = self.depthwise_conv1d(adapters.glu(self.linear_start(x)), (self.depthwise_conv1d.weight.shape[2] - 1, 0),
                                  call)
        return self.linear_end(jax.nn.silu(self.conv_norm(clip(h, self.clip))))


class Layer(nnx.Module):
    """`Gemma3nAudioConformerBlock`."""

    def __init__(self, spec: Spec, i: int):
        self.name, self.clip, self.weight = f"encoder.{i}", spec["gradient_clipping"], spec["conf_residual_weight"]
        self.ffw_layer_start = FeedForward(spec, f"{self.name}.ffn1")
        self.attention = LocalAttention(spec, f"{self.name}.attention")
        self.lconv1d = Convolution(spec, f"{self.name}.conv")
        self.ffw_layer_end = FeedForward(spec, f"{self.name}.ffn2")
        self.norm = RMSNorm(spec["hidden_size"])

    def feed_forward(self, part, module, x, call, taps):
        h = module.pre_layer_norm(clip(x, self.clip))
        y = adapters.adapt(self, part, x, h, module(h, call), call)
        taps.update({f"{self.name}.{part}.in": h, f"{self.name}.{part}.out": y})
        return x + self.weight * module.post_layer_norm(clip(y, self.clip))

    def __call__(self, x, mask, call: L.Call):                           # (B, T, D), (B, T) -> (B, T, D), taps
        taps = {}
        x = self.feed_forward("ffn1", self.ffw_layer_start, x, call, taps)
        a_in = self.attention.pre_attn_norm(clip(x, self.clip))
        a_out = adapters.adapt(self, "attention", x, a_in, self.attention(a_in, mask), call)
        x = x + self.attention.post_norm(clip(a_out, self.clip))
        x = L.zero_padding(x, mask)
        c_in = self.lconv1d.pre_layer_norm(x)
        c_out = self.lconv1d(c_in, call)
        x = self.feed_forward("ffn2", self.ffw_layer_end, x + c_out, call, taps)
        x = adapters.adapt_layer(self, "ffn2", self.norm(clip(x, self.clip)), call)
        taps |= {f"{self.name}.attention.in": a_in, f"{self.name}.attention.out": a_out,
                 f"{self.name}.conv.in": c_in, f"{self.name}.conv.out": c_out, self.name: x}
        return x, call.keep(taps, mask)


class AudioEncoder(nnx.Module):
    """`audio_mel` (B, T, mels), `audio_mel_mask` (B, T) of the same frames: True where there is only padding."""

    def __init__(self, spec: Spec):
        self.factor = spec["conf_reduction_factor"]
        self.step = math.prod(s[0] for s in spec["sscp_conv_stride_size"])
        self.subsample_conv_projection = Subsampling(spec)
        self.conformer = nnx.List([Layer(spec, i) for i in range(spec["conf_num_hidden_layers"])])

    def __call__(self, call: L.Call, audio_mel, audio_mel_mask=None) -> Outputs:
        x = audio_mel.astype(self.subsample_conv_projection.input_proj_linear.weight.dtype)
        padded = jnp.zeros(x.shape[:2], bool) if audio_mel_mask is None else audio_mel_mask.astype(bool)
        x = projected = self.subsample_conv_projection(L.zero_padding(x, ~padded))
        at = np.minimum(np.arange(x.shape[1]) * self.step, padded.shape[1] - 1)
        mask = ~padded[:, at]                                                                         # (B, T')
        x, states, taps = L.run(self.conformer, x, mask, call)
        taps |= call.keep({"projection": projected}, mask)
        x, mask = L.zero_padding(x, mask)[:, :: self.factor], mask[:, :: self.factor]
        return Outputs(None, x, tuple(states) if call.hidden else None, taps or None, mask.sum(-1))


def clip(x: jax.Array, limit: float) -> jax.Array:
    return jnp.clip(x, -limit, limit)


def bins(spec: Spec) -> list[int]:
    """Mel bins before and after each convolution."""
    sizes = [spec["input_feat_size"]]
    for kernel, stride in zip(spec["sscp_conv_kernel_size"], spec["sscp_conv_stride_size"], strict=True):
        sizes.append((sizes[-1] + 2 - kernel[1]) // stride[1] + 1)
    return sizes


def frames(spec: Spec, count: int) -> list[int]:
    """Frames after each convolution."""
    counts = []
    for stride in spec["sscp_conv_stride_size"]:
        count = (count - 1) // stride[0] + 1
        counts.append(count)
    return counts
