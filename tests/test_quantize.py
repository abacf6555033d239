"""int8 weights: rounding bound, size on disk, the same transcripts nearly, export, and what is refused."""
import os

import jax
import numpy as np
import pytest
import tiny

from jaxslim import cost, export, hub
from jaxslim.data import load_rows
from jaxslim.evaluate import frame_agreement
from jaxslim.methods import METHODS
from jaxslim.methods.quantize import Quantize, dequantize, quantize
from jaxslim.spec import SpecError

TEACHER = hub.load("bundled:wav2vec2-ctc-en")


def test_weights_are_within_half_a_step():
    small = METHODS["quantize"]().start(TEACHER, None, jax.random.key(0))
    back = dequantize(small)
    assert back.spec == TEACHER.spec
    changed = [k for k in TEACHER.params if small.params[k].dtype == np.int8]
    assert len(changed) == 8 * 6
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
    assert sizes[1] < 0.4 * sizes[0]
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
