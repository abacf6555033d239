"""Conformer layers (arXiv 2005.08100), names as in transformers, and the encoder of wav2vec2-conformer.

w2v_bert.py and parakeet.py put their own front and end around the same layers.

A layer is half a feed-forward block, attention, a convolution module, another half, and a norm. The families differ in
what comes before the layers and in a few points of `Style`; positions inside attention are positions.py's.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import adapters, gates, heads, positions, wav2vec2
from jaxslim.models import layers as L
from jaxslim.models.roles import FAMILIES, roles
from jaxslim.spec import Spec


class Style(NamedTuple):
    """How the layers of a family differ."""

    kernel: str           # config key: frames of the depthwise convolution
    stored_norm: bool     # batch norm with stored statistics behind that convolution, or layer norm
    causal: bool          # it looks back only
    masked: str           # where padding is set to zero in the convolution module: "", "before" or "after" its gate
    eps: str | None       # config key of the norms' epsilon; None = 1e-5


STYLES = {"wav2vec2-conformer": Style("conv_depthwise_kernel_size", True, False, "", None),
          "wav2vec2-bert": Style("conv_depthwise_kernel_size", False, True, "before", "layer_norm_eps"),
          "parakeet_ctc": Style("conv_kernel_size", True, False, "after", None)}
STYLES["parakeet_encoder"] = STYLES["parakeet_ctc"]


def build(spec: Spec) -> nnx.Module:
    return heads.build(spec, wav2vec2.Encoder(spec, Transformer))


class FeedForward(nnx.Module):
    """`width` and `act` are for one that is no block of its own."""

    def __init__(self, spec: Spec, block: str, width: int | None = None, act: str | None = None):
        f, names = spec.ffn(block), roles(spec, block)
        width = width or spec["hidden_size"]
        self.units, self.act = f.units, L.activation(act or spec["hidden_act"])
        self.rates = (spec["activation_dropout"], spec.get("hidden_dropout", 0.0))
        self.names = tuple(names[r].removeprefix(names["owner"] + ".") for r in ("up", "down"))
        self.has_bias = bias = has_bias(spec)
        if self.units:
            setattr(self, self.names[0], L.Linear(width, f.units, bias, f.ranks.get("up"), f.lora.get("up")))
            setattr(self, self.names[1], L.Linear(f.units, width, bias, f.ranks.get("down"), f.lora.get("down")))
        elif bias:  # a block without units keeps its output bias and nothing else
            setattr(self, self.names[1], L.Bias(width))

    def __call__(self, x, call: L.Call):                                 # (B, T, D) -> (B, T, D)
        if not self.units:
            return jnp.broadcast_to(getattr(self, self.names[1])() if self.has_bias else 0.0, x.shape).astype(x.dtype)
        up, down = (getattr(self, name) for name in self.names)
        return L.in_chunks(lambda x: down(L.dropout(self.act(up(x)), self.rates[0], call, 1)), x, call)


class Convolution(nnx.Module):
    """Pointwise to twice the channels, gate, depthwise over time, norm, activation, pointwise. The norm before it is in
    here when its name says so."""

    def __init__(self, spec: Spec, block: str):
        names, width, channels = roles(spec, block), spec["hidden_size"], spec.conv(block)
        style, own = STYLES[spec.family], names["owner"] + "."
        bias = spec["convolution_bias"] if "parakeet" in spec.family else False
        self.kernel, self.act, self.masked = spec[style.kernel], L.activation(spec["hidden_act"]), style.masked
        self.padding = (self.kernel - 1, 0) if style.causal else ((self.kernel - 1) // 2,) * 2
        self.inner = names["inner"].removeprefix(own)
        self.normed, self.channels, self.has_bias = names["norm"].startswith(own), channels, bias
        if self.normed:
            self.layer_norm = norm(spec)
        if not channels:  # a block without channels keeps its output bias, if it has one, and nothing else
            if bias:
                self.pointwise_conv2 = L.Bias(width)
            return
        self.pointwise_conv1 = L.Conv(width, 2 * channels, 1, bias)
        self.pointwise_conv2 = L.Conv(channels, width, 1, bias)
        self.depthwise_conv = Depthwise(channels, self.kernel, bias)
        setattr(self, self.inner, L.BatchNorm(channels) if style.stored_norm else
                L.LayerNorm(channels, eps(spec), gates.gated(spec, block)))

    def __call__(self, x, mask, call: L.Call):                           # (B, T, D) -> (B, T, D)
        if not self.channels:
            return jnp.broadcast_to(self.pointwise_conv2() if self.has_bias else 0.0, x.shape).astype(x.dtype)
        x = L.zero_padding(x, mask) if self.masked == "before" else x
        h = adapters.glu(self.pointwise_conv1.pointwise(x))
        h = L.zero_padding(h, mask) if self.masked == "after" else h
        h = self.act(getattr(self, self.inner)(self.depthwise_conv(h, self.padding, call)))
        return self.pointwise_conv2.pointwise(h)


class Depthwise(nnx.Module):
    def __init__(self, channels: int, width: int, bias: bool):
        self.weight, self.has_bias = L.param(channels, 1, width), bias
        if bias:
            self.bias = L.param(channels)

    def __call__(self, x, padding: tuple[int, int], call: L.Call):       # (B, T, C) -> (B, T, C)
        w, length = self.weight[...].astype(x.dtype), x.shape[1]
        if call.on_cpu():  # shifted sums, which XLA fuses; its depthwise convolution is slow on CPU
            h = jnp.pad(x, ((0, 0), padding, (0, 0)))
            y = sum(h[:, i : i + length] * w[:, 0, i] for i in range(w.shape[2]))
        else:
            y = jax.lax.conv_general_dilated(x, w, (1,), [padding], feature_group_count=w.shape[0],
                                             dimension_numbers=("NWC", "OIW", "NWC"))
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


class Layer(nnx.Module):
    def __init__(self, spec: Spec, i: int):
        self.name, self.index, self.drop = f"encoder.{i}", i, spec["layerdrop"]
        parts = FAMILIES[spec.family].parts
        self.owners = tuple(parts[p]["owner"] for p in ("ffn1", "attention", "conv", "ffn2"))
        self.norms = tuple(None if (n := parts[p]["norm"]).startswith(parts[p]["owner"] + ".") else n
                           for p in ("ffn1", "attention", "conv", "ffn2"))
        self.last = parts["ffn2"]["last"]
        makers = (FeedForward, functools.partial(positions.Attention, biasless=() if has_bias(spec) else tuple("qkvo")),
                  Convolution, FeedForward)
        for part, owner, make in zip(("ffn1", "attention", "conv", "ffn2"), self.owners, makers, strict=True):
            setattr(self, owner, make(spec, f"{self.name}.{part}"))
        for name in filter(None, (*self.norms, self.last)):
            setattr(self, name, norm(spec))
        # dropout behind attention: transformers uses the rate of the attention weights (Parakeet: none)
        self.rates = (spec.get("hidden_dropout", 0.0), 0.0 if "parakeet" in spec.family else spec["attention_dropout"],
                      spec.get("conformer_conv_dropout", 0.0))

    def __call__(self, x, mask, call: L.Call, shared=None):              # (B, T, D) -> (B, T, D), taps
        call, before, taps = call.fold(self.index), x, {}

        def sublayer(i, part, x, *arguments):
            module, name = getattr(self, self.owners[i]), self.norms[i]
            h = module.layer_norm(x) if name is None else getattr(self, name)(x)
            y = adapters.adapt(self, part, x, h, module(h, *arguments), call)
            taps.update({f"{self.name}.{part}.in": h, f"{self.name}.{part}.out": y})
            return y

        x = x + 0.5 * L.dropout(sublayer(0, "ffn1", x, call.fold(10)), self.rates[0], call, 11)
        x = x + L.dropout(sublayer(1, "attention", x, mask, call.fold(2), shared), self.rates[1], call, 3)
        x = x + L.dropout(sublayer(2, "conv", x, mask, call.fold(12)), self.rates[2], call, 12)
        x = x + 0.5 * L.dropout(sublayer(3, "ffn2", x, call.fold(13)), self.rates[0], call, 14)
        x = adapters.adapt_layer(self, "ffn2", getattr(self, self.last)(x), call)
        if call.key is not None and self.drop:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(call.key, 5), self.drop), before, x)
        return x, call.keep(taps | {self.name: x}, mask)


class Rates(nnx.Module):
    """Rotary frequencies: wav2vec2-conformer's checkpoints store them."""

    def __init__(self, spec: Spec):
        self.inv_freq = L.param((spec["hidden_size"] // spec["num_attention_heads"] + 1) // 2)

    def __call__(self):
        return jax.lax.stop_gradient(self.inv_freq[...].astype(jnp.float32))


class Transformer(nnx.Module):
    """The layers of wav2vec2-conformer and of w2v-BERT (`final` False: no positional convolution, no norm at the end).

    wav2vec2-conformer's checkpoints hold a positional convolution that nothing reads, in transformers too."""

    def __init__(self, spec: Spec, final: bool = True):
        self.rate, self.final, self.rotary = spec["hidden_dropout"], final, positions.kind(spec) == "rotary"
        if self.rotary and final:
            self.embed_positions = Rates(spec)
        elif self.rotary:
            self.rates = tuple(map(float, positions.rates(spec)))
        if final:
            self.pos_conv_embed = wav2vec2.PositionalConv(spec)
            self.layer_norm = L.LayerNorm(spec["hidden_size"], spec["layer_norm_eps"])
        self.layers = nnx.List([Layer(spec, i) for i in range(spec["num_hidden_layers"])])

    def __call__(self, x, mask, call: L.Call):                           # (B, T, D) -> (B, T, D), states, taps
        x = L.dropout(L.zero_padding(x, mask), self.rate, call, wav2vec2.EMBEDDING)
        rates = None
        if self.rotary:
            rates = self.embed_positions() if self.final else jnp.array(self.rates, jnp.float32)
        x, states, taps = L.run(self.layers, x, mask, call, shared=rates)
        return self.layer_norm(x) if self.final else x, states, taps


def norm(spec: Spec) -> L.LayerNorm:
    return L.LayerNorm(spec["hidden_size"], eps(spec))


def eps(spec: Spec) -> float:
    key = STYLES[spec.family].eps
    return spec[key] if key else 1e-5


def has_bias(spec: Spec) -> bool:
    """Whether the linears of attention and FFN have biases."""
    return bool(spec["attention_bias"]) if "parakeet" in spec.family else True
