"""Beam search against the sum over all alignments; ARPA back-off against sums by hand; hotwords."""
import itertools
import math

import numpy as np
import pytest

from jaxslim import beam
from jaxslim.arpa import LN10, Arpa
from jaxslim.data import CTCTask, DataError

TASK = CTCTask({"<pad>": 0, "|": 1, "a": 2, "b": 3})
ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<s>\t-0.3
-0.9\t</s>
-2.0\t<unk>\t-0.1
-0.5\ta\t-0.2
-0.7\tb\t-0.4

\\2-grams:
-0.1\t<s> b
-0.2\ta b

\\end\\
"""


def random(frames, seed=0, sharp=1.0):
    x = sharp * np.random.default_rng(seed).standard_normal((frames, 4))
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def exhaustive(logp):
    """text -> ln of the summed probability of all alignments."""
    found = {}
    for path in itertools.product(range(4), repeat=len(logp)):
        text = TASK.decode(path)
        p = sum(logp[t, i] for t, i in enumerate(path))
        found[text] = np.logaddexp(found.get(text, -math.inf), p)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_sums_over_all_alignments(seed):
    logp = random(6, seed)
    wide = beam.Options(width=10**6, token_floor=-1e9, beam_floor=-1e9)
    found = dict(beam.search(logp, TASK, wide, best=10**6))
    wanted = exhaustive(logp)
    assert set(found) == set(wanted) and max(abs(found[k] - wanted[k]) for k in wanted) < 1e-9


def test_a_narrow_beam_finds_what_greedy_misses():
    logp = np.log(np.array([[0.4, 0.0001, 0.35, 0.2499], [0.4, 0.0001, 0.35, 0.2499]]))
    assert TASK.decode(logp.argmax(-1)) == "" and beam.search(logp, TASK)[0][0] == "a"  # .4 .4 < .35 .35 + 2 (.4 .35)
    sharp = random(40, 1, sharp=12)
    assert beam.search(sharp, TASK)[0][0] == TASK.decode(sharp.argmax(-1))


@pytest.fixture
def lm(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    return Arpa(tmp_path / "lm.arpa")


def test_back_off_by_hand(lm):
    p, state = lm.score(lm.start, "b")
    assert p == pytest.approx(-0.1 * LN10) and state == ("b",)
    assert lm.score(("b",), "a")[0] == pytest.approx((-0.4 - 0.5) * LN10)  # back-off of b, then a alone
    p, state = lm.score(("a",), "zebra")
    assert p == pytest.approx((-0.2 - 2.0) * LN10) and state == ("<unk>",)
    assert lm.end(("a",)) == pytest.approx((-0.2 - 0.9) * LN10)


def test_the_language_model_decides_between_equals(lm):
    logp = np.log(np.array([[0.02, 0.02, 0.49, 0.47], [0.96, 0.02, 0.01, 0.01]]))
    assert beam.search(logp, TASK)[0][0] == "a"
    assert beam.search(logp, TASK, beam.Options(alpha=2.0), lm)[0][0] == "b"  # likely at the start
    score = dict(beam.search(logp, TASK, beam.Options(alpha=2.0, beta=0.7), lm, best=9))["b"]
    plain = dict(beam.search(logp, TASK, beam.Options(), best=9))["b"]
    assert score == pytest.approx(plain + 0.7 + 2.0 * (lm.score(lm.start, "b")[0] + lm.end(("b",))), abs=1e-6)


def test_hotwords_are_kept_and_only_they_gain():
    logp, wide = random(6, 3), {"width": 10**6, "token_floor": -1e9, "beam_floor": -1e9, "hotword_weight": 4.0}
    plain, hot = (dict(beam.search(logp, TASK, beam.Options(**wide, hotwords=words), best=10**6))
                  for words in ((), ("ab",)))
    for text in plain:
        assert hot[text] == pytest.approx(plain[text] + 4.0 * text.split().count("ab"))
    with pytest.raises(DataError, match="outside the vocabulary"):
        beam.search(logp, TASK, beam.Options(hotwords=("xyz",)))


@pytest.mark.parametrize("text", ["", "hello", ARPA.replace("ngram 2=2", "ngram 2=3"), ARPA[:-8],
                                  ARPA.replace("-0.5\ta", "x\ta"), ARPA.replace("a b", "a b c")])
def test_broken_arpa_files(tmp_path, text):
    (tmp_path / "lm.arpa").write_text(text)
    with pytest.raises(ValueError, match="ARPA"):
        Arpa(tmp_path / "lm.arpa")
