"""Word times of hand-made CTC paths, and every output format read back."""
import json
import re

import numpy as np
import pytest

from jaxslim import subtitles
from jaxslim.data import CTCTask
from jaxslim.data.tools import SPECIAL

TASK = CTCTask({t: i for i, t in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz'"])})
FRAME = 0.02


def path(text: str) -> np.ndarray:
    """'a_b|' -> ids; _ is the blank."""
    return np.array([TASK.blank_id if c == "_" else TASK.vocabulary[c] for c in text])


def test_words_have_the_frames_of_their_letters():
    found = subtitles.words(TASK, path("__hh_i_" + "_" * 20 + "|__yo_uu___|" + "_" * 30), FRAME)
    assert [w["word"] for w in found] == ["hi", "you"]
    assert found[0]["start"] == pytest.approx(0.02) and found[0]["end"] == pytest.approx(6 * FRAME + subtitles.PAD)
    assert found[1]["start"] == pytest.approx(30 * FRAME - subtitles.PAD)
    assert all(a["end"] <= b["start"] for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("text", ["", "____", "||", "_|_|a|", "|a", "a|", "aab_b|c"])
def test_words_join_to_the_greedy_transcript(text):
    ids = path(text)
    found = subtitles.words(TASK, ids, FRAME, start=5.0)
    assert " ".join(w["word"] for w in found) == " ".join(TASK.decode(ids).split())
    assert all(5.0 <= w["start"] < w["end"] <= 5.0 + len(ids) * FRAME for w in found)


def test_random_paths_give_ordered_words():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.choice([0, 0, 0, 4, *range(5, 31)], size=200)
        found = subtitles.words(TASK, ids, FRAME)
        times = [t for w in found for t in (w["start"], w["end"])]
        assert times == sorted(times) and " ".join(w["word"] for w in found) == " ".join(TASK.decode(ids).split())


ROW = {"file": "a.wav", "text": "x", "words": [{"word": f"word{k}", "start": k * 0.5, "end": k * 0.5 + 0.4}
                                                for k in range(40)]}
ROW["words"][20:] = [w | {"start": w["start"] + 3600, "end": w["end"] + 3600} for w in ROW["words"][20:]]


def test_cues_keep_all_words_and_the_limits():
    found = subtitles.cues(ROW["words"])
    assert " ".join(c["text"] for c in found).split() == [w["word"] for w in ROW["words"]]
    assert all(c["end"] - c["start"] <= subtitles.LONGEST and len(c["lines"]) <= 2 for c in found)
    assert all(len(line) <= subtitles.LINE for c in found for line in c["lines"])
    assert not any(c["start"] < 3000 < c["end"] for c in found)  # a pause ends a cue


def seconds(clock: str) -> float:
    h, m, s = clock.replace(",", ".").split(":")
    return 3600 * int(h) + 60 * int(m) + float(s)


def test_formats_read_back():
    found = subtitles.cues(ROW["words"])
    srt, vtt = subtitles.write(ROW, "srt"), subtitles.write(ROW, "vtt")
    for text, clock in ((srt, r"\d\d:\d\d:\d\d,\d{3}"), (vtt, r"\d\d:\d\d:\d\d\.\d{3}")):
        times = re.findall(rf"({clock}) --> ({clock})", text)
        assert [(seconds(a), seconds(b)) for a, b in times] == [(c["start"], c["end"]) for c in found]
    assert vtt.startswith("WEBVTT\n\n") and srt.startswith("1\n") and "01:00:" in srt
    tsv = [line.split("\t") for line in subtitles.write(ROW, "tsv").splitlines()]
    assert tsv[0] == ["start", "end", "text"] and [int(r[0]) for r in tsv[1:]] == [1000 * c["start"] for c in found]
    assert json.loads(subtitles.write(ROW, "json")) == ROW and subtitles.write(ROW, "txt") == "x\n"
    evil = {"words": [{"word": "<b>&", "start": 0.0, "end": 1.0}]}
    assert "&lt;b&gt;&amp;" in subtitles.write(evil, "vtt")


def test_refusals():
    with pytest.raises(ValueError, match="choose from txt, json"):
        subtitles.write(ROW, "doc")
    with pytest.raises(ValueError, match="a.wav has no word times"):
        subtitles.write({"file": "a.wav", "text": "x"}, "srt")
