"""Encoders of wav2vec2 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900), names as in transformers.

Switches of the config: both front-end norms (`feat_extract_norm` group | layer), both layer-norm placements
(`do_stable_layer_norm`), `conv_bias`, HuBERT's `feat_proj_layer_norm` and `conv_pos_batch_norm`, and the adapters of
adapters.py. WavLM adds a position bias to its attention (positions.py).
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxslim.models import adapters, gates, heads, positions
from jaxslim.models import layers as L
from jaxslim.models.mixers import Attention
from jaxslim.slim import Outputs
from jaxslim.spec import Spec

FRAMES = 128                     # of long audio that the convolutions make at a time on CPU
EMBEDDING, AUGMENT = 1001, 1003  # sites of random numbers beside the layers' own (their index)


def build(spec: Spec) -> nnx.Module:
    if spec.generator:
        from jaxslim.models import generative

        return heads.build(spec, generative.build(spec))
    return heads.build(spec, Encoder(spec))


def frames(spec: Spec, samples):
    """Frames of the front end for a number of samples (int or array); 0 when the clip is too short for one."""
    for kernel, stride in zip(spec["conv_kernel"], spec["conv_stride"], strict=True):
        samples = (samples - kernel) // stride + 1
    return max(samples, 0) if isinstance(samples, int) else jnp.maximum(samples, 0)


class ConvLayer(nnx.Module):
    def __init__(self, spec: Spec, i: int):
        din, dout = spec.channels(i - 1), spec.channels(i)
        self.stride, self.act = spec["conv_stride"][i], L.activation(spec["feat_extract_activation"])
        self.conv = L.Conv(din, dout, spec["conv_kernel"][i], bias=spec["conv_bias"])
        norm = spec["feat_extract_norm"]
        self.normed = norm == "layer" or i == 0
        if self.normed:
            gated = gates.gated(spec, f"frontend.{i}")
            self.layer_norm = L.LayerNorm(dout, gated=gated) if norm == "layer" else L.TimeNorm(dout)

    def __call__(self, x, *moments):                                     # (B, T, C) -> (B, T', C')
        x = self.conv(x, self.stride)
        return self.act(self.layer_norm(x, *moments) if self.normed else x)


class FeatureExtractor(nnx.Module):
    def __init__(self, spec: Spec):
        self.conv_layers = nnx.List([ConvLayer(spec, i) for i in range(len(spec["conv_dim"]))])
        self.framewise = spec["feat_extract_norm"] == "layer"            # group norm looks at the whole clip first
        self.stride = math.prod(spec["conv_stride"])                     # samples from frame to frame
        self.field = 1                                                   # samples that a frame sees
        for width, stride in zip(reversed(spec["conv_kernel"]), reversed(spec["conv_stride"])):
            self.field = (self.field - 1) * stride + width

    def __call__(self, wave, call: L.Call):                              # (B, samples) -> (B, T, C)
        count = max(wave.shape[1] - self.field, 0) // self.stride + 1
        if not call.chunked(count):
            return self.convolve(wave)
        moments = () if self.framewise else (self.moments(wave),)
        chunks, size = -(-count // FRAMES), FRAMES * self.stride
        wave = jnp.pad(wave, ((0, 0), (0, max(chunks * size + self.field - wave.shape[1], 0))))
        y = jax.lax.map(lambda start: self.convolve(jax.lax.dynamic_slice_in_dim(
            wave, start, size - self.stride + self.field, 1), *moments), jnp.arange(chunks) * size)
        return L.from_chunks(y, count)

    def convolve(self, wave, *moments):
        first, *others = self.conv_layers
        x = first(wave[:, :, None], *moments)
        for layer in others:
            x = layer(x)
        return x

    def moments(self, wave):
        """Mean and variance (B, 1, C) over time of the first convolution, which is computed twice rather than kept."""
        first = self.conv_layers[0]
        width, stride = first.conv.weight.shape[2], first.stride
        count, size = (wave.shape[1] - width) // stride + 1, 4 * L.CHUNK

        def part(start, frames):                                         # of `frames` frames from `start` on
            piece = jax.lax.dynamic_slice_in_dim(wave, start * stride, (frames - 1) * stride + width, 1)
            return first.layer_norm.moments(first.conv(piece[:, :, None], stride))

        whole, rest = divmod(count, size)
        means, variances = jax.lax.map(lambda start: part(start, size), jnp.arange(whole) * size)     # (N, B, 1, C)
        weights = np.full(whole, size / count)
        if rest:
            mean, variance = part(whole * size, rest)
            means, variances = jnp.concatenate([means, mean[None]]), jnp.concatenate([variances, variance[None]])
            weights = np.append(weights, rest / count)
        over = lambda x: jnp.tensordot(weights.astype(np.float32), x, 1)  # noqa: E731
        mean = over(means)
        return mean, over(variances + (means - mean) ** 2)


class FeatureProjection(nnx.Module):
    def __init__(self, spec: Spec):
        last = len(spec["conv_dim"]) - 1
        width = spec.channels(last)
        self.normed = spec.get("feat_proj_layer_norm", True)
        if self.normed:
            self.layer_norm = L.LayerNorm(width, spec["layer_norm_eps"], gates.gated(spec, f"frontend.{last}"))
        self.projection = L.Linear(width, spec["hidden_size"])

    def __call__(self, x):
        return self.projection(self.layer_norm(x) if self.normed else x)


class PositionalConv(nnx.Module):
    """Grouped convolution over time; weight = g v / |v|, the norm taken over all but the kernel axis."""

    def __init__(self, spec: Spec):
        width, self.groups = spec["hidden_size"], spec["num_conv_pos_embedding_groups"]
        self.kernel, self.act = spec["num_conv_pos_embeddings"], L.activation(spec["feat_extract_activation"])
        self.batch_normed = bool(spec.get("conv_pos_batch_norm", False))
        self.conv = L.Bias(width)
        if self.batch_normed:
            self.batch_norm = L.BatchNorm(width)
            self.conv.weight = L.param(width, width // self.groups, self.kernel)
        else:
            self.conv.parametrizations = nnx.Module()
            self.conv.parametrizations.weight = nnx.Module()
            self.conv.parametrizations.weight.original0 = L.param(1, 1, self.kernel)
            self.conv.parametrizations.weight.original1 = L.param(width, width // self.groups, self.kernel)

    def __call__(self, x, call: L.Call):                                 # (B, T, D) -> (B, T, D)
        if self.batch_normed:
            x, w = self.batch_norm(x), self.conv.weight[...]
        else:
            g, v = (p[...].astype(jnp.float32) for p in (self.conv.parametrizations.weight.original0,
                                                        self.conv.parametrizations.weight.original1))
            w = v * (g * jax.lax.rsqrt((v * v).sum((0, 1), keepdims=True)))
            w = w if call.collect is None else call.collect("pos_conv_embed.conv.weight", w)
        left = self.kernel // 2
        y = L.grouped_conv1d(x, w, self.groups, (left, self.kernel - 1 - left), call)
        return self.act(y + self.conv().astype(y.dtype))


class FeedForward(nnx.Module):
    def __init__(self, spec: Spec, block: str):
        f, width = spec.ffn(block), spec["hidden_size"]
        self.units, self.rates = f.units, (spec["activation_dropout"], spec["hidden_dropout"])
        self.act = L.activation(spec["hidden_act"])
        if not f.units:  # a block without units keeps its output bias and nothing else
            self.output_dense = L.Bias(width)
            return
        self.intermediate_dense = L.Linear(width, f.units, rank=f.ranks.get("up"), lora=f.lora.get("up"))
        self.output_dense = L.Linear(f.units, width, rank=f.ranks.get("down"), lora=f.lora.get("down"))

    def __call__(self, x, call: L.Call):
        if not self.units:
            return jnp.broadcast_to(self.output_dense(), x.shape).astype(x.dtype)
        return L.in_chunks(lambda x: self.output_dense(
            L.dropout(self.act(self.intermediate_dense(x)), self.rates[0], call, 1)), x, call)


class Layer(nnx.Module):
    """One transformer layer, pre-norm (`do_stable_layer_norm`) or post-norm."""

    def __init__(self, spec: Spec, i: int, side: str = "encoder"):
        self.name, self.index, self.pre = f"{side}.{i}", i, spec["do_stable_layer_norm"]
        self.rate, self.drop = spec["hidden_dropout"], spec["layerdrop"]
        self.attention = (positions.Attention if positions.kind(spec) else Attention)(spec, f"{self.name}.attention")
        self.feed_forward = FeedForward(spec, f"{self.name}.ffn")
        self.layer_norm = L.LayerNorm(spec["hidden_size"], spec["layer_norm_eps"])
        self.final_layer_norm = L.LayerNorm(spec["hidden_size"], spec["layer_norm_eps"])
        self.adapted = self.pre and bool(spec.get("adapter_attn_dim"))   # transformers has none in post-norm layers
        if self.adapted:
            self.adapter_layer = adapters.AttnAdapter(spec)

    def __call__(self, x, mask, call: L.Call, bias=None, mix=None):      # (B, T, D) -> (B, T, D), taps
        """`mix` takes the place of the attention block where that has a state (stream.py)."""
        call = call.fold(self.index)
        a_in = self.layer_norm(x) if self.pre else x
        a_out = (mix or self.attention)(a_in, mask, call.fold(2), *(() if bias is None else (bias,)))
        a_out = adapters.adapt(self, "attention", x, a_in, a_out, call)
        h = x + L.dropout(a_out, self.rate, call, 3)
        if not self.pre:
            h = self.layer_norm(h)
        f_in = self.final_layer_norm(h) if self.pre else h
        f_out = adapters.adapt(self, "ffn", h, f_in, self.feed_forward(f_in, call), call)
        y = h + L.dropout(f_out, self.rate, call, 4)
        if not self.pre:
            y = self.final_layer_norm(y)
        if self.adapted:
            y = y + self.adapter_layer(y)
        y = adapters.adapt_layer(self, "ffn", y, call)
        if call.key is not None and self.drop:
            y = jnp.where(jax.random.bernoulli(jax.random.fold_in(call.key, 5), self.drop), x, y)
        return y, call.keep({f"{self.name}.attention.in": a_in, f"{self.name}.attention.out": a_out,
                             f"{self.name}.ffn.in": f_in, f"{self.name}.ffn.out": f_out, self.name: y}, mask)


class Transformer(nnx.Module):
    def __init__(self, spec: Spec):
        self.pre, self.rate = spec["do_stable_layer_norm"], spec["hidden_dropout"]
        self.pos_conv_embed = PositionalConv(spec)
        self.layer_norm = L.LayerNorm(spec["hidden_size"], spec["layer_norm_eps"])
        self.layers = nnx.List([Layer(spec, i) for i in range(spec["num_hidden_layers"])])
        self.biased = positions.kind(spec) == "gated" and len(self.layers) > 0

    def __call__(self, x, mask, call: L.Call):                           # (B, T, D) -> (B, T, D), states, taps
        x, states, taps = self.body(x, mask, call)
        return self.layer_norm(x) if self.pre else x, states, taps

    def body(self, x, mask, call: L.Call):
        x = L.zero_padding(x, mask)
        x = x + self.pos_conv_embed(x, call)
        if not self.pre:
            x = self.layer_norm(x)
        x = L.dropout(x, self.rate, call, EMBEDDING)
        bias = self.layers[0].attention.shared(x.shape[1]) if self.biased else None
        return L.run(self.layers, x, mask, call, bias=bias)


class Encoder(nnx.Module):
    """`Wav2Vec2Model` / `HubertModel` / `WavLMModel`."""

    def __init__(self, spec: Spec, transformer: type[nnx.Module] = Transformer):
        self.spec = spec
        self.feature_extractor, self.feature_projection = FeatureExtractor(spec), FeatureProjection(spec)
        self.encoder = transformer(spec)
        self.adapted = bool(spec.get("add_adapter"))
        if self.adapted:
            self.adapter = adapters.ConvAdapter(spec)
        self.masking = spec["mask_time_prob"] > 0 or spec["mask_feature_prob"] > 0
        if self.masking:
            self.masked_spec_embed = L.param(spec["hidden_size"])

    def __call__(self, call: L.Call, input_values, attention_mask=None, **given) -> Outputs:
        spec = self.spec                                                 # `given`: what a transformer reads beside
        x = front = self.feature_extractor(input_values.astype(self.feature_projection.projection.weight.dtype), call)
        lengths = None if attention_mask is None else frames(spec, attention_mask.sum(-1))          # (B,)
        mask = L.frame_mask(lengths, x.shape[1])                                                     # (B, T)
        x = projected = L.dropout(self.feature_projection(x), spec["feat_proj_dropout"], call, EMBEDDING + 100)
        if call.key is not None and self.masking and spec.get("apply_spec_augment", True):
            x = self.augment(x, lengths, call)
        x, states, taps = self.encoder(x, mask, call, **given)
        taps |= call.keep({"frontend": front, "projection": projected}, mask)
        if self.adapted:
            x, lengths = self.adapter(x), None if lengths is None else self.adapter.frames(lengths)
        return Outputs(None, x, tuple(states) if call.hidden else None, taps or None, lengths)

    def augment(self, x, lengths, call):                                 # SpecAugment in time and feature direction
        spec, (batch, length, width) = self.spec, x.shape
        lengths = jnp.full(batch, length) if lengths is None else lengths
        time, feature = jax.random.split(jax.random.fold_in(call.key, AUGMENT))
        if spec["mask_time_prob"] > 0:
            spans = span_mask(time, lengths, length, spec["mask_time_prob"], spec["mask_time_length"],
                              spec.get("mask_time_min_masks", 2))
            x = jnp.where(spans[:, :, None], self.masked_spec_embed[...].astype(x.dtype), x)
        if spec["mask_feature_prob"] > 0:
            spans = span_mask(feature, jnp.full(batch, width), width, spec["mask_feature_prob"],
                              spec["mask_feature_length"], spec.get("mask_feature_min_masks", 0))
            x = jnp.where(spans[:, None, :], 0.0, x)
        return x


def span_mask(key, lengths, size: int, prob: float, width: int, least: int) -> jax.Array:
    """Random spans as transformers' `_compute_mask_indices` draws them: lengths (B,) -> bool (B, size)."""
    rounding, order = jax.random.split(key)
    count = (prob * lengths / width + jax.random.uniform(rounding)).astype(jnp.int32)
    count = jnp.minimum(jnp.maximum(count, least), size // width)
    starts = lengths - (width - 1)
    count = jnp.minimum(count, jnp.maximum(starts, 0))                                               # (B,)
    score = jnp.where(jnp.arange(size) < starts[:, None], jax.random.uniform(order, (len(lengths), size)), 2.0)
    chosen = (jnp.argsort(jnp.argsort(score, -1), -1) < count[:, None]).astype(jnp.int32)            # span starts
    total = jnp.pad(jnp.cumsum(chosen, -1), ((0, 0), (width, 0)))
    return total[:, width:] > total[:, :-width]
