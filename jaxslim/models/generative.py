"""The generative student (GenDistiller, arXiv 2310.13418 and 2406.09444): hidden layers of a teacher, one after
another, from the features F of a small front.

A model is one when its Spec has a block `generator`. The encoder of its family, with the few layers its config names,
gives F; row k of K reads what was generated so far and predicts target layer t_k (t_1 < ... < t_K, numbered as hidden
states: 0 = the embedding, i = output of layer i). All rows share their weights.

* `previous` (the second paper): a row reads F and the target layer before it, nothing else.
* `full`, `axial` (the first paper's attention in two dimensions, both ways over time and causal over layers): row 0
  is F, row k the target layer t_k. In `full` a frame attends to all frames of its own and earlier rows in one
  softmax; in `axial` first to its own frame in those rows, then to all frames of its own row.

The texts of the papers could not be read; ours are: a prediction is output(block) + `skip` * the row's history (F
in row 0), `inject` (how F joins the history in `previous`: added, concatenated and projected, or not at all), the two
readings of the first paper, pre-norm attention over layers with the time attention behind it, and that WavLM's rows
have no position bias.

Given `history`, all rows run in one pass (teacher forcing); without, they run by a scan, each on what the model
generated itself.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.models import mixers, wav2vec2
from jaxslim.models.attention import attention
from jaxslim.spec import Spec

SITE = 2001  # of random numbers, beside the layers' own


class Rows:
    """The rows of one pass, folded into the batch, and the keys and values that earlier passes left."""

    def __init__(self, index: jax.Array, mask: jax.Array | None, past: dict | None):
        self.index, self.mask, self.past = index, mask, past             # (R,), (B, T); name -> (K, B, T, H, *) twice

    def unfold(self, x: jax.Array) -> jax.Array:                         # (R B, ...) -> (R, B, ...)
        return x.reshape(self.index.shape[0], -1, *x.shape[1:])

    def all(self, name: str, *new: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values (R B, T, H, *) of this pass with those of earlier rows: (K, B, T, H, *)."""
        new = tuple(map(self.unfold, new))
        if self.past is None:
            return new
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.index[0], axis=0)
        self.past[name] = tuple(write(old, now.astype(old.dtype)) for old, now in zip(self.past[name], new,
                                                                                     strict=True))
        return self.past[name]


class FullAttention(mixers.Attention):
    """Over all frames of a row and the rows before it; scores of one row at a time exist, never of all."""

    def __call__(self, x, mask, call: L.Call, rows: Rows):               # (R B, T, D) -> (R B, T, D)
        keys, values = (jnp.moveaxis(y, 0, 1) for y in rows.all(self.block, *self.keys(x)))          # (B, K, T, H, *)
        count, length = keys.shape[1:3]
        valid = jnp.ones((keys.shape[0], length), bool) if rows.mask is None else rows.mask
        flat = lambda y: y.reshape(y.shape[0], count * length, *y.shape[3:])  # noqa: E731

        def row(part):
            q, i = part                                                                              # (B, T, H, K)
            seen = valid[:, None] & (jnp.arange(count) <= i)[:, None]                                # (B, K, T)
            return attention(q, flat(keys), flat(values), flat(seen), self.scale, call.fold(i), self.rate)

        y = jax.lax.map(row, (rows.unfold(self._split(getattr(self, self.names[0])(x))), rows.index))
        return self.join(y.reshape(x.shape[0], *y.shape[2:]))


class LayerAttention(mixers.Attention):
    """Over one frame in a row and the rows before it."""

    def __call__(self, x, call: L.Call, rows: Rows):                     # (R B, T, D) -> (R B, T, D)
        q = rows.unfold(self._split(getattr(self, self.names[0])(x)))                                # (R, B, T, H, K)
        k, v = rows.all(self.block, *self.keys(x))
        scores = jnp.einsum("rbthd,kbthd->bthrk", q * self.scale, k).astype(jnp.float32)
        seen = jnp.arange(k.shape[0]) <= rows.index[:, None]                                         # (R, K)
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), -1)
        weights = L.dropout(weights, self.rate, call, 0).astype(v.dtype)
        y = jnp.einsum("bthrk,kbthd->rbthd", weights, v)
        return self.join(y.reshape(x.shape[0], *y.shape[2:]))


class Layer(wav2vec2.Layer):
    def __init__(self, spec: Spec, i: int):
        super().__init__(spec, i, "generator")
        block, self.form = f"{self.name}.attention", spec.generator.attention
        self.attention = (FullAttention if self.form == "full" else mixers.Attention)(spec, block)
        self.attention.block = block
        if self.form == "axial":
            self.across = LayerAttention(spec, block)
            self.across.block = block
            self.across_layer_norm = L.LayerNorm(spec["hidden_size"], spec["layer_norm_eps"])

    def __call__(self, x, mask, call: L.Call, rows: Rows):               # (R B, T, D) -> (R B, T, D)
        if self.form == "axial":
            y = self.across(self.across_layer_norm(x), call.fold(SITE).fold(self.index), rows)
            x = x + L.dropout(y, self.rate, call.fold(SITE + 1), self.index)
        return super().__call__(x, mask, call, rows if self.form == "full" else None)[0]


class Generator(nnx.Module):
    def __init__(self, spec: Spec):
        g, width = spec.generator, spec["hidden_size"]
        self.form, self.inject_by, self.skip, self.embedded = g.attention, g.inject, g.skip, g.embedding
        self.count, self.sizes = spec.generated, (spec["num_attention_heads"], width // spec["num_attention_heads"])
        self.layers = nnx.List([Layer(spec, i) for i in range(g.layers)])
        self.output = L.Linear(width, width)
        if self.form == "previous" and g.inject == "concat":
            self.inject = L.Linear(2 * width, width)
        if g.embedding:
            self.layer_embedding = L.Weight(len(g.targets), width)

    def __call__(self, x, mask, call: L.Call, history=None, feed=None):
        """Generated layers (K, B, T, D) from F, x (B, T, D).

        Args:
          history: target layers before the last (B, K - 1, T, D); row k + 1 reads history[:, k]. None: its own.
          feed: (K - 1,) bool, True = row k + 1 reads what row k generated, not the history. None: the history.
        """
        call = call._replace(taps=frozenset())
        if history is not None:
            if history.shape != (x.shape[0], self.count - 1, *x.shape[1:]):
                raise ValueError(f"history: {history.shape}, but this model generates {self.count} layers of "
                                 f"{x.shape[1]} frames and {x.shape[2]} channels, so it takes (B, {self.count - 1}, "
                                 f"{x.shape[1]}, {x.shape[2]}). Do teacher and student have one frame rate?")
            history = jnp.moveaxis(history, 1, 0).astype(x.dtype)                                    # (K - 1, B, T, D)
            if feed is None:
                every = jnp.concatenate([x[None], history])
                return self.rows(x, every, Rows(jnp.arange(self.count), mask, None), call)
        given = jnp.zeros((self.count, *x.shape[:1], 1, 1), x.dtype)     # of the last row nothing is read
        if history is not None:
            given = jnp.concatenate([history, jnp.zeros_like(x)[None]])
        feed = jnp.ones(self.count, bool) if history is None else jnp.append(feed, True)

        def step(carry, row):
            (before, past), (i, given, own) = carry, row
            rows = Rows(i[None], mask, dict(past))
            y = self.rows(x, before[None], rows, call.fold(i))[0]
            return (jnp.where(own, y, given), rows.past), y

        start = x, self.empty(x)
        return jax.lax.scan(L.remat(step, call), start, (jnp.arange(self.count), given, feed))[1]

    def rows(self, x, before, rows: Rows, call: L.Call):
        """x (B, T, D) and each row's history (R, B, T, D), F in row 0 -> predictions (R, B, T, D)."""
        h, first = before, (rows.index == 0)[:, None, None, None]
        if self.form == "previous" and self.inject_by == "add":
            h = jnp.where(first, x, x + before)
        elif self.form == "previous" and self.inject_by == "concat":
            h = self.inject(jnp.concatenate([jnp.broadcast_to(x, before.shape), jnp.where(first, 0, before)], -1))
        if self.embedded:
            h = h + self.layer_embedding()[rows.index][:, None, None].astype(h.dtype)
        h = h.reshape(-1, *h.shape[2:])                                                              # (R B, T, D)
        mask = None if rows.mask is None else jnp.tile(rows.mask, (before.shape[0], 1))
        for layer in self.layers:
            with jax.named_scope(layer.name):
                fn = functools.partial(layer, mask=mask, call=call.fold(SITE), rows=rows)
                h = (L.remat(fn, call) if rows.past is None else fn)(h)  # a scan keeps less of whole steps
        y = self.output(h).reshape(before.shape)
        return y + before if self.skip else y

    def empty(self, x) -> dict:
        """Keys and values of all rows and layers, before the first."""
        if self.form == "previous":
            return {}
        zeros = jnp.zeros((self.count, *x.shape[:2], *self.sizes), x.dtype)
        return {layer.attention.block: (zeros, zeros) for layer in self.layers}


class Transformer(wav2vec2.Transformer):
    """Hidden states: embedding, initial layers, generated layers. The last one generated, behind the encoder's own
    norm where the family has one there, is the last hidden state."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.generator = Generator(spec)

    def __call__(self, x, mask, call: L.Call, history=None, feed=None):
        x, states, taps = self.body(x, mask, call)
        generated = self.generator(x, mask, call, history, feed)
        x = generated[-1]
        return self.layer_norm(x) if self.pre else x, [*states, *generated], taps


def build(spec: Spec) -> wav2vec2.Encoder:
    return wav2vec2.Encoder(spec, Transformer)
