"""GPT-NeoX against PyTorch transformers: forward, files, generation; its conversion and its counts."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxslim import causal, cost, hub
from jaxslim.methods.linearize import Linearize
from jaxslim.models import bind, roles
from jaxslim.models.gpt_neox import rates
from jaxslim.spec import Spec, SpecError
from jaxslim.train.mesh import RULES

torch = pytest.importorskip("torch")

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50,
             max_position_embeddings=64, eos_token_id=0, bos_token_id=0)
rope = lambda share, base=10000.0: dict(rope_parameters=dict(  # noqa: E731
    rope_type="default", rope_theta=base, partial_rotary_factor=share))
CASES = [("causal", {}), ("none", dict(use_parallel_residual=False, **rope(0.5, 500.0))),
         ("causal", dict(tie_word_embeddings=True, attention_bias=False, **rope(1.0))),
         ("causal", dict(num_attention_heads=2, use_parallel_residual=False, hidden_act="gelu_new", **rope(0.375)))]


def config(**changes):
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**{**SMALL, **changes}).to_dict()


def tokens(fill=0):
    """Rows of 17, 9 and 1 tokens and their mask; `fill` seeds what stands in padding."""
    mask = (np.arange(17) < np.array([17, 9, 1])[:, None]).astype(np.int32)
    ids, other = (np.random.default_rng(seed).integers(1, 50, mask.shape) for seed in (7, fill + 8))
    return dict(input_ids=np.where(mask, ids, other if fill else 0).astype(np.int32), attention_mask=mask)


def converted(mixer="mamba2", layers="all", model=None, **options):
    model = model or tiny.slim(config(), "causal")
    method = Linearize(mixer=mixer, layers=layers, options={"chunk": 8, **options})
    return method.start(model, None, jax.random.key(0))


def random_config(seed):
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    heads = pick(1, 2, 4)
    return pick("causal", "none"), dict(
        num_attention_heads=heads, hidden_size=heads * pick(6, 8, 10), intermediate_size=pick(20, 33),
        num_hidden_layers=pick(1, 2, 3), use_parallel_residual=pick(True, False), attention_bias=pick(True, False),
        tie_word_embeddings=pick(True, False), hidden_act=pick("gelu", "relu", "silu"), vocab_size=pick(50, 61),
        layer_norm_eps=pick(1e-5, 1e-6), **rope(pick(0.25, 0.34, 0.5, 1.0), pick(100.0, 10000.0)))


@pytest.mark.parametrize("head, changes", [*CASES[:3], random_config(0), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in [CASES[3], *map(random_config, range(1, 12))])])
def test_parity_and_round_trip(head, changes, tmp_path):
    import transformers

    theirs = tiny.torch_model(config(**changes), head)
    ours = hub.load(tiny.save(theirs, tmp_path / "theirs"))
    assert ours.spec.head == head
    inputs = tokens()
    with torch.no_grad():
        want = theirs(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}, output_hidden_states=True)
    have = ours(**inputs, output_hidden_states=True)
    valid = inputs["attention_mask"][..., None] == 1
    assert len(have.hidden_states) == len(want.hidden_states) == len(roles.layers(ours.spec)) + 1
    for h, w in zip(have.hidden_states, want.hidden_states):
        assert tiny.close(h * valid, w.numpy() * valid) < 2e-5
    last = "last_hidden_state" if head == "none" else "logits"
    assert tiny.close(getattr(have, last) * valid, getattr(want, last).numpy() * valid) < 2e-5
    np.testing.assert_array_equal(have.lengths, [17, 9, 1])
    hub.save(ours, tmp_path / "ours")
    assert hub.load(tmp_path / "ours").fingerprint == ours.fingerprint
    back, info = getattr(transformers, hub._architecture("gpt_neox", head)).from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, back.state_dict()[name])


def test_files_of_older_releases(tmp_path):
    """Pythia's own: rotary_pct in the config, embed_out for lm_head, masks and frequencies among the weights."""
    import json

    from safetensors.numpy import load_file, save_file

    theirs = tiny.torch_model(config(**rope(0.5, 100.0)), "causal")
    ours = hub.load(tiny.save(theirs, tmp_path))
    weights = load_file(tmp_path / hub.WEIGHTS)
    weights = {k.replace("lm_head.", "embed_out."): v for k, v in weights.items()}
    weights |= {f"gpt_neox.layers.{i}.attention.{k}": np.ones(3, np.float32) for i in range(2)
                for k in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    save_file(weights, tmp_path / hub.WEIGHTS)
    old = json.loads((tmp_path / "config.json").read_text())
    old.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(old | {"rotary_pct": 0.5, "rotary_emb_base": 100}))
    again = hub.load(tmp_path)
    np.testing.assert_array_equal(rates(again.spec), rates(ours.spec))
    np.testing.assert_array_equal(again(**tokens()).logits, ours(**tokens()).logits)


def test_stretched_positions_are_refused():
    with pytest.raises(SpecError, match="rope_type default"):
        bind.shapes(Spec(config() | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "gpt_neox", "causal"))


@pytest.mark.parametrize("make", [
    lambda: tiny.slim(config(), "causal"), lambda: converted("mamba2"),
    pytest.param(lambda: converted("mamba", (1,)), marks=pytest.mark.slow)], ids=["softmax", "mamba2", "hybrid"])
def test_padding_later_tokens_and_blocks(make):
    """Padding and what comes later change nothing; attention in blocks and layers in a scan neither."""
    model = make()
    clean, dirty = (model(**tokens(fill), taps=("encoder.1", "logits")) for fill in (0, 1))
    np.testing.assert_array_equal(clean.taps["encoder.1"], dirty.taps["encoder.1"])
    ids = np.random.default_rng(0).integers(1, 50, (2, 40)).astype(np.int32)
    full = model(input_ids=ids).logits
    tiny.close(model(input_ids=ids[:, :23]).logits, full[:, :23], 1e-5)
    if model.spec.blocks:
        return
    tiny.close(model(input_ids=ids, layers="scan").logits, full, 1e-5)
    long = np.random.default_rng(0).integers(1, 50, (1, 1100)).astype(np.int32)
    tiny.close(model(input_ids=long, attention="blocked").logits, model(input_ids=long, attention="dense").logits, 2e-5)


@pytest.mark.parametrize("changes", [{}, pytest.param(dict(tie_word_embeddings=True, use_parallel_residual=False),
                                                      marks=pytest.mark.slow)])
def test_greedy_generation_is_that_of_transformers(changes):
    import transformers

    theirs = tiny.torch_model(config(**changes), "causal")
    ours = tiny.slim(config(**changes), "causal")
    ours = ours.replace(params={k: jnp.asarray(theirs.state_dict()[k].numpy()) for k in ours.params})
    mask = (np.arange(9) >= np.array([0, 4, 8])[:, None]).astype(np.int32)
    ids = np.where(mask, np.random.default_rng(3).integers(1, 50, mask.shape), 0).astype(np.int32)
    free = causal.generate(ours, ids, mask, max_new_tokens=20, eos_token_id=None)
    for eos in (0, int(free[0, 9 + 12])):   # that of the config, and one that is said, so that some texts end early
        given = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=3)
        want = theirs.generate(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(),
                               generation_config=given)
        have = causal.generate(ours, ids, mask, max_new_tokens=20, eos_token_id=eos or (), pad_token_id=3)
        np.testing.assert_array_equal(have, want.numpy())


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 20, 0.6), (1.0, 0, 0.2)])
def test_sampling_rules_out_what_transformers_does(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32) * 3
    want = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)) if temperature != 1 else (
        torch.from_numpy(logits))
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    have = causal.Sampling(True, temperature, top_k, top_p).scores(jnp.asarray(logits))
    np.testing.assert_allclose(have, want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: converted("mamba2", (0,)), *(
    pytest.param(make, marks=pytest.mark.slow) for make in (
        lambda: converted("mamba2"), lambda: converted("mamba"), lambda: converted("gated_deltanet"),
        lambda: converted("gla")))], ids=["hybrid", "mamba2", "mamba", "gated_deltanet", "gla"])
def test_generation_of_converted_models(make):
    """Tokens are those of the full pass on ever longer texts, left padding or not; sampling repeats by its seed."""
    model = make()
    mask = (np.arange(9) >= np.array([0, 6])[:, None]).astype(np.int32)
    ids = np.where(mask, np.random.default_rng(3).integers(1, 50, mask.shape), 0).astype(np.int32)
    have = causal.generate(model, ids, mask, max_new_tokens=7, eos_token_id=None)
    for row, start in enumerate((0, 6)):
        logits = np.asarray(model(input_ids=have[row : row + 1, start:]).logits)[0]
        np.testing.assert_array_equal(logits[8 - start : -1].argmax(-1), have[row, 9:])
    stream = causal.stream(model, ids, mask, places=64)
    np.testing.assert_array_equal(np.stack([next(stream) for _ in range(7)], 1), have[:, 9:])
    if model.spec["num_hidden_layers"] == len(model.spec.blocks):
        return
    draws = [causal.generate(model, ids, mask, max_new_tokens=7, do_sample=True, seed=seed, eos_token_id=None)
             for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


def test_memory_of_generation():
    """A recurrent model keeps as much for any length; a hybrid grows by its softmax layers alone."""
    teacher, hybrid, all_ = tiny.slim(config(), "causal"), converted("mamba2", (0,)), converted("mamba2")
    size = lambda m, n: causal.state_bytes(m, 2, n)  # noqa: E731
    assert size(all_, 10) == size(all_, 10_000) > 0
    kept = 2 * 2 * 32 * 4                                                 # rows, keys and values, width, bytes
    assert size(teacher, 10_000) - size(teacher, 10) == 2 * 9990 * kept
    assert size(hybrid, 10_000) - size(hybrid, 10) == 9990 * kept
    assert len(list(causal.stream(hybrid, np.ones((1, 3), np.int32), places=40))) == 40 - 32 + 1


@pytest.mark.parametrize("bad, message", [
    (dict(input_ids=[[1, 2]], attention_mask=[[1, 0]]), "pad prompts on the left"),
    (dict(input_ids=[[99]]), "has 50 tokens"), (dict(input_ids=[[]]), "at least one token"),
    (dict(input_ids=[[1]], do_sample=True, temperature=0.0), "temperature must be positive"),
    (dict(input_ids=[[1]], max_new_tokens=0), "at least 1")])
def test_bad_prompts_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        causal.generate(tiny.slim(config(), "causal"), **bad)


def test_conversion_copies_q_k_v_o():
    """mamba2 in place of attention: x <- v, B <- k, C <- q, out <- o, taken out of the one matrix head by head."""
    teacher = tiny.slim(config(), "causal")
    student = converted("mamba2", model=teacher)
    assert student.spec.attention("encoder.0.attention").options["direction"] == "causal"
    matrix = np.asarray(teacher.params["gpt_neox.layers.0.attention.query_key_value.weight"]).reshape(4, 3, 8, 32)
    q, k, v = (matrix[:, i].reshape(32, 32) for i in range(3))
    owner = "gpt_neox.layers.0.attention.fwd."
    weight = student.params[owner + "in_proj.weight"]
    for at, want in ((32, v), (64, k), (96, q)):
        np.testing.assert_array_equal(weight[at : at + 32], want)
    np.testing.assert_array_equal(student.params[owner + "out_proj.weight"],
                                  teacher.params["gpt_neox.layers.0.attention.dense.weight"])
    assert not any("query_key_value" in name for name in student.params)


@pytest.mark.parametrize("options, message", [
    (dict(mixer="mamba2", direction="sum"), "must not look ahead"), (dict(mixer="hedgehog"), "must not look ahead")])
def test_mixers_that_look_ahead_are_refused(options, message):
    model = tiny.slim(config(), "causal")
    with pytest.raises(SpecError, match=message):
        Linearize(mixer=options.pop("mixer"), options=options).start(model, None, jax.random.key(0))
    with pytest.raises(SpecError, match="one matrix"):
        bind.shapes(model.spec.with_block("encoder.0.attention", heads=[0, 1]))


def test_saving_a_converted_model(tmp_path):
    model = converted("mamba")
    hub.save(model, tmp_path / "m")
    again = hub.load(tmp_path / "m")
    assert again.spec.blocks == model.spec.blocks and again.params.keys() == model.params.keys()
    for name, value in model.params.items():
        np.testing.assert_array_equal(again.params[name], value)


@pytest.mark.parametrize("spec", [Spec(config(), "gpt_neox", "causal"),
                                  Spec(config(tie_word_embeddings=True), "gpt_neox", "none"),
                                  converted("mamba2", (1,)).spec, converted("mamba").spec])
def test_counts_are_those_of_the_program(spec):
    for seconds in (3.0, 30.0):
        table = cost.macs(spec, seconds, 2)
        assert table.total == cost.traced_macs(spec, seconds, 2) and "encoder.1.ffn" in table.blocks
    assert cost.params(spec) == sum(x.size for x in bind.shapes(spec).values())
    for name, leaf in bind.shapes(spec).items():       # every matrix has a sharding rule
        if len(leaf.shape) == 2 and "A_log" not in name:
            assert any(re.search(pattern, name) for pattern, _ in RULES), name
