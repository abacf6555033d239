"""Whisper against PyTorch transformers: forward, gradients, cache, cost, sharding, files."""
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_whisper as tw

from jaxslim import cost, hub
from jaxslim.data import mel
from jaxslim.data.rows import load_rows
from jaxslim.models import bind
from jaxslim.models.layers import Call
from jaxslim.spec import Spec
from jaxslim.train import mesh

torch = pytest.importorskip("torch")
SHAPES = {
    "base": {},
    "distil": dict(encoder_layers=3, decoder_layers=1, decoder_attention_heads=2),
    "turbo": dict(num_mel_bins=128, encoder_layers=3, decoder_layers=2, encoder_attention_heads=8),
    "untied": dict(tie_word_embeddings=False, activation_function="relu", encoder_ffn_dim=24),
}


def reference(model, features, ids, mask=None):
    with torch.no_grad():
        return model(torch.from_numpy(features), decoder_input_ids=torch.from_numpy(ids).long(),
                     decoder_attention_mask=None if mask is None else torch.from_numpy(mask),
                     output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize("head", ["seq2seq", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_pytorch(shape, head, tmp_path):
    changes = {"frames": 40, **SHAPES[shape]}
    model, ours = tw.pair(tmp_path, head, **changes)
    x, ids = tw.features(2, changes.get("num_mel_bins", 80), 40), tw.ids()
    mask = None if shape != "base" else np.array([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])
    want = reference(model, x, ids, mask)
    have = ours(input_features=x, decoder_input_ids=ids, output_hidden_states=True,
                **({} if mask is None else {"decoder_attention_mask": mask}))
    pairs = [(have.encoder_last_hidden_state, want.encoder_last_hidden_state),
             *zip(have.encoder_hidden_states, want.encoder_hidden_states, strict=True),
             *zip(have.hidden_states, want.decoder_hidden_states, strict=True),
             (have.logits, want.logits) if head == "seq2seq" else (have.last_hidden_state, want.last_hidden_state)]
    assert max(tiny.close(a, b) for a, b in pairs) < 2e-5  # the tolerance is 1e-4


def test_gradients_equal_pytorch(tmp_path):
    model, ours = tw.pair(tmp_path, frames=20, encoder_layers=1, decoder_layers=1)
    model.requires_grad_(True)
    x, ids = tw.features(2, 80, 20), tw.ids()

    def loss(params):
        logits = ours.replace(params=params)(input_features=x, decoder_input_ids=ids).logits
        return (jax.nn.log_softmax(logits)[..., 3] ** 2).mean()

    grads = jax.grad(loss)(ours.params)
    logits = model(torch.from_numpy(x), decoder_input_ids=torch.from_numpy(ids).long()).logits
    (torch.log_softmax(logits, -1)[..., 3] ** 2).mean().backward()
    want = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(want)
    largest = max(np.abs(g).max() for g in want.values())
    for name, g in want.items():
        scale = max(np.abs(g).max(), 1e-2 * largest)
        assert tiny.close(np.asarray(grads[name]) / scale, g / scale) < 1e-3, name


def test_cached_decoding_equals_the_full_pass(tmp_path):
    _, ours = tw.pair(tmp_path, frames=20)
    x, ids = tw.features(2, 80, 20), tw.ids(2, 9)
    full = ours(input_features=x, decoder_input_ids=ids).logits
    module, size = bind.bind(ours.spec, ours.params), 12
    states = module.model.encode(jnp.asarray(x), Call())[0]
    cross = module.model.cross(states)
    cache = tuple((jnp.zeros((2, size, 4, 8)),) * 2 for _ in range(2))
    at, logits = 0, []
    for width in (3, 1, 1, 2, 1, 1):
        seen = jnp.arange(size) <= (at + jnp.arange(width))[:, None]
        out, cache = module.model.decode(jnp.asarray(ids[:, at : at + width]), cross, cache, at,
                                         jnp.broadcast_to(at + jnp.arange(width), (2, width)),
                                         jnp.broadcast_to(seen, (2, width, size)))
        logits.append(module.logits(out))
        at += width
    assert tiny.close(jnp.concatenate(logits, 1), full) < 2e-5


@pytest.mark.parametrize("head", ["seq2seq", "none"])
def test_round_trip(head, tmp_path):
    import transformers

    model, ours = tw.pair(tmp_path / "hf", head, frames=20)
    ours.save_pretrained(str(tmp_path / "ours"))
    again = hub.load(tmp_path / "ours")
    assert again.fingerprint == ours.fingerprint
    reopened, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, a), b in zip(model.state_dict().items(), reopened.state_dict().values()):
        assert torch.equal(a, b), name
    if head == "seq2seq":  # a bare model reads the whole checkpoint too, without the head
        config = dict(ours.spec.config) | {"architectures": ["WhisperModel"]}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        bare = hub.load(tmp_path / "hf")
        assert set(bare.params) == {k.removeprefix("model.") for k in ours.params}
        assert isinstance(transformers.WhisperModel.from_pretrained(tmp_path / "hf"), transformers.WhisperModel)


def test_tied_weights_are_read_from_either_name(tmp_path):
    from safetensors.numpy import load_file, save_file

    _, ours = tw.pair(tmp_path, frames=20)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    home, twin = "model.decoder.embed_tokens.weight", "proj_out.weight"
    assert twin not in weights
    both = weights | {twin: weights[home]}
    save_file(both, file)
    assert hub.load(tmp_path).fingerprint == ours.fingerprint
    save_file({k: v for k, v in both.items() if k != home}, file)
    assert hub.load(tmp_path).fingerprint == ours.fingerprint
    save_file(both | {twin: 2 * weights[home]}, file)
    with pytest.raises(hub.HubError, match="tie_word_embeddings"):
        hub.load(tmp_path)
    save_file({k: v for k, v in weights.items() if k != home}, file)
    with pytest.raises(hub.HubError, match="missing model.decoder.embed_tokens.weight"):
        hub.load(tmp_path)


def test_pruned_blocks_of_both_sides(tmp_path):
    _, ours = tw.pair(tmp_path, frames=20)
    spec = ours.spec.with_block("encoder.0.attention", heads=[0, 2]).with_block("decoder.1.cross", heads=[])
    spec = spec.with_block("decoder.0.ffn", units=0).with_block("frontend.0", channels=20)
    spec = spec.with_block("decoder.0.attention", qk_dim=6, q_rank=3)
    model = tiny.slim(spec)
    out = model(input_features=tw.features(2, 80, 20), decoder_input_ids=tw.ids(), taps=("decoder.1.cross.out",))
    assert np.isfinite(out.logits).all() and out.taps["decoder.1.cross.out"].shape == (2, 7, 32)
    assert model.params["model.encoder.conv2.weight"].shape == (32, 20, 3)


def test_wrong_number_of_frames_is_named(tmp_path):
    _, ours = tw.pair(tmp_path, frames=20)
    with pytest.raises(ValueError, match=r"takes \(B, 80, 40\)"):
        ours(input_features=tw.features(1, 80, 25), decoder_input_ids=tw.ids(1))


@pytest.mark.slow
def test_training_pass_is_finite(tmp_path):
    _, ours = tw.pair(tmp_path, frames=40, dropout=0.1, attention_dropout=0.1, encoder_layerdrop=0.2,
                      apply_spec_augment=True, mask_feature_prob=0.1, mask_time_prob=0.2)
    out = ours(input_features=tw.features(2, 80, 40), decoder_input_ids=tw.ids(), key=jax.random.key(0), remat="dots")
    plain = ours(input_features=tw.features(2, 80, 40), decoder_input_ids=tw.ids())
    assert np.isfinite(out.logits).all() and not np.allclose(out.logits, plain.logits)


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_equals_the_extractor(mels):
    from transformers import WhisperFeatureExtractor

    oracle, rng = WhisperFeatureExtractor(feature_size=mels), np.random.default_rng(0)
    rows = load_rows("bundled:prompts-en/test")
    clips = [rows.audio(i) for i in range(4)] + [rng.standard_normal(20_001).astype(np.float32), np.zeros(16_000),
                                                 np.sin(np.arange(31 * 16_000) * 0.3).astype(np.float32)]
    have, mask = mel.features(clips, mels)
    want = oracle(clips, sampling_rate=16000, return_tensors="np", return_attention_mask=True)
    assert have.shape == (7, mels, 3000) and have.dtype == np.float32
    np.testing.assert_array_equal(mask, want["attention_mask"])
    assert np.abs(np.asarray(have) - want["input_features"]).max() <= 1e-4   # with PyTorch it rounds in fp32,
    padded = [np.pad(c[:480_000], (0, max(0, 480_000 - len(c)))) for c in clips]
    exact = oracle._np_extract_fbank_features(padded, "cpu")                  # without PyTorch in fp64
    assert np.abs(np.asarray(have) - exact).max() <= 1e-6


def test_log_mel_of_long_audio():
    from transformers import WhisperFeatureExtractor

    clip = load_rows("bundled:prompts-en/test").audio(0)
    long = [np.tile(clip, 27)[: 35 * 16_000 + 77], clip]
    have, mask = mel.features(long, longest=True)
    want = WhisperFeatureExtractor()(long, sampling_rate=16000, return_tensors="np", padding="longest",
                                     truncation=False, return_attention_mask=True)
    np.testing.assert_array_equal(mask, want["attention_mask"])
    assert np.abs(np.asarray(have) - want["input_features"]).max() <= 1e-4
    with pytest.raises(ValueError, match="shorter than one window"):
        mel.features([clip[:300]], longest=True)


@pytest.mark.parametrize("head, seconds", [("seq2seq", 0.3), ("none", 1.0)])
def test_formula_equals_the_traced_count(head, seconds):
    spec = Spec(tw.config(frames=20, encoder_layers=3, decoder_attention_heads=2), "whisper", head)
    pruned = spec.with_block("encoder.0.attention", heads=[1], q_rank=3).with_block("decoder.1.cross", qk_dim=6)
    pruned = pruned.with_block("decoder.0.ffn", units=0).with_block("frontend.0", channels=9)
    for each in (spec, pruned):
        assert cost.macs(each, seconds, 2).total == cost.traced_macs(each, seconds, 2)
        assert cost.params(each) == sum(np.prod(x.shape) for x in bind.shapes(each).values())  # tied: once


def test_matrices_are_sharded():
    spec = Spec(tw.config(frames=20), "whisper", "seq2seq")
    for name, leaf in bind.shapes(spec).items():
        if len(leaf.shape) > 1 and "embed_positions" not in name:
            assert any(re.search(rule, name) for rule, _ in mesh.RULES), name
