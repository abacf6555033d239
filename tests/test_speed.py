"""Bench rows, names, random weights, and the table script. Times themselves are not tested: machines differ."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_tasks

from jaxslim import cost, speed, speed_worker
from jaxslim.formulas import inputs
from jaxslim.shapes import SHAPES
from jaxslim.spec import Spec
from jaxslim.train.log import wav_bytes

ROOT = Path(__file__).parents[1]
TINY = Spec(dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24, vocab_size=7,
                 conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 4], num_feat_extract_layers=2,
                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2), "wav2vec2", "ctc")
TINY_LINEAR = TINY.with_block("encoder.0.attention", mixer="hedgehog")


def test_random_model():
    model = speed.random_model(TINY, seed=3)
    assert np.isfinite(np.asarray(model(input_values=np.ones((1, 1600), np.float32)).logits)).all()
    p = model.params
    assert p["wav2vec2.encoder.layer_norm.weight"].min() == 1 and p["lm_head.bias"].max() == 0
    assert 0.01 < p["lm_head.weight"].std() < 0.03
    assert model.fingerprint == speed.random_model(TINY, seed=3).fingerprint != speed.random_model(TINY, 4).fingerprint


def test_names(tmp_path):
    model = speed.random_model(TINY)
    model.save_pretrained(tmp_path / "m")
    same, weights = speed.resolve(str(tmp_path / "m"))
    assert weights == "loaded" and same.params.keys() == model.params.keys()
    linear, weights = speed.resolve(f"{tmp_path / 'm'}?encoder.*.attention.mixer=hedgehog&encoder.0.ffn.units=5")
    assert weights == "partly random" and linear.spec.blocks == {
        "encoder.0.attention": {"mixer": "hedgehog"}, "encoder.0.ffn": {"units": 5}}
    assert np.array_equal(linear.params["lm_head.weight"], model.params["lm_head.weight"])
    short, _ = speed.resolve(f"{tmp_path / 'm'}?num_hidden_layers=1&encoder.*.attention.mixer=hedgehog")
    assert list(short.spec.blocks) == ["encoder.0.attention"]
    for name, part in (("config:nonsense", "wav2vec2-base"), (f"{tmp_path / 'm'}?encoder.9.ffn.units=5", "no block")):
        with pytest.raises(speed.BenchError, match=part):
            speed.resolve(name)


MILLIONS = {"wav2vec2-base": 94.4, "wav2vec2-large-lv60": 315.5, "hubert-xlarge": 962.5, "w2v-bert-2.0": 580.5,
            "parakeet-ctc-0.6b": 608.8, "whisper-tiny": 37.8, "whisper-large-v3-turbo": 808.9, "bert-base": 109.5}


def test_stock_shapes():
    for name, size in MILLIONS.items():  # as their model cards say
        family, head, config = SHAPES[name]
        assert cost.params(Spec(config, family, head)) / 1e6 == pytest.approx(size, 0.002), name


@pytest.mark.parametrize("family", ["whisper", "wav2vec2-bert", "parakeet_ctc", "bert"])
def test_inputs_of_every_kind(family, tmp_path):
    """What a worker feeds is what the family takes, from noise and from a file, and PyTorch takes it too."""
    pytest.importorskip("torch")
    spec = tiny_tasks.SPECS[family]
    (tmp_path / "a.wav").write_bytes(wav_bytes(0.1 * np.sin(np.arange(9000) / 9)))
    for seconds, wav in ((0.5, None), (2.6, str(tmp_path / "a.wav"))):
        job = dict(seconds=seconds, batch=2, seed=0, wav=wav)
        batch = speed_worker.batch_of(spec, job)
        assert {k: v.shape for k, v in batch.items()} == {k: x.shape for k, x in inputs(spec, seconds, 2).items()}
        out = speed.random_model(spec)(**batch)
        assert np.isfinite(np.asarray(out.logits)).all()
    job |= dict(name=speed_worker.JSON + json.dumps({**dataclasses.asdict(spec), "config": dict(spec.config)}),
                engine="torch eager", threads=1, dtype=None)
    facts, call, _ = speed_worker.setup_torch(job)
    call()
    statistics = 2 * 32 if "parakeet" in family else 0  # of batch norm: floats in the file, buffers in torch
    assert facts["params"] == cost.params(spec) - statistics and facts["weights"] == "random"


def test_rows_beside_torch():
    pytest.importorskip("torch")
    lines = []
    rows = speed.main_rows(TINY, "1", "torch", repeats=2, batch=2, threads=1, progress=lines.append)
    assert len(lines) == 3 and [r["engine"] for r in rows] == ["jaxslim", "torch eager", "torch sdpa"]
    for row in rows:
        assert set(row) <= set(speed.ROW_KEYS) and "error" not in row and row["runs"] == 2 and row["threads"] == 1
        assert 0 < row["min_seconds"] <= row["steady_seconds"] <= row["max_seconds"] and row["peak_bytes"] >= 0
        assert row["rtfx"] * row["seconds_per_second"] == pytest.approx(1)
        assert row["params"] == cost.params(TINY)
    ours = rows[0]
    assert ours["gmacs_here"] == cost.macs(TINY, 1, 2).total / 1e9 and ours["gmacs"] == cost.macs(TINY, 10).total / 1e9
    assert ours["compile_seconds"] > 0 and ours["ratio"] > 0 and len(ours["baseline_seconds"]) == 2
    assert ours["fingerprint"] == speed.random_model(TINY).fingerprint
    assert speed.table(rows).row_count == 3
    json.dumps(rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_rows_beside_torch_compile_and_onnxruntime():
    pytest.importorskip("onnxruntime")
    rows = speed.main_rows(TINY, "1", "torch-compile,onnxruntime", repeats=2, batch=2, threads=1)
    assert [r["engine"] for r in rows] == ["jaxslim", "torch compile", "onnxruntime"]
    assert all("error" not in r and r["runs"] == 2 and r["params"] == cost.params(TINY) for r in rows), rows
    assert len(rows[0]["baseline_seconds"]) == 2


@pytest.mark.slow
def test_two_models_and_a_slim():
    rows = speed.bench(speed.random_model(TINY_LINEAR), seconds=[0.5], baseline=TINY, repeats=2, dtype="bfloat16")
    assert [r["weights"] for r in rows] == ["loaded", "random"] and "ratio" in rows[0] and "ratio" not in rows[1]
    assert rows[0]["dtype"] == "bfloat16"


def test_errors(monkeypatch):
    with pytest.raises(speed.BenchError, match="no-such-folder"):
        speed.bench("./no-such-folder", seconds=[1])
    with pytest.raises(speed.BenchError, match="numbers like"):
        speed.main_rows(TINY, "ten")
    with pytest.raises(speed.BenchError, match="positive"):
        speed.bench(TINY, seconds=[0])
    with pytest.raises(speed.BenchError, match="shorter than one frame"):
        speed.bench(TINY, seconds=[0.001])
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(speed.BenchError, match="pip install"):
        speed.bench(TINY, baseline="torch")


def test_a_dead_worker_is_a_row_with_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = speed.bench(TINY, seconds=[1])
    assert "exit status 1" in row["error"]
    assert speed.table([row]).row_count == 1


def test_student_beside_teacher(monkeypatch):
    good = {"seconds_per_second": 2.0, "min_seconds": 1.5, "peak_bytes": 7, "runs": 3}
    rows = [{"model": "s", **good, "seconds_per_second": 1.0}, {"model": "t", **good}]
    monkeypatch.setattr(speed, "bench", lambda *args, **kwargs: rows)
    assert speed.beside("s", "t") == {
        "student_seconds_per_second": 1.0, "student_min_seconds": 1.5, "student_peak_bytes": 7,
        "teacher_seconds_per_second": 2.0, "teacher_min_seconds": 1.5, "teacher_peak_bytes": 7, "time_share": 0.5}
    rows[1] = {"model": "t", "error": "killed"}
    assert speed.beside("s", "t").keys() == {"student_seconds_per_second", "student_min_seconds", "student_peak_bytes"}


def test_table_script_resumes(tmp_path):
    log = tmp_path / "log"
    results = [{"model": "m", "audio_seconds": s, "steady_seconds": s / 2, "peak_bytes": 3e6 * s} for s in (1.0, 4.0)]
    script = tmp_path / "measure.py"
    script.write_text(f"import sys\nopen({str(log)!r}, 'a').write(sys.argv[1])\n"
                      f"if sys.argv[1] == 'c': sys.exit(3)\nprint({json.dumps(json.dumps(results))})\n")
    table = tmp_path / "t.yaml"

    def run(ids, *options):
        rows = "".join(f"- {{id: {i}, command: python {script} {i}}}\n" for i in ids)
        table.write_text(f"name: t\nrows:\n{rows}columns: {{s: '{{audio_seconds:g}}', MB: '{{peak_bytes:.1f/1e6}}', "
                         "x: '{twice:.1f}', no: '{none}'}\nrelative:\n"
                         "- {name: twice, of: steady_seconds, to: {audio_seconds: 1.0}, by: [model]}\n"
                         "plots:\n- {name: time, title: T < U, xlabel: s, x: '{audio_seconds}', "
                         "y: '{steady_seconds}'}\n")
        return subprocess.run([sys.executable, ROOT / "scripts/table.py", table, "--results", tmp_path, *options],
                              capture_output=True, text=True, env=os.environ)

    assert run("abc", "--list").stdout.split() == ["a", "b", "c"] and not log.exists()
    failed = run("abc")                                              # c fails, the others stay
    assert failed.returncode == 1 and "c failed: exit status 3" in failed.stderr, failed.stderr
    assert log.read_text() == "abc" and len(json.loads((tmp_path / "t.json").read_text())) == 4
    assert run("ab").returncode == 0 and log.read_text() == "abc"    # nothing is missing
    assert run("ab", "--again", "b").returncode == 0 and log.read_text() == "abcb"
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert "| 4 | 12.0 | 4.0 | - |" in lines and "![T < U](t-time.svg)" in lines
    drawn = ElementTree.parse(tmp_path / "t-time.svg").getroot()     # XML, though the title has a <
    names = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert names[0] == "T < U" and names[-2:] == ["a", "b"]          # a series for each id
    stored = json.loads((tmp_path / "t.json").read_text())
    assert [r["id"] for r in stored] == ["a", "a", "b", "b"] and stored[0]["command"].endswith("measure.py a")


def test_shipped_tables_are_read():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import table
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    for path in (ROOT / "configs/tables").glob("*.yaml"):
        table.read(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["ctc", "distill"])
def test_training_steps_beside_pytorch(step):
    command = [sys.executable, ROOT / "scripts/step_speed.py", "--step", step, "--layers", "1", "--seconds", "1",
               "--batch-size", "1", "--repeats", "1", "--dtype", "float32", "--engines", "jaxslim,torch"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert [r["engine"] for r in found] == ["jaxslim", "torch"] and found[0]["model_flops"] > 1e9
    assert all(r["step_seconds"] > 0 and r["peak_bytes"] > 1e8 and 0 < r["loss"] < 1e3 for r in found)
    assert found[0]["vs_torch"] == pytest.approx(found[1]["step_seconds"] / found[0]["step_seconds"])
