"""CTC prefix beam search with an optional n-gram language model and hotwords (Hannun et al. 2014, arXiv 1408.2873).

The score of a text is ln p_CTC + alpha ln p_LM + beta words + a bonus for each hotword, whose letters earn their share
before the word is complete (as pyctcdecode does), so that the beam keeps it.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxslim.arpa import Arpa

NEVER = -math.inf


@dataclasses.dataclass(frozen=True)
class Options:
    """Beam search: `width` prefixes are kept, tokens below `token_floor` (ln p of a frame) are not tried, prefixes more
    than `beam_floor` below the best are dropped."""

    width: int = 64
    alpha: float = 0.5
    beta: float = 1.0
    hotwords: tuple[str, ...] = ()
    hotword_weight: float = 5.0
    token_floor: float = -7.0
    beam_floor: float = -15.0


@dataclasses.dataclass(frozen=True)
class Search:
    """(log probabilities (T, V), task) -> text: `search` with its options and language model at hand."""

    options: Options = Options()
    lm: Arpa | None = None

    def __call__(self, log_probabilities: np.ndarray, task) -> str:
        return search(log_probabilities, task, self.options, self.lm)[0][0]


@dataclasses.dataclass
class Prefix:
    """A text so far: ln p of the paths that end in a blank and in its last letter, and what its words score."""

    words: float = 0.0           # alpha ln p_LM + beta + hotwords of the finished words
    state: tuple = ()            # of the language model
    part: str = ""               # letters of the unfinished word
    blank: float = NEVER
    letter: float = NEVER
    bonus: float = 0.0           # of the unfinished word

    @property
    def path(self) -> float:
        return float(np.logaddexp(self.blank, self.letter))

    @property
    def total(self) -> float:
        return self.path + self.words + self.bonus


def search(log_probabilities: np.ndarray, task, options: Options = Options(), lm: Arpa | None = None,
           best: int = 1) -> list[tuple[str, float]]:
    """Log probabilities (T, V) of one clip -> its `best` texts and their scores, the best first.

    Raises:
      ValueError: a hotword has letters that the vocabulary lacks.
    """
    gap, tokens = task.vocabulary[task.word_delimiter], {i: t for t, i in task.vocabulary.items()}
    hot = {word: [*task.encode(word)] for word in options.hotwords}
    hot = {"".join(tokens[i] for i in ids): len(ids) for ids in hot.values()}
    beams: dict[tuple[int, ...], Prefix] = {(): Prefix(state=lm.start if lm else (), blank=0.0)}
    for frame in log_probabilities:
        tried = np.flatnonzero(frame >= min(options.token_floor, float(frame.max())))
        new: dict[tuple[int, ...], Prefix] = {}
        for key, beam in beams.items():
            path = beam.path
            for i in tried:
                i, p = int(i), float(frame[i])
                if i == task.blank_id:
                    kept = new.setdefault(key, dataclasses.replace(beam, blank=NEVER, letter=NEVER))
                    kept.blank = float(np.logaddexp(kept.blank, path + p))
                    continue
                after = path
                if key and key[-1] == i:  # the same letter again: the old one, or a new one behind a blank
                    kept = new.setdefault(key, dataclasses.replace(beam, blank=NEVER, letter=NEVER))
                    kept.letter = float(np.logaddexp(kept.letter, beam.letter + p))
                    after = beam.blank
                if after == NEVER:
                    continue
                longer = (*key, i)
                if longer not in new:
                    new[longer] = _extend(beam, tokens[i], i == gap, hot, options, lm)
                new[longer].letter = float(np.logaddexp(new[longer].letter, after + p))
        ranked = sorted(new.items(), key=lambda item: -item[1].total)[: options.width]
        floor = ranked[0][1].total + options.beam_floor
        beams = {key: beam for key, beam in ranked if beam.total >= floor}
    found: dict[str, float] = {}
    for key, beam in beams.items():
        done = _extend(beam, "", True, hot, options, lm)
        score = beam.path + done.words + (options.alpha * lm.end(done.state) if lm else 0.0)
        text = task.decode(key, collapse=False)
        found[text] = float(np.logaddexp(found.get(text, NEVER), score))
    return sorted(found.items(), key=lambda item: -item[1])[:best]


def _extend(beam: Prefix, token: str, ends: bool, hot: dict[str, int], options: Options, lm: Arpa | None) -> Prefix:
    """The prefix with one more token; `ends` finishes its word."""
    if not ends:
        part = beam.part + token
        share = max((len(part) / n for word, n in hot.items() if word.startswith(part)), default=0.0)
        return Prefix(beam.words, beam.state, part, bonus=options.hotword_weight * share)
    if not beam.part:
        return Prefix(beam.words, beam.state)
    words, state = beam.words + options.beta * (lm is not None), beam.state
    if lm is not None:
        p, state = lm.score(state, beam.part)
        words += options.alpha * p
    return Prefix(words + options.hotword_weight * (beam.part in hot), state)
