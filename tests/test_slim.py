"""Slim: a model as data. Calls, taps, dtypes, rematerialisation, keys, fingerprints, and live NNX modules."""
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxslim import from_flax, to_flax
from jaxslim.models import bind
from jaxslim.slim import Method, _forward
from jaxslim.spec import SpecError

MODEL = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
VALUES, MASK = tiny.waves(2000, 1130)
BATCH = {"input_values": VALUES, "attention_mask": MASK}
DROPPING = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, hidden_dropout=0.2, attention_dropout=0.2,
                     layerdrop=0.1, mask_time_prob=0.2, mask_time_length=5)


def test_outputs_as_transformers_names_them():
    out = MODEL(**BATCH)
    assert out.logits.shape == (2, 50, 11) and out.last_hidden_state.shape == (2, 50, 32)
    assert out.hidden_states is None and out.taps is None and list(out.lengths) == [50, 28]
    out = MODEL(**BATCH, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert MODEL(input_values=VALUES).lengths is None


def test_every_tap():
    widths = {"frontend": 20, "projection": 32, "embedding": 32, "logits": 11, "encoder.0": 32, "encoder.1": 32}
    widths |= {f"encoder.{i}.{p}.{side}": 32 for i in (0, 1) for p in ("attention", "ffn") for side in ("in", "out")}
    out = MODEL(**BATCH, taps=tuple(widths), output_hidden_states=True)
    assert {k: v.shape for k, v in out.taps.items()} == {k: (2, 50, w) for k, w in widths.items()}
    for name, tap in out.taps.items():
        assert not np.any(tap[1, 28:]), name  # padded frames are zero
    np.testing.assert_array_equal(out.taps["embedding"][0], out.hidden_states[0][0])
    np.testing.assert_array_equal(out.taps["encoder.0"][1, :28], out.hidden_states[1][1, :28])
    assert set(MODEL(**BATCH, taps=("encoder.1",)).taps) == {"encoder.1"}


def test_an_unknown_tap_is_an_error():
    with pytest.raises(ValueError, match=r"no tap 'encoder.1.atention.in'. Did you mean 'encoder.1.attention.in'"):
        MODEL(**BATCH, taps=("encoder.1", "encoder.1.atention.in"))


def test_no_key_means_evaluation():
    a, b = (DROPPING(**BATCH).logits for _ in range(2))
    np.testing.assert_array_equal(a, b)
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    x, y, z = (DROPPING(**BATCH, key=key).logits for key in keys)
    np.testing.assert_array_equal(x, y)  # a key says everything
    assert not np.allclose(x, z) and not np.allclose(a, x)


def test_dtype_is_of_the_products_only():
    out = MODEL(**BATCH, dtype=jnp.bfloat16, output_hidden_states=True)
    assert out.hidden_states[1].dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    want = MODEL(**BATCH, output_hidden_states=True)
    assert np.abs(out.logits - want.logits).max() < 0.1 * np.abs(want.logits).max()
    default = MODEL.replace(defaults=(("dtype", "bfloat16"),))
    np.testing.assert_array_equal(default(**BATCH).logits, out.logits)
    half = MODEL.replace(params={k: v.astype(jnp.float16) for k, v in MODEL.params.items()})
    assert half(**BATCH).logits.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_outputs_nor_gradients(remat):
    def loss(params, remat):
        return (DROPPING.replace(params=params)(**BATCH, key=jax.random.key(3), remat=remat).logits ** 2).mean()

    (want, grads), (have, again) = (jax.value_and_grad(loss)(DROPPING.params, r) for r in ("none", remat))
    tiny.close(have, want, 1e-6)
    for name in grads:
        tiny.close(again[name], grads[name], 1e-5)


def test_one_trace_for_equal_calls():
    model = tiny.slim(num_hidden_layers=1)
    before = _forward._cache_size()
    for seed in range(3):
        other = tiny.slim(num_hidden_layers=1, seed=seed)
        other(input_values=VALUES)
        model(input_values=VALUES.tolist())  # anything that numpy can read
    assert _forward._cache_size() <= before + 2  # float32 arrays, and float64 lists
    leaves, tree = jax.tree.flatten(model)
    assert len(leaves) == len(model.params) and jax.tree.unflatten(tree, leaves).spec == model.spec


def test_fingerprint():
    same = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    shuffled = same.replace(params=dict(reversed(same.params.items())))
    on_host = same.replace(params={k: np.asarray(v) for k, v in same.params.items()})
    assert len(MODEL.fingerprint) == 64
    assert MODEL.fingerprint == same.fingerprint == shuffled.fingerprint == on_host.fingerprint
    name = "lm_head.bias"
    others = [same.replace(params={**same.params, name: same.params[name].at[0].add(1e-6)}),
              same.replace(params={**same.params, name: same.params[name].astype(jnp.float16)}),
              same.replace(spec=same.spec.replace(config={**same.spec.config, "layerdrop": 0.5}))]
    assert len({m.fingerprint for m in (same, *others)}) == 4


def test_equality_and_hash_are_of_the_object():
    assert MODEL == MODEL and MODEL != tiny.slim() and len({MODEL, MODEL}) == 1  # comparing arrays would be an error


def test_wrong_parameters_are_listed():
    params = dict(MODEL.params)
    del params["lm_head.bias"]
    params |= {"other.weight": np.zeros(3), "lm_head.weight": np.zeros((11, 31))}
    with pytest.raises(SpecError, match=r"missing lm_head.bias \(11,\).*unexpected other.weight \(3,\).*"
                                        r"misshapen lm_head.weight: \(11, 31\), expected \(11, 32\)"):
        MODEL.replace(params=params)(**BATCH)
    bind.check(MODEL.spec, {**MODEL.params, "aux.multiplier.macs": np.zeros(())})  # training only


def test_adapter_ids_need_slots():
    with pytest.raises(ValueError, match="no adapters"):
        MODEL(**BATCH, adapter_ids=np.zeros(2, np.int32))


def test_default_hooks():
    method, model = Method(), MODEL.replace(params={**MODEL.params, "aux.x": np.zeros(1)})
    assert method.start(MODEL, None, None) is MODEL and method.teacher_at(MODEL, 3) is MODEL
    assert method.group("any") == "main" and method.targets(MODEL, {}, None, 0) == {}
    assert set(method.finish(model, None).params) == set(MODEL.params)
    with pytest.raises(NotImplementedError, match="defines no loss"):
        method.loss(MODEL, {}, {}, None, 0)


@pytest.mark.parametrize("head", ["ctc", "none"])
def test_flax_round_trip(head):
    model = tiny.slim(tiny.config(), head)
    module = to_flax(model)
    back = from_flax(module)
    assert back.spec == model.spec and back.fingerprint == model.fingerprint
    from jaxslim.models import layers
    live = nnx.jit(lambda m, x: m(layers.Call(), input_values=x))(module, VALUES)
    np.testing.assert_allclose(live.last_hidden_state, model(input_values=VALUES).last_hidden_state, atol=1e-5)


TREE_MODE = """
    import jax, numpy as np, optax, tiny
    from flax import nnx
    from jaxslim import from_flax, to_flax
    from jaxslim.models import layers
    model = tiny.slim(feat_extract_norm="layer", num_hidden_layers=1)
    values, mask = tiny.waves(2000, 1130)
    module, tx = to_flax(model), optax.sgd(0.1)
    def loss(module):
        return (module(layers.Call(), input_values=values, attention_mask=mask).logits ** 2).mean()
    graph, state = nnx.split(module)
    state = jax.jit(lambda s: tx.update(jax.grad(lambda s: loss(nnx.merge(graph, s)))(s), tx.init(s), s)[0])(state)
    updates = {".".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(state)}
    trained = model.replace(params={k: v + updates[k] for k, v in model.params.items()})
    nnx.update(module, jax.tree.map(lambda a, b: a + b, nnx.state(module), state))
    assert from_flax(module).fingerprint == trained.fingerprint
    assert from_flax(module).fingerprint != model.fingerprint
    print(float(loss(module)), float((trained(input_values=values, attention_mask=mask).logits ** 2).mean()))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_loop_of_ones_own_in_the_tree_mode_of_nnx():
    """NNX without its graph: what it is going to be by default."""
    env = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false",
           "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(TREE_MODE)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    live, ours = map(float, done.stdout.split())
    assert live == pytest.approx(ours, rel=1e-5)
