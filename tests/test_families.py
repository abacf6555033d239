"""Every speech family against PyTorch transformers: switches, heads, padding, gradients, round trip, costs."""
import functools

import jax
import numpy as np
import pytest
import tiny

from jaxslim import cost, hub
from jaxslim.models import bind
from jaxslim.models.roles import layers

torch = pytest.importorskip("torch")

HEADS = dict(classifier_proj_size=10, tdnn_dim=[8, 6, 10], tdnn_kernel=[3, 2, 1], tdnn_dilation=[1, 2, 1],
             xvector_output_dim=7, num_labels=5)
STABLE = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
MMS = dict(STABLE, adapter_attn_dim=6)
WAVLM = dict(num_buckets=20, max_bucket_distance=30)  # exact up to 5 frames, clipped from 30
CASES = {  # name: (family, head, changes, quick)
    "classification": ("wav2vec2", "classification", {}, 1),
    "classification-sum": ("hubert", "classification", dict(use_weighted_layer_sum=True), 0),
    "frames-sum": ("wav2vec2", "frames", dict(STABLE, use_weighted_layer_sum=True), 1),
    "frames": ("wav2vec2", "frames", {}, 0),
    "xvector": ("wav2vec2", "xvector", {}, 0),
    "xvector-sum": ("wav2vec2", "xvector", dict(use_weighted_layer_sum=True), 1),
    "mms": ("wav2vec2", "ctc", MMS, 1),
    "mms-hubert": ("hubert", "none", MMS, 0),
    "adapter": ("wav2vec2", "ctc", dict(add_adapter=True, num_adapter_layers=2), 0),
    "adapter-narrow": ("wav2vec2", "ctc", dict(add_adapter=True, output_hidden_size=24, adapter_kernel_size=4), 1),
    "adapter-model": ("wav2vec2", "none", dict(add_adapter=True, adapter_stride=3), 0),
    "wavlm": ("wavlm", "ctc", WAVLM, 1),
    "wavlm-stable": ("wavlm", "xvector", dict(WAVLM, **STABLE, use_weighted_layer_sum=True, conv_bias=True), 1),
    "wavlm-model": ("wavlm", "none", dict(STABLE, num_buckets=320, max_bucket_distance=800, num_hidden_layers=3), 1),
    "wavlm-classification": ("wavlm", "classification", dict(WAVLM), 0),
    "wavlm-frames": ("wavlm", "frames", dict(WAVLM, **STABLE), 0),
    "wavlm-adapter": ("wavlm", "ctc", dict(WAVLM, add_adapter=True), 0),
}
CONFORMER = dict(position_embeddings_type="relative", conv_depthwise_kernel_size=5, hidden_act="swish",
                 conformer_conv_dropout=0.0)
BERT = dict(CONFORMER, feature_projection_input_dim=20, position_embeddings_type="relative_key",
            left_max_position_embeddings=6, right_max_position_embeddings=3)
CASES |= {
    "conformer": ("wav2vec2-conformer", "ctc", CONFORMER, 1),
    "conformer-rotary": ("wav2vec2-conformer", "frames", dict(
        CONFORMER, position_embeddings_type="rotary", feat_extract_norm="layer", conv_bias=True), 1),
    "conformer-none": ("wav2vec2-conformer", "xvector", dict(
        CONFORMER, position_embeddings_type=None, use_weighted_layer_sum=True), 1),
    "conformer-model": ("wav2vec2-conformer", "none", dict(CONFORMER, hidden_act="gelu", add_adapter=True), 0),
    "conformer-classification": ("wav2vec2-conformer", "classification", dict(
        CONFORMER, position_embeddings_type="rotary"), 0),
    "bert": ("wav2vec2-bert", "ctc", dict(BERT, add_adapter=True, use_intermediate_ffn_before_adapter=True), 1),
    "bert-relative": ("wav2vec2-bert", "classification", dict(
        BERT, position_embeddings_type="relative", use_weighted_layer_sum=True), 1),
    "bert-rotary": ("wav2vec2-bert", "none", dict(BERT, position_embeddings_type="rotary", add_adapter=True,
                                                 num_adapter_layers=2, output_hidden_size=24), 1),
    "bert-none": ("wav2vec2-bert", "frames", dict(BERT, position_embeddings_type=None), 0),
    "bert-xvector": ("wav2vec2-bert", "xvector", dict(BERT, use_weighted_layer_sum=True), 0),
    "parakeet": ("parakeet_ctc", "ctc", {}, 1),
    "parakeet-biasless": ("parakeet_ctc", "ctc", dict(attention_bias=False, convolution_bias=False,
                                                      scale_input=False), 1),
    "parakeet-model": ("parakeet_encoder", "none", dict(subsampling_factor=4, num_mel_bins=40, hidden_act="relu"), 1),
}
PARAMS = [pytest.param(name, id=name, marks=() if case[3] else pytest.mark.slow) for name, case in CASES.items()]
GRADIENTS = ("mms", "xvector-sum", "wavlm", "conformer", "bert", "parakeet")
ROBUST = {"mms": MMS, "wavlm": dict(WAVLM, **STABLE), "bert": BERT, "parakeet": {}}  # models that padding cannot touch
FEATURES = {"wav2vec2-bert": 20, "parakeet_ctc": 80, "parakeet_encoder": 40}


def config(name):
    family, _, changes, _ = CASES[name]
    return tiny.config(family, **{**HEADS, **changes})


def batch(family, fill=3.0, lengths=(2000, 1130, 2000)):
    """Named inputs of a family: a padded batch whose padding is noise."""
    if family in FEATURES:
        return feature_batch(FEATURES[family], [n // 20 for n in lengths], fill)
    values, mask = tiny.waves(*lengths, fill=fill)
    return {"input_values": values, "attention_mask": mask}


def feature_batch(width, lengths, fill):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((len(lengths), max(lengths), width)).astype(np.float32)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    garbage = fill * np.random.default_rng(1).standard_normal(values.shape).astype(np.float32)
    return {"input_features": np.where(mask[:, :, None] == 1, values, garbage), "attention_mask": mask}


def torch_inputs(inputs):
    return {k: torch.from_numpy(v) for k, v in inputs.items()}


def outputs(out):
    """Everything an output holds, in order."""
    last = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    return (*out.hidden_states, last)


@pytest.mark.parametrize("name", PARAMS)
def test_parity_and_round_trip(name, tmp_path):
    family, head, *_ = CASES[name]
    model = tiny.torch_model(config(name), head)
    ours = hub.load(tiny.save(model, tmp_path / "hf"))
    assert (ours.spec.family, ours.spec.head) == (family, head)
    for mask in (True, False):
        inputs = batch(family)
        if not mask:
            del inputs["attention_mask"]
        with torch.no_grad():
            want = outputs(model(**torch_inputs(inputs), output_hidden_states=True))
        have = outputs(ours(**inputs, output_hidden_states=True))
        assert len(have) == len(want)
        if mask and "parakeet" in family:  # padded queries attend to all frames there, to valid ones here
            valid = np.asarray(ours(**inputs).lengths)
            have, want = ([np.concatenate([np.asarray(x)[i, :n] for i, n in enumerate(valid)]) for x in xs]
                          for xs in (have, want))
        assert max(tiny.close(h, w) for h, w in zip(have, want)) < 2e-5

    hub.save(ours, tmp_path / "ours")
    import transformers

    again = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "ours").state_dict()
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(again[k].numpy(), v.numpy(), err_msg=k)
    stored = hub.load(tmp_path / "ours")
    assert stored.spec.blocks == {} and stored.fingerprint == ours.fingerprint


@pytest.mark.parametrize("name", PARAMS)
def test_costs_are_exact(name):
    family, head, *_ = CASES[name]
    spec = tiny.slim(config(name), head).spec
    specs = [spec, shrunk(spec)]
    for s in specs:
        for seconds, rows in ((0.2, 1), (0.31, 3)):
            counted = cost.macs(s, seconds, rows)
            assert counted.total == cost.traced_macs(s, seconds, rows)
        table = cost.params_by_block(s)
        assert sum(table.values()) == sum(v.size for v in bind.shapes(s).values() if v.dtype == np.float32)
        assert set(counted.blocks) <= set(table)
        assert table.get("other", 0) <= 4 * spec["hidden_size"] + spec["hidden_size"]


def shrunk(spec):
    """A Spec that differs in every way that the family supports."""
    spec = spec.with_block("encoder.0.attention", heads=[3, 1], v_dim=5, lora={"q": {"rank": 2, "alpha": 4}}, k_rank=3)
    spec = spec.with_block("encoder.1.attention", mixer="hedgehog", options={"features": 4}, heads=[0, 2])
    for block in sorted(bind_blocks(spec)):
        if block == "ffn" or block == "ffn1":
            spec = spec.with_block(f"encoder.0.{block}", units=7, up_rank=4, down_rank=3)
        if block == "ffn2":
            spec = spec.with_block(f"encoder.1.{block}", units=0)
        if block == "conv":
            spec = spec.with_block(f"encoder.1.{block}", channels=9)
    return spec


def bind_blocks(spec):
    from jaxslim.models.roles import FAMILIES

    return FAMILIES[spec.family].parts


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_pytorch(name, tmp_path):
    family, head, *_ = CASES[name]
    model = tiny.torch_model(config(name), head)
    ours = hub.load(tiny.save(model, tmp_path))
    inputs = batch(family)
    valid = np.float32(1)
    if "parakeet" in family:  # padded queries attend to all frames there, to valid ones here
        out = ours(**inputs)
        valid = np.float32(np.arange(out.logits.shape[1]) < np.asarray(out.lengths)[:, None])

    def loss(params):
        return (valid * jax.nn.log_softmax(ours.replace(params=params)(**inputs).logits)[..., 3] ** 2).mean()

    grads = jax.grad(loss, allow_int=True)(ours.params)
    logits = model(**torch_inputs(inputs)).logits
    (torch.from_numpy(np.asarray(valid)) * torch.log_softmax(logits, -1)[..., 3] ** 2).mean().backward()
    want = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    assert len(want) > 0.8 * len(grads)
    largest = max(np.abs(g).max() for g in want.values())
    for k, g in want.items():
        scale = max(np.abs(g).max(), 1e-2 * largest)  # k_proj.bias has a gradient of 0 but for rounding
        tiny.close(np.asarray(grads[k]) / scale, g / scale, 1e-3)


@pytest.mark.parametrize("name", ROBUST)
def test_padding_garbage_and_batching_change_nothing(name):
    changes = {**HEADS, **ROBUST[name]}
    family = CASES[name][0]
    ours = tiny.slim(tiny.config(family, **changes), "ctc")
    taps = ("projection", "embedding", *layers(ours.spec), "logits",
            *(f"encoder.0.{part}.{side}" for part in bind_blocks(ours.spec) for side in ("in", "out")))
    lengths = (2000, 1130, 480)
    run = functools.partial(ours, output_hidden_states=True, taps=taps)
    clean, dirty = (run(**batch(family, fill, lengths)) for fill in (0.0, 50.0))
    assert set(clean.taps) == set(taps)
    for tap in taps:  # taps are zero where nothing is
        np.testing.assert_array_equal(clean.taps[tap], dirty.taps[tap], err_msg=tap)
        assert not np.any(clean.taps[tap][1, int(clean.lengths[1]):])
    for row, samples in enumerate(lengths):
        alone = run(**{k: v[row : row + 1, : samples_of(family, samples)]
                       for k, v in batch(family, 0.0, lengths).items()})
        frames = int(clean.lengths[row])
        for a, b in zip(outputs(clean), outputs(alone)):
            assert tiny.close(a[row, :frames], b[0, :frames]) < 2e-5


def samples_of(family, samples):
    return samples // 20 if family in FEATURES else samples


NOISY = dict(hidden_dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, final_dropout=0.1, layerdrop=0.2,
             feat_proj_dropout=0.1, mask_time_length=3, mask_feature_prob=0.1, mask_feature_length=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conformer", "wavlm", "bert", "parakeet"])
def test_training_is_finite(name):
    family, head, changes, _ = CASES[name]
    ours = tiny.slim(tiny.config(family, **{**HEADS, **changes, **NOISY}), head)
    inputs = batch(family)

    def loss(params, **options):
        out = ours.replace(params=params)(**inputs, key=jax.random.key(0), **options)
        return (out.logits.astype(np.float32) ** 2).mean()

    plain, again = (jax.grad(functools.partial(loss, **options), allow_int=True)(ours.params)
                    for options in ({}, {"remat": "full", "dtype": "bfloat16"}))
    for k, g in plain.items():
        if g.dtype == np.float32:
            assert np.isfinite(g).all() and np.isfinite(again[k]).all(), k


@pytest.mark.parametrize("name", PARAMS)
def test_every_large_matrix_has_a_sharding_rule(name):
    import re

    from jaxslim.train import mesh

    family, head, *_ = CASES[name]
    shapes = bind.shapes(tiny.slim(config(name), head).spec)
    small = r"original0$|depthwise_conv|gru_rel_pos|rel_attn_embed|distance_embedding|objective"  # stay whole
    without = [k for k, v in shapes.items() if len(v.shape) > 1 and not any(re.search(p, k) for p, _ in mesh.RULES)]
    assert [k for k in without if not re.search(small, k)] == []


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_mms_switches_its_language(ending, tmp_path):
    """As `load_adapter` of transformers: the language's adapters and output layer, its size, and the tokenizer's."""
    import json

    import safetensors.torch

    folder = tmp_path / "mms"
    model = tiny.torch_model(config("mms"), "ctc")
    tiny.save(model, folder)
    other = tiny.torch_model(tiny.config("wav2vec2", **HEADS, **MMS, vocab_size=17), "ctc", seed=5)
    adapter = {k: v.clone() for k, v in other._get_adapters().items()}
    adapter = {k: v.detach().contiguous() for k, v in adapter.items()}
    if ending == "bin":
        torch.save(adapter, folder / "adapter.fra.bin")
    else:
        safetensors.torch.save_file(adapter, folder / "adapter.fra.safetensors")
    (folder / "vocab.json").write_text(json.dumps({lang: {chr(97 + i): i for i in range(n)}
                                                   for lang, n in (("eng", 11), ("fra", 17))}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"target_lang": "eng", "pad_token": "a"}))

    ours = hub.load(folder, language="fra")
    model.config._name_or_path = str(folder)
    model.load_adapter("fra")
    inputs = batch("wav2vec2")
    with torch.no_grad():
        want = model(**torch_inputs(inputs)).logits
    assert ours.spec["vocab_size"] == 17 and want.shape[-1] == 17
    assert tiny.close(ours(**inputs).logits, want) < 2e-5

    hub.save(ours, tmp_path / "fra", source=folder)  # a folder that speaks French without being asked
    assert hub.load(tmp_path / "fra").fingerprint == ours.fingerprint
    assert json.loads((tmp_path / "fra" / "tokenizer_config.json").read_text())["target_lang"] == "fra"
    with pytest.raises(hub.HubError, match="adapter.deu.*there is fra"):
        hub.load(folder, language="deu")
    with pytest.raises(hub.HubError, match="no language adapters"):
        hub.load("bundled:wav2vec2-ctc-en", language="fra")


def test_wavlm_heads_keep_their_numbers():
    """Heads that stay see the same bias whatever else is cut, also when the first layer has none left."""
    full = tiny.slim(tiny.config("wavlm", **{**HEADS, **WAVLM, **STABLE}), "ctc")
    values, mask = tiny.waves(2000, 1130)
    keep, width = [3, 1], 8
    rows = np.concatenate([np.arange(h * width, (h + 1) * width) for h in keep])
    spec, params = full.spec.with_block("encoder.1.attention", heads=keep), dict(full.params)
    masked = dict(full.params)
    base = "wavlm.encoder.layers.1.attention."
    for name in ("q_proj", "k_proj", "v_proj"):
        for leaf in ("weight", "bias"):
            params[f"{base}{name}.{leaf}"] = params[f"{base}{name}.{leaf}"][rows]
    params[f"{base}out_proj.weight"] = params[f"{base}out_proj.weight"][:, rows]
    masked[f"{base}out_proj.weight"] = np.where(np.isin(np.arange(32), rows), full.params[f"{base}out_proj.weight"], 0)
    a = full.replace(spec=spec, params=params)(input_values=values, attention_mask=mask)
    b = full.replace(params=masked)(input_values=values, attention_mask=mask)
    assert tiny.close(a.logits, b.logits) < 2e-6

    none = full.spec.with_block("encoder.0.attention", heads=[])
    assert "wavlm.encoder.layers.0.attention.rel_attn_embed.weight" in bind.shapes(none)
    params = {k: full.params[k] for k in bind.shapes(none)}
    assert np.isfinite(full.replace(spec=none, params=params)(input_values=values).logits).all()
