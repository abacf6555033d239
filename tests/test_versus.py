"""Paired comparison: intervals, slices, confusions; gates of `eval`; what it refuses."""
import json

import numpy as np
import pytest

from jaxslim import cli, versus

WORDS = "the quick brown fox jumps over the lazy dog and runs away".split()


def rows(drop: float, seed: int, n: int = 60):
    """Predictions that lose each word with probability `drop`; speaker b loses twice as many."""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        text = [WORDS[k] for k in np.random.default_rng(i).integers(len(WORDS), size=8)]
        speaker = "ab"[i % 2]
        kept = [w for w in text if rng.random() > drop * (1 + (speaker == "b"))]
        out.append({"id": f"u{i}", "text": " ".join(text), "pred_text": " ".join(kept), "duration": 1.0 + i % 12,
                    "speaker": speaker})
    return out


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_a_clear_loss_is_resolved_and_a_tie_is_not():
    result = versus.compare(rows(0.3, 1), rows(0.05, 2))
    assert versus.verdict(result) == "worse" and 0 < result["low"] < result["delta"] < result["high"]
    assert result["delta"] == pytest.approx(result["a"]["wer"] - result["b"]["wer"])
    assert versus.verdict(versus.compare(rows(0.3, 1), rows(0.3, 2))) == "not resolved"
    same = versus.compare(rows(0.3, 1), rows(0.3, 1))
    assert same["delta"] == 0 and not same["changed"] and not same["confusions"]


def test_slices_add_up_and_show_who_loses():
    result = versus.compare(rows(0.3, 1), rows(0.05, 2), by=("speaker", "duration"))
    by = {(s["column"], s["value"]): s for s in result["slices"]}
    assert by["speaker", "b"]["wer_a"] > by["speaker", "a"]["wer_a"]
    for column in ("speaker", "duration"):
        parts = [s for s in result["slices"] if s["column"] == column]
        assert sum(s["n"] for s in parts) == 60 and sum(s["words"] for s in parts) == result["a"]["words"]
        assert sum(s["delta"] * s["words"] for s in parts) / result["a"]["words"] == pytest.approx(result["delta"])
    assert [s["value"] for s in result["slices"] if s["column"] == "duration"] == ["00 to 02 s", "02 to 05 s",
                                                                                   "05 to 10 s", "10 to 20 s"]


def test_confusions_count_what_only_the_first_gets_wrong():
    b = [{"id": 1, "text": "a big dog", "pred_text": "a big dog"}, {"id": 2, "text": "a dog", "pred_text": "dog"}]
    a = [{"id": 1, "text": "a big dog", "pred_text": "a big fog"}, {"id": 2, "text": "a dog", "pred_text": ""}]
    result = versus.compare(a, b, by=())
    assert sorted(result["confusions"]) == [("", "dog", 1), ("fog", "dog", 1)]  # both miss the second "a"
    assert [c["id"] for c in result["changed"]] == ["1", "2"] and result["changed"][0]["gain"] == -1


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no utterance in common"):
        versus.compare([{"id": 1, "text": "a", "pred_text": "a"}], [{"id": 2, "text": "a", "pred_text": "a"}])
    with pytest.raises(ValueError, match="two references"):
        versus.compare([{"id": 1, "text": "a", "pred_text": "a"}], [{"id": 1, "text": "b", "pred_text": "a"}])
    with pytest.raises(ValueError, match="no column 'accent'; they have id, text"):
        versus.compare(rows(0.1, 1), rows(0.1, 2), by=("accent",))
    with pytest.raises(ValueError, match="does not exist; write it with"):
        versus.read(tmp_path)
    with pytest.raises(ValueError, match="rows need text"):
        versus.read(write(tmp_path / "x.jsonl", [{"id": 1}]))


def test_command(tmp_path, capsys):
    a, b = (write(tmp_path / name, r) for name, r in (("a.jsonl", rows(0.3, 1)), ("b.jsonl", rows(0.05, 2))))
    assert cli.main(["compare", a, b, "--by", "speaker", "--canary", str(tmp_path / "c.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "worse" in out and "speaker b: 30 utterances" in out
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) > 20
    assert cli.main(["compare", a, str(tmp_path)]) == 2 and "does not exist" in capsys.readouterr().err


def test_gates(tmp_path):
    baseline = write(tmp_path / "b.jsonl", rows(0.05, 2))
    worse, same = rows(0.3, 1), rows(0.05, 3)
    assert versus.gates({"wer": 0.2}, worse, max_wer=0.3) == []
    assert "more than 10 %" in versus.gates({"wer": 0.2}, worse, max_wer=0.1)[0]
    assert "points from" in versus.gates({"wer": 0.2}, worse, baseline=baseline)[0]
    assert versus.gates({"wer": 0.2}, same, baseline=baseline) == []
    assert versus.gates({"wer": 0.2}, worse, baseline=baseline, max_regression=0.9) == []


def test_eval_exits_with_4_when_a_gate_is_missed(tmp_path, capsys):
    words = ["eval", "bundled:wav2vec2-ctc-en", "--data", "bundled:prompts-en/validation", "--limit", "3", "--json"]
    kept = str(tmp_path / "p.jsonl")
    assert cli.main([*words, "--max-wer", "0.0001", "--predictions", kept]) == 4
    assert json.loads(capsys.readouterr().out)["gates_missed"]
    assert versus.read(kept)[0]["speaker"]
    assert cli.main([*words, "--max-regression", kept]) == 0
