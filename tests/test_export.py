"""Models in other forms: generated PyTorch code, the stock shape again, and what must not open or be kept."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny

from jaxslim import hub, torch_code
from jaxslim.cli import main
from jaxslim.dense import ExportError, expand, fold
from jaxslim.export import PARITY, ParityError, export
from jaxslim.hub import CONFIG, WEIGHTS
from jaxslim.spec import Spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
BUNDLED = "bundled:wav2vec2-ctc-en"
STABLE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
KINDS = {  # family, head, changes of the config
    "wav2vec2 base": ("wav2vec2", "ctc", {}), "wav2vec2 large": ("wav2vec2", "ctc", STABLE),
    "wav2vec2 encoder": ("wav2vec2", "none", dict(feat_extract_norm="layer")),
    "hubert base": ("hubert", "ctc", dict(conv_bias=True)), "hubert large": ("hubert", "ctc", STABLE),
    "hubert encoder": ("hubert", "none", dict(conv_pos_batch_norm=True, feat_proj_layer_norm=False)),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No progress bars and no library logs. Copied code gets a folder of its own for each test: transformers goes by
    the name of the model's folder, and does not load the second file of another model of that name."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    def forget():
        for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
            del sys.modules[name]

    forget()

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])  # before that of an earlier test
    yield
    logging.set_verbosity(level)
    forget()


def stock(kind):
    family, head, changes = KINDS[kind]
    return tiny.slim(tiny.config(family, **changes), head).spec.replace(head=head, family=family)


def random_spec(kind, seed, mixers=("softmax", "hedgehog"), front=True):
    """Every field of every block, each present by chance."""
    rng, spec = np.random.default_rng(seed), stock(kind)

    def some(least, most, chance=0.6):
        return int(rng.integers(least, most + 1)) if rng.random() < chance else None

    def linears(roles):
        lora = {r: {"rank": 2, "alpha": 5} for r in roles if rng.random() < 0.4}
        return {**{f"{r}_rank": some(1, 6, 0.4) for r in roles}, "lora": lora or None}

    for i in range(3 if front else 0):
        spec = spec.with_block(f"frontend.{i}", channels=some(2, spec.channels(i)))
    for i in range(2):
        heads = sorted(rng.choice(4, rng.integers(1, 5), replace=False).tolist()) if rng.random() < 0.7 else None
        mixer = str(rng.choice(mixers))
        fields = dict(heads=heads, qk_dim=some(2, 8), v_dim=some(2, 8), scale=0.3 if rng.random() < 0.5 else None,
                      **linears("qkvo"))
        if mixer == "hedgehog":
            fields |= dict(mixer=mixer, options={"features": int(rng.integers(2, 6)), "window": 0})
        spec = spec.with_block(f"encoder.{i}.attention", **fields)
        spec = spec.with_block(f"encoder.{i}.ffn", units=some(1, 48), **linears(("up", "down")))
    gone = rng.integers(4)  # sometimes a whole block
    if gone < 2:
        spec = spec.replace(blocks={**spec.blocks, f"encoder.{gone}.attention": {"heads": []}})
    elif gone == 2:
        spec = spec.replace(blocks={**spec.blocks, "encoder.1.ffn": {"units": 0}})
    return spec


def auto(spec):
    return transformers.AutoModelForCTC if spec.head == "ctc" else transformers.AutoModel


def run(model, values, mask=None):
    with torch.no_grad():
        out = model(torch.from_numpy(values), attention_mask=None if mask is None else torch.from_numpy(mask),
                    output_hidden_states=True)
    return [h.numpy() for h in (*out.hidden_states, out["logits" if "logits" in out else "last_hidden_state"])]


def agree(model, theirs, alone=False):
    """Logits and hidden states of the valid frames of a padded batch, and of a clip alone."""
    values, mask = tiny.waves(2400, 1500, 500)
    for batch in [dict(input_values=values, attention_mask=mask)] + [dict(input_values=values[:1])] * alone:
        ours = model(**batch, output_hidden_states=True)
        want = run(theirs, *batch.values())
        have = [*ours.hidden_states, ours.last_hidden_state if ours.logits is None else ours.logits]
        frames = want[-1].shape[1]
        valid = np.arange(frames) < (np.full(1, frames) if ours.lengths is None else np.asarray(ours.lengths))[:, None]
        for a, b in zip(have, want, strict=True):
            tiny.close(np.asarray(a)[valid], b[valid])


# Generated code


@pytest.mark.parametrize("kind, seed", [*((kind, 1 + i) for i, kind in enumerate(KINDS)), *(
    pytest.param(kind, seed, marks=pytest.mark.slow) for kind in KINDS for seed in range(11, 15))])
def test_random_specs_in_torch(kind, seed, tmp_path):
    spec = random_spec(kind, seed)
    model = tiny.slim(spec, seed=seed)
    hub.save(model, tmp_path / "m")
    theirs = auto(spec).from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    assert type(theirs).__name__ == hub._architecture(spec.family, spec.head)
    agree(model, theirs)
    assert set(theirs.state_dict()) == set(model.params)


def test_round_trip_through_torch(tmp_path):
    spec = random_spec("hubert large", 3).with_block("encoder.0.attention", mixer="hedgehog", options={"features": 3})
    hub.save(tiny.slim(spec), tmp_path / "ours")
    model = hub.load(tmp_path / "ours")
    hub.save(model, tmp_path / "again")  # a model that was loaded is saved as it was
    assert hub.load(tmp_path / "again").fingerprint == model.fingerprint
    assert json.loads((tmp_path / "ours" / CONFIG).read_text()) == json.loads((tmp_path / "again" / CONFIG).read_text())
    theirs = transformers.AutoModelForCTC.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert theirs.config.hidden_act == "gelu" and theirs.config.model_type == "jaxslim-hubert"
    theirs.train()(torch.randn(1, 2000)).logits.sum().backward()  # trains as usual
    assert all(p.grad is not None for name, p in theirs.named_parameters() if "masked_spec" not in name)
    tiny.save(theirs, tmp_path / "theirs")
    for file in torch_code.FILES:
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    back = hub.load(tmp_path / "theirs")
    assert back.spec.blocks == spec.blocks and set(back.params) == set(model.params)
    for name, value in back.params.items():
        np.testing.assert_array_equal(value, model.params[name])
    reopened = transformers.AutoModelForCTC.from_pretrained(tmp_path / "theirs", trust_remote_code=True).eval()
    agree(model, reopened, alone=True)
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True).eval()
    values, mask = tiny.waves(2000)
    tiny.close(model(input_values=values).last_hidden_state, run(encoder, values)[-1])
    eager = transformers.AutoModelForCTC.from_pretrained(tmp_path / "ours", trust_remote_code=True,
                                                         attn_implementation="eager").eval()
    agree(model, eager)


def test_only_what_the_spec_needs_is_written():
    spec = stock("wav2vec2 base")
    one = torch_code.files(spec.with_block("encoder.0.ffn", units=3), "Wav2Vec2ForCTC")["modeling_jaxslim.py"]
    assert "class Attention" not in one and "frontend" not in one.split("def slim")[1] and "# part:" not in one
    all_ = torch_code.files(random_spec("hubert base", 1), "HubertForCTC")
    for name, text in all_.items():
        compile(text, name, "exec")
        assert "Wav2Vec2" not in text and max(map(len, text.splitlines())) <= 120
    assert "HubertAttention" in all_["modeling_jaxslim.py"] and '"jaxslim-hubert"' in all_["configuration_jaxslim.py"]


def test_what_has_no_code_is_named():
    from jaxslim import spec as spec_module

    assert torch_code.WRITTEN["attention"] <= spec_module.FIELDS["attention"]  # or extend the template
    spec = stock("wav2vec2 base").with_block("encoder.0.ffn", units=3)
    later = spec.with_block("encoder.0.ffn", int8=["up"])
    assert "encoder.0.ffn of wav2vec2 has int8, for which no PyTorch" in torch_code.unsupported(later)
    assert torch_code.files(later, "Wav2Vec2ForCTC") == {} and torch_code.unsupported(spec) is None


def test_nothing_opens_a_changed_model_as_a_stock_one(tmp_path):
    spec = stock("wav2vec2 base").with_block("encoder.0.attention", mixer="hedgehog", options={"features": 4})
    hub.save(tiny.slim(spec), tmp_path / "m")
    for cls in (transformers.Wav2Vec2ForCTC, transformers.HubertForCTC):
        with pytest.raises(KeyError, match="trust_remote_code=True"):
            cls.from_pretrained(tmp_path / "m")
    for cls in (transformers.AutoModelForCTC, transformers.AutoModel, transformers.AutoConfig):
        with pytest.raises(ValueError, match="custom code"):
            cls.from_pretrained(tmp_path / "m", trust_remote_code=False)
    for file in torch_code.FILES:
        (tmp_path / "m" / file).unlink()
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCTC.from_pretrained(tmp_path / "m", trust_remote_code=True)


TEXT = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=40)
DISTIL = dict(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40)
WHISPER = dict(vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
               decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40, num_mel_bins=8, pad_token_id=1,
               max_source_positions=30, max_target_positions=20, decoder_start_token_id=4, suppress_tokens=None,
               begin_suppress_tokens=None)
LORA = {"rank": 2, "alpha": 5}


@pytest.mark.parametrize("family, head, changes", [
    ("wavlm", "ctc", {}), ("bert", "classification", TEXT), ("whisper", "seq2seq", WHISPER),
    pytest.param("wavlm", "none", STABLE, marks=pytest.mark.slow),
    pytest.param("roberta", "none", TEXT, marks=pytest.mark.slow),
    pytest.param("distilbert", "none", DISTIL, marks=pytest.mark.slow)])
def test_other_families(family, head, changes, tmp_path):
    config = tiny.config(family, **changes) if family == "wavlm" else transformers.CONFIG_MAPPING[family](**changes)
    spec = Spec(config if family == "wavlm" else config.to_dict(), family, head)
    spec = spec.with_block("encoder.0.ffn", units=9, up_rank=3, lora={"down": LORA}).with_block(
        "encoder.0.attention", heads=[3, 1], qk_dim=5, v_dim=6, scale=0.3, q_rank=3, lora={"o": LORA, "v": LORA})
    pruned = tiny.slim(spec.with_block("encoder.1.attention", heads=[]).with_block("encoder.1.ffn", units=0))
    assert export(pruned, tmp_path / "dense", format="hf-dense")["relative_difference"] < 1e-5
    record = export(pruned, tmp_path / "m")
    assert record["checked"] and record["trust_remote_code"] and record["relative_difference"] < 1e-5
    with pytest.raises(KeyError, match="trust_remote_code=True"):
        getattr(transformers, record["class"]).from_pretrained(tmp_path / "m")
    linear = spec.with_block("encoder.1.attention", mixer="hedgehog", options={"features": 4}, heads=[0, 2])
    assert export(tiny.slim(linear), tmp_path / "linear")["relative_difference"] < 1e-5


CONFORMER = dict(position_embeddings_type="relative", conv_depthwise_kernel_size=5, hidden_act="swish")
W2V_BERT = dict(CONFORMER, feature_projection_input_dim=20, position_embeddings_type="relative_key",
                left_max_position_embeddings=6, right_max_position_embeddings=3)


@pytest.mark.parametrize("family, changes", [
    ("wav2vec2-bert", W2V_BERT), ("parakeet_ctc", {}),
    pytest.param("wav2vec2-conformer", CONFORMER, marks=pytest.mark.slow),
    pytest.param("wav2vec2-conformer", dict(CONFORMER, position_embeddings_type="rotary"), marks=pytest.mark.slow),
    pytest.param("wav2vec2-conformer", dict(CONFORMER, position_embeddings_type=None), marks=pytest.mark.slow),
    pytest.param("wav2vec2-bert", dict(W2V_BERT, position_embeddings_type="relative"), marks=pytest.mark.slow),
    pytest.param("parakeet_ctc", dict(attention_bias=False, convolution_bias=False), marks=pytest.mark.slow),
    pytest.param("parakeet_encoder", {}, marks=pytest.mark.slow)])
def test_conformers(family, changes, tmp_path):
    """Attention that knows positions, fewer channels in the convolution modules, factors, LoRA, a linear mixer."""
    head = "none" if family == "parakeet_encoder" else "ctc"
    spec = Spec(tiny.config(family, **changes), family, head)
    spec = spec.with_block("encoder.0.ffn1", units=9, up_rank=3).with_block("encoder.1.ffn2", units=0)
    spec = spec.with_block("encoder.0.attention", heads=[3, 1], qk_dim=5, v_dim=6, scale=0.3, q_rank=3,
                           lora={"o": LORA, "v": LORA})
    if changes.get("position_embeddings_type") != "relative_key":  # layer norm over the channels: no stock form
        spec = spec.with_block("encoder.1.conv", channels=7)
    spec = spec.with_block("encoder.1.attention", k_rank=4, heads=[0, 1, 2])
    pruned = tiny.slim(spec)
    if family != "wav2vec2-bert" or "encoder.1.conv" not in spec.blocks:
        assert export(pruned, tmp_path / "dense", format="hf-dense")["relative_difference"] < 1e-5
    record = export(pruned, tmp_path / "m")
    assert record["checked"] and record["trust_remote_code"] and record["relative_difference"] < 1e-5
    with pytest.raises(KeyError, match="trust_remote_code=True"):
        getattr(transformers, record["class"]).from_pretrained(tmp_path / "m")
    linear = spec.with_block("encoder.1.attention", mixer="hedgehog", options={"features": 4}, heads=[0, 2])
    linear = linear.with_block("encoder.1.conv", channels=6)
    linear = linear.replace(blocks={**linear.blocks, "encoder.0.attention": {"heads": []}})
    assert export(tiny.slim(linear), tmp_path / "linear")["relative_difference"] < 1e-5
    again = hub.load(tmp_path / "linear")
    assert again.spec.blocks == linear.blocks and dict(again.spec.config) == dict(hub.load(tmp_path / "m").spec.config)
    if family == "wav2vec2-bert":
        with pytest.raises(ExportError, match="encoder.1.conv: layer norm over the channels"):
            export(tiny.slim(spec.with_block("encoder.1.conv", channels=7)), tmp_path / "no", format="hf-dense")


@pytest.mark.slow
def test_whisper_decoders(tmp_path):
    """Fewer heads on both sides of the decoder, one self-attention and one cross-attention with none: the same logits,
    and the same tokens from `generate`, which keeps keys and values in a cache."""
    import test_generate
    import tiny_whisper as tw

    spec = Spec(tw.config(frames=20, decoder_layers=3), "whisper", "seq2seq")
    spec = spec.with_block("decoder.0.attention", heads=[]).with_block("decoder.1.attention", heads=[2, 0], qk_dim=5)
    spec = spec.with_block("decoder.1.cross", heads=[1], v_dim=6, scale=0.4, lora={"k": LORA}).with_block(
        "decoder.2.cross", heads=[]).with_block("decoder.2.ffn", units=7).with_block("encoder.0.attention", heads=[3])
    spec = spec.with_block("frontend.0", channels=20)
    model = tiny.slim(spec)
    assert export(model, tmp_path / "dense", format="hf-dense")["relative_difference"] < 1e-5
    assert export(model, tmp_path / "m")["relative_difference"] < 1e-5
    for attention in ("eager", "sdpa"):
        theirs = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
            tmp_path / "m", trust_remote_code=True, attn_implementation=attention).eval()
        for beams in (1, 3)[: 1 + (attention == "eager")]:
            have = test_generate.same(theirs, model, tw.features(2, frames=20), language="en", num_beams=beams)
        assert have.sequences.shape[1] > 3


@pytest.mark.parametrize("family, head, names", [
    ("wav2vec2", "ctc", ["window", "mamba2", "causal window"]), ("wav2vec2", "ctc", ["gated_deltanet", "hydra", "gla"]),
    ("bert", "classification", ["linformer", "mamba2 groups"]), ("hubert", "none", ["mamba", "t2r"]),
    pytest.param("whisper", "seq2seq", ["elu", "gated_deltanet causal", "gla causal"], marks=pytest.mark.slow),
    pytest.param("wavlm", "ctc", ["mamba2 causal", "mamba causal", "hydra"], marks=pytest.mark.slow),
    pytest.param("distilbert", "none", ["causal", "hydra", "linformer kv"], marks=pytest.mark.slow)])
def test_every_mixer_in_torch(family, head, names, tmp_path):
    from test_mixers import CASES

    changes = {"bert": TEXT, "distilbert": DISTIL, "whisper": WHISPER}.get(family, STABLE)
    depth = {"distilbert": "n_layers", "whisper": "encoder_layers"}.get(family, "num_hidden_layers")
    config = transformers.CONFIG_MAPPING[family](**{**changes, depth: len(names)}).to_dict() if family in (
        "bert", "distilbert", "whisper") else tiny.config(family, **{**changes, depth: len(names)})
    spec = Spec(config, family, head)
    for i, name in enumerate(names):
        mixer, options = CASES[name]
        spec = spec.with_block(f"encoder.{i}.attention", mixer=mixer, options=options)
    model = tiny.slim(spec)
    record = export(model, tmp_path / "m")
    assert record["checked"] and record["trust_remote_code"] and record["relative_difference"] < 4e-5
    text = (tmp_path / "m" / "modeling_jaxslim.py").read_text()
    assert "# part:" not in text and max(map(len, text.splitlines())) <= 120
    assert ("def linear_attention" in text) == any(CASES[n][0] in ("elu", "t2r", "hedgehog") for n in names)
    if head == "ctc":
        theirs = transformers.AutoModelForCTC.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
        agree(model, theirs)
        assert set(theirs.state_dict()) == set(model.params)


def test_two_folders_of_one_name_open_in_one_process(tmp_path):
    """transformers keeps one model class for a configuration class, and one such class for files of the same text."""
    thin, mixed = stock("wav2vec2 base").with_block("encoder.0.attention", v_dim=4), stock("wav2vec2 base").with_block(
        "encoder.1.attention", mixer="elu")
    for where, spec in (("a", thin), ("b", mixed), ("a2", thin)):
        model = tiny.slim(spec)
        export(model, tmp_path / where / "m")
        theirs = transformers.AutoModelForCTC.from_pretrained(tmp_path / where / "m", trust_remote_code=True)
        agree(model, theirs.eval())


def test_one_linformer_matrix_for_all_layers_in_torch(tmp_path):
    spec = stock("wav2vec2 base")
    for i in (0, 1):
        spec = spec.with_block(f"encoder.{i}.attention", mixer="linformer",
                               options={"length": 500, "features": 4, "sharing": "layer"})
    model = tiny.slim(spec)
    assert export(model, tmp_path / "m")["relative_difference"] < 1e-5
    theirs = transformers.AutoModelForCTC.from_pretrained(tmp_path / "m", trust_remote_code=True)
    tiny.save(theirs, tmp_path / "again")
    assert set(theirs.state_dict()) == set(model.params) == set(hub.load(tmp_path / "again").params)


CHILD = """
import json, sys
sys.modules["jaxslim"] = None  # not installed
import numpy as np, torch, transformers
folder, clip, out = sys.argv[1:]
wave = np.load(clip)
model = transformers.AutoModelForCTC.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.from_numpy((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7))[None]).logits
recognizer = transformers.pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
np.savez(out, logits=logits.numpy(), text=recognizer({"raw": wave, "sampling_rate": 16000})["text"])
"""


OPEN = """
import sys
sys.modules["jaxslim"] = None  # not installed
import numpy as np, torch, transformers
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    inputs = {k: torch.from_numpy(v) for k, v in np.load(folder + "/inputs.npz").items()}
    with torch.no_grad():
        np.save(folder + "/logits.npy", model(**inputs).logits.numpy())
"""


@pytest.mark.slow
def test_folders_of_other_families_open_without_jaxslim(tmp_path):
    import tiny_tasks

    from jaxslim.export import example

    models, words = {}, []
    for family, name in (("wav2vec2-bert", "AutoModelForCTC"), ("parakeet_ctc", "AutoModelForCTC"),
                         ("whisper", "AutoModelForSpeechSeq2Seq"), ("bert", "AutoModelForSequenceClassification")):
        spec = tiny_tasks.SPECS[family].with_block("encoder.0.attention", heads=[2, 1], qk_dim=5)
        models[family] = tiny.slim(spec)
        export(models[family], tmp_path / family)
        x = {k: v.astype(np.int64) if v.dtype == np.int32 else v for k, v in example(spec).items()}
        np.savez(tmp_path / family / "inputs.npz", **x)
        words += [family, name]
    done = subprocess.run([sys.executable, "-c", OPEN, *words], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr[-2000:]
    for family, model in models.items():
        out = model(**example(model.spec))
        have, want = np.asarray(out.logits), np.load(tmp_path / family / "logits.npy")
        if family == "parakeet_ctc":  # padded queries attend to all frames there, to valid ones here
            valid = np.arange(have.shape[1]) < np.asarray(out.lengths)[:, None]
            have, want = have[valid], want[valid]
        tiny.close(have, want)


def test_converted_teacher_in_a_pipeline_without_jaxslim(tmp_path):
    from jaxslim.data import load_rows
    from jaxslim.data.audio import normalize
    from jaxslim.data.tasks import CTCTask
    from jaxslim.methods.linearize import Linearize

    model = Linearize(layers=(0, 2)).start(hub.load(BUNDLED), None, None)
    model = Linearize(layers=(1,), mixer="gla").start(model, None, None)
    record = export(model, tmp_path / "m", source=BUNDLED)
    assert record["checked"] and record["trust_remote_code"] and record["argmax_agreement"] == 1.0
    assert {"vocab.json", "tokenizer_config.json", "processor_config.json", PARITY} <= set(os.listdir(tmp_path / "m"))
    wave = load_rows("bundled:prompts-en/test").audio(0)
    np.save(tmp_path / "clip.npy", wave)
    done = subprocess.run([sys.executable, "-c", CHILD, "m", "clip.npy", "out.npz"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    ours = np.asarray(model(input_values=normalize(wave)[None]).logits)
    tiny.close(ours, found["logits"])
    task = CTCTask.from_pretrained(hub.folder(BUNDLED))
    assert str(found["text"]) and str(found["text"]).strip() == task.decode(ours[0].argmax(-1)).strip()


# The stock shape


def test_uniform_shapes_are_stock_models(tmp_path):
    spec = stock("wav2vec2 large").with_block("frontend.0", channels=7).with_block("frontend.2", channels=3)
    spec = spec.with_block("encoder.0.ffn", units=9).with_block("encoder.1.ffn", units=9)
    spec = spec.with_block("encoder.0.attention", heads=[0, 1, 2, 3], mixer="softmax", qk_dim=8, scale=8**-0.5)
    model = tiny.slim(spec)
    record = export(model, tmp_path / "m")
    assert not record["trust_remote_code"] and record["relative_change"] == 0.0
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    assert (config["model_type"], config["conv_dim"], config["intermediate_size"]) == ("wav2vec2", [7, 16, 3], 9)
    assert "jaxslim" not in config and set(os.listdir(tmp_path / "m")) == {CONFIG, WEIGHTS, PARITY}
    agree(model, transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "m").eval())
    assert fold(spec.with_block("encoder.0.ffn", units=8)) is None
    assert fold(spec.with_block("encoder.0.attention", scale=0.1)) is None


@pytest.mark.parametrize("kind", ["hubert base", "hubert encoder", pytest.param(
    "wav2vec2 large", marks=pytest.mark.slow), pytest.param("wav2vec2 base", marks=pytest.mark.slow)])
def test_pruned_and_factored_models_in_the_stock_shape(kind, tmp_path):
    front = "encoder" in kind
    spec = random_spec(kind, 4, mixers=("softmax",), front=front)
    if kind == "hubert base":  # group norm: channels before the last one come back exactly
        spec = spec.with_block("frontend.0", channels=5).with_block("frontend.1", channels=3)
    spec = spec.with_block("encoder.0.attention", heads=[3, 1], qk_dim=5, v_dim=6, scale=0.3, q_rank=4, o_rank=3)
    model = tiny.slim(spec)
    record = export(model, tmp_path / "m", format="hf-dense", dtype="float16" if front else None)
    assert record["checked"] and record["relative_change"] < 1e-5 and not record["trust_remote_code"]
    assert json.loads((tmp_path / "m" / PARITY).read_text()) == record
    theirs = getattr(transformers, record["class"]).from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    if not front:
        agree(model, theirs)
    assert theirs.config.intermediate_size == 48 and hub.load(tmp_path / "m").spec.blocks == {}


@pytest.mark.parametrize("kind, block, fields, reason", [
    ("wav2vec2 base", "encoder.1.attention", {"mixer": "hedgehog"}, "encoder.1.attention: mixer hedgehog is no "),
    ("wav2vec2 large", "frontend.0", {"channels": 4}, "frontend.0: layer norm over the channels"),
    ("wav2vec2 base", "frontend.2", {"channels": 4}, "frontend.2: the projection's layer norm"),
    ("wav2vec2 base", "encoder.0.ffn", {"units": 49}, "encoder.0.ffn: more units"),
    ("wav2vec2 base", "encoder.0.attention", {"qk_dim": 9}, "encoder.0.attention: heads larger"),
])
def test_what_has_no_stock_shape(kind, block, fields, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export(tiny.slim(stock(kind).with_block(block, **fields)), tmp_path / "m", format="hf-dense")
    assert not list(tmp_path.glob("m*"))


# What is kept


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    import jaxslim.export

    model = tiny.slim(stock("wav2vec2 base").with_block("encoder.0.ffn", units=5))
    export(model, tmp_path / "m")
    before = (tmp_path / "m" / PARITY).read_text()
    theirs = jaxslim.export._theirs
    monkeypatch.setattr(jaxslim.export, "_theirs", lambda *args: theirs(*args) + 0.01)
    with pytest.raises(ParityError, match="differ by .* --force"):
        export(model, tmp_path / "m")
    assert (tmp_path / "m" / PARITY).read_text() == before
    with pytest.raises(ParityError):
        export(model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "modules"]
    assert export(model, tmp_path / "new", force=True)["relative_difference"] > 1e-4
    monkeypatch.setattr(jaxslim.export, "_theirs", lambda *args: theirs(*args) * np.nan)
    with pytest.raises(ParityError):
        export(model, tmp_path / "new")
    monkeypatch.setattr(jaxslim.export, "expand", lambda m: tiny.slim(m.spec.replace(blocks={}), seed=9))
    monkeypatch.setattr(jaxslim.export, "_theirs", theirs)
    with pytest.raises(ParityError):  # PyTorch agrees with what was written, but that is not the model
        export(model, tmp_path / "new", format="hf-dense")


def test_without_torch_and_unchecked(tmp_path, monkeypatch):
    model = tiny.slim(stock("wav2vec2 base").with_block("encoder.0.ffn", units=5))
    record = export(model, tmp_path / "m", check=False)
    assert not record["checked"] and record["reason"] == "not asked for"
    monkeypatch.setitem(sys.modules, "torch", None)
    record = export(model, tmp_path / "m", format="hf-dense")
    assert not record["checked"] and record["reason"] == "PyTorch is not installed" and record["relative_change"] < 1e-6
    assert json.loads((tmp_path / "m" / PARITY).read_text()) == record
    with pytest.raises(ExportError, match="Did you mean 'hf-dense'"):
        export(model, tmp_path / "m", format="hf-dens")


def test_command_line(tmp_path, capsys):
    spec = stock("wav2vec2 base").with_block("encoder.0.attention", heads=[1])
    hub.save(tiny.slim(spec), tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checked"]
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "dense"), "--format", "hf-dense"]) == 0
    assert "same argmax in 100.00%" in capsys.readouterr().out
    hub.save(tiny.slim(spec.with_block("encoder.0.attention", mixer="hedgehog")), tmp_path / "linear")
    assert main(["export", str(tmp_path / "linear"), str(tmp_path / "no"), "--format", "hf-dense"]) == 2
    assert "no softmax attention" in capsys.readouterr().err
    with pytest.raises(ExportError):
        expand(hub.load(tmp_path / "linear"))
