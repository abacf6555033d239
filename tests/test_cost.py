"""Parameter and MAC counts: the formula equals the count over the traced program, for any Spec and length."""
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslim import cost
from jaxslim.models import bind
from jaxslim.models.attention import BLOCK
from jaxslim.models.roles import blocks
from jaxslim.spec import Spec

SMALL = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40, vocab_size=11,
             conv_dim=[8, 12, 6], conv_kernel=[10, 3, 2], conv_stride=[5, 2, 2], conv_bias=True,
             num_conv_pos_embeddings=7, num_conv_pos_embedding_groups=3, feat_extract_norm="layer")


def small(family="wav2vec2", head="ctc", blocks=None, **config):
    return Spec({**SMALL, **config}, family, head, blocks or {})


def chance(strategy):
    return st.none() | strategy


@st.composite
def lora(draw, names):
    return {n: {"rank": draw(st.integers(1, 5)), "alpha": 4} for n in draw(st.sets(st.sampled_from(names), min_size=1))}


@st.composite
def specs(draw):
    size = st.integers(1, 30)
    changed = {}
    for i in range(3):
        changed[f"frontend.{i}"] = {"channels": draw(chance(st.integers(1, 9)))}
    for i in range(2):
        mixer = draw(st.sampled_from(["softmax", "hedgehog"]))
        heads = draw(chance(st.lists(st.integers(0, 3), unique=True)))
        attention = {"mixer": mixer, "heads": heads, "qk_dim": draw(chance(size)), "v_dim": draw(chance(size)),
                     "lora": draw(chance(lora("qkvo"))), **{f"{r}_rank": draw(chance(size)) for r in "qkvo"}}
        if mixer == "hedgehog":
            attention["options"] = draw(chance(st.fixed_dictionaries({"features": size})))
        changed[f"encoder.{i}.attention"] = attention
        changed[f"encoder.{i}.ffn"] = {"units": draw(chance(st.integers(0, 50))), "up_rank": draw(chance(size)),
                                       "down_rank": draw(chance(size)), "lora": draw(chance(lora(["up", "down"])))}
    changed = {b: {k: v for k, v in f.items() if v is not None} for b, f in changed.items()}
    return small(draw(st.sampled_from(["wav2vec2", "hubert"])), draw(st.sampled_from(["none", "ctc"])), changed,
                 num_conv_pos_embeddings=draw(st.integers(1, 8)), conv_bias=draw(st.booleans()),
                 feat_extract_norm=draw(st.sampled_from(["group", "layer"])),
                 do_stable_layer_norm=draw(st.booleans()))


@settings(max_examples=25, deadline=None)
@given(specs(), st.floats(0.01, 3.0), st.integers(1, 3))
def test_formula_equals_the_traced_program(spec, seconds, batch):
    counted = cost.macs(spec, seconds, batch)
    assert counted.total == sum(counted.blocks.values()) == cost.traced_macs(spec, seconds, batch)
    assert set(counted.blocks) == {*blocks(spec), "projection", "positional"}


@settings(max_examples=25, deadline=None)
@given(specs())
def test_parameters_equal_the_shapes(spec):
    floats = [x for x in bind.shapes(spec).values() if jnp.issubdtype(x.dtype, jnp.floating)]
    table = cost.params_by_block(spec)
    assert cost.params(spec) == sum(table.values()) == sum(math.prod(x.shape) for x in floats)
    for block in blocks(spec):
        assert table[block] > 0


@pytest.mark.parametrize("family, config, millions", [
    ("wav2vec2", {}, 94.4),
    ("wav2vec2", dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                      feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True), 315.5),
])
def test_full_size(family, config, millions):
    spec = Spec(config, family, "ctc")
    assert cost.params(spec) / 1e6 == pytest.approx(millions, abs=0.1)
    for seconds in (1, 600):
        assert cost.macs(spec, seconds).total == cost.traced_macs(spec, seconds)


def test_softmax_is_quadratic_and_hedgehog_linear():
    linear = small()
    for i in range(2):
        linear = linear.with_block(f"encoder.{i}.attention", mixer="hedgehog")
    growth = [cost.macs(s, 200).total / cost.macs(s, 20).total for s in (small(), linear)]
    assert growth[0] > 50 and growth[1] == pytest.approx(10, rel=1e-2)


def test_as_run_counts_the_blocked_program():
    short, long = BLOCK * 15 / 16000, BLOCK * 50 / 16000
    assert cost.macs(small(), short, as_run=True).total == cost.traced_macs(small(), short, attention="blocked")
    run = cost.macs(small(), long, as_run=True)
    assert run.blocks == {} and run.total >= cost.macs(small(), long).total


def test_counts_through_inner_programs():
    def f(x, w):
        step = jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None))
        y, _ = jax.lax.scan(step, x, None, length=5)
        y = jax.lax.cond(y.sum() > 0, lambda y: y @ w, lambda y: jax.nn.relu(y @ w), y)
        return jax.jit(lambda y: jax.nn.silu(y) @ w)(y)

    x, w = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert cost.jaxpr_macs(jax.make_jaxpr(f)(x, w)) == 7 * 3 * 4 * 4
    loop = jax.make_jaxpr(lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x))(x, w)
    with pytest.raises(ValueError, match="while"):
        cost.jaxpr_macs(loop)


def test_too_short_audio_is_a_clear_error():
    with pytest.raises(ValueError, match="shorter than one frame"):
        cost.macs(small(), 0.0005)


def test_per_layer_table():
    spec = small(blocks={"encoder.1.ffn": {"units": 5}})
    rows = cost.per_layer_rows(spec, 2.0)
    assert sum(r["params"] for r in rows) == cost.params(spec)
    assert sum(r["macs"] for r in rows) == cost.macs(spec, 2.0).total
    assert [r["changes"] for r in rows if r["block"] == "encoder.1.ffn"] == [{"units": 5}]
    assert cost.per_layer_table(spec, 2.0).row_count == len(rows) + 1
