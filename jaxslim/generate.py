"""Transcription with Whisper: what `generate` of transformers does, on the searches of search.py.

    audio, mask = mel.features(waves, longest=True)
    generate(model, audio, mask, **generation_config("folder"), language="en", return_timestamps=True)

Up to 30 s one window is decoded; longer audio is decoded sequentially (Whisper, arXiv 2212.04356, section 3.8): every
window begins where the last complete pair of timestamps ended. A window whose text is too repetitive or too unlikely
is decoded again at the next temperature; silence is skipped. Differs from transformers in one thing: a clip's result
does not depend on the clips that are decoded beside it (there it does, when windows fall back or texts are
conditioned), but for timestamps, which all get when one is longer than a window.
"""
from __future__ import annotations

import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import search
from jaxslim.prompt import Options, generation_config, options, start_tokens  # noqa: F401
from jaxslim.slim import Slim

SECONDS, FRAME, STRIDE = 0.02, 0.01, 2   # of one timestamp step, of a log-mel frame; frames in a step
PROMPTS = 32   # prompts longer than the start tokens are padded to a multiple, to compile less often


class Generated(NamedTuple):
    """Tokens without prompt and end token, and the segments that they make up."""

    sequences: np.ndarray                    # (B, N), padded with pad_token_id
    segments: list[list[dict[str, Any]]]     # of each clip: {start, end: seconds, tokens: (n,), temperature,
    #                                          avg_logprob, no_speech_prob, compression_ratio}


def generate(model: Slim, input_features: jax.Array, attention_mask: np.ndarray | None = None,
             **given: Any) -> Generated:
    """Tokens and segments of clips.

    Args:
      model: a Whisper model with its head.
      input_features: (B, mels, T) log-mel frames (data/mel.py); T is the model's window or longer.
      attention_mask: (B, T), 1 where there is audio; needed for several clips longer than the window.
      **given: fields of `Options`, such as all of `generation_config(name)`.
    """
    if model.spec.head != "seq2seq":
        raise ValueError(f"generate needs a model with a language-model head; this one has head {model.spec.head!r}.")
    o, features = options(model.spec, **given), jnp.asarray(input_features)
    window, (clips, _, frames) = STRIDE * model.spec["max_source_positions"], features.shape
    if frames > window:
        if o.return_timestamps is False or o.no_timestamps_token_id is None:
            raise ValueError("Audio longer than a window needs timestamps: return_timestamps=True (or None) and "
                             "no_timestamps_token_id.")
        if clips > 1 and attention_mask is None:
            raise ValueError("Several clips longer than a window need attention_mask (see data/mel.py).")
    stamps = bool(o.return_timestamps or frames > window)
    ends = np.full(clips, frames) if clips == 1 or frames <= window else np.asarray(attention_mask).sum(-1)
    return _Run(model, features, o, stamps, window).run(ends)


class _Run:
    """One call of `generate`: what stays the same from window to window, and what every clip has said so far."""

    def __init__(self, model: Slim, features: jax.Array, o: Options, stamps: bool, window: int):
        self.model, self.o, self.window, clips = model, o, window, features.shape[0]
        self.features = jnp.pad(features, ((0, 0), (0, 0), (0, window)))
        last = model.spec["vocab_size"] if o.no_timestamps_token_id is None else o.no_timestamps_token_id
        pad = o.eos_token_id if o.pad_token_id is None else o.pad_token_id
        self.rules = search.Rules(o.eos_token_id, pad, last + 1, stamps, o.max_initial_timestamp_index,
                                  o.suppress_tokens or (), o.begin_suppress_tokens or ())
        self.start = start_tokens(model, features[:, :, :window], o, stamps)           # (B, n)
        first = o.prompt_ids is not None and o.prompt_condition_type == "first-segment"
        prompt = np.array(o.prompt_ids or (), int)
        prompt = prompt[1:] if first and prompt[0] == o.prev_sot_token_id else prompt
        self.said = [[prompt] if first else [] for _ in range(clips)]   # what conditions the next window
        self.segments = [[] for _ in range(clips)]
        self.condition = [o.condition_on_prev_tokens] * clips
        self.length, self.beams, self.calls = [o.max_length] * clips, [o.num_beams] * clips, 0

    def run(self, ends: np.ndarray) -> Generated:
        seek = np.zeros(len(ends), int)
        while (seek < ends).any():
            rows = [i for i in range(len(ends)) if seek[i] < ends[i]]
            counts = {i: int(min(ends[i] - seek[i], self.window)) for i in rows}
            pieces = self._windows(rows, seek, counts)
            for i, piece in self._decode(rows, pieces).items():
                if piece is None:  # silence
                    seek[i] += counts[i]
                    continue
                new, step = _segments(piece, seek[i] * SECONDS / STRIDE, counts[i], self.rules.begin)
                seek[i] += step or counts[i]  # a pair at 0.00 would never end (in transformers it does not)
                self.segments[i] += new
                self.said[i] += [s["tokens"] for s in new]
        texts = [np.concatenate([s["tokens"] for s in each] or [np.zeros(0, int)]).astype(np.int64)
                 for each in self.segments]
        width = max(map(len, texts))
        padded = np.stack([np.pad(t, (0, width - len(t)), constant_values=self.rules.pad) for t in texts])
        return Generated(padded, self.segments)

    def _windows(self, rows, seek, counts) -> jax.Array:
        """Encoder states of the next window of every clip in `rows`."""
        cut = [_cut(self.features, i, seek[i], counts[i], self.window) for i in rows]
        return search.encode(self.model.params, _fill(jnp.stack(cut)), spec=self.model.spec)[: len(rows)]

    def _prompt(self, i: int) -> np.ndarray:
        """The decoder's input for clip i: what was said before if wanted, then the start tokens."""
        o, spec = self.o, self.model.spec
        prompt = None if o.prompt_ids is None else np.array(o.prompt_ids)
        if self.condition[i] and self.said[i]:
            said = [t[:-1] if len(t) > 2 and t[-2] >= self.rules.begin else t for t in self.said[i]]
            said = np.concatenate(said)[-(spec["max_target_positions"] // 2 - 1):]
            mark = o.prev_sot_token_id
            if mark is None and len(o.suppress_tokens or ()) >= 2:
                mark = o.suppress_tokens[-2]
            if prompt is None or o.prompt_condition_type != "all-segments":
                prompt = np.array([] if mark is None else [mark], int)
            return np.concatenate([prompt, said, self.start[i]]).astype(np.int32)
        return (self.start[i] if prompt is None else np.concatenate([prompt, self.start[i]])).astype(np.int32)

    def _decode(self, rows: list[int], states: jax.Array) -> dict[int, dict | None]:
        """Clip -> what was found in its window (None = silence), after as many fallbacks as it takes."""
        o, cap = self.o, self.model.spec["max_target_positions"]
        prompts = {i: self._prompt(i) for i in rows}
        limits = {}
        for i in rows:
            size = len(prompts[i])
            if (o.max_new_tokens or 0) + size > cap:
                raise ValueError(f"The prompt has {size} tokens and max_new_tokens is {o.max_new_tokens}, together "
                                 f"more than the decoder's {cap} positions; shorten the prompt or lower "
                                 "max_new_tokens.")
            if o.max_new_tokens is None:  # grows with every window, as in transformers
                self.length[i] = min(self.length[i] + min(cap // 2 - 1, size), cap)
            limits[i] = self.length[i] - size if o.max_new_tokens is None else o.max_new_tokens
        ladder = o.temperature if isinstance(o.temperature, tuple) else (o.temperature,)
        found, left = {}, list(rows)
        for temperature in ladder:
            again = []
            if temperature:  # from the first sample on, clips are decoded without beams, as in transformers
                self.beams = [1 if i in left else n for i, n in enumerate(self.beams)]
            for beams in sorted({self.beams[i] for i in left}):
                group = [i for i in left if self.beams[i] == beams]
                pieces = self._search([prompts[i] for i in group], [limits[i] for i in group],
                                      states[jnp.array([rows.index(i) for i in group])], temperature, beams)
                for i, piece in zip(group, pieces, strict=True):
                    found[i], retry = self._judge(piece)
                    self.condition[i] = o.condition_on_prev_tokens and temperature < 0.5
                    again += [i] if retry else []
            left = again
            if not left:
                break
        return found

    def _search(self, prompts, limits, states, temperature: float, beams: int) -> list[dict]:
        o, start, rows = self.o, self.start.shape[1], len(prompts)
        size = max(map(len, prompts))
        size = size if size == start else -(-size // PROMPTS) * PROMPTS
        ids, valid = np.zeros((rows, size), np.int32), np.zeros((rows, size), bool)
        for row, prompt in enumerate(prompts):
            ids[row, size - len(prompt):], valid[row, size - len(prompt):] = prompt, True
        steps = min(-(-max(limits) // PROMPTS) * PROMPTS, self.model.spec["max_target_positions"])
        states, ids, valid, limit = (_fill(jnp.asarray(x)) for x in (states, ids, valid, np.array(limits)))
        common = dict(spec=self.model.spec, rules=self.rules, steps=steps, start=start)
        if beams > 1:
            out = search.beam(self.model.params, states, ids, valid, limit, float(o.length_penalty),
                              o.early_stopping is True, o.early_stopping == "never", **common, beams=beams)
        else:
            self.calls += 1
            key = jax.random.fold_in(jax.random.key(o.seed), self.calls)
            out = search.greedy(self.model.params, states, ids, valid, limit, key, temperature or 1.0, **common,
                                sample=temperature > 0, top_k=o.top_k or 0)
        tokens, lengths, logprobs, silence = (np.asarray(x)[:rows] for x in out)
        return [{"tokens": tokens[i, : lengths[i]].astype(np.int64), "avg_logprob": float(logprobs[i]),
                 "no_speech_prob": float(silence[i]), "temperature": temperature,
                 "compression_ratio": compression_ratio(tokens[i, : lengths[i]], self.model.spec["vocab_size"])}
                for i in range(rows)]

    def _judge(self, piece: dict) -> tuple[dict | None, bool]:
        """The piece without end token (None = silence), and whether to decode again."""
        o, tokens = self.o, piece["tokens"]
        retry = o.compression_ratio_threshold is not None and piece["compression_ratio"] > o.compression_ratio_threshold
        unlikely = o.logprob_threshold is not None and piece["avg_logprob"] < o.logprob_threshold
        if unlikely and o.no_speech_threshold is not None and piece["no_speech_prob"] > o.no_speech_threshold:
            return None, False
        if len(tokens) and tokens[-1] == self.rules.eos:
            piece = piece | {"tokens": tokens[:-1]}
        return piece, retry or unlikely


def compression_ratio(tokens: np.ndarray, vocabulary: int) -> float:
    """Bytes of the tokens by bytes of their zlib compression: high for a text that repeats itself."""
    width = int(math.log2(vocabulary) / 8) + 1
    data = b"".join(int(t).to_bytes(width, "little") for t in tokens)
    return len(data) / len(zlib.compress(data))


def _segments(piece: dict, offset: float, frames: int, begin: int) -> tuple[list[dict], int]:
    """Cuts a window's tokens between pairs of timestamps -> segments, frames to go on by."""
    tokens = piece["tokens"]
    stamps = tokens >= begin
    ends = [i + 1 for i in range(len(tokens) - 1) if stamps[i] and stamps[i + 1]]
    single = list(stamps[-2:]) == [False, True]  # nothing is said after the last timestamp

    def make(start, end, part):
        return {**piece, "start": offset + start * SECONDS, "end": offset + end * SECONDS, "tokens": part}

    if not ends:
        last = int(frames * FRAME / SECONDS)
        said = tokens[stamps]
        if len(said) and said[-1] != begin:
            last = int(said[-1] - begin)
        return [make(0, last, tokens)], frames
    ends = [*ends, len(tokens)] if single else [*ends[:-1], ends[-1] + 1]
    segments, last = [], 0
    for i, end in enumerate(ends):
        part = tokens[last:end]
        stop = part[-1 if single or i < len(ends) - 1 else -2]
        segments.append(make(int(part[0] - begin), int(stop - begin), part))
        last = end
    return segments, frames if single else int(tokens[last - 2] - begin) * STRIDE


@functools.partial(jax.jit, static_argnames="window")
def _cut(features, row, seek, count, window: int) -> jax.Array:
    """(mels, window) of a clip from frame `seek` on, zero after `count` frames."""
    cut = jax.lax.dynamic_slice_in_dim(features[row], seek, window, 1)
    return jnp.where(jnp.arange(window) < count, cut, 0)


def _fill(x: jax.Array) -> jax.Array:
    """Rows up to the next power of two (copies of the first), so that few batch sizes are compiled."""
    size = 1 << (len(x) - 1).bit_length()
    return jnp.concatenate([x, jnp.broadcast_to(x[:1], (size - len(x), *x.shape[1:]))]) if size > len(x) else x
