"""GPT-NeoX (arXiv 2204.06745), the family of Pythia: a causal language model, names as in transformers.

A pre-norm decoder with rotary positions on a part of every head (arXiv 2104.09864). In the parallel form attention and
FFN read the same input and are added at once. Its blocks are called `encoder.I` as everywhere, so that all methods find
them; q, k, v are one matrix, head by head [q | k | v], as the checkpoints have it.

Beside the forward pass there is the step form that generation needs: `begin` makes the state before the first token,
`extend` takes tokens and a state and gives the next. A softmax layer's state is its keys and values, of a fixed number
of places; that of a recurrent mixer (recurrent.KINDS, direction: causal) has one size whatever came
before. Mixers have no rotary positions: a recurrence knows the order by itself.
"""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxslim.models import adapters, recurrent
from jaxslim.models import layers as L
from jaxslim.models.attention import attention
from jaxslim.models.wav2vec2 import EMBEDDING
from jaxslim.slim import Outputs
from jaxslim.spec import Spec, SpecError

FIELDS = {"mixer", "options", "adapter"}   # of an attention block that may differ: q, k, v are one matrix here


def build(spec: Spec) -> nnx.Module:
    rotary(spec)                           # what is wrong with the positions is said here
    for name, fields in spec.blocks.items():
        if name.endswith(".attention") and (other := sorted(fields.keys() - FIELDS)):
            raise SpecError(f"Block {name}: {', '.join(other)} cannot differ in a gpt_neox model, whose q, k, v are "
                            "one matrix; its attention can have another mixer or an adapter.")
    if spec.head not in ("none", "causal"):
        raise SpecError(f"gpt_neox has no head {spec.head!r}; known are none, causal.")
    return Model(spec) if spec.head == "none" else CausalLM(spec)


def tied(spec: Spec) -> bool:
    """Whether the output matrix is the embedding; then it is stored once."""
    return spec.head == "causal" and spec.get("tie_word_embeddings", False)


def rotary(spec: Spec) -> tuple[int, float]:
    """(rotated channels of a head, base): of `rope_parameters`, or of older configs' rotary_pct and rotary_emb_base.
    Raises SpecError for positions that are stretched."""
    given = spec.config
    new = given.get("rope_parameters") or {}
    scaled = new.get("rope_type", "default") != "default" or given.get("rope_scaling") is not None
    if scaled:
        raise SpecError("config.json: only plain rotary positions are supported for gpt_neox (rope_type default, no "
                        "rope_scaling).")
    share = new.get("partial_rotary_factor", given.get("rotary_pct", 0.25))
    size = spec["hidden_size"] // spec["num_attention_heads"]
    return int(size * share), float(new.get("rope_theta", given.get("rotary_emb_base", 10000)))


def rates(spec: Spec) -> np.ndarray:
    """Rotary frequencies (R/2,) of the R rotated channels."""
    count, base = rotary(spec)
    power = np.arange(0, count, 2, dtype=np.float32) / np.float32(max(count, 1))
    return (1.0 / np.float32(base) ** power).astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, rate: jax.Array) -> jax.Array:
    """x (B, T, H, K), positions (B, T) -> x with the first R channels of every head rotated; rate (R/2,)."""
    if not rate.shape[0]:
        return x
    angle = (positions[..., None].astype(jnp.float32) * jnp.concatenate([rate, rate]))[:, :, None]   # (B, T, 1, R)
    h, rest = x[..., : 2 * rate.shape[0]], x[..., 2 * rate.shape[0]:]
    a, b = jnp.split(h, 2, -1)
    h = h * jnp.cos(angle).astype(x.dtype) + jnp.concatenate([-b, a], -1) * jnp.sin(angle).astype(x.dtype)
    return jnp.concatenate([h, rest], -1)


class Attention(nnx.Module):
    """Causal attention, or a recurrent mixer in its place."""

    def __init__(self, spec: Spec, block: str):
        a, width, bias = spec.attention(block), spec["hidden_size"], spec["attention_bias"]
        self.mixer, self.heads, self.scale, self.block = a.mixer, len(a.heads), a.scale, block
        self.size, self.rate = a.qk_dim, spec["attention_dropout"]
        if a.mixer == "softmax":
            self.query_key_value, self.dense = L.Linear(width, 3 * width, bias), L.Linear(width, width, bias)
            return
        if a.mixer not in recurrent.KINDS or a.options["direction"] != "causal":
            raise SpecError(f"Block {block}: a language model must not look ahead, and its mixers are recurrent: "
                            f"{', '.join(recurrent.KINDS)} with direction causal, not {a.mixer} "
                            f"{a.options.get('direction', '')}.")
        recurrent.check(a.mixer, width, a.options, block)
        self.direction = "causal"
        for name, part in recurrent.parts(a.mixer, width, a.options).items():
            setattr(self, name, part)

    def project(self, x, positions, rate):                               # (B, T, D) -> q, k, v (B, T, H, K)
        h = self.query_key_value(x).reshape(*x.shape[:2], self.heads, -1)                            # (B, T, H, 3K)
        q, k, v = jnp.split(h, 3, -1)
        return rotate(q, positions, rate), rotate(k, positions, rate), v

    def __call__(self, x, mask, call: L.Call, positions=None, rate=None):  # (B, T, D) -> (B, T, D)
        if self.mixer != "softmax":
            return recurrent.run(self, x, mask, call)
        y = attention(*self.project(x, positions, rate), mask, self.scale, call, self.rate, causal=True)
        return self.dense(y.reshape(*x.shape[:2], -1))

    def state(self, rows: int, places: int) -> Any:
        """Before the first token: keys and values of `places` tokens, or the recurrent mixer's own state."""
        if self.mixer != "softmax":
            return self.fwd.state(rows)
        return (jnp.zeros((rows, places, self.heads, self.size)),) * 2

    def extend(self, x, valid, state, seen, at, positions, rate):        # (B, T, D) -> (B, T, D), state
        """Tokens at places `at` to `at + T` of a cache; valid (B, T), seen (B, T, S) over the cache."""
        if self.mixer != "softmax":
            return recurrent.extend(self.fwd, x, valid, state, L.Call())
        q, k, v = self.project(x, positions, rate)
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, 1)
                for old, new in zip(state, (k, v), strict=True))
        y = attention(q, k.astype(q.dtype), v.astype(q.dtype), seen, self.scale, L.Call())
        return self.dense(y.reshape(*x.shape[:2], -1)), (k, v)


class MLP(nnx.Module):
    def __init__(self, spec: Spec, block: str):
        f, width = spec.ffn(block), spec["hidden_size"]
        self.units, self.act = f.units, L.activation(spec["hidden_act"])
        if not f.units:  # a block without units keeps its output bias and nothing else
            self.dense_4h_to_h = L.Bias(width)
            return
        self.dense_h_to_4h = L.Linear(width, f.units, rank=f.ranks.get("up"), lora=f.lora.get("up"))
        self.dense_4h_to_h = L.Linear(f.units, width, rank=f.ranks.get("down"), lora=f.lora.get("down"))

    def __call__(self, x):
        if not self.units:
            return jnp.broadcast_to(self.dense_4h_to_h(), x.shape).astype(x.dtype)
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class Layer(nnx.Module):
    def __init__(self, spec: Spec, i: int):
        self.name, self.index, width, eps = f"encoder.{i}", i, spec["hidden_size"], spec["layer_norm_eps"]
        self.parallel, self.rate = spec["use_parallel_residual"], spec["hidden_dropout"]
        self.input_layernorm, self.post_attention_layernorm = L.LayerNorm(width, eps), L.LayerNorm(width, eps)
        self.attention, self.mlp = Attention(spec, f"{self.name}.attention"), MLP(spec, f"{self.name}.ffn")

    def __call__(self, x, mask, call: L.Call, positions, rate):          # (B, T, D) -> (B, T, D), taps
        call = call.fold(self.index)
        mix = lambda a_in: self.attention(a_in, mask, call.fold(2), positions, rate)  # noqa: E731
        return self.join(x, mix, mask, call)

    def extend(self, x, state, **where):
        """The step form: (B, T, D), state -> (B, T, D), state."""
        after = []

        def mix(a_in):
            y, new = self.attention.extend(a_in, state=state, **where)
            after.append(new)
            return y

        return self.join(x, mix, None, L.Call())[0], after[0]

    def join(self, x, mix, mask, call: L.Call):
        a_in = self.input_layernorm(x)
        a_out = adapters.adapt(self, "attention", x, a_in, mix(a_in), call)
        h = x + L.dropout(a_out, self.rate, call, 3)
        source = x if self.parallel else h
        f_in = self.post_attention_layernorm(source)
        f_out = adapters.adapt(self, "ffn", source, f_in, L.in_chunks(self.mlp, f_in, call), call)
        y = adapters.adapt_layer(self, "ffn", h + L.dropout(f_out, self.rate, call, 4), call)
        return y, call.keep({f"{self.name}.attention.in": a_in, f"{self.name}.attention.out": a_out,
                             f"{self.name}.ffn.in": f_in, f"{self.name}.ffn.out": f_out, self.name: y}, mask)


class Model(nnx.Module):
    """`GPTNeoXModel`."""

    def __init__(self, spec: Spec):
        width, self.rate, self.frequencies = spec["hidden_size"], spec["hidden_dropout"], tuple(rates(spec).tolist())
        self.embed_in = L.Weight(spec["vocab_size"], width)
        self.layers = nnx.List([Layer(spec, i) for i in range(spec["num_hidden_layers"])])
        self.final_layer_norm = L.LayerNorm(width, spec["layer_norm_eps"])

    def __call__(self, call: L.Call, input_ids, attention_mask=None) -> Outputs:
        ids = jnp.asarray(input_ids)
        mask = None if attention_mask is None else attention_mask.astype(bool)                       # (B, T)
        x = L.dropout(self.embed_in()[ids], self.rate, call, EMBEDDING)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        x, states, taps = L.run(self.layers, x, mask, call, positions=positions, rate=self.rotation())
        x = self.final_layer_norm(x)                                     # the last state is the normed one, as in HF
        return Outputs(None, x, (*states[:-1], x) if call.hidden else None, taps or None,
                       None if mask is None else mask.sum(-1))

    def rotation(self) -> jax.Array:
        return jnp.array(self.frequencies, jnp.float32)

    def begin(self, rows: int, places: int) -> tuple[Any, ...]:
        """The state of every layer before the first token, for at most `places` tokens of softmax layers."""
        return tuple(layer.attention.state(rows, places) for layer in self.layers)

    def extend(self, ids, valid, states, seen, at, positions):           # ids, valid, positions (B, T)
        """-> (B, T, D) normed, states; arguments as Attention.extend."""
        x, after, rate = self.embed_in()[ids], [], self.rotation()
        for layer, state in zip(self.layers, states, strict=True):
            step = functools.partial(layer.extend, valid=valid, seen=seen, at=at, positions=positions, rate=rate)
            x, state = step(x, state)
            after.append(state)
        return self.final_layer_norm(x), tuple(after)


class CausalLM(nnx.Module):
    """`GPTNeoXForCausalLM`: logits (B, T, V) of the token that follows."""

    def __init__(self, spec: Spec):
        self.gpt_neox, self.tied = Model(spec), tied(spec)
        if not self.tied:
            self.lm_head = L.Linear(spec["hidden_size"], spec["vocab_size"], bias=False)

    def __call__(self, call: L.Call, **inputs) -> Outputs:
        out = self.gpt_neox(call, **inputs)
        logits = self.logits(out.last_hidden_state)
        return out._replace(logits=logits, taps={**(out.taps or {}), **call.keep({"logits": logits}, None)} or None)

    def logits(self, x):                                                 # (B, T, D) -> (B, T, V)
        x = L.matmul(x, self.gpt_neox.embed_in()) if self.tied else self.lm_head(x)
        return x.astype(jnp.float32)
