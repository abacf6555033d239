"""BERT (arXiv 1810.04805), RoBERTa (arXiv 1907.11692) and DistilBERT (arXiv 1910.01108), names as in transformers.

One post-norm encoder; the families differ in names (roles.py), in the embeddings (RoBERTa counts positions from its
padding id, DistilBERT has no token types) and in the classification head. `mean_pool` makes sentence embeddings.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import adapters
from jaxslim.models import layers as L
from jaxslim.models.heads import DROPOUT, labels
from jaxslim.models.mixers import Attention
from jaxslim.models.roles import FAMILIES, roles
from jaxslim.models.wav2vec2 import EMBEDDING
from jaxslim.slim import Outputs
from jaxslim.spec import Spec, SpecError


def build(spec: Spec) -> nnx.Module:
    for key, plain in (("is_decoder", False), ("add_cross_attention", False), ("position_embedding_type", "absolute")):
        if spec.get(key, plain) != plain:
            raise SpecError(f"config.json: {key}={spec[key]!r} is not supported for {spec.family}; only {plain!r} is.")
    if spec.head == "none":
        return Encoder(spec, pooler=spec.family != "distilbert" and spec.get("add_pooling_layer", True))
    if spec.head != "classification":
        raise SpecError(f"{spec.family} has no head {spec.head!r}; known are none, classification.")
    return Classification(spec)


class Embeddings(nnx.Module):
    def __init__(self, spec: Spec):
        width, self.rate = spec.of("encoder", "hidden_size"), spec.of("encoder", "hidden_dropout")
        self.padding = spec.get("pad_token_id")
        self.first = spec["pad_token_id"] if spec.family == "roberta" else None  # RoBERTa: position of padding
        self.longest = spec["max_position_embeddings"] - (0 if self.first is None else self.first + 1)
        self.typed = spec.family != "distilbert"
        self.word_embeddings = L.Weight(spec["vocab_size"], width)
        self.position_embeddings = L.Weight(spec["max_position_embeddings"], width)
        if self.typed:
            self.token_type_embeddings = L.Weight(spec["type_vocab_size"], width)
        self.LayerNorm = L.LayerNorm(width, spec.get("layer_norm_eps", 1e-12))

    def __call__(self, ids, types, call: L.Call):                        # (B, T) -> (B, T, D)
        if ids.shape[1] > self.longest:
            raise ValueError(f"input_ids: {ids.shape[1]} tokens, but this model has positions for {self.longest}; "
                             "truncate the text.")
        positions = jnp.arange(ids.shape[1])[None]
        if self.first is not None:
            real = (ids != self.first).astype(jnp.int32)
            positions = jnp.cumsum(real, -1) * real + self.first
        x = L.lookup(self.word_embeddings(), ids, self.padding)
        if self.typed:
            x = x + self.token_type_embeddings()[jnp.zeros_like(ids) if types is None else types]
        elif types is not None:
            raise ValueError("token_type_ids: DistilBERT has no token types; leave them out.")
        places = L.lookup(self.position_embeddings(), positions, self.first)
        return L.dropout(self.LayerNorm(x + places), self.rate, call, EMBEDDING)


class Layer(nnx.Module):
    """One post-norm layer. Names inside it, dots included, are the family's (`intermediate.dense`, `ffn.lin1`)."""

    def __init__(self, spec: Spec, i: int):
        self.name, self.index = f"encoder.{i}", i
        block, width, eps = f"{self.name}.ffn", spec.of(self.name, "hidden_size"), spec.get("layer_norm_eps", 1e-12)
        f, owner = spec.ffn(block), roles(spec, self.name)["owner"] + "."
        inside = [{role: name.removeprefix(owner) for role, name in roles(spec, b).items()}
                  for b in (f"{self.name}.attention", block)]
        self.mix, self.up, self.down = inside[0]["owner"], inside[1]["up"], inside[1]["down"]
        self.norms = tuple(names["norm"] for names in inside)
        self.rate, self.units = spec.of(block, "hidden_dropout"), f.units
        self.act = L.activation(spec.of(block, "hidden_act"))
        setattr(self, self.mix, Attention(spec, f"{self.name}.attention"))
        for name in self.norms:
            setattr(self, name, L.LayerNorm(width, eps))
        if not f.units:  # a block without units keeps its output bias and nothing else
            setattr(self, self.down, L.Bias(width))
            return
        setattr(self, self.up, L.Linear(width, f.units, rank=f.ranks.get("up"), lora=f.lora.get("up")))
        setattr(self, self.down, L.Linear(f.units, width, rank=f.ranks.get("down"), lora=f.lora.get("down")))

    def feed_forward(self, x):
        down = getattr(self, self.down)
        if not self.units:
            return jnp.broadcast_to(down(), x.shape).astype(x.dtype)
        return down(self.act(getattr(self, self.up)(x)))

    def __call__(self, x, mask, call: L.Call):                           # (B, T, D) -> (B, T, D), taps
        call, (norm, final) = call.fold(self.index), (getattr(self, name) for name in self.norms)
        a_out = adapters.adapt(self, "attention", x, x, getattr(self, self.mix)(x, mask, call.fold(2)), call)
        h = norm(x + L.dropout(a_out, self.rate, call, 3))
        f_out = adapters.adapt(self, "ffn", h, h, L.in_chunks(self.feed_forward, h, call), call)
        y = adapters.adapt_layer(self, "ffn", final(h + L.dropout(f_out, self.rate, call, 4)), call)
        return y, call.keep({f"{self.name}.attention.in": x, f"{self.name}.attention.out": a_out,
                             f"{self.name}.ffn.in": h, f"{self.name}.ffn.out": f_out, self.name: y}, mask)


class Stack(nnx.Module):
    """`encoder.layer` (BERT, RoBERTa), `transformer.layer` (DistilBERT)."""

    def __init__(self, spec: Spec):
        self.layer = nnx.List([Layer(spec, i) for i in range(spec.of("encoder", "num_hidden_layers"))])


class Pooler(nnx.Module):
    def __init__(self, width: int):
        self.dense = L.Linear(width, width)

    def __call__(self, x):                                               # (B, T, D) -> (B, D)
        return jnp.tanh(self.dense(x[:, 0]))


class Encoder(nnx.Module):
    """`BertModel`, `RobertaModel`, `DistilBertModel`."""

    def __init__(self, spec: Spec, pooler: bool = False):
        self.stack, self.pooled = FAMILIES[spec.family].layer["encoder"].split(".")[0], pooler
        self.embeddings = Embeddings(spec)
        setattr(self, self.stack, Stack(spec))
        if pooler:
            self.pooler = Pooler(spec["hidden_size"])

    def __call__(self, call: L.Call, input_ids, attention_mask=None, token_type_ids=None) -> Outputs:
        mask = None if attention_mask is None else attention_mask.astype(bool)                       # (B, T)
        x = self.embeddings(input_ids, token_type_ids, call)
        x, states, taps = L.run(getattr(self, self.stack).layer, x, mask, call)
        lengths = None if mask is None else mask.sum(-1)
        return Outputs(None, x, tuple(states) if call.hidden else None, taps or None, lengths,
                       pooler_output=self.pooler(x) if self.pooled else None)


class Dense(nnx.Module):
    """RoBERTa's `classifier`."""

    def __init__(self, width: int, classes: int):
        self.dense, self.out_proj = L.Linear(width, width), L.Linear(width, classes)


class Classification(nnx.Module):
    """`...ForSequenceClassification`: the first token through the family's own head. logits (B, labels)."""

    def __init__(self, spec: Spec):
        family, width = spec.family, spec.of("head", "hidden_size")
        self.family, self.inner = family, FAMILIES[family].prefix
        setattr(self, self.inner, Encoder(spec, pooler=family == "bert"))
        rate = spec.get("seq_classif_dropout" if family == "distilbert" else "classifier_dropout")
        self.rate = spec.of("head", "hidden_dropout") if rate is None else rate
        if family == "distilbert":
            self.pre_classifier = L.Linear(width, width)
        self.classifier = Dense(width, labels(spec)) if family == "roberta" else L.Linear(width, labels(spec))

    def __call__(self, call: L.Call, **inputs) -> Outputs:
        out = getattr(self, self.inner)(call, **inputs)
        first = out.last_hidden_state[:, 0]                                                          # (B, D)
        if self.family == "bert":
            logits = self.classifier(L.dropout(out.pooler_output, self.rate, call, DROPOUT))
        elif self.family == "roberta":
            h = jnp.tanh(self.classifier.dense(L.dropout(first, self.rate, call, DROPOUT)))
            logits = self.classifier.out_proj(L.dropout(h, self.rate, call, DROPOUT + 1000))
        else:
            logits = self.classifier(L.dropout(jax.nn.relu(self.pre_classifier(first)), self.rate, call, DROPOUT))
        logits = logits.astype(jnp.float32)
        return out._replace(logits=logits, taps={**(out.taps or {}), **call.keep({"logits": logits}, None)} or None)


def mean_pool(hidden: jax.Array, attention_mask: jax.Array | None = None, normalize: bool = True) -> jax.Array:
    """Sentence embeddings: the mean over real tokens, (B, T, D) -> (B, D), of length 1 if `normalize`.

    As sentence-transformers' Pooling (mean_tokens) and Normalize (arXiv 1908.10084).
    """
    mask = jnp.ones(hidden.shape[:2], bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    x = L.zero_padding(hidden.astype(jnp.float32), mask).sum(1) / jnp.maximum(mask.sum(-1), 1)[:, None]
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if normalize else x
