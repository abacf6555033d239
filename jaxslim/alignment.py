"""Forced alignment: which frames say which letter, when the text is known."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxslim import subtitles
from jaxslim.data.rows import DataError
from jaxslim.decode import single
from jaxslim.slim import inputs
from jaxslim.stream import samples_per_frame


def best_path(scores: np.ndarray, labels: Sequence[int], blank: int) -> np.ndarray:
    """The most probable CTC path that spells `labels` (Viterbi over Graves et al. 2006, section 4).

    Args:
      scores: (T, V) log probabilities, or logits: a constant per frame changes nothing.
      labels: (N,) symbols without blanks.
    Returns: ids (T,) int, blanks included.
    Raises:
      DataError: T frames are too few for the labels and the blanks between equal ones.
    """
    labels = np.asarray(labels, int)
    frames, states = len(scores), np.full(2 * len(labels) + 1, blank)
    states[1::2] = labels
    need = len(labels) + int((labels[1:] == labels[:-1]).sum())
    if frames < max(need, 1):
        raise DataError(f"{len(labels)} labels need {max(need, 1)} frames, and there are {frames}: the text does not "
                        "fit the audio.")
    skip = np.zeros(len(states), bool)  # a state may follow the one two before: a letter after another letter
    skip[3::2] = labels[1:] != labels[:-1]
    best = np.full(len(states), -np.inf)
    best[:2] = scores[0, states[:2]]
    came = np.zeros((frames, len(states)), np.int8)
    for t in range(1, frames):
        ways = np.stack([best, np.append(-np.inf, best[:-1]),
                         np.where(skip, np.concatenate([[-np.inf, -np.inf], best])[: len(best)], -np.inf)])
        came[t] = ways.argmax(0)
        best = ways[came[t], np.arange(len(states))] + scores[t, states]
    state = len(states) - 1 if len(states) == 1 or best[-1] >= best[-2] else len(states) - 2
    path = np.empty(frames, int)
    for t in range(frames - 1, -1, -1):
        path[t] = states[state]
        state -= int(came[t, state])
    return path


def align(model, wave: np.ndarray, text: str, task, *, dtype: Any = None) -> list[subtitles.Word]:
    """Times of the words of `text` in a clip: dicts of word, start, end (seconds).

    Args:
      model: with a CTC head over characters; wave: (samples,) at `task.sampling_rate`.
    Raises:
      DataError: characters outside the vocabulary, or more text than the clip's frames can hold.
    """
    out = model(**inputs(single(wave, task)), dtype=dtype)
    scores = np.asarray(out.logits[0], np.float32)
    if out.lengths is not None:
        scores = scores[: int(out.lengths[0])]
    path = best_path(scores, task.encode(text), task.blank_id)
    return subtitles.words(task, path, samples_per_frame(model.spec, len(wave), len(path)) / task.sampling_rate)
