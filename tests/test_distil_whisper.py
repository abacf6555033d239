"""Distil-Whisper: copied layers, the objective, pseudo-labels with their filter, and the whole on tiny models."""
import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_tasks
import tiny_whisper as tw
from conftest import write_data
from test_linearize import value

from jaxslim import cli, hub, pseudo, recipe
from jaxslim.data import DataError, load_rows
from jaxslim.methods.distil_whisper import DistilWhisper
from jaxslim.models import bind
from jaxslim.spec import Spec, SpecError

TEACHER = tiny.slim(Spec(tw.config(frames=20, encoder_layers=1, decoder_layers=3), "whisper", "seq2seq",
                         {"decoder.2.ffn": {"units": 24}, "encoder.0.ffn": {"units": 16}}), seed=5)
LABELS = np.array([[3, 4, 5, tw.EOS], [6, tw.EOS, -100, -100]], np.int32)
BATCH = {"input_features": tw.features(frames=20), "decoder_input_ids": tw.ids(length=4), "labels": LABELS}


def test_layers_are_copied():
    made = DistilWhisper().start(TEACHER, None, None)
    bind.check(made.spec, made.params)
    assert made.spec["decoder_layers"] == 2 and made.spec["encoder_layers"] == 1
    assert made.spec.blocks == {"decoder.1.ffn": {"units": 24}, "encoder.0.ffn": {"units": 16}}
    name = "model.decoder.layers.{}.fc1.weight"
    assert made.params[name.format(1)] is TEACHER.params[name.format(2)]
    assert made.params[name.format(0)] is TEACHER.params[name.format(0)]
    assert DistilWhisper(decoder_layers=1).layers(TEACHER.spec) == (2,)
    assert DistilWhisper(decoder_layers=2, copied=(0, 1)).layers(TEACHER.spec) == (0, 1)
    assert DistilWhisper(decoder_layers=3).start(TEACHER, None, None) is TEACHER
    large = TEACHER.spec.replace(config={**TEACHER.spec.config, "decoder_layers": 32}, blocks={})
    assert DistilWhisper().layers(large) == (0, 31) and DistilWhisper(decoder_layers=4).layers(large) == (0, 10, 21, 31)


def test_objective():
    """The teacher as its own student: no KL, and the cross-entropy over labelled tokens only."""
    method = DistilWhisper(decoder_layers=3)
    terms = value(method, TEACHER, TEACHER, BATCH)
    logits = np.asarray(TEACHER(**{k: v for k, v in BATCH.items() if k != "labels"}).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.mean([log_p[b, t, LABELS[b, t]] for b, t in zip(*np.nonzero(LABELS >= 0))])
    assert terms["ce"] == (pytest.approx(want, rel=1e-4), pytest.approx(0.8))
    assert terms["kl"] == (pytest.approx(0, abs=1e-5), 1.0)
    student = DistilWhisper().start(TEACHER, None, None)
    assert value(DistilWhisper(), student, TEACHER, BATCH)["kl"][0] > 1e-3
    assert set(value(DistilWhisper(kl_weight=0.0), student, TEACHER, BATCH)) == {"ce"}
    frozen = {n for n in student.params if method.group(n) == "frozen"}
    assert frozen == {n for n in student.params if n.startswith("model.encoder.")}


@pytest.mark.parametrize("options, message", [
    ({"decoder_layers": 4}, "4 decoder_layers of a teacher with 3"), ({"decoder_layers": 0}, "0 decoder_layers"),
    ({"copied": (0,)}, r"copied \[0\]; give 2 ascending numbers from 0 to 2"), ({"copied": (2, 1)}, r"copied \[2, 1\]"),
    ({"copied": (1, 3)}, r"copied \[1, 3\]")])
def test_what_cannot_be(options, message):
    with pytest.raises(SpecError, match=message):
        DistilWhisper(**options).start(TEACHER, None, None)
    with pytest.raises(SpecError, match="the teacher is a wav2vec2 model"):
        DistilWhisper().start(tiny.slim(), None, None)


def test_pseudo_labels(tmp_path, small, capsys):
    """With a CTC model: what it says becomes the text; the filter, resuming, and other settings."""
    data = load_rows(small["train"])
    made = pseudo.label(small["model"], data, tmp_path / "all", max_wer=1e9, part=5)
    assert made["kept"] + made["empty"] == made["rows"] == 8 and made["too_far"] == made["unjudged"] == 0
    rows, times = load_rows(str(tmp_path / "all")), {}
    for p in (tmp_path / "all").glob("*.parquet"):
        times[p] = p.stat().st_mtime_ns
    assert len(rows) == made["kept"] and set(rows.column("reference")) <= set(data.column("text"))
    assert rows.audio(0).shape == (round(16000 * rows.duration(0)),)
    table = pq.read_table(min(times)).to_pylist()
    assert all(r["text"] != r["reference"] and r["wer"] > 0 for r in table)      # random weights
    (tmp_path / "all" / "counts-00001.json").unlink()
    assert pseudo.label(small["model"], data, tmp_path / "all", max_wer=1e9, part=5) == made
    assert [p.name for p, t in times.items() if p.stat().st_mtime_ns != t] in ([], ["part-00001.parquet"])
    with pytest.raises(DataError, match="made with another max_wer"):
        pseudo.label(small["model"], data, tmp_path / "all", max_wer=0.5, part=5)
    assert cli.main(["data", "label", small["model"], small["train"], str(tmp_path / "none"), "--max-wer", "0"]) == 3
    assert "No clip of" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(DataError, match="holds Parquet files already"):
        pseudo.label(small["model"], data, tmp_path / "other")


@pytest.mark.slow
def test_the_whole(tmp_path):
    """A tiny random Whisper labels clips; its student learns from them and is saved as a stock model."""
    teacher = tiny_tasks.folder("whisper", tmp_path / "teacher")
    pseudo.label(teacher, write_data(tmp_path / "data", rows=4), tmp_path / "labelled", max_wer=1e9)
    tree = {"teacher": teacher, "data": {"train": str(tmp_path / "labelled")}, "control": False, "bench_seconds": [],
            "stages": [{"name": "distil", "method": "distil_whisper", "options": {"decoder_layers": 1},
                        "train": {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "run"))
    made, old = hub.load(tmp_path / "run" / "final"), hub.load(teacher)
    assert made.spec["decoder_layers"] == 1
    moved = {k for k, v in made.params.items() if not np.array_equal(v, old.params[k])}
    assert moved and not any(k.startswith("model.encoder.") for k in moved)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), made.params))
