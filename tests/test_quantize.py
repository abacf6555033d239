"""int8: integer sums exactly, rounding bounds, size on disk, nearly the same transcripts, export, what is refused."""
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxslim import cost, export, hub
from jaxslim.data import load_rows
from jaxslim.evaluate import frame_agreement
from jaxslim.methods import METHODS
from jaxslim.methods.quantize import Quantize, dequantize, quantize
from jaxslim.models.layers import int8_matmul, int8_rows
from jaxslim.spec import SpecError

TEACHER = hub.load("bundled:wav2vec2-ctc-en")


def test_weights_are_within_half_a_step():
    small = METHODS["quantize"]().start(TEACHER, None, jax.random.key(0))
    back = dequantize(small)
    assert back.spec == TEACHER.spec
    changed = [k for k in TEACHER.params if small.params[k].dtype == np.int8]
    assert len(changed) == 4 * 6
    for name in TEACHER.params:
        was, now = (np.asarray(m.params[name], np.float32) for m in (TEACHER, back))
        step = np.asarray(small.params[f"{name}_scale"]) if name in changed else np.zeros(1)
        assert (np.abs(was - now) <= 0.5001 * step.reshape(-1, *[1] * (was.ndim - 1))).all(), name
    assert quantize(small).fingerprint == small.fingerprint


def test_real_speech_says_nearly_the_same_in_a_smaller_folder(tmp_path):
    small = quantize(TEACHER)
    rows = load_rows("bundled:prompts-en/validation")[:6]
    assert frame_agreement(small, TEACHER, rows, source="bundled:wav2vec2-ctc-en") > 0.97
    sizes = []
    for name, model in (("float", TEACHER), ("int8", small)):
        hub.save(model, tmp_path / name)
        sizes.append(os.path.getsize(tmp_path / name / "model.safetensors"))
    kept = sum(4 * np.size(v) for k, v in TEACHER.params.items() if "conv" in k)   # stays as it is
    assert sizes[1] - kept < 0.3 * (sizes[0] - kept)
    assert hub.load(tmp_path / "int8").fingerprint == small.fingerprint
    assert cost.macs(small.spec).total == cost.macs(TEACHER.spec).total


def test_other_formats_get_floats(tmp_path):
    small = quantize(tiny.slim())
    assert export.export(small, tmp_path / "hf")["class"] == "Wav2Vec2ForCTC"
    x = np.random.default_rng(0).standard_normal((1, 900)).astype(np.float32)
    a, b = (np.asarray(m(input_values=x).logits) for m in (small, hub.load(tmp_path / "hf")))
    assert np.abs(a - b).max() < 1e-4
    assert export.export(small, tmp_path / "program", format="stablehlo")["relative_difference"] < 1e-5


def test_blocks_and_refusal():
    one = Quantize(blocks=r"^encoder\.0\.ffn").start(TEACHER, None, jax.random.key(0))
    assert list(one.spec.blocks) == ["encoder.0.ffn"]
    with pytest.raises(SpecError, match="no linear .* fits 'nothing'"):
        Quantize(blocks="nothing").start(TEACHER, None, jax.random.key(0))


def operands(n=7, din=300, dout=40, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, din)) * 10.0 ** rng.integers(-3, 3, (n, 1))).astype(np.float32)
    x[0] = 0.0                                                          # a frame of padding
    return x, rng.integers(-127, 128, (dout, din)).astype(np.int8), rng.uniform(1e-3, 1e-2, dout).astype(np.float32)


def test_integer_products_are_exact():
    x, w, scale = operands()
    q, s = map(np.asarray, int8_rows(x))
    want = np.abs(x).max(1, keepdims=True).astype(np.float32) * np.float32(1 / 127)
    np.testing.assert_array_equal(s[1:], want[1:])
    np.testing.assert_array_equal(q, np.rint(x / s))
    assert q.dtype == np.int8 and np.abs(q).max(1).tolist() == [0] + 6 * [127]
    total = q.astype(np.int64) @ w.astype(np.int64).T                   # no float in it
    assert np.abs(total).max() > 2**17 and np.abs(total).max() < 2**31
    have = np.asarray(jax.jit(int8_matmul)(x.reshape(7, 1, 300), w, scale))
    assert have.shape == (7, 1, 40)
    np.testing.assert_array_equal(have[:, 0], total.astype(np.float32) * s * scale)
    jaxpr = str(jax.make_jaxpr(int8_matmul)(x, w, scale))
    assert "preferred_element_type=int32" in jaxpr and "i8[7,300]" in jaxpr


def test_dynamic_is_within_half_a_step_of_the_weight_only_product():
    for seed in range(3):
        x, w, scale = operands(seed=seed)
        weights = w.astype(np.float64) * scale[:, None]
        s = np.asarray(int8_rows(x)[1], np.float64)
        difference = np.abs(np.asarray(int8_matmul(x, w, scale), np.float64) - x.astype(np.float64) @ weights.T)
        bound = 0.5 * s * np.abs(weights).sum(1)                        # each input is off by at most s / 2
        assert (difference <= 1.0001 * bound).all() and (difference[1:] > 0).any()
    assert (np.asarray(int8_matmul(x, w, scale))[0] == 0).all()
    x[1, 0] = np.nan                                                    # is never hidden
    assert np.isnan(np.asarray(int8_matmul(x, w, scale))[1]).all()


def test_gradients_pass_straight_through():
    x, w, scale = operands()
    dy = np.random.default_rng(3).standard_normal((7, 40)).astype(np.float32)
    have = jax.vjp(lambda x, s: int8_matmul(x, w, s), x, scale)[1](dy)
    want = jax.vjp(lambda x, s: (x @ w.astype(jnp.float32).T) * s, x, scale)[1](dy)
    tiny.close(have[0], want[0], 1e-5)
    tiny.close(have[1], want[1], 2e-2)                                  # of the product as it was taken


def test_a_dynamic_model_is_saved_counted_and_undone(tmp_path):
    model = tiny.slim()
    dynamic = Quantize(activations="int8").start(model, None, jax.random.key(0))
    assert dynamic.spec.blocks["encoder.1.ffn"] == {"int8": ["down", "up"], "activations": "int8"}
    hub.save(dynamic, tmp_path / "out")
    again = hub.load(tmp_path / "out")
    assert again.spec.blocks == dynamic.spec.blocks and all(
        again.params[k].dtype == v.dtype for k, v in dynamic.params.items())
    weights = quantize(model)
    assert quantize(dynamic).spec == weights.spec and dequantize(dynamic).spec == model.spec
    assert quantize(weights, activations="int8").fingerprint == dynamic.fingerprint
    assert cost.macs(dynamic.spec, 0.2).total == cost.traced_macs(dynamic.spec, 0.2) == cost.macs(model.spec, 0.2).total
    x = tiny.waves(900)[0]
    a, b, c = (np.asarray(m(input_values=x).logits) for m in (dynamic, again, weights))
    np.testing.assert_array_equal(a, b)
    assert 0 < np.abs(a - c).max() < 0.1 * np.abs(c).max()
    for block in ({"activations": "int8"}, {"int8": ["up"], "activations": "int4"}):
        with pytest.raises(SpecError, match="only int8 is known"):
            model.spec.replace(blocks={"encoder.0.ffn": block})


def test_dynamic_int8_on_real_speech():
    dynamic = quantize(TEACHER, activations="int8")
    rows = load_rows("bundled:prompts-en/validation")[:6]
    assert frame_agreement(dynamic, TEACHER, rows, source="bundled:wav2vec2-ctc-en") > 0.95
