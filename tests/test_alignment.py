"""Forced alignment against all paths, and its word times on real speech."""
import itertools

import numpy as np
import pytest

from jaxslim import hub
from jaxslim.alignment import align, best_path
from jaxslim.data import load_rows, task_of
from jaxslim.data.rows import DataError
from jaxslim.transcription import transcribe


def collapse(path):
    return [k for k, _ in itertools.groupby(path) if k]


@pytest.mark.parametrize("labels", [(), (1,), (1, 2), (1, 1), (2, 1, 2)])
def test_no_path_is_better(labels):
    for seed in range(3):
        scores = np.random.default_rng(seed).normal(size=(5, 3))
        path = best_path(scores, labels, 0)
        fits = [p for p in itertools.product(range(3), repeat=5) if collapse(p) == list(labels)]
        best = max(scores[range(5), p].sum() for p in fits)
        assert collapse(path) == list(labels) and scores[range(5), path].sum() == pytest.approx(best)


def test_a_text_with_more_states_than_a_byte_counts():
    labels = np.arange(200) % 3 + 1
    path = best_path(np.random.default_rng(0).normal(size=(300, 4)), labels, 0)
    assert collapse(path) == labels.tolist()


def test_too_much_text():
    with pytest.raises(DataError, match="4 labels need 5 frames, and there are 4"):
        best_path(np.zeros((4, 3)), [1, 1, 2, 1], 0)


def test_the_models_own_words_are_where_it_heard_them():
    """Aligned to its own transcript, a model's words stand where its greedy path has them."""
    name = "bundled:wav2vec2-ctc-en"
    model, rows = hub.load(name), load_rows("bundled:prompts-en/validation")
    task = task_of(model.spec, hub.folder(name))
    i = int(np.argmin([rows.duration(i) for i in range(len(rows))]))
    heard = transcribe(model, [rows[i]["audio"]["bytes"]], source=name, progress=False)[0]
    found = align(model, rows.audio(i), heard["text"], task)
    assert [w["word"] for w in found] == [w["word"] for w in heard["words"]] and found
    for mine, theirs in zip(found, heard["words"]):
        assert abs(mine["start"] - theirs["start"]) < 0.05 and abs(mine["end"] - theirs["end"]) < 0.05
    said = align(model, rows.audio(i), rows[i]["text"], task)
    assert [w["word"] for w in said] == rows[i]["text"].split()
    assert all(a["end"] <= b["start"] + 1e-6 for a, b in zip(said, said[1:]))
