"""Gates: what they multiply, which are open, that cutting closed ones changes nothing; and what a gated model costs."""
import jax
import jax.numpy as jnp
import numpy as np
import pruned
import pytest
import tiny

from jaxslim import budget, cost, hub
from jaxslim.methods.linearize import Linearize
from jaxslim.models import bind, gates, roles
from jaxslim.slim import Slim
from jaxslim.spec import GATES, Spec, SpecError, kind

SLOW = ("wav2vec2-stable", "roberta")  # shapes of which the others have everything
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in pruned.FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_model_equals_the_cut_one(name):
    """20 masks; the first shape is empty everywhere, the second keeps one unit of each block."""
    assert max(pruned.difference(name, 20, 3)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", pruned.FAMILIES)
def test_many_more_shapes(name):
    assert max(pruned.difference(name, 40, 20)) <= 1e-5


@pytest.mark.parametrize("name", pruned.FAMILIES)
def test_costs_are_those_of_the_cut_model(name):
    spec = pruned.with_gates(pruned.model(name)).spec
    seconds = (0.3, 0.5)
    for seed in range(12):
        small = spec
        counts = pruned.widths(spec, seed)
        for block, n in counts.items():
            small = gates.with_units(small, block, list(range(n)))
        small, counts = gates.plain(small), {b: float(n) for b, n in counts.items()}
        assert float(budget.params(spec, counts)) == pytest.approx(cost.params(small), rel=1e-6)
        want = sum(cost.macs(small, s).total for s in seconds) / 2
        assert float(budget.expected("macs", spec, counts, seconds)) == pytest.approx(want, rel=1e-6)
        for part in ("encoder", "attention", *(["frontend"] if "frontend.0" in counts else [])):
            mine = [b for b in cost.params_by_block(small) if part in (b.split(".")[0], kind(b))]
            assert float(budget.params(spec, counts, part)) == pytest.approx(
                sum(cost.params_by_block(small)[b] for b in mine), rel=1e-6)
            assert float(budget.macs(spec, counts, 0.3, part)) == pytest.approx(
                sum(cost.macs(small, 0.3).blocks[b] for b in mine), rel=1e-6)
    assert float(budget.params(spec, budget.floor(spec))) == cost.params(gates.emptied(spec))


def test_factored_and_adapted_blocks_cost_what_they_cost():
    spec = pruned.model("wavlm").spec.with_block("encoder.0.ffn", up_rank=5, lora={"down": {"rank": 2, "alpha": 4}})
    spec = spec.with_block("encoder.1.attention", q_rank=3, o_rank=4, qk_dim=6)
    gated = pruned.with_gates(tiny.slim(spec))
    batch = pruned.inputs(spec)
    for seed in range(3):
        keep = pruned.widths(gated.spec, seed)
        state = pruned.mask(gated.spec, keep, seed)
        small = Slim(*gates.cut(gated.spec, gated.params, state))
        counts = {b: float(n) for b, n in keep.items()}
        assert float(budget.params(gated.spec, counts)) == cost.params(small.spec)
        assert float(budget.macs(gated.spec, counts, 0.5)) == pytest.approx(cost.macs(small.spec, 0.5).total, rel=1e-6)
        tiny.close(pruned.run_masked(gated.spec, gated.params, state, batch),
                   pruned.run(small.spec, small.params, batch), 1e-5)


def test_gates_scale_what_a_unit_gives():
    """Against scaling what makes the unit: values, units and channels are linear in it where the activation is relu."""
    model = tiny.slim(**dict(pruned.FAST, **pruned.STABLE, hidden_act="relu", feat_extract_activation="relu"))
    gated = pruned.with_gates(model)
    counts = {g.key: g.size for g in gates.groups(gated.spec)}
    state = pruned.mask(gated.spec, counts, 0)
    scaled = dict(model.params)

    def scale(name, value, repeat=1):
        for end in ("weight", "bias"):
            x = scaled[f"{name}.{end}"]
            scaled[f"{name}.{end}"] = x * np.repeat(value, repeat).reshape(-1, *[1] * (x.ndim - 1))

    scale("wav2vec2.feature_extractor.conv_layers.0.layer_norm", state["frontend.0"].value)
    scale("wav2vec2.feature_projection.layer_norm", state["frontend.1"].value)  # behind the norm
    for i in range(2):
        r = roles.roles(model.spec, f"encoder.{i}.attention")
        scale(r["v"], state[f"encoder.{i}.attention"].value, 8)
        scale(r["v"], np.tile(state[f"encoder.{i}.attention:vo"].value, 4))
        scale(r["k"], np.tile(state[f"encoder.{i}.attention:qk"].value, 4))
        scale(roles.roles(model.spec, f"encoder.{i}.ffn")["up"], state[f"encoder.{i}.ffn"].value)
    batch = pruned.inputs(model.spec)
    tiny.close(pruned.run_masked(gated.spec, gated.params, state, batch), pruned.run(model.spec, scaled, batch), 1e-5)


def test_norms_over_closed_channels_are_another_model():
    """The ablation `norm: all`: statistics over all channels, so the cut model differs."""
    model = pruned.model("wav2vec2-stable")
    spec = model.spec.with_block("frontend.0", gates={"channels": {"norm": "all"}})
    gated = Slim(spec, {**model.params, **{k: np.zeros(x.shape, np.float32) for k, x in gates.shapes(spec).items()}})
    state, batch = gates.masked(spec, {"frontend.0": range(5)}), pruned.inputs(spec)
    masked = np.asarray(pruned.run_masked(spec, gated.params, state, batch))
    small = np.asarray(pruned.run(*gates.cut(spec, gated.params, state), batch))
    assert np.abs(masked - small).max() > 0.05


def test_twice_pruned_heads_keep_their_numbers():
    first = pruned.with_gates(pruned.model("wavlm"))
    keep = {**{g.key: range(g.size) for g in gates.groups(first.spec)}, "encoder.0.attention": (1, 2, 3),
            "encoder.1.attention": (0, 3)}
    once = Slim(*gates.cut(first.spec, first.params, gates.masked(first.spec, keep)))
    assert once.spec.blocks == {"encoder.0.attention": {"heads": [1, 2, 3]}, "encoder.1.attention": {"heads": [0, 3]}}
    second = pruned.with_gates(once)
    keep |= {"encoder.0.attention": (0, 2), "encoder.1.attention": (1,), "encoder.1.ffn": (4, 5, 40)}
    state = gates.masked(second.spec, keep)
    twice = Slim(*gates.cut(second.spec, second.params, state))
    assert twice.spec.blocks == {"encoder.0.attention": {"heads": [1, 3]}, "encoder.1.attention": {"heads": [3]},
                                 "encoder.1.ffn": {"units": 3}}
    straight = Slim(*gates.cut(first.spec, first.params, gates.masked(first.spec, {
        "encoder.0.attention": (1, 3), "encoder.1.attention": (3,), "encoder.1.ffn": (4, 5, 40)})))
    assert twice.spec == straight.spec
    batch = pruned.inputs(once.spec)
    want = pruned.run(twice.spec, twice.params, batch)
    np.testing.assert_array_equal(want, pruned.run(straight.spec, straight.params, batch))
    tiny.close(pruned.run_masked(second.spec, second.params, state, batch), want, 1e-5)


@pytest.mark.parametrize("options", [dict(features=4), pytest.param(dict(mixer="t2r", features=4),
                                                                    marks=pytest.mark.slow)])
def test_linear_attention_has_heads_too(options):
    gated = pruned.with_gates(Linearize(**options).start(pruned.model("wav2vec2-stable"), None, None))
    state = pruned.mask(gated.spec, pruned.widths(gated.spec, 5) | {"encoder.0.attention": 2}, 0)
    small = gates.cut(gated.spec, gated.params, state)
    assert small[1]["wav2vec2.encoder.layers.0.attention.feature_q.weight"].shape == (2, 4, 8)
    batch = pruned.inputs(gated.spec)
    tiny.close(pruned.run_masked(gated.spec, gated.params, state, batch), pruned.run(*small, batch), 1e-5)


def test_ranks_are_cut_in_every_head():
    gated = pruned.with_gates(pruned.model("conformer"), {**GATES, "attention": ("qk", "vo")})
    block = "encoder.0.attention"
    keep = {f"{block}:qk": (1, 5, 6), f"{block}:vo": ()}
    state = gates.masked(gated.spec, keep)
    small = Slim(*gates.cut(gated.spec, gated.params, state))
    a, whole = small.spec.attention(block), gated.spec.attention(block)
    assert (a.qk_dim, a.v_dim, a.count, a.scale) == (3, 1, whole.count, whole.scale)
    assert block not in {g.key for g in gates.groups(gated.spec)}  # no gates on heads were asked for
    batch = pruned.inputs(gated.spec)
    tiny.close(pruned.run_masked(gated.spec, gated.params, state, batch), pruned.run(small.spec, small.params, batch),
               1e-5)


def test_ranks_that_cannot_be_gated():
    linear = Linearize(features=4).start(pruned.model("wav2vec2-stable"), None, None)
    for spec, what in ((linear.spec, "no product of Q and K"), (pruned.model("w2v-bert").spec, "relative_key")):
        with pytest.raises(SpecError, match=what):
            gates.groups(spec.with_block("encoder.0.attention", gates={"qk": {}}))
    empty = pruned.model("wavlm").spec.with_block("encoder.0.attention", heads=[])
    with pytest.raises(SpecError, match="no heads left"):
        gates.groups(empty.with_block("encoder.0.attention", gates={"vo": {}}))


# ---- which gates are open ----


def test_samples_follow_the_hard_concrete_distribution():
    spec = pruned.model("wav2vec2").spec.with_block("encoder.0.ffn", gates={"units": {}})
    name = gates.names(spec, "encoder.0.ffn")["units"]
    log_alpha = jnp.linspace(-4, 4, 48)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: gates.sample(spec, {name: log_alpha}, key)["encoder.0.ffn"]))(keys)
    np.testing.assert_allclose(drawn.open.mean(0), gates.probability(log_alpha), atol=0.03)
    assert float(gates.probability(jnp.zeros(()))) == pytest.approx(0.8318, abs=1e-4)  # sigmoid(2/3 log 11)
    assert ((drawn.value > 0) == (drawn.open == 1)).all() and drawn.value.max() == 1.0
    settled = gates.settle(spec, {name: log_alpha})["encoder.0.ffn"]
    on = settled.open == 1
    np.testing.assert_allclose(np.median(drawn.value, 0)[on], settled.value[on], atol=0.03)


@pytest.mark.parametrize("options", [{}, {"tile": 8}, {"uniform": True}, {"tile": 8, "uniform": True}])
def test_as_many_are_open_as_are_expected(options):
    gated = pruned.with_gates(pruned.model("bert"), {"attention": ("heads",), "ffn": ("units",)}, **options)
    blocks = [f"encoder.{i}.ffn" for i in range(2)]
    want = [float(gates.expected(gated.spec, gated.params)[b]) for b in blocks]
    state = gates.settle(gated.spec, gated.params)
    have, tile = [int(state[b].open.sum()) for b in blocks], options.get("tile", 1)
    assert abs(sum(have) - sum(want)) <= (tile if "uniform" in options else tile / 2)  # not a rounding a layer
    assert all(n % tile == 0 for n in have)
    if "uniform" in options:
        assert have[0] == have[1]
    else:
        assert all(abs(a - b) <= tile for a, b in zip(have, want, strict=True))
    log_alpha = gated.params[gates.names(gated.spec, blocks[0])["units"]]
    assert set(np.flatnonzero(state[blocks[0]].open)) == set(np.argsort(-log_alpha)[: have[0]])


def test_a_closed_block_closes_its_units():
    gated = pruned.with_gates(pruned.model("bert"))
    params = dict(gated.params)
    params[gates.names(gated.spec, "encoder.0.ffn")["block"]] = np.float32([-9.0])
    params[gates.names(gated.spec, "encoder.1.ffn")["block"]] = np.float32([9.0])
    small, _ = gates.cut(gated.spec, params, gates.settle(gated.spec, params))
    assert small.ffn("encoder.0.ffn").units == 0 and small.ffn("encoder.1.ffn").units > 0
    assert float(gates.expected(gated.spec, params)["encoder.0.ffn"]) < 0.05


def test_evaluation_and_training_use_the_gates():
    """Slim.__call__ itself: without a key settled and repeatable, equal to the cut model; with one, drawn."""
    gated = pruned.with_gates(pruned.model("bert"), spread=1.0)
    batch = pruned.inputs(gated.spec)
    small = Slim(*gates.cut(gated.spec, gated.params, gates.settle(gated.spec, gated.params)))
    tiny.close(gated(**batch).logits, small(**batch).logits, 1e-5)
    drawn = [np.asarray(gated(**batch, key=jax.random.key(i)).logits) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3


def test_a_gated_model_is_saved_and_read(tmp_path):
    gated = pruned.with_gates(pruned.model("bert"))
    hub.save(gated, tmp_path / "m")
    back = hub.load(tmp_path / "m")
    assert back.spec.blocks == gated.spec.blocks and back.spec.blocks["encoder.0.ffn"]["gates"]
    assert all((back.params[k] == v).all() for k, v in gated.params.items())


# ---- bad input ----


@pytest.mark.parametrize("blocks, message", [
    ({"encoder.0.attention": {"gates": {"units": {}}}}, "encoder.0.attention can have no gate on 'units'"),
    ({"encoder.0.ffn": {"gates": {"qk": {}}}}, "no gate on 'qk'; its gates are"),
    ({"encoder.0.ffn": {"gates": {"units": {"tiles": 8}}}}, r"gate options \['tiles'\]"),
])
def test_gates_that_no_block_has(blocks, message):
    with pytest.raises(SpecError, match=message):
        Spec(pruned.model("bert").spec.config, "bert", "none", blocks)


def test_unfinished_models_do_not_pass_for_finished_ones():
    gated = pruned.with_gates(pruned.model("bert"))
    with pytest.raises(SpecError, match="still being pruned; finish the stage first"):
        bind.to_flax(gated)
    whisper = pruned.model("whisper").spec.with_block("frontend.1", gates={"channels": {}})
    with pytest.raises(SpecError, match="frontend.1: its channels are the model's width"):
        gates.groups(whisper)


@pytest.mark.parametrize("name, message", [
    ("flops", "unknown cost 'flops'"), ("latency.encoder", "unknown cost"), ("params.encodr", "Did you mean 'encoder'"),
    ("macs.decoder", "no part 'decoder'")])
def test_unknown_costs(name, message):
    with pytest.raises(SpecError, match=message):
        budget.check(name, pruned.model("wav2vec2").spec)


def test_every_kind_of_block_has_a_field():
    assert set(gates.FIELD) == set(GATES)
