"""micro-SUPERB: metrics against references, what each task asks, retention; and the whole on tiny upstreams."""
import json
import pathlib
import runpy

import numpy as np
import pytest
import tiny
from conftest import SHAPE, write_model

from jaxslim import cli, superb
from jaxslim.config import ConfigError
from jaxslim.data import DataError
from jaxslim.data.store import Store
from jaxslim.methods.generate import Generate
from jaxslim.superb import clips as C
from jaxslim.superb import fidelity, keywords, metrics, query, recognition, suite, voices
from jaxslim.superb.features import Features
from jaxslim.superb.retention import retention
from jaxslim.superb.tasks import Options, Task

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(0)
QUICK = Options(limit=8, seeds=(0,), draws=2, char_steps=3, asr_steps=2, asr_units=4, asr_layers=1, pooled_steps=100)


# ---- metrics ----


def test_metrics_equal_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    for _ in range(5):
        scores, relevant = RNG.integers(0, 12, 60) / 4.0, RNG.random(60) < 0.3      # with ties
        assert metrics.average_precision(scores, relevant) == pytest.approx(
            sklearn.average_precision_score(relevant, scores))
        weights = RNG.integers(0, 3, 60).astype(float)
        alarm, hit, _ = sklearn.roc_curve(relevant, scores, sample_weight=weights, drop_intermediate=False)
        line = np.linspace(0, 1, 200_001)
        want = line[np.argmin(np.abs(np.interp(line, alarm, hit) - (1 - line)))]
        assert metrics.equal_error_rate(scores, relevant, weights) == pytest.approx(want, abs=1e-4)
    assert metrics.equal_error_rate(np.array([3.0, 2, 1, 0]), np.array([True, True, False, False])) == 0
    assert np.isnan(metrics.average_precision(scores, np.zeros(60, bool)))


def test_subsequence_warping_equals_the_plain_recursion():
    cost = RNG.random((5, 9)).astype(np.float32)
    table = np.full((5, 9), np.inf)
    table[0] = cost[0]
    for n in range(1, 5):
        for t in range(9):
            table[n, t] = cost[n, t] + min([table[n - 1, t], *((table[n - 1, t - 1], table[n, t - 1]) if t else ())])
    np.testing.assert_allclose(query.warp(cost, np.ones(9, bool)), table[-1], rtol=1e-5)


def test_a_query_finds_itself_and_padding_changes_nothing():
    document, one = RNG.standard_normal((2, 40, 6)).astype(np.float32)
    inside = np.concatenate([one[:20], document[:10], one[20:]])
    pad = lambda x: np.concatenate([x, 100 * np.ones((13, 6), np.float32)])  # noqa: E731
    score = lambda d, n: float(query.subsequence(document[:10], d, n))  # noqa: E731
    assert score(inside, 50) < 1e-5 < 0.05 < score(one, 40)
    assert score(pad(one), 40) == pytest.approx(score(one, 40), abs=1e-6)


def test_linear_cka():
    x, y = RNG.standard_normal((30, 5)), RNG.standard_normal((30, 8))
    turn = np.linalg.qr(RNG.standard_normal((5, 5)))[0]
    assert fidelity.linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-5)
    few = fidelity.linear_cka(np.tile(x, (1, 10)), np.tile(y, (1, 10)))     # more channels than frames
    assert few == pytest.approx(fidelity.linear_cka(x, y), abs=1e-5) and 0 < few < 0.9


# ---- the clips and what is asked ----


@pytest.fixture(scope="module")
def clips():
    return C.load()


def test_clips(clips):
    clips, fingerprint = clips
    count = lambda *what: len(C.find(clips, *what))  # noqa: E731
    assert count("sentence", "test") == 70 and count("piece", "test") == 200 and count("piece", "train", "es") == 80
    assert {c.speaker for c in clips if c.language in ("en", "es")} == {"Allison"}
    wave = clips[C.find(clips, "piece", "test", "ru")[0]].wave()
    assert wave.shape == (16000,) and fingerprint == C.load()[1] != C.load(limit=5)[1]
    train, test = (C.find(clips, "sentence", s) for s in ("train", "test"))
    words = keywords.words_of(clips, train, test)
    assert 8 <= len(words) <= 20 and {"please", "press", "conference"} <= set(words) and "the" not in words
    index = C.find(clips, "piece", "test")
    a, b, same = voices.trials(clips, index)
    assert same.sum() == 40 * 40 and len(a) == 10 * 40 * 40
    assert all({clips[index[i]].language, clips[index[j]].language} == {"en", "es"}
               for i, j in zip(a[same][:50], b[same][:50]))


def test_missing_speech_is_named(tmp_path):
    with pytest.raises(DataError, match=f"micro-superb needs {tmp_path}/en/train: .* does not exist"):
        C.load(f"{tmp_path}/{{}}")


# ---- tasks, on features that know the answer or nothing ----


def features(tmp_path, clips, make) -> Features:
    """Features (2, T, D) of a few clips: `make(clip, frames)` in layer 1, noise in layer 0."""
    rng, rows = np.random.default_rng(1), []
    for clip in clips:
        told = make(clip, max(int(clip.seconds * 20), 2))
        rows.append({"states": np.stack([rng.standard_normal(told.shape), told]).astype(np.float32)})
    store = Store(tmp_path / "f", {}, [range(len(clips))])
    store.fill(lambda members: rows)
    return Features(store, clips)


def test_voices_and_languages_from_features_that_tell(clips, tmp_path):
    some = [clips[0][i] for split in ("train", "test") for n in C.LANGUAGES
            for i in C.find(clips[0], "piece", split, n)[:8]]
    rng = np.random.default_rng(0)

    def told(clip, frames):
        x = 0.3 * rng.standard_normal((frames, 10))
        x[:, C.LANGUAGES.index(clip.language)] += 1
        x[:, 5 + ("Allison", "June", "Carlo", "Ivrvoice").index(clip.speaker)] += 1
        return x

    f = features(tmp_path, some, told)
    for task in (voices.LANGUAGE, voices.SPEAKER):
        arrays, info = task.run(f, QUICK)
        assert task.value(arrays, np.arange(task.items(arrays))) > 0.85
        assert info["layer_weights"][1] > 0.5 and arrays["correct"].shape[0] == 2
    arrays, info = voices.VERIFICATION.run(f, QUICK)
    assert info["layer"] == 1 and info["by_layer"][0] > 0.3 > 0.1 > info["by_layer"][1]
    every = np.arange(voices.VERIFICATION.items(arrays))
    assert voices.VERIFICATION.value(arrays, every) == pytest.approx(info["by_layer"][1], abs=1e-4)
    some[0] = some[0].__class__(**{**some[0].__dict__, "language": "fr"})
    with pytest.raises(DataError, match="micro-superb: no clips of en"):
        voices.classify(f, QUICK, {"en": [], "es": [1]}, {"en": [1], "es": [1]})


def test_words_from_features_that_spell(clips, tmp_path):
    """Letters one after another as frames: the linear head reads them, queries find them, keywords are there."""
    whole = {s: [clips[0][i] for i in C.find(clips[0], "sentence", s)] for s in ("train", "validation", "test")}
    some = [c for c in whole["train"] if c.seconds < 1.5][:120] + whole["validation"][:12] + [
        c for c in whole["test"] if c.seconds < 6][:25]
    alphabet = " " + recognition.LETTERS

    def spelt(clip, frames):
        return np.repeat(np.eye(len(alphabet))[[alphabet.index(x) for x in clip.text]], 2, 0)

    f = features(tmp_path, some, spelt)
    o = Options(seeds=(0,), draws=1, char_steps=60, char_rate=0.1, pooled_steps=50, limit=100, batch_seconds=24)
    arrays, info = query.TASK.run(f, o)
    assert info["layer"] == 1 and query.TASK.value(arrays, np.arange(query.TASK.items(arrays))) > 0.8
    assert info["by_layer"][0] < 0.5
    arrays, info = recognition.CHAR.run(f, o)
    assert recognition.CHAR.value(arrays, np.arange(25)) < 0.1 and info["layer_weights"][1] > 0.5
    arrays, info = keywords.TASK.run(f, o)
    assert set(info["words"]) and 0.2 < keywords.TASK.value(arrays, np.arange(25)) <= 1


@pytest.mark.slow
def test_the_recurrent_head_learns_to_spell(clips, tmp_path):
    """Four frames a letter, read in pairs; padding of a batch changes no transcript."""
    sentences = C.find(clips[0], "sentence", "train")
    some = [c for c in (clips[0][i] for i in sentences) if c.seconds < 1.5][:48]
    some += [c.__class__(**{**c.__dict__, "split": "test"}) for c in some[:8]]
    alphabet = " " + recognition.LETTERS

    def spelt(clip, frames):
        return np.repeat(np.eye(len(alphabet))[[alphabet.index(x) for x in clip.text]], 4, 0)

    f = features(tmp_path, some, spelt)
    values = {}
    for steps in (1, 80):
        o = Options(seeds=(0,), asr_steps=steps, asr_rate=0.02, asr_units=16, asr_layers=1, batch_seconds=24)
        arrays, info = recognition.ASR.run(f, o)
        values[steps] = arrays["character_errors"].sum() / arrays["characters"].sum()
    assert info["test_clips"] == 8 and values[80] < 0.6 * values[1]


# ---- the score ----


def test_retention():
    task = Task("t", "x", "lower", None, lambda a: len(a["x"]), lambda a, rows: float(a["x"][rows].mean()))
    noise = 0.01 * RNG.standard_normal(50)
    found = {"log-mel": {"t": {"x": 0.9 + noise}}, "teacher": {"t": {"x": 0.5 + noise}},
             "model": {"t": {"x": 0.6 + noise}}}
    kept = retention([task], found)
    assert kept["mean"] == pytest.approx(0.75) and kept["low"] == pytest.approx(0.75) and kept["of"] == ["t"]
    loud = {"t": {"x": 0.5 + RNG.standard_normal(50)}}
    unclear = retention([task], found | {"teacher": loud, "log-mel": {"t": {"x": loud["t"]["x"][::-1] + 0.001}}})
    assert unclear["mean"] is None and not unclear["tasks"]["t"]["resolved"]
    assert unclear["tasks"]["t"]["retention"] is None
    wide = retention([task], found | {"model": {"t": {"x": 0.6 + 0.2 * RNG.standard_normal(50)}}})
    assert wide["low"] < wide["mean"] < wide["high"] and wide["high"] - wide["low"] > 0.1


# ---- the whole ----


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory):
    """(folder of a teacher, a generative student of it); 20 ms frames."""
    folder = tmp_path_factory.mktemp("superb")
    shape = {**SHAPE, "conv_kernel": [400, 2], "conv_stride": [160, 2], "num_hidden_layers": 2}
    teacher = write_model(folder / "teacher", **shape)
    return teacher, tiny.slim(Generate(student="previous", target_layers=(1, 2)).spec(tiny.slim(**shape).spec), seed=1)


@pytest.mark.slow
def test_suite(upstreams, tmp_path, capsys):
    teacher, student = upstreams
    tasks = ("keyword", "language", "verification")
    run = lambda **more: superb.evaluate(student, teacher=teacher, output=tmp_path / "out", tasks=tasks,  # noqa: E731
                                         options=QUICK, **more)
    result = run()
    assert set(result["tasks"]) == set(tasks) and set(result["seconds"]) == set(suite.ROLES)
    for row in result["tasks"].values():
        assert all(0 <= row[role] <= 1 for role in suite.ROLES)
    rows = result["fidelity"]["rollout"]
    assert [r["layer"] for r in rows] == [1, 2] and rows[0]["gap"] == pytest.approx(0, abs=1e-5) != rows[1]["gap"]
    assert [r["layer"] for r in result["fidelity"]["model"]["layers"]] == [1, 2]
    assert {"l1", "cosine", "cka", "cka_ru"} <= result["fidelity"]["model"]["mean"].keys()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    assert len(files) == 4 * len(tasks)
    next(p for p in files if p.name == "keyword.npz" and student.fingerprint[:12] in str(p)).with_suffix(
        ".json").unlink()
    again = run()                                     # only what is missing is made, and it is the same
    assert again | {"seconds": 0} == result | {"seconds": 0}
    changed = {p for p, t in files.items() if p.stat().st_mtime_ns != t}
    assert [p.name for p in changed] == ["keyword.npz"]
    short = run(generated_layers=1)
    assert len(short["fidelity"]["rollout"]) == 1 and short["gmacs"] < result["gmacs"]
    flat = runpy.run_path(str(ROOT / "scripts/generate_row.py"))["row"](result, "tiny", 2)
    assert flat["model_keyword"] == result["tasks"]["keyword"]["model"] and flat["gap_2"] == rows[1]["gap"]
    assert {"log_mel_language", "random_language", "teacher_language", "fidelity_cka", "params"} <= flat.keys()
    from rich.console import Console

    Console(width=140).print(superb.render(result))
    assert "verification" in capsys.readouterr().out


def test_the_teacher_alone(upstreams, tmp_path, capsys):
    """Through the command, the teacher as the model: all it kept of itself."""
    teacher, _ = upstreams
    words = ["eval", teacher, "--suite", "micro-superb", "--baseline", teacher, "--output", str(tmp_path / "out"),
             "--tasks", "verification", "--json"]
    assert cli.main([*words, "--suite-options", "limit=4"]) == 0
    result = json.loads(capsys.readouterr().out)
    row = result["tasks"]["verification"]
    assert row["model"] == row["teacher"] and result["fidelity"]["model"]["mean"]["cka"] == pytest.approx(1, abs=1e-3)
    assert result["fidelity"]["rollout"] is None
    assert cli.main([*words[:-2], "speling", "--json"]) == 2
    assert "no task 'speling'" in capsys.readouterr().err
    assert cli.main([*words[:-1], "--suite-options", "asr_step=3"]) == 2
    assert "unknown key 'asr_step'" in capsys.readouterr().err
    assert cli.main(["eval", teacher]) == 2 and "--suite micro-superb" in capsys.readouterr().err


def test_bad_options():
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        superb.options(["seeds"])
    assert superb.options(["seeds=[1]", "asr-rate=1e-2"]) == Options(seeds=(1,), asr_rate=0.01)
