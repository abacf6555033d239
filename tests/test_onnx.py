"""ONNX graphs: onnxruntime, sherpa-onnx and onnx-asr compute what the model computes, at any batch and length."""
import json

import jax
import numpy as np
import pytest
import tiny
from test_export import quiet, random_spec  # noqa: F401  (a fixture for all tests here)

from jaxslim import cli, export, hub, onnx_bundles, onnx_graph
from jaxslim.data import CTCTask, load_rows
from jaxslim.dense import ExportError
from jaxslim.methods import METHODS
from jaxslim.spec import Spec

for package in onnx_graph.PACKAGES:
    pytest.importorskip(package)
BUNDLED = "bundled:wav2vec2-ctc-en"


@pytest.fixture
def short(monkeypatch):
    """Pieces of the bundled clips: the small models have a frame every 40 samples."""
    speech = onnx_graph.speech
    monkeypatch.setattr(onnx_graph, "speech", lambda rows, rate=16000: {
        i: wave[8000 : 10000 + 300 * i] for i, wave in speech(rows, rate).items()})


def same(model, run, *lengths):
    values, mask = tiny.waves(*lengths)
    out = model(input_values=values, attention_mask=mask)
    valid = np.arange(out.logits.shape[1]) < np.asarray(out.lengths)[:, None]
    tiny.close(run(input_values=values, attention_mask=mask)[valid], np.asarray(out.logits)[valid])


def test_generated_code_with_open_shapes(short, tmp_path):
    spec = random_spec("wav2vec2 large", 4).with_block("encoder.0.attention", mixer="hedgehog", options={"features": 3})
    model, out = tiny.slim(spec), tmp_path / "out"
    record = export.export(model, out, format="onnx")
    assert record["relative_difference"] < 1e-5 and record["argmax_agreement"] == 1.0
    assert [r["shape"][0] for r in record["compared"]] == [1, 2, 4] and not record["trust_remote_code"]
    assert json.loads((out / "parity.json").read_text()) == record
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.onnx", "parity.json"]
    assert json.loads((out / "config.json").read_text())["model_type"] == "wav2vec2"
    same(model, onnx_graph.read(out), 1111, 600, 900)
    hub.save(model, out)  # a folder that an export wrote is ours: replaced whole
    assert not (out / "model.onnx").exists() and hub.load(out).spec.blocks == spec.blocks


@pytest.mark.slow
def test_a_window_with_open_shapes(short, tmp_path):
    model = tiny.slim(tiny.slim().spec.with_block("encoder.1.attention", mixer="hedgehog", options={"window": 5}))
    assert export.export(model, tmp_path / "out", format="onnx")["relative_difference"] < 1e-5
    same(model, onnx_graph.read(tmp_path / "out"), 1111, 250, 900)


FAMILIES = {"hubert": {}, "wavlm": {}, "wav2vec2-conformer": dict(position_embeddings_type="relative",
                                                                   conv_depthwise_kernel_size=7)}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, short, tmp_path):
    model = tiny.slim(tiny.config(family, **FAMILIES[family]), "ctc")
    assert export.export(model, tmp_path / "out", format="onnx")["relative_difference"] < 1e-5
    same(model, onnx_graph.read(tmp_path / "out"), 1111, 600, 900)


@pytest.mark.parametrize("mixer, options, why", [
    ("mamba2", {"head_dim": 8}, "mamba2, whose PyTorch code loops"),
    ("hedgehog", {"causal": True}, "causal linear attention, whose")])
def test_loops_are_refused(mixer, options, why, tmp_path):
    spec = tiny.slim().spec.with_block("encoder.1.attention", mixer=mixer, options=options)
    with pytest.raises(ExportError, match=f"Block encoder.1.attention has {why}"):
        export.export(tiny.slim(spec), tmp_path / "out", format="onnx")
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path, monkeypatch, capsys):
    model = tiny.slim()
    with pytest.raises(ExportError, match="of type float16 are not written; ONNX graphs are float32 or int8"):
        export.export(model, tmp_path / "out", format="onnx", dtype="float16")
    with pytest.raises(ExportError, match="hf: weights of type int8"):
        export.export(model, tmp_path / "out", dtype="int8")
    assert onnx_graph.unsupported(Spec({"model_type": "whisper"}, "whisper", "seq2seq")).startswith("whisper is an enc")
    with pytest.raises(ExportError, match="has no model.onnx"):
        onnx_graph.read(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot open"):
        onnx_graph.read(tmp_path)
    monkeypatch.setattr(onnx_graph, "PACKAGES", ("no_such_package",))
    assert cli.main(["export", BUNDLED, str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "pip install jaxslim[export] (no_such_package is not installed)" in capsys.readouterr().err


def test_a_graph_that_differs_is_not_kept(short, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "write", lambda module, inputs, output, path: path.write_bytes(b"graph") and 20)
    monkeypatch.setattr(onnx_graph, "read", lambda path: lambda **x: np.full((len(x["input_values"]), 999, 11), 1.0))
    monkeypatch.setattr(onnx_graph, "batches", lambda spec, path: [{"input_values": tiny.waves(1000, 900)[0]}])
    monkeypatch.setattr(export, "_ours", lambda model, x: (np.ones((2, 999, 11)) * 1.5, np.ones((2, 999), bool)))
    with pytest.raises(export.ParityError, match="differ by 5.0e-01 of max"):
        export.export(tiny.slim(), tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
    assert export.export(tiny.slim(), tmp_path / "out", format="onnx", force=True)["max_difference"] == 0.5


def test_token_lists():
    task = CTCTask.from_pretrained(hub.folder(BUNDLED))
    spec = hub.load(BUNDLED).spec
    listed = onnx_bundles.files(spec, "sherpa-onnx", task)["tokens.txt"].splitlines()
    assert listed[0] == "<blk> 0" and listed[4] == "▁ 4" and listed[31] == "' 31" and len(listed) == 32
    both = onnx_bundles.files(spec, "onnx-asr", task)
    assert json.loads(both["config.json"]) == {"model_type": "wav2vec2-ctc", "subsampling_factor": 320}
    upper = CTCTask({"<pad>": 0, "|": 1, "A": 3}, do_lower_case=True)
    five = spec.replace(config={**spec.config, "vocab_size": 5})
    assert onnx_bundles.files(five, "onnx-asr", upper)["vocab.txt"] == (
        "<blk> 0\n▁ 1\n<unused2> 2\na 3\n<unused4> 4\n")
    with pytest.raises(ExportError, match="two that become one"):
        onnx_bundles.files(spec, "onnx-asr", CTCTask({"<pad>": 0, "|": 1, "A": 3, "a": 2}, do_lower_case=True))


@pytest.mark.slow
@pytest.mark.parametrize("format", onnx_bundles.BUNDLES)
def test_bundles_on_small_models(format, short, tmp_path, small):
    pytest.importorskip(onnx_bundles.BUNDLES[format])
    model = hub.load(small["model"])
    record = export.export(model, tmp_path / "out", format=format, source=small["model"], dtype="int8")
    assert record["relative_difference"] < 1e-4 and record["transcripts"]["different"] == []
    assert record["transcripts"]["clips"] == 7 and record["int8"]["argmax_agreement"] > 0.8
    assert (tmp_path / "out" / "model.int8.onnx").exists() and not (tmp_path / "out" / "model.onnx").exists()
    run = onnx_bundles.recognizer(tmp_path / "out", format)
    assert isinstance(run(onnx_graph.speech([0])[0]), str)


@pytest.mark.slow
@pytest.mark.parametrize("format", onnx_bundles.BUNDLES)
def test_the_same_transcripts_of_every_test_clip(format, tmp_path):
    pytest.importorskip(onnx_bundles.BUNDLES[format])
    teacher = hub.load(BUNDLED)
    task = CTCTask.from_pretrained(hub.folder(BUNDLED))
    rows = load_rows("bundled:prompts-en/test")
    waves = {i: rows.audio(i) for i in range(len(rows))}
    for model in (teacher, METHODS["linearize"](mixer="hedgehog").start(teacher, None, jax.random.key(0))):
        export.export(model, tmp_path / "out", format=format, source=BUNDLED)
        found = onnx_bundles.transcripts(onnx_bundles.logits(model, task, waves), task, tmp_path / "out", format, waves)
        assert found["clips"] == 70 and all(d["margin"] < onnx_bundles.MARGIN for d in found["different"])
