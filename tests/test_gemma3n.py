"""Gemma 3n's audio encoder against transformers, and TPA on it."""
import jax
import numpy as np
import pytest
import tiny
from test_adapter import KEY, noisy

from jaxslim import adapter_merge, adapters, cost, hub
from jaxslim.export import example
from jaxslim.methods.adapter import Adapter
from jaxslim.models import bind
from jaxslim.spec import SpecError

SMALL = dict(hidden_size=16, input_feat_size=12, conf_num_attention_heads=2, conf_num_hidden_layers=2,
             sscp_conv_channel_size=[4, 3], conf_attention_chunk_size=4, conf_attention_context_left=4,
             conf_attention_logit_cap=3.0, conf_reduction_factor=2)


def config(**changes):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING["gemma3n_audio"](**{**SMALL, **changes}).to_dict()


BASE = tiny.slim(config(), "none")


def batch(lengths=(77, 45), fill=0.0):
    mask = np.arange(max(lengths)) >= np.array(lengths)[:, None]                 # True: padding, as in transformers
    x = np.random.default_rng(0).standard_normal((*mask.shape, 12)).astype(np.float32)
    return {"audio_mel": np.where(mask[:, :, None], np.float32(fill) * x[::-1], x), "audio_mel_mask": mask}


@pytest.mark.parametrize("changes", [{}, pytest.param(dict(
    conf_attention_context_right=2, gradient_clipping=1.5, conf_residual_weight=0.3, conf_reduction_factor=1,
    sscp_conv_kernel_size=[[3, 3], [5, 3]]), marks=pytest.mark.slow)])
def test_parity_and_round_trip(changes, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = tiny.torch_model(config(**changes), "none")
    ours = hub.load(tiny.save(theirs, tmp_path / "hf"))
    assert (ours.spec.family, ours.spec.head) == ("gemma3n_audio", "none")
    states = []
    for block in theirs.conformer:
        block.register_forward_hook(lambda m, a, out: states.append(out))
    x = batch()
    with torch.no_grad():
        want = theirs(**{k: torch.from_numpy(v) for k, v in x.items()})
    have = ours(**x, output_hidden_states=True)
    tiny.close(have.last_hidden_state, want.last_hidden_state, 1e-5)
    np.testing.assert_array_equal(have.lengths, (~want.audio_mel_mask).sum(-1))
    valid = ~x["audio_mel_mask"][:, ::4]
    for mine, other in zip(have.hidden_states[1:], states, strict=True):
        tiny.close(np.asarray(mine)[valid], other.numpy()[valid], 1e-5)
    whole = ours(audio_mel=x["audio_mel"][:1]).last_hidden_state
    tiny.close(whole, np.asarray(have.last_hidden_state)[:1], 1e-5)
    garbage = ours(**batch(fill=9.0)).last_hidden_state
    np.testing.assert_array_equal(garbage, have.last_hidden_state)              # padding changes nothing
    hub.save(ours, tmp_path / "ours")
    assert hub.load(tmp_path / "ours").fingerprint == ours.fingerprint


def test_the_audio_part_of_a_whole_gemma(tmp_path):
    """Names and config as Gemma3nForConditionalGeneration has them; text and vision are left where they are."""
    import json

    from safetensors.numpy import save_file

    arrays = {f"model.audio_tower.{k}": np.asarray(v) for k, v in BASE.params.items()}
    other = {"model.language_model.norm.weight": np.ones(3, np.float32), "lm_head.weight": np.ones((2, 3), np.float32)}
    save_file({**arrays, **other}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "audio_config": config()}))
    ours = hub.load(tmp_path)
    assert ours.params.keys() == BASE.params.keys()
    np.testing.assert_array_equal(ours(**batch()).last_hidden_state, BASE(**batch()).last_hidden_state)
    one = noisy(Adapter(width=4).start(ours, None, KEY))
    hub.save(one, tmp_path / "adapted")                    # no PyTorch code for it: opened by this library
    assert hub.load(tmp_path / "adapted").fingerprint == one.fingerprint
    one.save_adapter(tmp_path / "bundle")
    assert ours.load_adapter(tmp_path / "bundle").spec.blocks == one.spec.blocks


@pytest.mark.slow
def test_tpa_on_it():
    base = np.asarray(BASE(**batch()).last_hidden_state)
    for kind, options in (("tpa", {}), ("lora", dict(linears=("q", "o", "up")))):
        one = Adapter(kind=kind, width=4, **options).start(BASE, None, KEY)
        tiny.close(one(**batch()).last_hidden_state, base, 1e-6)
        one = noisy(one)
        changed = np.asarray(one(**batch()).last_hidden_state)
        assert np.abs(changed - base).max() > 1e-2
        np.testing.assert_array_equal(one.disable_adapter()(**batch()).last_hidden_state, base)
        tiny.close(adapter_merge.merge(one)(**batch()).last_hidden_state, changed, 1e-5)
    assert not any(k.endswith(".bias") for k in one.params)                     # linears here have none
    grads = jax.grad(lambda p: (one.replace(params={**one.params, **p})(**batch()).last_hidden_state ** 2).mean())(
        {k: v for k, v in one.params.items() if adapters.LEAF.search(k)})
    assert all(np.isfinite(g).all() for g in grads.values())
    with pytest.raises(SpecError, match="keeps its mixer"):
        bind.shapes(BASE.spec.with_block("encoder.0.attention", heads=[0]))
    with pytest.raises(SpecError, match="nothing to train"):
        Adapter(kind="bitfit").start(BASE, None, KEY)


def test_costs_are_exact():
    spec = Adapter(width=3).start(BASE, None, KEY).spec
    for s in (BASE.spec, spec.with_block("encoder.1.ffn1", units=5).with_block("encoder.0.conv", channels=7)):
        for seconds, rows in ((0.5, 1), (0.77, 3)):
            assert cost.macs(s, seconds, rows).total == cost.traced_macs(s, seconds, rows)
        assert cost.params(s) == sum(x.size for x in bind.shapes(s).values())
    full = bind.shapes(tiny.slim(config(), "none").spec.replace(config={"hidden_size": 1536}))
    assert sum(x.size for x in full.values()) / 1e6 == pytest.approx(680, abs=10)
    assert example(BASE.spec)["audio_mel"].shape == (2, 200, 12)
