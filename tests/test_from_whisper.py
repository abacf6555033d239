"""scripts/from_whisper.py: what is copied is Whisper's, what is learned is learned."""
import pathlib
import sys

import jax
import numpy as np
import pytest
import tiny
import tiny_whisper as tw

from jaxslim.config import Group, Train
from jaxslim.models import bind
from jaxslim.models import layers as L
from jaxslim.slim import inputs
from jaxslim.spec import Spec
from jaxslim.train import mesh as M
from jaxslim.train import step as S

SPEC = Spec(tw.config(frames=50, encoder_layers=2, decoder_layers=1), "whisper", "seq2seq")


@pytest.fixture(scope="module")
def script():
    folder = str(pathlib.Path(__file__).parents[1] / "scripts")
    sys.path.insert(0, folder)
    import from_whisper

    sys.path.remove(folder)
    return from_whisper


@pytest.fixture(scope="module")
def world(script):
    """(script, method, teacher with positions, student with all units, batch)"""
    rng = np.random.default_rng(0)
    batch = {"input_values": rng.standard_normal((4, 8000)).astype(np.float32),
             "attention_mask": np.ones((4, 8000), np.int32), "labels": np.full((4, 3), 5, np.int32)}
    batch["attention_mask"][1, 5000:] = 0
    teacher = script.with_positions(tiny.slim(SPEC), [batch] * 20, 8)
    method = script.FromWhisper(units=SPEC["encoder_ffn_dim"])
    student = method.student(teacher, tiny.slim(mask_time_prob=0.05), [batch], jax.random.key(0))
    return script, method, teacher, student, batch


def test_the_layers_are_whispers(world):
    _, _, teacher, student, _ = world
    x = np.random.default_rng(1).standard_normal((2, 7, SPEC["d_model"])).astype(np.float32)
    ours = bind.bind(student.spec, student.params).wav2vec2.encoder
    theirs = bind.bind(SPEC, teacher.params).model.encoder
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        got, want = a(x, None, L.Call())[0], b(x, None, L.Call())[0]
        tiny.close(got, want, 1e-5)
    tiny.close(ours.layer_norm(x), theirs.layer_norm(x), 1e-6)


def test_units_that_are_cut_leave_their_mean(world):
    script, _, teacher, whole, batch = world
    student = script.FromWhisper(units=8).student(teacher, tiny.slim(mask_time_prob=0.05), [batch], jax.random.key(0))
    assert student.spec["intermediate_size"] == 8
    name = "wav2vec2.encoder.layers.0.feed_forward.output_dense."
    kept = [np.flatnonzero((whole.params[name + "weight"].T == w).all(1))[0] for w in student.params[name + "weight"].T]
    mean = script.FromWhisper().activity(teacher, student.spec, [batch])[0][0]
    cut = np.setdiff1d(np.arange(SPEC["encoder_ffn_dim"]), kept)
    added = whole.params[name + "weight"][:, cut] @ mean[cut]
    tiny.close(student.params[name + "bias"], whole.params[name + "bias"] + added, 1e-5)


@pytest.mark.slow
def test_frames_of_both_models_are_as_many_and_the_loss_falls(world):
    script, method, teacher, student, batch = world
    targets = method.targets(teacher, batch, None, 0)
    assert targets["0"].shape[:2] == student(**inputs(batch)).logits.shape[:2]
    method = script.FromWhisper(units=method.units, task_weight=1.0)
    cfg = Train(max_steps=30, groups={g: Group(3e-3, schedule="constant") for g in ("front", "layers")}, prng="hash")
    mesh = M.make("data=1", jax.devices()[:1])
    state, frozen, tx = S.init(method, student, cfg, mesh)
    step, losses = S.make(method, student.spec, tx, cfg, state, mesh), []
    for _ in range(30):
        state, metrics = step(state, frozen, teacher, batch)
        losses.append({k: float(v) for k, v in metrics.items()})
    assert {"loss/0", "loss/2", "loss/ctc"} <= losses[0].keys() and "loss/3" not in losses[0]
    assert losses[-1]["loss/2"] < losses[0]["loss/2"] and losses[-1]["loss/ctc"] < losses[0]["loss/ctc"]


def test_convolutions_make_log_mel_features(script):
    """Fitted on some clips, they explain the features of others, and padding changes little but the last frames."""
    from jaxslim.data import load_rows, mel

    rows = load_rows("bundled:prompts-en/train")
    long = [w[:16000] for w in (rows.audio(i) for i in range(0, 400, 15)) if len(w) >= 16000]   # of one shape
    clips = [(w - w.mean()) / w.std() for w in long[:20]]
    fitted = [{"input_values": w[None], "attention_mask": np.ones((1, len(w)), np.int32)} for w in clips[:12]]
    student = script.FromWhisper(units=8).student(
        tiny.slim(SPEC), tiny.slim(mask_time_prob=0.05), fitted, jax.random.key(0))
    assert all(np.abs(v).max() < 65504 for v in student.params.values())   # of half precision
    first, *others = bind.bind(student.spec, student.params).wav2vec2.feature_extractor.conv_layers[:5]

    def features(wave):
        x = first(wave[None, :, None])
        for layer in others:
            x = layer(x)
        return np.asarray(x[0]) - script.ABOVE

    have, want = [], []
    for wave in clips[12:]:
        x, y = features(wave), np.asarray(mel.log_mel(script.LEVEL * wave[None, mel.SIZE // 2:], 80))[0].T
        have, want = [*have, x[2: len(y)]], [*want, y[2: len(x)]]          # the first frames see a reflection there
        tiny.close(features(np.pad(wave, (0, 8000)))[: len(x) - 3], x[:-3], 2e-2)
    have, want = np.concatenate(have), np.concatenate(want)
    assert ((have - want) ** 2).mean() < 0.01 * want.var(0).mean()
