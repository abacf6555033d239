"""The page over several runs: its frontier, what is left out, and hostile names."""
import json

import numpy as np
import pytest

from jaxslim import cli, pareto
from jaxslim.pareto import Point
from jaxslim.report import ReportError

TEACHER = {"wer": 0.30, "wer_low": 0.27, "wer_high": 0.33, "n": 70, "params": 7.0e6, "gmacs": 5.04, "fingerprint": "f",
           "seconds_per_second": 0.007, "peak_bytes": 8e7, "path": "bundled:x"}


def run(folder, **models):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"recipe": "r", "stages": [], **models}))
    return str(folder)


def test_frontier_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = [Point("", "student", {"wer": float(w), "params": int(c)}) for w, c in
                 zip(rng.integers(1, 9, 12) / 10, rng.integers(1, 9, 12))]
        found.append(Point("", "student", {"wer": 0.05}))                # of unknown cost: neither beats nor is shown
        edge = pareto.frontier(found, "params")
        for p in found[:-1]:
            better = [q for q in found[:-1] if q.values["wer"] <= p.values["wer"] and q.values["params"] <=
                      p.values["params"] and q.values != p.values]
            assert (p in edge) == (not better)
        assert found[-1] not in edge
        errors = [p.values["wer"] for p in edge]
        assert errors == sorted(errors, reverse=True)


def test_page_over_runs(tmp_path, capsys):
    small = TEACHER | {"wer": 0.32, "params": 3e6, "gmacs": 2.5, "fingerprint": "s"}
    worse = TEACHER | {"wer": 0.40, "params": 4e6, "gmacs": 2.0, "fingerprint": "w", "peak_bytes": None}
    runs = [run(tmp_path / "half", teacher=TEACHER, control=TEACHER | {"wer": 0.29, "fingerprint": "c"}, student=small),
            run(tmp_path / "<b>bold", teacher=TEACHER, student=worse | {"n": 71})]
    (tmp_path / "more.json").write_text(json.dumps([{"name": "other", "wer": 0.5, "params": 1e6}, {"name": "none"}]))
    found = pareto.points([*runs, tmp_path / "more.json"])
    assert [p.name for p in found] == ["teacher", "half, control", "half, student", "<b>bold, student", "more, other"]
    assert [p.name for p in pareto.frontier(found, "params")] == ["more, other", "half, student", "half, control"]
    assert [p.name for p in pareto.frontier(found, "gmacs")] == ["<b>bold, student", "half, student", "half, control"]
    out = tmp_path / "page.html"
    assert cli.main(["report", *runs, str(tmp_path / "more.json"), "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    html = out.read_text()
    assert html.count("<svg class=\"chart\"") == 4 and "<b>bold" not in html and "&lt;b&gt;bold, student" in html
    assert "30.0\u00a0% (27.0–33.0)" in html and "(70, 71 clips)" in html
    for text in ("http://", "https://", "<script"):
        assert text not in html


def test_one_run_is_the_page_of_that_run(tmp_path):
    assert cli.main(["report", run(tmp_path / "a", teacher=TEACHER)]) == 0
    assert "Before and after" in (tmp_path / "a/report.html").read_text()


def test_nothing_to_show(tmp_path):
    with pytest.raises(ReportError, match="has a model with a word error rate"):
        pareto.page([run(tmp_path / "a", teacher={"params": 1})] * 2, tmp_path / "out.html")
    for bad in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ReportError, match="no run folder with summary.json, and no JSON file"):
            pareto.page([bad, bad], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
