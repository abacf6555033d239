"""New models: random weights for a config, a new head for a new vocabulary, and `jaxslim train` of both."""
import json

import conftest
import numpy as np
import pytest
import remote
import soundfile
import tiny

from jaxslim import hub, recipe, scratch
from jaxslim.config import ConfigError
from jaxslim.models import bind
from jaxslim.spec import Spec
from jaxslim.train import log as L

CONFORMER = {"model_type": "wav2vec2-bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24, "conv_depthwise_kernel_size": 3, "feature_projection_input_dim": 160,
             "layerdrop": 0.0, "mask_time_prob": 0.0}
STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "buckets": [0.12],
         "mesh": "data=1", "groups": {"main": {"learning_rate": 1e-3}}}


def config(tmp_path, small, **changes):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"data": {"train": small["train"]}, "output_dir": str(tmp_path / "run"), **STEPS,
                                **changes}))
    return str(path)


def test_weights_as_transformers_draws_them():
    torch = pytest.importorskip("torch")
    import transformers

    for family, more in (("wav2vec2", {"feat_extract_norm": "layer", "conv_bias": True}), ("wav2vec2-bert", {})):
        torch.manual_seed(0)
        made = transformers.CONFIG_MAPPING[family](hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                                   num_attention_heads=4, vocab_size=30, **more)
        theirs = transformers.AutoModelForCTC.from_config(made).state_dict()
        spec = Spec(made.to_dict(), family, "ctc")
        ours = scratch.initial(spec, 0)
        assert ours.keys() == bind.shapes(spec).keys()
        for name, value in ours.items():
            want = theirs[name].float()
            if name.endswith("original0"):
                assert value.mean() == pytest.approx(float(want.mean()), rel=0.25), name
            elif value.ndim > 1 and "distance_embedding" not in name:
                assert value.std() == pytest.approx(float(want.std()), rel=0.25), name
            elif name.endswith("norm.weight"):
                np.testing.assert_array_equal(value, want)


def test_training_from_scratch(small, tmp_path, caplog):
    path = config(tmp_path, small, model=CONFORMER)
    model = recipe.train(path)
    assert model.spec.family == "wav2vec2-bert" and model.spec["vocab_size"] == 11  # <pad> <s> </s> <unk> | and a to f
    first = hub.load(tmp_path / "run" / "initial")
    assert any(np.any(np.asarray(first.params[k]) != v) for k, v in model.params.items())
    assert hub.load(tmp_path / "run" / "final").fingerprint == model.fingerprint
    assert len(L.read(str(tmp_path / "run"))) == 2
    again = recipe.train(path)  # finished: the same model, no new weights drawn
    assert again.fingerprint == model.fingerprint
    from transformers import AutoFeatureExtractor

    made = AutoFeatureExtractor.from_pretrained(tmp_path / "run" / "final")
    assert type(made).__name__ == "SeamlessM4TFeatureExtractor"


def test_a_new_vocabulary(small, tmp_path):
    model = recipe.train(config(tmp_path, small, model=small["model"], vocabulary="data", max_steps=1,
                                options={"freeze": ["wav2vec2"]}))
    old = hub.load(small["model"])
    assert model.params["lm_head.weight"].shape == (11, 32)
    assert np.abs(model.params["lm_head.weight"] - old.params["lm_head.weight"]).max() > 0.01
    for name, value in model.params.items():
        if not name.startswith("lm_head"):
            np.testing.assert_array_equal(value, old.params[name])
    vocabulary = json.loads((tmp_path / "run" / "final" / "vocab.json").read_text())
    assert set("abcdef") <= set(vocabulary)


def test_a_head_on_an_encoder_that_had_none(small, tmp_path):
    """Its names have no prefix; all of its weights are kept."""
    encoder = tiny.slim(head="none", **conftest.SHAPE)
    hub.save(encoder, tmp_path / "encoder")
    made = hub.load(scratch.with_vocabulary(str(tmp_path / "encoder"), tmp_path / "new", small["train"], 0))
    assert made.params.keys() == {"lm_head.weight", "lm_head.bias", *(f"wav2vec2.{k}" for k in encoder.params)}
    for name, value in encoder.params.items():
        np.testing.assert_array_equal(made.params[f"wav2vec2.{name}"], value)


def test_a_classifier_of_clips(small, tmp_path, capsys):
    """A new head for the labels of the data; it learns, `jaxslim eval` scores it, transformers opens it."""
    from jaxslim import cli

    rng, lines = np.random.default_rng(0), []
    for i in range(24):
        wave = np.sin(2 * np.pi * (300 if i % 2 else 2000) * np.arange(1900) / 16000 + rng.uniform(0, 6))
        (tmp_path / f"{i}.wav").write_bytes(L.wav_bytes(0.3 * wave + 0.01 * rng.standard_normal(1900)))
        lines.append(json.dumps({"id": f"{i}", "audio": f"{i}.wav", "label": "low" if i % 2 else "high"}))
    (tmp_path / "tones.jsonl").write_text("\n".join([*lines, json.dumps({"id": "odd", "audio": "0.wav"})]))
    data = str(tmp_path / "tones.jsonl")
    model = recipe.train(config(tmp_path, small, model=small["model"], labels="data", max_steps=40, eval_steps=20,
                                per_device_train_batch_size=8, data={"train": data, "validation": data},
                                groups={"main": {"learning_rate": 3e-3}}))
    assert model.spec["id2label"] == {"0": "high", "1": "low"} and "lm_head.weight" not in model.params
    first, old = hub.load(tmp_path / "run" / "initial"), hub.load(small["model"])
    np.testing.assert_array_equal(first.params["wav2vec2.encoder.layer_norm.weight"],
                                  old.params["wav2vec2.encoder.layer_norm.weight"])
    final = str(tmp_path / "run" / "final")
    assert cli.main(["eval", final, "--data", data, "--predictions", str(tmp_path / "said.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] > 0.9 and result["n"] == 24 and result["skipped"] == 1
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.pipeline("audio-classification", final)
    assert isinstance(theirs.model, torch.nn.Module)
    for row in said[:4]:
        wave = soundfile.read(tmp_path / f"{row['id']}.wav")[0]
        assert theirs({"raw": wave, "sampling_rate": 16000})[0]["label"] == row["pred_text"]
    with pytest.raises(ConfigError, match="0 different values in the column `label`"):
        recipe.train(config(tmp_path, small, model=small["model"], labels="data", output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("change, message", [
    ({"model_type": "wav2vec"}, "model_type 'wav2vec' cannot be trained from scratch. Did you mean 'wav2vec2'"),
    ({"hiden_size": 3}, "wav2vec2-bert has no key 'hiden_size' in its config. Did you mean 'hidden_size'")])
def test_configs_that_cannot_be(small, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        recipe.train(config(tmp_path, small, model=CONFORMER | change))


def test_a_run_in_a_bucket(small, tmp_path, monkeypatch):
    """All files of a run but the checkpoints, which Orbax writes to gs:// by a client of its own."""
    from jaxslim.train import loop

    real = loop.Checkpoints
    monkeypatch.setattr(loop, "Checkpoints", lambda folder, keep: real(str(tmp_path / "checkpoints"), keep))
    (tmp_path / "c.yaml").write_text(json.dumps({
        "model": small["model"], "data": {"train": small["train"], "validation": small["validation"]},
        "output_dir": "gs://bucket/run", "eval_steps": 1, **STEPS}))
    with remote.bucket():
        from etils import epath

        model = recipe.train(str(tmp_path / "c.yaml"))
        folder = epath.Path("gs://bucket/run")
        assert {"config.yaml", "metrics.jsonl", "best.npz", "final"} <= {p.name for p in folder.iterdir()}
        assert hub.load("gs://bucket/run/final").fingerprint == model.fingerprint
        assert [r["step"] for r in L.read("gs://bucket/run") if "loss" in r] == [1, 2]



@pytest.mark.slow
def test_a_changed_config_and_augmentation(small, tmp_path):
    trained = recipe.train(config(tmp_path, small, model=small["model"], min_seconds=0.0, buckets=[0.12, 0.7],
                                  model_config={"hidden_dropout": 0.3}, augment={"noise": 1.0}, join_seconds=0.7))
    assert trained.spec["hidden_dropout"] == 0.3 and hub.load(tmp_path / "run/final").spec["hidden_dropout"] == 0.3
    model = hub.load(small["model"])
    for values, message in (({"hidden_dropouts": 0.1}, "no 'hidden_dropouts'. Did you mean 'hidden_dropout'"),
                            ({"hidden_size": 2 * model.spec["hidden_size"]}, "would change the model's parameters")):
        with pytest.raises(ConfigError, match=message):
            scratch.changed(model, values)
    with pytest.raises(ConfigError, match="augment nois"):
        recipe.train(config(tmp_path, small, model=small["model"], augment={"nois": 1.0}))
