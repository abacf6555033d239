"""Heads on an encoder, names as in transformers: CTC, sequence and frame classification, x-vectors.

The classification heads read the last hidden state, or with `use_weighted_layer_sum` a learned mixture of all hidden
states (SUPERB, arXiv 2105.01051). X-vectors: time-delay layers and statistic pooling (Snyder et al., ICASSP 2018).
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.models.roles import FAMILIES, roles
from jaxslim.slim import Outputs
from jaxslim.spec import Spec, SpecError

DROPOUT = 1002  # site of random numbers, beside the layers' own


def build(spec: Spec, encoder: nnx.Module) -> nnx.Module:
    """The model of a Spec around its encoder; the encoder itself when the head is "none"."""
    if spec.head == "none":
        return encoder
    if spec.head not in HEADS:
        raise SpecError(f"{spec.family} has no head {spec.head!r}; known are none, {', '.join(HEADS)}.")
    if spec.head in ("classification", "frames") and spec.get("add_adapter"):
        raise SpecError(f"config.json: add_adapter does not go with the head {spec.head!r} (nor in transformers).")
    return HEADS[spec.head](spec, encoder)


def width(spec: Spec) -> int:
    """Features of a frame that the encoder gives to its head."""
    return (spec.get("output_hidden_size") or spec["hidden_size"]) if spec.get("add_adapter") else spec["hidden_size"]


def labels(spec: Spec) -> int:
    """Number of classes, as transformers counts them."""
    names = spec.config.get("id2label")
    return len(names) if names else spec.config.get("num_labels", 2)


class Head(nnx.Module):
    """An encoder under its Hugging Face name; subclasses add the layers above it."""

    weighted = True  # whether `use_weighted_layer_sum` is a switch of this head

    def __init__(self, spec: Spec, encoder: nnx.Module):
        self.inner = FAMILIES[spec.family].prefix
        setattr(self, self.inner, encoder)
        self.mixing = self.weighted and bool(spec.get("use_weighted_layer_sum"))
        if self.mixing:
            self.layer_weights = L.param(spec["num_hidden_layers"] + 1 + spec.generated)

    def encode(self, call: L.Call, inputs) -> tuple[jax.Array, Outputs]:
        """What the head reads (B, T, D), and the encoder's outputs."""
        out = getattr(self, self.inner)(call._replace(hidden=call.hidden or self.mixing), **inputs)
        if not self.mixing:
            return out.last_hidden_state, out
        weights = jax.nn.softmax(self.layer_weights[...])
        x = sum(w * h.astype(jnp.float32) for w, h in zip(weights, out.hidden_states, strict=True))
        return x.astype(out.last_hidden_state.dtype), out if call.hidden else out._replace(hidden_states=None)

    def finish(self, call: L.Call, out: Outputs, logits: jax.Array, **taps: jax.Array) -> Outputs:
        logits = logits.astype(jnp.float32)
        mask = L.frame_mask(out.lengths, logits.shape[1]) if logits.ndim == 3 else None
        kept = call.keep({"logits": logits}, mask) | call.keep(taps, None)
        return out._replace(logits=logits, taps={**(out.taps or {}), **kept} or None)


class CTC(Head):
    """`...ForCTC`."""

    weighted = False

    def __init__(self, spec: Spec, encoder: nnx.Module):
        super().__init__(spec, encoder)
        self.last, self.rate = roles(spec, "head")["owner"], spec.get("final_dropout", 0.0)
        self.conv = spec.family == "parakeet_ctc"  # its head is a convolution of width 1, as in NeMo
        make = functools.partial(L.Conv, width=1) if self.conv else L.Linear
        setattr(self, self.last, make(width(spec), spec["vocab_size"]))

    def __call__(self, call: L.Call, **inputs) -> Outputs:               # logits (B, T, V)
        x, out = self.encode(call, inputs)
        last = getattr(self, self.last)
        return self.finish(call, out, (last.pointwise if self.conv else last)(L.dropout(x, self.rate, call, DROPOUT)))


class Classification(Head):
    """`...ForSequenceClassification`: the mean over valid frames."""

    def __init__(self, spec: Spec, encoder: nnx.Module):
        super().__init__(spec, encoder)
        self.projector = L.Linear(spec["hidden_size"], spec["classifier_proj_size"])
        self.classifier = L.Linear(spec["classifier_proj_size"], labels(spec))

    def __call__(self, call: L.Call, **inputs) -> Outputs:               # logits (B, labels)
        x, out = self.encode(call, inputs)
        pooled = mean(self.projector(x), out.lengths)
        return self.finish(call, out, self.classifier(pooled), pooled=pooled)


class Frames(Head):
    """`...ForAudioFrameClassification`."""

    def __init__(self, spec: Spec, encoder: nnx.Module):
        super().__init__(spec, encoder)
        self.classifier = L.Linear(spec["hidden_size"], labels(spec))

    def __call__(self, call: L.Call, **inputs) -> Outputs:               # logits (B, T, labels)
        x, out = self.encode(call, inputs)
        return self.finish(call, out, self.classifier(x))


class TDNN(nnx.Module):
    """A convolution over time whose weight is stored as a linear's, (out, W * in)."""

    def __init__(self, spec: Spec, i: int):
        dims = spec["tdnn_dim"]
        self.shape, self.dilation = (dims[i], spec["tdnn_kernel"][i], dims[max(i - 1, 0)]), spec["tdnn_dilation"][i]
        self.kernel = L.Linear(self.shape[1] * self.shape[2], dims[i])

    def __call__(self, x):                                               # (B, T, C) -> (B, T', C')
        w = self.kernel.weight[...].reshape(self.shape).astype(x.dtype)                               # (out, W, in)
        y = jax.lax.conv_general_dilated(x, w, (1,), "VALID", rhs_dilation=(self.dilation,),
                                         dimension_numbers=("NWC", "OWI", "NWC"))
        return jax.nn.relu(y + self.kernel.bias[...].astype(y.dtype))


class Objective(nnx.Module):
    """Class vectors of the AM-softmax loss; read in training only."""

    def __init__(self, spec: Spec):
        self.weight = L.param(spec["xvector_output_dim"], labels(spec))


class XVector(Head):
    """`...ForXVector`. The tap "xvector" is the speaker embedding, the logits are its projection."""

    def __init__(self, spec: Spec, encoder: nnx.Module):
        super().__init__(spec, encoder)
        dims, size = spec["tdnn_dim"], spec["xvector_output_dim"]
        self.projector = L.Linear(spec["hidden_size"], dims[0])
        self.tdnn = nnx.List([TDNN(spec, i) for i in range(len(dims))])
        self.feature_extractor, self.classifier = L.Linear(2 * dims[-1], size), L.Linear(size, size)
        self.objective, self.shrink = Objective(spec), sum(k - 1 for k in spec["tdnn_kernel"])

    def __call__(self, call: L.Call, **inputs) -> Outputs:               # logits (B, xvector_output_dim)
        x, out = self.encode(call, inputs)
        x = self.projector(x)
        for layer in self.tdnn:
            x = layer(x)
        lengths = None  # transformers' length after the layers leaves dilation out, so padding can leak; so it is here
        if out.lengths is not None:
            lengths = jnp.clip(out.lengths - self.shrink, 0, x.shape[1])
        average = mean(x.astype(jnp.float32), lengths)
        count = x.shape[1] if lengths is None else lengths[:, None]
        square = L.zero_padding((x - average[:, None]) ** 2, L.frame_mask(lengths, x.shape[1])).sum(1)
        spread = jnp.sqrt(jnp.maximum(square / jnp.maximum(count - 1, 1), 1e-20))  # unbiased, as torch's std
        embedding = self.feature_extractor(jnp.concatenate([average, spread], -1).astype(x.dtype))
        return self.finish(call, out, self.classifier(embedding), xvector=embedding)


HEADS = {"ctc": CTC, "classification": Classification, "frames": Frames, "xvector": XVector}


def mean(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Mean over the valid frames: (B, T, C) -> (B, C), fp32 inside."""
    h = L.zero_padding(x, L.frame_mask(lengths, x.shape[1])).astype(jnp.float32).sum(1)
    return (h / (x.shape[1] if lengths is None else jnp.maximum(lengths, 1)[:, None])).astype(x.dtype)
