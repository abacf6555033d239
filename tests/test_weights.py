"""Folders with PyTorch `.bin` or Flax msgpack weights load as the same model in safetensors does, to the bit."""
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
import tiny
from flax import serialization, traverse_util

from jaxslim import hub, weights
from jaxslim.hub import HubError
from jaxslim.train import mesh

torch = pytest.importorskip("torch")

TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50,
            max_position_embeddings=40, num_labels=3)
WHISPER = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
               encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, num_mel_bins=8, max_source_positions=50,
               max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
               suppress_tokens=[], begin_suppress_tokens=[])
MODELS = {  # family, changes of the config, head
    "wav2vec2": ("wav2vec2", dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True), "ctc"),
    "wav2vec2 encoder": ("wav2vec2", {}, "none"), "whisper": ("whisper", WHISPER, "seq2seq"),
    "whisper untied": ("whisper", WHISPER | {"tie_word_embeddings": False}, "seq2seq"),
    "whisper without head": ("whisper", WHISPER, "none"), "roberta": ("roberta", TEXT, "classification"),
    "roberta encoder": ("roberta", TEXT, "none"), "bert": ("bert", TEXT, "classification"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (the torch model, its folder, the Slim read from safetensors)."""
    made = {}

    def make(name):
        if name not in made:
            from transformers import CONFIG_MAPPING

            family, changes, head = MODELS[name]
            plain = family != "wav2vec2"
            config = CONFIG_MAPPING[family](**changes).to_dict() if plain else tiny.config(family, **changes)
            model = tiny.torch_model(config, head)
            folder = pathlib.Path(tiny.save(model, tmp_path_factory.mktemp("weights") / "model"))
            made[name] = model, folder, hub.load(folder)
        return made[name]

    return make


def stripped(folder, target):
    """A copy of the folder without weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def split(tensors, count=3):
    names = list(tensors)
    return [{k: tensors[k] for k in names[i::count]} for i in range(count)]


def write_index(folder, stem, suffix, parts):
    import json

    files = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.{suffix}" for i in range(len(parts))]
    where = {k: file for file, part in zip(files, parts) for k in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [folder / file for file in files]


@pytest.mark.parametrize("name", MODELS)
def test_bin(name, saved, tmp_path):
    model, folder, want = saved(name)
    folder = stripped(folder, tmp_path / "bin")
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization="whisper" not in name)
    assert hub.load(folder).fingerprint == want.fingerprint
    (folder / "pytorch_model.bin").unlink()
    parts = split(model.state_dict())
    for file, part in zip(write_index(folder, "pytorch_model", "bin", parts), parts):
        torch.save(part, file)
    assert hub.load(folder).fingerprint == want.fingerprint
    file.unlink()
    with pytest.raises(HubError, match="1 of 3 weight files are missing .pytorch_model-00003-of-00003.bin"):
        hub.load(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(HubError, match="has pytorch_model-00001-of-00003.bin but no pytorch_model.bin.index.json"):
        hub.load(folder)


def flax_tree(model, family: str) -> dict:
    """What transformers 4's Flax class of a model stored: its `rename_key_and_reshape_tensor` for every weight."""
    leaves = {}
    for name, value in model.state_dict().items():
        array, names = value.numpy(), name.split(".")
        *owner, leaf = names
        if name.startswith("proj_out"):
            if model.config.tie_word_embeddings:
                continue
            owner = ["lm_head"]
        if owner[-2:] == ["parametrizations", "weight"]:
            owner, leaf = owner[:-2], {"original0": "weight_g", "original1": "weight_v"}[leaf]
        elif leaf == "weight" and ("embed" in owner[-1]):
            leaf = "embedding"
        elif leaf == "weight" and array.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf, array = "kernel", array.T if array.ndim == 2 else array.transpose(2, 1, 0)
        leaves[tuple([*owner, leaf])] = np.ascontiguousarray(array)
    return leaves


FLAX = [n for n in MODELS]


@pytest.mark.parametrize("name", FLAX)
def test_flax(name, saved, tmp_path):
    model, folder, want = saved(name)
    folder, leaves = stripped(folder, tmp_path / "flax"), flax_tree(model, name)
    assert any(key[-1] == "kernel" for key in leaves) and any(key[-1] == "scale" for key in leaves)
    tree = traverse_util.unflatten_dict(leaves)
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert hub.load(folder).fingerprint == want.fingerprint
    (folder / "flax_model.msgpack").unlink()
    parts = split({"/".join(k): v for k, v in leaves.items()})
    for file, part in zip(write_index(folder, "flax_model", "msgpack", parts), parts):
        file.write_bytes(serialization.msgpack_serialize(part))
    assert hub.load(folder).fingerprint == want.fingerprint
    parts[0].popitem()
    (folder / "flax_model-00001-of-00003.msgpack").write_bytes(serialization.msgpack_serialize(parts[0]))
    with pytest.raises(HubError, match="which does not hold it"):
        hub.load(folder)


def test_flax_is_checked_as_strictly(saved, tmp_path):
    model, folder, _ = saved("roberta")
    folder, leaves = stripped(folder, tmp_path / "flax"), flax_tree(model, "roberta")
    key = ("roberta", "encoder", "layer", "0", "intermediate", "dense", "kernel")
    for change, message in (({key: leaves[key].T}, "misshapen roberta.encoder.layer.0.intermediate.dense.weight"),
                            ({("more", "kernel"): np.ones((2, 3))}, "unexpected more.weight"),
                            ({key: None}, "missing roberta.encoder.layer.0.intermediate.dense.weight")):
        tree = traverse_util.unflatten_dict({k: v for k, v in {**leaves, **change}.items() if v is not None})
        (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        with pytest.raises(HubError, match=message):
            hub.load(folder)
    for data in (b"", b"\x93\1\2", os.urandom(500), pickle.dumps({"a": 1})):
        (folder / "flax_model.msgpack").write_bytes(data)
        with pytest.raises(HubError, match="not a Flax msgpack file|does not fit"):
            hub.load(folder)


def test_architectures_of_flax_classes(saved, tmp_path):
    import json

    _, folder, want = saved("roberta")
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(
        json.dumps({**config, "architectures": ["FlaxRobertaForSequenceClassification"]}))
    assert hub.load(tmp_path / "copy").fingerprint == want.fingerprint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "msgpack"])
def test_stored_types(dtype, kind, saved, tmp_path):
    from ml_dtypes import bfloat16
    from safetensors.torch import save_file

    model, folder, _ = saved("bert")
    folder, state = stripped(folder, tmp_path / "copy"), model.state_dict()
    state = {k: v.to(getattr(torch, dtype)).contiguous() for k, v in state.items()}
    if kind == "msgpack":
        leaves = {k: v.astype(bfloat16 if dtype == "bfloat16" else dtype) for k, v in flax_tree(model, "bert").items()}
        (folder / "flax_model.msgpack").write_bytes(
            serialization.msgpack_serialize(traverse_util.unflatten_dict(leaves)))
    else:
        save = {"safetensors": save_file, "bin": torch.save}[kind]
        save(state, folder / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind])
    ours = hub.load(folder)
    for name, value in state.items():
        assert ours.params[name].dtype == np.float32
        np.testing.assert_array_equal(ours.params[name], value.float().numpy())
    assert {str(v.dtype) for v in hub.load(folder, dtype="bfloat16").params.values()} == {"bfloat16"}


def test_safetensors_then_bin_then_msgpack(saved, tmp_path):
    model, folder, want = saved("bert")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "pytorch_model.bin").write_bytes(b"broken")
    (tmp_path / "copy" / "flax_model.msgpack").write_bytes(b"broken")
    assert hub.load(tmp_path / "copy").fingerprint == want.fingerprint
    (tmp_path / "copy" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "copy" / "pytorch_model.bin")
    assert hub.load(tmp_path / "copy").fingerprint == want.fingerprint
    names = ["config.json", "pytorch_model.bin", "flax_model.msgpack", "model-00001-of-00002.safetensors"]
    assert weights.best(names) == ["pytorch_model.bin"]
    assert weights.best([*names, "model.safetensors"]) == ["model-00001-of-00002.safetensors", "model.safetensors"]


def test_download_asks_for_one_kind_after_the_other(saved, tmp_path, monkeypatch):
    import huggingface_hub

    model, folder, want = saved("bert")
    folder, asked = stripped(folder, tmp_path / "snapshot"), []

    def download(repo, *, revision, allow_patterns):
        asked.append((revision, allow_patterns))
        if "pytorch_model.bin" in allow_patterns:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.load("org/name", revision="v2").fingerprint == want.fingerprint
    assert [revision for revision, _ in asked] == ["v2", "v2"]
    assert "model.safetensors" in asked[0][1] and not any("bin" in p or "msgpack" in p for p in asked[0][1])


def test_hostile_bin_is_refused_in_a_folder(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    folder = stripped(saved("bert")[1], tmp_path / "copy")
    for legacy in (False, True):
        torch.save({"weight": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(HubError, match="pytorch_model.bin is refused: it asks for posix.system"):
            hub.load(folder)
    assert not (tmp_path / "canary").exists()


# Straight to devices


def test_one_array_at_a_time(saved, tmp_path, monkeypatch):
    """A read array is gone before the next is read, and a shard's file with the last array of it."""
    model, folder, want = saved("bert")
    folder = stripped(folder, tmp_path / "copy")
    parts = split({k: v.half() for k, v in model.state_dict().items()})
    for file, part in zip(write_index(folder, "pytorch_model", "bin", parts), parts):
        torch.save(part, file)
    arrays, most, views, mapped = [], [], [], []
    read, read_views = weights.Stored.__array__, weights.pickle_reader.read

    class Tracked(np.ndarray):  # a weak reference needs a class of its own
        pass

    def tracked(self, *args, **kwargs):
        array = read(self, *args, **kwargs).view(Tracked)
        arrays.append(weakref.ref(array))
        most.append(sum(r() is not None for r in arrays))
        mapped.append(sum(r() is not None for r in views))
        return array

    def opened(path):
        found = {k: v.view(Tracked) for k, v in read_views(path).items()}
        views.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(weights.Stored, "__array__", tracked)
    monkeypatch.setattr(weights.pickle_reader, "read", opened)
    ours = hub.load(folder, mesh=mesh.make("data=-1"))
    assert len(most) == len(ours.params) and max(most) <= 2
    assert mapped == list(range(len(most), 0, -1))
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in ours.params.values())
    half = {k: v.half().float().numpy() for k, v in model.state_dict().items()}
    for name, value in ours.params.items():
        np.testing.assert_array_equal(value, half[name])


SHARDED = """
import sys, jax, numpy as np
from jaxslim import hub
from jaxslim.train import mesh
where = mesh.make("fsdp=2,tensor=2")
plain, ours = hub.load(sys.argv[1]), hub.load(sys.argv[1], mesh=where)
split = 0
for name, want in plain.params.items():
    have = ours.params[name]
    assert have.sharding == mesh.sharding({name: want}, where)[name], name
    split += have.addressable_shards[0].data.size < want.size
    np.testing.assert_array_equal(np.asarray(have), np.asarray(want))
assert split >= 12, split
ids = np.ones((4, 6), np.int32)
np.testing.assert_allclose(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
"""


@pytest.mark.multiprocess
def test_sharded_over_four_devices(saved):
    _, folder, _ = saved("bert")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
