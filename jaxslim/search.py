"""Greedy, sampled and beam search over Whisper's decoder, each one jitted program with a cache of fixed size.

Written after the rules of `transformers` (generation/utils.py and generation/logits_process.py, release 5), so that the
chosen tokens are the same: which scores are masked when, how beams end, when the search may stop.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxslim.models import bind
from jaxslim.models.layers import Call
from jaxslim.models.whisper import WithHead

NEVER = -1.0e9  # score of a beam that does not exist


class Rules(NamedTuple):
    """What may be said when; static."""

    eos: int
    pad: int
    begin: int                               # id of <|0.00|>; <|notimestamps|> and <|nospeech|> stand before it
    timestamps: bool = False                 # they must come, in pairs and never going back
    max_initial: int | None = None           # the first one is at most this many steps in
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()     # at the first token only

    def mask(self, scores: jax.Array, tokens: jax.Array, t: jax.Array) -> jax.Array:
        """Scores (B, V) of the token after the `t` first ones of tokens (B, N); what is ruled out becomes -inf."""
        ids, none = jnp.arange(scores.shape[-1]), -jnp.inf
        first = t == 0
        if self.begin_suppress:
            scores = jnp.where(first & jnp.isin(ids, jnp.array(self.begin_suppress)), none, scores)
        if self.suppress:
            scores = jnp.where(jnp.isin(ids, jnp.array(self.suppress)), none, scores)
        if not self.timestamps:
            return scores
        scores = jnp.where(ids == self.begin - 1, none, scores)
        stamp, text = ids >= self.begin, ids < self.begin
        at = lambda i: jnp.take(tokens, jnp.maximum(i, 0), axis=1)  # noqa: E731
        last = (t >= 1) & (at(t - 1) >= self.begin)                                     # (B,)
        before = (t < 2) | (at(t - 2) >= self.begin)
        scores = jnp.where((last & before)[:, None] & stamp, none, scores)              # a pair is complete: text
        scores = jnp.where((last & ~before)[:, None] & (ids < self.eos), none, scores)  # half a pair: no text
        said = jnp.where((jnp.arange(tokens.shape[1]) < t) & (tokens >= self.begin), tokens, -1).max(1)
        least = jnp.where(said < 0, self.begin, said + ~(last & ~before))
        scores = jnp.where(stamp & (ids < least[:, None]), none, scores)
        scores = jnp.where(first & text, none, scores)
        if self.max_initial is not None:
            scores = jnp.where(first & (ids > self.begin + self.max_initial), none, scores)
        logs = jax.nn.log_softmax(scores, -1)
        likely = jax.nn.logsumexp(jnp.where(stamp, logs, none), -1) > jnp.where(text, logs, none).max(-1)
        return jnp.where(likely[:, None] & text, none, scores)


class Found(NamedTuple):
    """What a search found. `tokens` beyond `lengths` mean nothing; the end token counts."""

    tokens: jax.Array       # (B, N)
    lengths: jax.Array      # (B,)
    logprobs: jax.Array     # (B,) mean log probability of the tokens
    no_speech: jax.Array    # (B,) probability of <|nospeech|> where the transcript starts


@functools.partial(jax.jit, static_argnames="spec")
def encode(params, features, *, spec) -> jax.Array:
    """input_features (B, mels, 2 S) -> (B, S, D)."""
    return _model(spec, params).model.encode(features, Call())[0]


@functools.partial(jax.jit, static_argnames="spec")
def first_logits(params, states, start, *, spec) -> jax.Array:
    """Logits (B, V) after the single token `start` (an id), for language detection."""
    module = _model(spec, params)
    ids = jnp.full((states.shape[0], 1), start)
    x, _, _, _ = module.model.decoder(ids, module.model.cross(states), Call(), jnp.zeros_like(ids), None)
    return module.logits(x)[:, 0]


@functools.partial(jax.jit, static_argnames=("spec", "rules", "steps", "start", "sample", "top_k"))
def greedy(params, states, ids, valid, limit, key, temperature, *, spec, rules: Rules, steps: int, start: int,
           sample: bool, top_k: int = 50) -> Found:
    """The best (or a sampled) token at a time.

    Args:
      states: (B, S, D) output of the encoder. ids, valid: (B, P) prompt, padded on the left where valid is False.
      limit: (B,) tokens that may be made, at most `steps`.
      start: how many of the prompt's last tokens begin the transcript (no speech is read at the first of them).
      sample: draw with `temperature` from the `top_k` best instead of taking the best one.
    """
    module, rows = _model(spec, params), ids.shape[0]
    (logits, cache), no_speech, step = _prefill(module, states, ids, valid, steps, start, rules, 1)

    def body(carry):
        t, tokens, logprobs, done, lengths, logits, cache = carry
        scores = rules.mask(logits, tokens, t)
        if sample:
            scores = scores / temperature
            least = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][:, -1:] if top_k else -jnp.inf
            scores = jnp.where(scores < least, -jnp.inf, scores)
            new = jax.random.categorical(jax.random.fold_in(key, t), scores)
        else:
            new = scores.argmax(-1)
        new = jnp.where(done, rules.pad, new)
        logs = jax.nn.log_softmax(scores * (temperature if sample else 1.0), -1)
        tokens, logprobs = tokens.at[:, t].set(new), logprobs.at[:, t].set(_pick(logs, new))
        lengths = jnp.where(done, lengths, t + 1)
        done = done | (new == rules.eos) | (t + 1 >= limit)
        logits, cache = jax.lax.cond(done.all(), lambda: (logits, cache), lambda: step(new, t, cache))
        return t + 1, tokens, logprobs, done, lengths, logits, cache

    carry = (jnp.int32(0), jnp.full((rows, steps), rules.pad), jnp.zeros((rows, steps)), limit <= 0,
             jnp.zeros(rows, jnp.int32), logits, cache)
    _, tokens, logprobs, _, lengths, _, _ = jax.lax.while_loop(lambda c: ~c[3].all() & (c[0] < steps), body, carry)
    return Found(tokens, lengths, _mean(logprobs, lengths), no_speech)


@functools.partial(jax.jit, static_argnames=("spec", "rules", "steps", "start", "beams"))
def beam(params, states, ids, valid, limit, penalty, early, never, *, spec, rules: Rules, steps: int, start: int,
         beams: int) -> Found:
    """Beam search. `penalty` is the exponent of the length that scores are divided by; `early` stops as soon as there
    are `beams` ended sequences, `never` only when no better one can come, neither of them in between (a heuristic).
    Other arguments as for `greedy`."""
    module, rows, count = _model(spec, params), ids.shape[0], beams
    (logits, cache), no_speech, step = _prefill(module, states, ids, valid, steps, start, rules, beams)
    vocab, limit = logits.shape[-1], limit[:, None]
    gather = lambda x, i: jnp.take_along_axis(x, i.reshape(i.shape + (1,) * (x.ndim - 2)), 1)  # noqa: E731

    def body(carry):
        t, live, score, best, best_score, ended, open_, _, logits, cache = carry
        scores = rules.mask(jax.nn.log_softmax(logits, -1), live[0].reshape(rows * count, steps), t)
        total = scores.reshape(rows, count, vocab) + score[:, :, None]
        top, index = jax.lax.top_k(total.reshape(rows, -1), 2 * count)                   # (B, 2 beams)
        parent, new = index // vocab, index % vocab
        logs = jax.nn.log_softmax(scores, -1).reshape(rows, -1)
        live = (gather(live[0], parent).at[:, :, t].set(new),
                gather(live[1], parent).at[:, :, t].set(jnp.take_along_axis(logs, index, 1)))
        hits = (new == rules.eos) | (t + 1 >= limit)
        # Ended sequences among the first `beams` compete with the ones that ended before.
        fresh = hits & (jnp.arange(2 * count) < count)
        value = top / (t + 1.0) ** penalty
        value += (ended.all(1, keepdims=True) & early) * NEVER
        value += ~open_ * NEVER
        value += ~fresh * NEVER
        joined = jnp.concatenate([best_score, value], 1)
        best_score, chosen = jax.lax.top_k(joined, count)
        lengths = jnp.broadcast_to(t + 1, fresh.shape)
        best = tuple(gather(jnp.concatenate([a, b], 1), chosen) for a, b in zip(best, (*live, lengths), strict=True))
        ended = gather(jnp.concatenate([ended, fresh], 1), chosen)
        # The others go on.
        score, chosen = jax.lax.top_k(top + hits * NEVER, count)
        live, parent, new = tuple(gather(x, chosen) for x in live), gather(parent, chosen), gather(new, chosen)
        reach = jnp.where(never & (penalty > 0), limit, t + 1)
        worst = jnp.where(ended, best_score.min(1, keepdims=True), NEVER)
        open_ = open_ & (score[:, :1] / (reach * 1.0) ** penalty > worst).any(1, keepdims=True)
        go = open_.any() & ~(ended.all() & early) & ~hits.all()
        order = (parent + jnp.arange(rows)[:, None] * count).reshape(-1)
        cache = jax.tree.map(lambda x: x[order], cache)
        logits, cache = jax.lax.cond(go, lambda: step(new.reshape(-1), t, cache), lambda: (logits, cache))
        return t + 1, live, score, best, best_score, ended, open_, go, logits, cache

    tokens, logs = jnp.full((rows, count, steps), rules.pad), jnp.zeros((rows, count, steps))
    none = jnp.full((rows, count), NEVER)
    carry = (jnp.int32(0), (tokens, logs), none.at[:, 0].set(0.0),
             (tokens, logs, jnp.zeros((rows, count), jnp.int32)), none,
             jnp.zeros((rows, count), bool), jnp.ones((rows, 1), bool), jnp.bool_(True), logits, cache)
    carry = jax.lax.while_loop(lambda c: c[7] & (c[0] < steps), body, carry)
    tokens, logs, lengths = (x[:, 0] for x in carry[3])
    return Found(tokens, lengths, _mean(logs, lengths), no_speech)


def _model(spec, params) -> WithHead:
    return bind.bind(spec, params)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:                                  # (B, V), (B,) -> (B,)
    return jnp.take_along_axis(x, index[:, None], 1)[:, 0]


def _mean(x: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[1]) < lengths[:, None], x, 0).sum(1) / jnp.maximum(lengths, 1)


def _prefill(module: WithHead, states, ids, valid, steps: int, start: int, rules: Rules, beams: int):
    """Runs the prompt -> ((logits (B beams, V), cache), no-speech probability (B,), step(tokens, t, cache))."""
    rows, length = ids.shape
    cross, size = module.model.cross(states), length + steps
    cache = tuple((jnp.zeros((rows, size, *k.shape[2:]), k.dtype), jnp.zeros((rows, size, *v.shape[2:]), v.dtype))
                  for k, v in (layer.self_attn.keys(states[:, :1]) for layer in module.model.decoder.layers))
    seen = jnp.concatenate([valid, jnp.ones((rows, steps), bool)], 1)                    # (B, S)
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    lower = jnp.arange(size) <= jnp.arange(length)[:, None]                              # (P, S)
    x, cache = module.model.decode(ids, cross, cache, 0, positions, lower & seen[:, None, :])
    logits = module.logits(x[:, jnp.array([length - start, length - 1])])                # (B, 2, V)
    no_speech = jax.nn.softmax(logits[:, 0], -1)[:, rules.begin - 2] if rules.begin <= logits.shape[-1] else (
        jnp.zeros(rows))
    spread = lambda x: jnp.repeat(x, beams, 0)  # noqa: E731
    seen, after, (cross, cache, logits) = spread(seen), spread(positions[:, -1] + 1), jax.tree.map(
        spread, (cross, cache, logits[:, 1]))

    def step(tokens, t, cache):                                                          # (B beams,) -> logits, cache
        mask = (jnp.arange(size) <= length + t) & seen
        x, cache = module.model.decode(tokens[:, None], cross, cache, length + t, (after + t)[:, None],
                                       mask[:, None, :])
        return module.logits(x)[:, 0], cache

    return (logits, cache), no_speech, step
