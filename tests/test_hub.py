"""Reading, writing and importing model folders, and every way in which one can be broken."""
import json
import os
import pathlib
import shutil
import stat
import struct

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_whisper
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxslim import hub
from jaxslim.hub import CONFIG, INDEX, WEIGHTS, HubError

BUNDLED = "bundled:wav2vec2-ctc-en"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small CTC model as `hub.save` writes it, tokenizer files included."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    hub.save(tiny.slim(vocab_size=32), folder, source=BUNDLED)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not ...}))


def shard(folder, count=2):
    """model.safetensors -> `count` shards and their index; returns the shards' names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, where = sorted(tensors), {}
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        part = names[i::count]
        save_file({k: tensors[k] for k in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def same(a, b):
    assert a.spec == b.spec and sorted(a.params) == sorted(b.params)
    for name, value in a.params.items():
        np.testing.assert_array_equal(value, b.params[name], strict=True)


# What is read and written


@pytest.mark.parametrize("family, head, changes", [
    ("wav2vec2", "ctc", dict(feat_extract_norm="layer", do_stable_layer_norm=True)),
    ("hubert", "none", dict(conv_pos_batch_norm=True, feat_proj_layer_norm=False))])
def test_round_trip_is_bit_for_bit(family, head, changes, tmp_path):
    pytest.importorskip("torch")
    theirs = pathlib.Path(tiny.save(tiny.torch_model(tiny.config(family, **changes), head), tmp_path / "theirs"))
    model = hub.load(theirs)
    assert (model.spec.family, model.spec.head, model.spec.blocks) == (family, head, {})
    assert all(v.dtype == jnp.float32 or k.endswith("num_batches_tracked") for k, v in model.params.items())
    hub.save(model, tmp_path / "ours")
    before, after = load_file(theirs / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert list(before) == list(after)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], strict=True)
    with safe_open(tmp_path / "ours" / WEIGHTS, "np") as file:
        assert file.metadata()["format"] == "pt"
    assert json.loads((theirs / CONFIG).read_text()) == json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert hub.load(tmp_path / "ours").fingerprint == model.fingerprint


def test_import_check_compares_every_layer(tmp_path):
    pytest.importorskip("torch")
    theirs = tiny.save(tiny.torch_model(tiny.config("hubert"), "ctc"), tmp_path / "theirs")
    rows = hub.import_model(theirs, tmp_path / "ours", check=True)
    assert [r[0] for r in rows] == ["frontend", "projection", "embedding", "encoder.0", "encoder.1", "logits"]
    assert all(ok and difference < 2e-5 * max(1, scale) for _, difference, scale, ok in rows)
    tiny_whisper.pair(tmp_path / "whisper", frames=20)
    rows = hub.import_model(tmp_path / "whisper", tmp_path / "ours-whisper", check=True)
    assert [r[0] for r in rows] == [
        "embedding", "encoder.0", "encoder.1", "decoder.embedding", "decoder.0", "decoder.1", "logits"]
    assert all(ok and difference < 2e-5 * max(1, scale) for _, difference, scale, ok in rows)
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    name = "hubert.encoder.layers.1.attention.v_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, tmp_path / "ours" / WEIGHTS)
    wrong = {tap: ok for tap, *_, ok in hub.compare(hub.load(tmp_path / "ours"), theirs)}
    assert wrong["encoder.0"] and not wrong["encoder.1"] and not wrong["logits"]


def test_half_precision_is_a_storage_format(saved, tmp_path):
    model = hub.load(saved)
    hub.save(model, tmp_path / "half", source=saved, dtype="float16")
    half, config = hub.load(tmp_path / "half"), json.loads((tmp_path / "half" / CONFIG).read_text())
    assert config["dtype"] == "float32"  # in what to run, so that transformers opens it in fp32
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.6 * (saved / WEIGHTS).stat().st_size
    for name, value in model.params.items():
        assert half.params[name].dtype == jnp.float32
        np.testing.assert_array_equal(half.params[name], np.asarray(value, np.float16).astype(np.float32))
    low = hub.load(saved, dtype="bfloat16")
    assert {v.dtype for v in low.params.values()} == {jnp.dtype(jnp.bfloat16)}
    hub.save(low, tmp_path / "low")
    assert json.loads((tmp_path / "low" / CONFIG).read_text())["dtype"] == "bfloat16"
    same(hub.load(tmp_path / "low", dtype="bfloat16"), low)


def test_changed_blocks_travel_in_the_config(tmp_path):
    spec = tiny.slim().spec.with_block("encoder.0.attention", mixer="hedgehog", options={"features": 4})
    spec = spec.with_block("encoder.1.ffn", units=5)
    model = tiny.slim(spec)
    hub.save(model.replace(params={**model.params, "aux.multiplier.macs": jnp.zeros(())}), tmp_path / "m")
    ours = json.loads((tmp_path / "m" / CONFIG).read_text())["jaxslim"]
    assert ours == {"version": 1, "family": "wav2vec2", "head": "ctc", "blocks": dict(spec.blocks)}
    again = hub.load(tmp_path / "m")
    assert again.spec.blocks == spec.blocks and again.fingerprint == hub.load(tmp_path / "m").fingerprint
    for name, value in model.params.items():  # and the training-only parameter is gone
        np.testing.assert_array_equal(value, again.params[name])
    assert set(again.params) == set(model.params)
    with pytest.raises(HubError, match="only a stock model"):
        hub.compare(again, tmp_path / "m")


def test_tokenizer_files_travel_and_others_do_not(saved, copy, tmp_path):
    (copy / "training_args.bin").write_bytes(b"x")
    hub.save(hub.load(copy), tmp_path / "out", source=copy)
    names = {CONFIG, WEIGHTS, "vocab.json", "tokenizer_config.json", "processor_config.json", "NOTICE"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names == {f.name for f in saved.iterdir()}
    # the weights are as readable as the text files
    assert len({stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "out").iterdir()}) == 1
    from jaxslim.data.tasks import CTCTask

    assert CTCTask.from_pretrained(hub.folder(tmp_path / "out")).blank_id == 0


def test_shards_and_old_names(saved, copy):
    tensors = load_file(copy / WEIGHTS)
    for i, old in enumerate(("weight_g", "weight_v")):
        new = f"parametrizations.weight.original{i}"
        tensors = {k.replace(new, old): v for k, v in tensors.items()}
    tensors = {k.replace("layer_norm.weight", "layer_norm.gamma").replace("layer_norm.bias", "layer_norm.beta"): v
               for k, v in tensors.items()}
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in tensors and "wav2vec2.encoder.layer_norm.beta" in tensors
    save_file(tensors, copy / WEIGHTS)
    assert len(shard(copy, 3)) == 3
    edit(copy, dtype=..., torch_dtype="float32")
    same(hub.load(copy), hub.load(saved))


def test_pretraining_checkpoints_give_their_encoder(copy, tmp_path):
    tensors = {k: v for k, v in load_file(copy / WEIGHTS).items() if not k.startswith("lm_head")}
    extra = {f"{k}.weight": np.ones((2, 2), np.float32) for k in ("quantizer.weight_proj", "project_hid", "project_q")}
    save_file({**tensors, **extra}, copy / WEIGHTS)
    edit(copy, architectures=["Wav2Vec2ForPreTraining"])
    model = hub.load(copy)
    assert model.spec.head == "none" and set(model.params) == {k.removeprefix("wav2vec2.") for k in tensors}
    hub.save(model, tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / CONFIG).read_text())["architectures"] == ["Wav2Vec2Model"]
    same(hub.load(tmp_path / "encoder"), model)


def test_head_is_told_by_the_weights_and_the_mask_embedding_may_be_absent(saved, copy):
    name = "wav2vec2.masked_spec_embed"  # as in facebook/wav2vec2-base-960h
    save_file({k: v for k, v in load_file(copy / WEIGHTS).items() if k != name}, copy / WEIGHTS)
    edit(copy, architectures=None)
    model = hub.load(copy)
    assert model.spec.head == "ctc" and not np.any(model.params[name])
    edit(copy, mask_time_prob=0.0)
    assert name not in hub.load(copy).params
    shutil.copy(saved / WEIGHTS, copy / WEIGHTS)
    assert name not in hub.load(copy).params


def test_bundled_and_names(monkeypatch, tmp_path):
    assert hub.folder(BUNDLED).name == "wav2vec2-ctc-en" and (hub.folder(BUNDLED) / "vocab.json").is_file()
    with pytest.raises(HubError, match="Did you mean 'wav2vec2-ctc-en'"):
        hub.folder("bundled:wav2vec2-ctc")
    with pytest.raises(HubError, match="does not exist. A model is bundled:NAME"):
        hub.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="is a file; give the folder"):
        hub.load(tmp_path / "file")


# Broken folders


BREAKAGES = {  # what is done to a good folder -> what the error says
    "no config": (lambda f: (f / CONFIG).unlink(), "has weights .model.safetensors. but no config.json"),
    "not a model": (lambda f: [p.unlink() for p in (f / CONFIG, f / WEIGHTS)], "is not a model folder"),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{"), "config.json is not valid JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object"),
    "unknown architecture": (lambda f: edit(f, architectures=["Data2VecAudioForCTC"], model_type="data2vec-audio"),
                             "Data2VecAudioForCTC is not supported; supported are wav2vec2, .*whisper.*model_type"),
    "unsupported head": (lambda f: edit(f, architectures=["Wav2Vec2ForMaskedLM"]),
                         "Wav2Vec2ForMaskedLM is not supported; supported are Wav2Vec2Model, Wav2Vec2ForCTC"),
    "unknown model type": (lambda f: edit(f, architectures=..., model_type="parakeet"), "model_type 'parakeet' is not"),
    "remote code": (lambda f: edit(f, architectures=["MyForCTC"], model_type="mine", auto_map={"AutoModel": "m.My"}),
                    "MyForCTC is not supported.*wants to run its own code .auto_map., which is never done"),
    "unknown activation": (lambda f: edit(f, hidden_act="mish2"), "'mish2' of the config is not supported"),
    "nonsense in config": (lambda f: edit(f, conv_dim="many"), "config.json does not describe a model"),
    "newer version": (lambda f: edit(f, jaxslim={"version": 9, "family": "wav2vec2", "head": "ctc"}),
                      "has version 9"),
    "unknown family": (lambda f: edit(f, jaxslim={"version": 1, "family": "mimi", "head": "ctc"}),
                       "'mimi' is not supported"),
    "LFS pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                    "model.safetensors is a Git LFS pointer.*git lfs pull"),
    "LFS config": (lambda f: (f / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS pointer"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 4000), "4000 bytes. is truncated or not a safetensors file"),
    "cut short": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 5), "is truncated"),
    "empty file": (lambda f: os.truncate(f / WEIGHTS, 0), "0 bytes. is truncated"),
    "absurd header": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"), "is truncated or not"),
    "no pickle": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
                  "pytorch_model.bin .* is truncated or not a PyTorch weights file"),
    "no msgpack": (lambda f: (f / WEIGHTS).rename(f / "flax_model.msgpack"),
                   "flax_model.msgpack .* is truncated or not a Flax msgpack file"),
    "shard elsewhere": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.safetensors") and (
        f / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../a.bin"}}'), "no file of this folder"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
    "missing shard": (lambda f: (f / shard(f)[1]).unlink(), "1 of 2 weight files are missing .model-00002-of-00002"),
    "half a shard": (lambda f: os.truncate(f / shard(f)[0], 900), "model-00001.*safetensors .900 bytes. is truncated"),
    "no index": (lambda f: (shard(f), (f / INDEX).unlink()), "but no model.safetensors.index.json"),
    "wrong vocabulary size": (lambda f: edit(f, vocab_size=40),
                              r"misshapen lm_head.weight: \(32, 32\), expected \(40, 32\)"),
    "too few layers": (lambda f: edit(f, num_hidden_layers=3), "missing wav2vec2.encoder.layers.2.*and [0-9]+ more"),
    "too many layers": (lambda f: edit(f, num_hidden_layers=1), "unexpected wav2vec2.encoder.layers.1"),
    "other width": (lambda f: edit(f, intermediate_size=64), "misshapen .*Config and weights must come from the same"),
    "other vocabulary": (lambda f: (f / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 32})),
                         "ids up to 32, but the model has 32 outputs"),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_broken_folders_say_what_and_where(what, copy):
    damage, message = BREAKAGES[what]
    damage(copy)
    with pytest.raises(HubError, match=message) as caught:
        hub.load(copy)
    text = str(caught.value)
    assert "copy" in text and text.endswith(".") and "\n" not in text and len(text) < 900


def test_shard_that_lacks_a_listed_weight(copy):
    first, _ = shard(copy)
    tensors = load_file(copy / first)
    tensors.popitem()
    save_file(tensors, copy / first)
    with pytest.raises(HubError, match="which does not hold it"):
        hub.load(copy)


# Output folders


def test_foreign_folders_are_refused_and_ours_are_replaced(saved, tmp_path):
    model = hub.load(saved)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(HubError, match="holds files that jaxslim did not write"):
        hub.save(model, foreign)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HubError, match="is a file; give a folder"):
        hub.save(model, tmp_path / "file")
    shutil.copytree(saved, tmp_path / "theirs")  # a model folder, but not written by us
    save_file(load_file(saved / WEIGHTS), tmp_path / "theirs" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(HubError, match="did not write"):
        hub.save(model, tmp_path / "theirs")

    (tmp_path / "empty").mkdir()
    hub.save(model, tmp_path / "empty", source=saved)
    (tmp_path / "empty" / "README.md").write_text("a card")
    (tmp_path / "empty" / "stage.json").write_text("{}")
    hub.save(model, tmp_path / "empty")  # the stage and the vocabulary belonged to the model before
    assert {f.name for f in (tmp_path / "empty").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert {f.name for f in tmp_path.iterdir()} == {"foreign", "file", "theirs", "empty"}  # nothing left beside


def test_a_save_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch):
    hub.save(hub.load(saved), tmp_path / "out")
    before = hub.load(tmp_path / "out").fingerprint
    other = tiny.slim(vocab_size=32, seed=1)

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(hub, "save_file", fail)
            with pytest.raises(HubError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
                hub.save(other, tmp_path / "out")
        if isinstance(error, OSError):
            assert "no space left" in str(caught.value)
        assert hub.load(tmp_path / "out").fingerprint == before
        assert [f.name for f in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out").rename(tmp_path / ".out.old")  # killed between the two renames
    hub.save(other, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    with pytest.raises(HubError, match="The model to be saved does not fit"):
        hub.save(other.replace(params={}), tmp_path / "out")


def test_unwritable_folder(saved, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)  # as root every folder is writable
    with pytest.raises(HubError, match="Cannot write .*out: no permission. Choose a folder you may write to"):
        hub.save(hub.load(saved), tmp_path / "out")


def test_a_file_where_a_parent_folder_should_be(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="Cannot write "):
        hub.save(hub.load(saved), tmp_path / "file" / "out")


# The hub


HUB_ERRORS = [
    (errors.LocalEntryNotFoundError, "not in the hub's cache"), (errors.GatedRepoError, "is gated: accept its terms"),
    (errors.RepositoryNotFoundError, "no such repository"),
    (errors.RevisionNotFoundError, "org/name has no revision 'v9'"), (ConnectionError, "failed: Name or service"),
]


@pytest.mark.parametrize("error, message", HUB_ERRORS, ids=[m for _, m in HUB_ERRORS])
def test_hub_errors_are_sentences(error, message, monkeypatch):
    def download(*args, **kwargs):
        raised = error.__new__(error)  # most want an HTTP response to be made of
        raised.args = ("Name or service\nnot known",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubError, match=message) as caught:
        hub.load("org/name@v9")
    assert "org/name" in str(caught.value) and str(caught.value).endswith(".")


def test_hub_id_is_downloaded_and_cached(saved, tmp_path, monkeypatch):
    asked = {}

    def download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same(hub.load("org/some.name@refs/pr/3"), hub.load(saved))
    assert (asked["repo"], asked["revision"]) == ("org/some.name", "refs/pr/3")
    assert not any("bin" in p for p in asked["patterns"])
    hub.folder("org/name", revision="main")
    assert asked["revision"] == "main"


def test_offline_without_a_cached_copy(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="org/name is no local folder .*HF_HUB_OFFLINE is set"):
        hub.load("org/name")


def test_push(saved, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **kw):
            calls.append(("create", repo_id, kw))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, folder_path, **kw):
            calls.append(("upload", sorted(os.listdir(folder_path)), kw["repo_id"]))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    url = hub.push(hub.load(saved), "me/small", source=saved, private=True, token="t")
    assert url == "https://huggingface.co/me/small"
    assert calls[1] == ("create", "me/small", {"private": True, "exist_ok": True})
    assert {CONFIG, WEIGHTS, "vocab.json"} < set(calls[2][1]) and calls[2][2] == "me/small"


def test_remote_folders(saved, monkeypatch, tmp_path):
    from etils import epath

    path = epath.Path
    monkeypatch.setattr(epath, "Path", lambda p: path(str(p).replace("gs://bucket", str(tmp_path))))
    hub.save(hub.load(saved), "gs://bucket/runs/final", source=saved)
    assert (tmp_path / "runs/final" / "vocab.json").is_file()
    same(hub.load("gs://bucket/runs/final"), hub.load(saved))
    with pytest.raises(HubError, match="gs://bucket/none does not exist"):
        hub.load("gs://bucket/none")
