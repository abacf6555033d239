"""StableHLO programs: read back they compute what the model computes, at other shapes than those traced."""
import json

import numpy as np
import pytest
import tiny

from jaxslim import cli, export, hub, stablehlo
from jaxslim.data import CTCTask, load_rows
from jaxslim.dense import ExportError

pytest.importorskip("flatbuffers")
CONFORMER = dict(position_embeddings_type="relative", conv_depthwise_kernel_size=7)
MODELS = {
    "wav2vec2": ("wav2vec2", "ctc", {}),
    "stable layer norm": ("wav2vec2", "ctc", {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "wavlm": ("wavlm", "ctc", {}),
    "conformer": ("wav2vec2-conformer", "ctc", CONFORMER),
}


@pytest.mark.parametrize("name", ["wav2vec2", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "conformer", "wavlm", "stable layer norm"))])
def test_open_shapes(name, tmp_path):
    family, head, changes = MODELS[name]
    model = tiny.slim(tiny.config(family, **changes), head)
    record = export.export(model, tmp_path / "out", format="stablehlo")
    assert record["checked"] and record["relative_difference"] <= 1e-5 and record["platforms"] == ["cpu", "cuda", "tpu"]
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["format"] == "stablehlo"
    program = stablehlo.read(tmp_path / "out")
    for rows, samples in ((1, 700), (3, 1111)):
        x = np.random.default_rng(samples).standard_normal((rows, samples)).astype(np.float32)
        mask = (np.arange(samples) < samples - 100 * np.arange(rows)[:, None]).astype(np.int32)
        ours = model(input_values=x, attention_mask=mask)
        theirs = program(input_values=x, attention_mask=mask)
        assert np.abs(np.asarray(ours.logits) - np.asarray(theirs["logits"])).max() < 1e-4
        assert np.asarray(theirs["lengths"]).tolist() == np.asarray(ours.lengths).tolist()


def test_the_shortest_clip():
    model = tiny.slim()
    assert model(input_values=np.zeros((1, stablehlo.least(model)), np.float32)).logits.shape[1] == 1


def test_bundled_teacher_says_the_same_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "bundled:wav2vec2-ctc-en", str(out), "--format", "stablehlo"]) == 0
    assert "jax.export.deserialize" in capsys.readouterr().out
    program, model, task = stablehlo.read(out), hub.load("bundled:wav2vec2-ctc-en"), CTCTask.from_pretrained(out)
    rows = load_rows("bundled:prompts-en/validation")[:2]
    for i in range(len(rows)):
        wave = task.inputs(rows.audio(i))[None]
        mask = np.ones(wave.shape, np.int32)
        texts = [task.decode(np.asarray(x[0]).argmax(-1)) for x in (
            model(input_values=wave, attention_mask=mask).logits,
            program(input_values=wave, attention_mask=mask)["logits"])]
        assert texts[0] == texts[1] != ""


def test_refusals(tmp_path):
    with pytest.raises(ExportError, match="has no model.stablehlo"):
        stablehlo.read(tmp_path)
    (tmp_path / "model.stablehlo").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="not a program that jax"):
        stablehlo.read(tmp_path)
