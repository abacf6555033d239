"""Whisper (arXiv 2212.04356): log-mel encoder and text decoder, names as in transformers; Distil-Whisper and turbo are
shapes of it (few decoder layers).

Beside the forward pass of `WhisperModel` / `WhisperForConditionalGeneration` there are the three steps that decoding
needs, with the cache as explicit arrays: `encode`, `cross` (keys and values of the encoder's output, once a clip) and
`decode` (one or more tokens, which writes its keys and values into the cache).
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import adapters
from jaxslim.models import layers as L
from jaxslim.models.mixers import Attention
from jaxslim.models.wav2vec2 import EMBEDDING, span_mask
from jaxslim.slim import Outputs
from jaxslim.spec import Spec, SpecError

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # a pair (keys (B, S, H, K), values (B, S, H, Kv)) per decoder layer
DECODER, AUGMENT = 5000, 5001                    # sites of random numbers beside the layers' own


def build(spec: Spec) -> nnx.Module:
    for i in range(spec["decoder_layers"]):
        if (mixer := spec.attention(f"decoder.{i}.attention").mixer) != "softmax":
            raise SpecError(f"Block decoder.{i}.attention: mixer {mixer} is not causal; a decoder needs softmax.")
    return Whisper(spec) if spec.head == "none" else WithHead(spec)


def tied(spec: Spec) -> bool:
    """Whether the output matrix is the decoder's embedding (every published model); then it is stored once."""
    return spec.head != "none" and spec.get("tie_word_embeddings", True)


class Layer(nnx.Module):
    """A pre-norm layer of either side; a decoder's has cross-attention between self-attention and FFN."""

    def __init__(self, spec: Spec, side: str, i: int):
        self.name, self.index, width = f"{side}.{i}", i, spec["d_model"]
        self.decoder, self.rate, self.inner = side == "decoder", spec["dropout"], spec["activation_dropout"]
        self.drop, self.act = spec.of(side, "layerdrop"), L.activation(spec["activation_function"])
        self.self_attn = Attention(spec, f"{self.name}.attention", biasless=("k",))
        self.self_attn_layer_norm = L.LayerNorm(width)
        if self.decoder:
            self.encoder_attn = Attention(spec, f"{self.name}.cross", biasless=("k",))
            self.encoder_attn_layer_norm = L.LayerNorm(width)
        f = spec.ffn(f"{self.name}.ffn")
        self.units = f.units
        if f.units:
            self.fc1 = L.Linear(width, f.units, rank=f.ranks.get("up"), lora=f.lora.get("up"))
            self.fc2 = L.Linear(f.units, width, rank=f.ranks.get("down"), lora=f.lora.get("down"))
        else:  # a block without units keeps its output bias and nothing else
            self.fc2 = L.Bias(width)
        self.final_layer_norm = L.LayerNorm(width)

    def __call__(self, x, cross, call: L.Call, mask=None, cache=None, at=0):
        """x (B, T, D), cross (keys, values) of the encoder or None, mask (B, T, S) or None; cache (keys, values) of
        S positions, written from `at` on. -> x, taps, cache."""
        call, name, start = call.fold(self.index), self.name, x
        a_in = self.self_attn_layer_norm(x)
        if not self.decoder:
            a_out = self.self_attn(a_in, mask, call.fold(2))
        else:
            new = self.self_attn.keys(a_in)
            cache = new if cache is None else tuple(
                jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), at, 1)
                for old, x in zip(cache, new, strict=True))
            a_out = self.self_attn.attend(a_in, *cache, mask, call.fold(2))
        a_out = adapters.adapt(self, "attention", x, a_in, a_out, call)
        x = x + L.dropout(a_out, self.rate, call, 3)
        taps = {f"{name}.attention.in": a_in, f"{name}.attention.out": a_out}
        if self.decoder:
            c_in = self.encoder_attn_layer_norm(x)
            c_out = self.encoder_attn.attend(c_in, *cross, None, call.fold(6))
            c_out = adapters.adapt(self, "cross", x, c_in, c_out, call)
            x = x + L.dropout(c_out, self.rate, call, 7)
            taps |= {f"{name}.cross.in": c_in, f"{name}.cross.out": c_out}
        f_in = self.final_layer_norm(x)
        f_out = adapters.adapt(self, "ffn", x, f_in, self.ffn(f_in, call), call)
        x = adapters.adapt_layer(self, "ffn", x + L.dropout(f_out, self.rate, call, 4), call)
        if call.key is not None and self.drop:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(call.key, 5), self.drop), start, x)
        taps |= {f"{name}.ffn.in": f_in, f"{name}.ffn.out": f_out, name: x}
        return x, call.keep(taps, None), cache

    def ffn(self, x, call: L.Call):
        if not self.units:
            return jnp.broadcast_to(self.fc2(), x.shape).astype(x.dtype)
        return self.fc2(L.dropout(self.act(self.fc1(x)), self.inner, call, 1))


class Encoder(nnx.Module):
    def __init__(self, spec: Spec):
        self.spec = spec
        self.conv1 = L.Conv(spec.channels(-1), spec.channels(0), 3)
        self.conv2 = L.Conv(spec.channels(0), spec["d_model"], 3)
        self.embed_positions = L.Weight(spec["max_source_positions"], spec["d_model"])
        self.layers = nnx.List([Layer(spec, "encoder", i) for i in range(spec["encoder_layers"])])
        self.layer_norm = L.LayerNorm(spec["d_model"])

    def __call__(self, x, call: L.Call):                                 # (B, mels, 2 S) -> (B, S, D), states, taps
        spec = self.spec
        if x.shape[1:] != (want := (spec["num_mel_bins"], 2 * spec["max_source_positions"])):
            raise ValueError(f"input_features has shape {x.shape}; this model takes (B, {want[0]}, {want[1]}): log-mel "
                             "frames padded to the full window.")
        x = jnp.swapaxes(x, 1, 2).astype(self.conv1.weight.dtype)
        x = L.gelu(self.conv2(L.gelu(self.conv1(x, 1, 1)), 2, 1))
        taps = call.keep({"frontend": x}, None)
        x = L.dropout(x + self.embed_positions().astype(x.dtype), spec["dropout"], call, EMBEDDING)
        taps |= call.keep({"embedding": x}, None)
        x, states, new, _ = _run(self.layers, x, call)
        x = self.layer_norm(x)
        return x, (*states[:-1], x), taps | new                          # the last state is the normed one, as in HF


class Decoder(nnx.Module):
    def __init__(self, spec: Spec):
        self.rate, self.padding = spec["dropout"], spec.get("pad_token_id")
        self.embed_tokens = L.Weight(spec["vocab_size"], spec["d_model"])
        self.embed_positions = L.Weight(spec["max_target_positions"], spec["d_model"])
        self.layers = nnx.List([Layer(spec, "decoder", i) for i in range(spec["decoder_layers"])])
        self.layer_norm = L.LayerNorm(spec["d_model"])

    def __call__(self, ids, cross: Cache, call: L.Call, positions, mask, cache: Cache | None = None, at=0):
        """ids, positions (B, T), mask (B, T, S) -> (B, T, D), states, taps, cache."""
        x = L.lookup(self.embed_tokens(), ids, self.padding) + self.embed_positions()[positions]
        x = L.dropout(x, self.rate, call, EMBEDDING)
        x, states, taps, cache = _run(self.layers, x, call, cross, mask, cache, at)
        x = self.layer_norm(x)
        return x, (*states[:-1], x), taps, cache


class Whisper(nnx.Module):
    """`WhisperModel`."""

    def __init__(self, spec: Spec):
        self.spec, self.encoder, self.decoder = spec, Encoder(spec), Decoder(spec)

    def __call__(self, call: L.Call, input_features, decoder_input_ids, attention_mask=None,
                 decoder_attention_mask=None) -> Outputs:
        ids = jnp.asarray(decoder_input_ids)
        states, every, taps = self.encode(input_features, call, attention_mask)
        lower = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None]                                  # (1, T, T)
        valid = None if decoder_attention_mask is None else decoder_attention_mask != 0
        mask = lower if valid is None else lower & valid[:, None, :]
        x, hidden, new, _ = self.decoder(ids, self.cross(states), call.fold(DECODER),
                                         jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), mask)
        taps |= {k: L.zero_padding(v, valid) for k, v in new.items()}
        return Outputs(None, x, hidden if call.hidden else None, taps or None, None, states,
                       every if call.hidden else None)

    def encode(self, input_features, call: L.Call, attention_mask=None):
        """(B, mels, 2 S) -> (B, S, D), every hidden state, taps. Whisper has no mask: padding is silence; the mask
        (B, 2 S) only keeps SpecAugment off it."""
        if call.key is not None and self.spec.get("apply_spec_augment", False):
            input_features = self.augment(input_features, attention_mask, call)
        return self.encoder(input_features, call)

    def cross(self, states) -> Cache:
        """Keys and values of the encoder's output (B, S, D) for every decoder layer."""
        return tuple(layer.encoder_attn.keys(states) for layer in self.decoder.layers)

    def decode(self, ids, cross: Cache, cache: Cache, at, positions, mask):
        """Tokens (B, T) at cache places `at` to `at + T`; mask (B, T, S) over the cache -> (B, T, D), cache."""
        x, _, _, cache = self.decoder(ids, cross, L.Call(), positions, mask, cache, at)
        return x, cache

    def augment(self, x, mask, call):                                    # SpecAugment on log-mel frames (B, mels, T)
        spec, (batch, mels, length) = self.spec, x.shape
        time, feature = jax.random.split(jax.random.fold_in(call.key, AUGMENT))
        if spec["mask_time_prob"] > 0:
            lengths = jnp.full(batch, length) if mask is None else mask.sum(-1)
            spans = span_mask(time, lengths, length, spec["mask_time_prob"], spec["mask_time_length"],
                              spec["mask_time_min_masks"])
            x = jnp.where(spans[:, None, :], 0.0, x)
        if spec["mask_feature_prob"] > 0:
            spans = span_mask(feature, jnp.full(batch, mels), mels, spec["mask_feature_prob"],
                              spec["mask_feature_length"], spec["mask_feature_min_masks"])
            x = jnp.where(spans[:, :, None], 0.0, x)
        return x


class WithHead(nnx.Module):
    """`WhisperForConditionalGeneration`."""

    def __init__(self, spec: Spec):
        self.model, self.tied = Whisper(spec), tied(spec)
        if not self.tied:
            self.proj_out = L.Linear(spec["d_model"], spec["vocab_size"], bias=False)

    def __call__(self, call: L.Call, **inputs) -> Outputs:
        out = self.model(call, **inputs)
        logits = self.logits(out.last_hidden_state)
        return out._replace(logits=logits, taps={**(out.taps or {}), **call.keep({"logits": logits}, None)} or None)

    def logits(self, x):                                                 # (B, T, D) -> (B, T, V)
        x = L.matmul(x, self.model.decoder.embed_tokens()) if self.tied else self.proj_out(x)
        return x.astype(jnp.float32)


def _run(layers, x, call: L.Call, cross=None, mask=None, cache=None, at=0):
    """All layers of a side -> x, states (embedding, then every layer), taps, keys and values of every layer."""
    states, taps, out = [x], {}, []
    for i, layer in enumerate(layers):
        step = functools.partial(layer, cross=None if cross is None else cross[i], call=call, mask=mask,
                                 cache=None if cache is None else cache[i], at=at)
        with jax.named_scope(layer.name):
            x, new, pair = L.remat(step, call)(x)
        states.append(x)
        out.append(pair)
        taps |= new
    return x, states, taps, tuple(out)
