"""Text generation with a causal language model (GPT-NeoX): greedy or sampled, as `generate` of transformers does.

`generate` makes all tokens in one jitted program; `stream` gives one token at a time and never ends by itself. Both
work on the step form of the model (models/gpt_neox.py): a softmax layer has a cache of fixed size, a recurrent mixer a
state of fixed size. A model without softmax layers so needs the same memory for the ten-thousandth token as for the
first; one with some left needs it for their keys and values only.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import bind
from jaxslim.slim import Slim

PROMPTS = 32    # prompts are padded on the left to a multiple, to compile less often


class Sampling(NamedTuple):
    """How the next token is drawn; static. In transformers' order: temperature, top_k, top_p."""

    sample: bool = False        # False: the most probable one
    temperature: float = 1.0
    top_k: int = 50             # only among so many most probable ones, 0 = all
    top_p: float = 1.0          # only among the most probable ones that have so much probability together

    def scores(self, logits: jax.Array) -> jax.Array:
        """Logits (B, V) -> what is drawn from: -inf where a token is ruled out."""
        if not self.sample:
            return logits
        logits, none = logits / self.temperature, -jnp.inf
        if 0 < self.top_k < logits.shape[-1]:
            logits = jnp.where(logits < jax.lax.top_k(logits, self.top_k)[0][:, -1:], none, logits)
        if self.top_p < 1.0:
            order = jnp.argsort(logits, -1)                                                           # least first
            below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1), -1)
            out = (below <= 1.0 - self.top_p).at[:, -1].set(False)
            logits = jnp.where(jnp.take_along_axis(out, jnp.argsort(order, -1), -1), none, logits)
        return logits

    def draw(self, logits: jax.Array, key: jax.Array) -> jax.Array:                                  # (B, V) -> (B,)
        scores = self.scores(logits)
        return (jax.random.categorical(key, scores) if self.sample else scores.argmax(-1)).astype(jnp.int32)


class State(NamedTuple):
    """Between two tokens."""

    layers: Any             # of every layer: keys and values (B, S, H, K), or a mixer's state
    seen: jax.Array         # (B, S) places of the cache that hold a token; S = 0 without softmax layers
    at: jax.Array           # () the next place
    position: jax.Array     # (B,) of the next token
    logits: jax.Array       # (B, V) of the next token


def generate(model: Slim, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, *,
             max_new_tokens: int = 20, do_sample: bool = False, temperature: float = 1.0, top_k: int = 50,
             top_p: float = 1.0, eos_token_id: int | None | tuple[int, ...] = (), pad_token_id: int | None = None,
             seed: int = 0) -> np.ndarray:
    """Prompts (B, P) -> prompts and what follows (B, P + N), N at most `max_new_tokens`; names as in transformers.

    Args:
      attention_mask: (B, P), 0 on padding; prompts of different lengths are padded on the left.
      eos_token_id: ends a text; () = that of the config, None = none. pad_token_id follows it (default: the same).
    Raises:
      ValueError: the model has no language-model head, an empty prompt, or a prompt padded on the right.
    """
    sampling, ids, valid = _checked(model, input_ids, attention_mask, do_sample, temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    ends = model.spec.get("eos_token_id") if eos_token_id == () else eos_token_id
    ends = () if ends is None else tuple(np.atleast_1d(ends).tolist())
    pad = pad_token_id if pad_token_id is not None else model.spec.get("pad_token_id")
    pad = pad if pad is not None else (ends or (0,))[0]
    new, lengths = _generate(model, ids, valid, jax.random.key(seed), sampling=sampling, steps=max_new_tokens,
                             ends=ends, pad=pad)
    new = np.asarray(new)[:, : int(lengths.max())]
    return np.concatenate([np.asarray(input_ids, np.int32), new], 1)


def stream(model: Slim, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, *, places: int = 2048,
           do_sample: bool = False, temperature: float = 1.0, top_k: int = 50, top_p: float = 1.0,
           seed: int = 0) -> Iterator[np.ndarray]:
    """Tokens (B,) that follow prompts (B, P), one at a time, on and on; the caller stops.

    `places` is the cache of softmax layers, prompt included: the iteration ends when it is full. Without such layers it
    never ends.
    """
    sampling, ids, valid = _checked(model, input_ids, attention_mask, do_sample, temperature, top_k, top_p)
    size = places if softmax_layers(model) else 0
    if size and ids.shape[1] > size:
        raise ValueError(f"The prompt has {ids.shape[1]} tokens, the cache {size} places; raise places.")
    state, key, at = _begin(model, ids, valid, size), jax.random.key(seed), ids.shape[1]
    while True:
        key, now = jax.random.split(key)
        tokens, state = _step(model, state, now, sampling=sampling)
        yield np.asarray(tokens)
        at += 1
        if size and at > size:
            return


def texts(model: Slim, task: Any, prompts: Sequence[str], **options: Any) -> list[dict[str, str]]:
    """What follows each of `prompts`, up to its end: [{prompt, text}]. task: a CausalTask; options as `generate`. Every
    text begins behind an end token, as in training."""
    if model.spec.head != "causal":
        raise ValueError(f"Text generation needs a language-model head; this {model.spec.family} model has the head "
                         f"{model.spec.head!r}.")
    ids = [np.append(np.int32(task.end), task.encode(text) if text else []).astype(np.int32) for text in prompts]
    width = max(map(len, ids))
    padded = np.stack([np.pad(row, (width - len(row), 0)) for row in ids])
    mask = np.arange(width) >= np.array([[width - len(row)] for row in ids])
    new = generate(model, padded, mask, eos_token_id=task.end, pad_token_id=task.end, **options)[:, width:]
    ends = [np.append(np.flatnonzero(row == task.end), len(row))[0] for row in new]
    return [{"prompt": text, "text": task.decode(row[:end])} for text, row, end in zip(prompts, new, ends, strict=True)]


def softmax_layers(model: Slim) -> int:
    """Layers whose memory grows with the text."""
    spec = model.spec
    return sum(spec.attention(f"encoder.{i}.attention").mixer == "softmax" for i in range(spec["num_hidden_layers"]))


def state_bytes(model: Slim, rows: int, places: int) -> int:
    """Bytes of all that is kept between two tokens, for texts of up to `places` tokens."""
    size = places if softmax_layers(model) else 0
    state = jax.eval_shape(lambda m: bind.bind(m.spec, m.params).gpt_neox.begin(rows, size), model)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _checked(model, input_ids, attention_mask, do_sample, temperature, top_k, top_p):
    if model.spec.head != "causal":
        raise ValueError(f"Text generation needs a language-model head; this {model.spec.family} model has the head "
                         f"{model.spec.head!r}.")
    ids = np.asarray(input_ids, np.int32)
    valid = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if ids.ndim != 2 or not ids.shape[1] or not valid.any(1).all():
        raise ValueError(f"input_ids has shape {ids.shape}; give (B, P) with at least one token in every row.")
    if not valid[:, -1].all():
        raise ValueError("attention_mask: a prompt ends with padding; pad prompts on the left.")
    if ids.min() < 0 or ids.max() >= model.spec["vocab_size"]:
        raise ValueError(f"input_ids go from {ids.min()} to {ids.max()}; this model has {model.spec['vocab_size']} "
                         "tokens.")
    if do_sample and (temperature <= 0 or top_k < 0 or not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature must be positive, "
                         "top_k not negative, top_p above 0 and at most 1.")
    left = -ids.shape[1] % PROMPTS
    ids, valid = (np.pad(x, ((0, 0), (left, 0))) for x in (ids, valid))
    sampling = Sampling(do_sample, float(temperature), top_k, float(top_p)) if do_sample else Sampling()
    return sampling, ids, valid


def _module(model: Slim):
    return bind.bind(model.spec, model.params, model.active)


def _prefill(module, ids, valid, size: int) -> State:
    """The state behind the prompts ids, valid (B, P)."""
    rows, length = ids.shape
    layers = module.gpt_neox.begin(rows, size)
    seen = jnp.pad(valid, ((0, 0), (0, size - length))) if size else jnp.zeros((rows, 0), bool)
    lower = jnp.arange(size) <= jnp.arange(length)[:, None]                                          # (P, S)
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    x, layers = module.gpt_neox.extend(ids, valid, layers, lower & seen[:, None], 0, positions)
    return State(layers, seen, jnp.int32(length), positions[:, -1] + 1, module.logits(x[:, -1:])[:, 0])


def _advance(module, tokens, state: State) -> State:                                                 # tokens (B,)
    seen = state.seen | (jnp.arange(state.seen.shape[1]) == state.at)
    x, layers = module.gpt_neox.extend(tokens[:, None], jnp.ones((len(tokens), 1), bool), state.layers, seen[:, None],
                                       state.at, state.position[:, None])
    return State(layers, seen, state.at + 1, state.position + 1, module.logits(x)[:, 0])


@functools.partial(jax.jit, static_argnames="size")
def _begin(model, ids, valid, size: int) -> State:
    return _prefill(_module(model), ids, valid, size)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnums=1)
def _step(model, state: State, key, *, sampling: Sampling):
    tokens = sampling.draw(state.logits, key)
    return tokens, _advance(_module(model), tokens, state)


@functools.partial(jax.jit, static_argnames=("sampling", "steps", "ends", "pad"))
def _generate(model, ids, valid, key, *, sampling: Sampling, steps: int, ends: tuple[int, ...], pad: int):
    module, rows = _module(model), ids.shape[0]
    state = _prefill(module, ids, valid, ids.shape[1] + steps if softmax_layers(model) else 0)

    def body(carry):
        t, tokens, done, lengths, state = carry
        new = jnp.where(done, pad, sampling.draw(state.logits, jax.random.fold_in(key, t)))
        tokens, lengths = tokens.at[:, t].set(new), jnp.where(done, lengths, t + 1)
        done = done | jnp.isin(new, jnp.array(ends, jnp.int32)) if ends else done
        state = jax.lax.cond(done.all(), lambda: state, lambda: _advance(module, new, state))
        return t + 1, tokens, done, lengths, state

    carry = (jnp.int32(0), jnp.full((rows, steps), pad, jnp.int32), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32),
             state)
    _, tokens, _, lengths, _ = jax.lax.while_loop(lambda c: ~c[2].all() & (c[0] < steps), body, carry)
    return tokens, lengths
