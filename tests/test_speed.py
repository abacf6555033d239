"""Bench rows, names, random weights, and the table script. Times themselves are not tested: machines differ."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxslim import cost, speed, speed_worker
from jaxslim.spec import Spec

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
    for name, part in (("config:nonsense", "wav2vec2-base"), (f"{tmp_path / 'm'}?encoder.9.ffn.units=5", "no block")):
        with pytest.raises(speed.BenchError, match=part):
            speed.resolve(name)


def test_stock_shapes():
    for name, (family, config) in speed_worker.CONFIGS.items():
        assert cost.params(Spec(config, family, "ctc")) / 1e6 == pytest.approx(315.5 if "large" in name else 94.4, 0.01)


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
                         "- {name: twice, of: steady_seconds, to: {audio_seconds: 1.0}, by: [model]}\n")
        return subprocess.run([sys.executable, ROOT / "scripts/table.py", table, "--results", tmp_path, *options],
                              capture_output=True, text=True, env=os.environ)

    assert run("abc", "--list").stdout.split() == ["a", "b", "c"] and not log.exists()
    failed = run("abc")                                              # c fails, the others stay
    assert failed.returncode == 1 and "c failed: exit status 3" in failed.stderr, failed.stderr
    assert log.read_text() == "abc" and len(json.loads((tmp_path / "t.json").read_text())) == 4
    assert run("ab").returncode == 0 and log.read_text() == "abc"    # nothing is missing
    assert run("ab", "--again", "b").returncode == 0 and log.read_text() == "abcb"
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert "| 4 | 12.0 | 4.0 | - |" in lines
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
