"""linearize: the mixer against its definition, both objectives, guidance; and that it learns."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_step import MODEL, RAGGED, setup

from jaxslim import config, hub
from jaxslim.config import Group, Train
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.methods import METHODS
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.linearize import Linearize
from jaxslim.models import bind, layers
from jaxslim.slim import Slim, inputs
from jaxslim.spec import SpecError

WIDE = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0)


def value(method, student, teacher, batch=RAGGED, key=None):
    """Terms of a method's loss as {name: (sum / count, weight)}."""
    @jax.jit
    def terms(student, teacher):
        targets = {} if teacher is None else method.targets(teacher, batch, None, 0)
        return method.loss(student, targets, batch, key, 0)

    return {k: (float(t.sum / max(float(t.count), 1e-6)), float(t.weight)) for k, t in terms(student, teacher).items()}


# ---- the mixer ----


def test_hedgehog_equals_its_quadratic_definition():
    """The whole block, from its inputs and weights, with all T x T weights in float64."""
    student = tiny.slim(Linearize(features=5).start(WIDE, None, None).spec, seed=4)  # random feature maps
    values, mask = tiny.waves(920, 400)
    out = student(input_values=values, attention_mask=mask,
                  taps=("encoder.1.attention.in", "encoder.1.attention.out"))
    x, have = (np.asarray(out.taps[f"encoder.1.attention.{side}"], np.float64) for side in ("in", "out"))
    owner = "wav2vec2.encoder.layers.1.attention."
    p = {k.removeprefix(owner): np.asarray(v, np.float64) for k, v in student.params.items() if k.startswith(owner)}
    valid = np.arange(x.shape[1]) < np.asarray(out.lengths)[:, None]
    q, k, v = (np.reshape(x @ p[f"{r}_proj.weight"].T + p[f"{r}_proj.bias"], (*x.shape[:2], 4, 8)) for r in "qkv")

    def phi(x, w):
        h = np.einsum("bthk,hfk->bthf", x, w)
        e, n = np.exp(h), np.exp(-h)
        return np.concatenate([e / e.sum(-1, keepdims=True), n / n.sum(-1, keepdims=True)], -1)

    scores = np.einsum("bthf,bshf->bhts", phi(q, p["feature_q.weight"]), phi(k, p["feature_k.weight"]))
    scores = scores * valid[:, None, None]
    y = np.einsum("bhts,bshk->bthk", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    want = (y @ p["out_proj.weight"].T + p["out_proj.bias"]) * valid[..., None]
    tiny.close(have, want, 1e-5)


def test_sharp_feature_maps_stay_finite():
    student = Linearize().start(WIDE, None, None)
    sharp = {k: 1e4 * v if "feature_" in k else v for k, v in student.params.items()}

    def loss(params):
        return (student.replace(params=params)(**inputs(RAGGED)).logits ** 2).mean()

    total, grads = jax.jit(jax.value_and_grad(loss))(sharp)
    assert np.isfinite(total) and all(np.isfinite(g).all() for g in grads.values())


def test_padding_changes_no_valid_frame():
    student = Linearize().start(WIDE, None, None)
    outs = []
    for fill in (0.0, 50.0):
        values, mask = tiny.waves(2000, 700, 30, fill=fill)
        outs.append(student(input_values=values, attention_mask=mask).logits)
    for row, frames in enumerate((50, 17, 0)):
        np.testing.assert_array_equal(outs[0][row, :frames], outs[1][row, :frames])
    alone = student(input_values=values[1:2, :700]).logits
    tiny.close(outs[0][1, :17], alone[0], 2e-5)
    assert np.isfinite(outs[0]).all()


@pytest.mark.parametrize("mixer", ["softmax", "hedgehog"])
def test_a_block_without_heads_is_its_bias(mixer):
    options = {"mixer": mixer, "options": {"features": 8, "window": 0}} if mixer == "hedgehog" else {}
    spec = WIDE.spec.with_block("encoder.0.attention", heads=[], **options)
    model = tiny.slim(spec)
    names = [k for k in model.params if ".layers.0.attention." in k]
    assert names == ["wav2vec2.encoder.layers.0.attention.out_proj.bias"]
    out = model(**inputs(RAGGED), taps=("encoder.0.attention.out",)).taps["encoder.0.attention.out"]
    np.testing.assert_allclose(out[0], np.broadcast_to(model.params[names[0]], out[0].shape), rtol=1e-6)
    if mixer == "softmax":  # linearize leaves it alone
        assert Linearize().start(model, None, None).spec.blocks["encoder.0.attention"] == {"heads": []}


def test_a_window_is_refused():
    spec = WIDE.spec.with_block("encoder.0.attention", mixer="hedgehog", options={"features": 8, "window": 64})
    with pytest.raises(SpecError, match="encoder.0.attention.*window: 0"):
        bind.shapes(spec)


# ---- start ----


def test_start_copies_all_and_adds_feature_maps():
    student = Linearize(features=6).start(WIDE, None, None)
    new = student.params.keys() - WIDE.params.keys()
    assert len(new) == 4 and all(k.endswith(("feature_q.weight", "feature_k.weight")) for k in new)
    assert all(student.params[k].shape == (4, 6, 8) for k in new)
    assert all(student.params[k] is WIDE.params[k] for k in WIDE.params)
    bind.check(student.spec, student.params)
    assert student.spec.attention("encoder.1.attention").options == {"features": 6, "window": 0}
    again = Linearize().start(student, None, None)  # layers that are linear stay as they are
    assert again.spec == student.spec
    some = Linearize(layers=(1,)).start(WIDE, None, None)
    assert list(some.spec.blocks) == ["encoder.1.attention"]


def test_start_refuses():
    with pytest.raises(SpecError, match=r"layers \[0, 2\] of a model with layers 0 to 1"):
        Linearize(layers=(0, 2)).start(WIDE, None, None)
    with pytest.raises(SpecError, match="unknown mixer 'mamba'; known are"):
        Linearize(mixer="mamba").start(WIDE, None, None)
    with pytest.raises(config.ConfigError, match="'sometimes' is none of"):
        config.build(METHODS["linearize"], {"guidance": "sometimes"})


# ---- objectives ----


def test_align_is_zero_without_a_change():
    method = Linearize(objective="align")
    terms = value(method, WIDE, WIDE)
    assert terms == {f"encoder.{i}.attention": (pytest.approx(0.0, abs=1e-10), 0.5) for i in (0, 1)}
    changed = value(method, method.start(WIDE, None, None), WIDE)
    assert all(v > 1e-3 for v, _ in changed.values())


def test_align_is_relative_to_the_teachers_energy():
    """A mixer that gives zero loses exactly 1 in every layer."""
    method = Linearize(objective="align")
    student = method.start(WIDE, None, None)
    student = student.replace(params={k: 0.0 * v if ".out_proj." in k else v for k, v in student.params.items()})
    assert value(method, student, WIDE) == {f"encoder.{i}.attention": (pytest.approx(1.0), 0.5) for i in (0, 1)}


def test_align_feeds_the_teachers_inputs():
    """What one layer gives does not depend on the layers before it."""
    method = Linearize(objective="align")
    student = method.start(WIDE, None, None)
    other = student.replace(params={k: v + 0.1 if ".layers.0." in k else v for k, v in student.params.items()})
    a, b = value(method, student, WIDE), value(method, other, WIDE)
    assert a["encoder.1.attention"] == b["encoder.1.attention"] and a["encoder.0.attention"] != b["encoder.0.attention"]


@pytest.mark.parametrize("distance", ["ln_mse", "mse"])
def test_cald_of_the_teacher_itself_is_zero(distance):
    terms = value(Linearize(distance=distance, logit_weight=1.0), WIDE, WIDE)
    assert {k: v for k, v in terms.items() if k not in ("ctc", "unfit")} == {
        "encoder.0": (0.0, 7.5), "encoder.1": (0.0, 7.5), "kl": (0.0, 1.0)}
    assert terms["ctc"] == value(Finetune(), WIDE, None)["ctc"] and terms["ctc"][0] > 0


def test_guidance():
    def guided(steps, **options):
        return [Linearize(**options).teacher_at(MODEL, step) is not None for step in steps]

    steps = (0, 1, 2, 3, 100)
    assert guided(steps) == [True] * 5
    assert guided(steps, guidance="unguided") == [False] * 5
    assert guided(steps, guidance="hybrid", until=2) == [True, True, False, False, False]
    assert guided(steps, objective="align", guidance="unguided") == [True] * 5  # nothing to align without a teacher


def test_the_hybrid_switch_costs_one_more_trace():
    method = Linearize(guidance="hybrid", until=2)
    state, frozen, step = setup(method, method.start(MODEL, None, None))
    terms = []
    for i in range(4):
        state, metrics = step(state, frozen, method.teacher_at(MODEL, i), RAGGED)
        terms.append({k.removeprefix("loss/") for k in metrics if k.startswith("loss/")})
    assert terms == [{"ctc", "unfit", "encoder.0"}] * 2 + [{"ctc", "unfit"}] * 2 and step._cache_size() == 2


def test_groups_and_control():
    names = list(Linearize().start(WIDE, None, None).params)
    trained = {o: {n for n in names if Linearize(**o_).group(n) == "main"} for o, o_ in {
        "all": dict(objective="align"), "maps": dict(objective="align", align_projections=False), "cald": {},
        "whole": dict(freeze_frontend=False)}.items()}
    assert all(".attention." in n for n in trained["all"]) and len(trained["all"]) == 2 * (8 + 2)
    assert len(trained["maps"]) == 4 and trained["whole"] == set(names)
    assert set(names) - trained["cald"] == {n for n in names if "feature_extractor" in n}
    assert Linearize(objective="align").control() is None
    control = Linearize().control()
    assert [control.group(n) for n in ("a.feature_extractor.b", "lm_head.bias")] == ["frozen", "main"]
    assert Linearize(freeze_frontend=False).control() == Finetune()
    hubert = "hubert.encoder.pos_conv_embed.batch_norm.running_mean"
    assert Linearize().group(hubert) == Finetune().group(hubert) == "frozen"


def test_submodules_by_name():
    module = bind.bind(WIDE.spec, WIDE.params)
    block = bind.submodule(module, "wav2vec2.encoder.layers.1.attention")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 32)), jnp.float32)
    assert block(x, None, layers.Call()).shape == (1, 7, 32)


def test_the_loss_falls_on_bundled_speech(tmp_path):
    """The bundled teacher, some clips: aligning helps within a dozen steps, and what is learnt is saved and read."""
    name = "bundled:wav2vec2-ctc-en"
    teacher, task = hub.load(name), CTCTask.from_pretrained(hub.folder(name))
    keep = 2  # layers of the teacher, for speed
    spec = teacher.spec.replace(config={**teacher.spec.config, "num_hidden_layers": keep})
    teacher = Slim(spec, {k: v for k, v in teacher.params.items() if k in bind.shapes(spec)})
    batches = Batches(load_rows("bundled:prompts-en/train")[:40], task, batch_size=4, buckets=(1.5,), max_seconds=1.5,
                      max_skipped=1.0)
    method = Linearize(objective="align")
    cfg = Train(groups={"main": Group(5e-3, schedule="constant")}, max_steps=12)
    state, frozen, step = setup(method, method.start(teacher, batches, None), cfg)
    losses = []
    for batch in [next(batches) for _ in range(4)] * 3:
        state, metrics = step(state, frozen, teacher, {k: v for k, v in batch.items() if k != "row"})
        losses.append(float(metrics["loss"]))
    batches.close()
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4]), losses
    student = method.finish(Slim(method.start(teacher, None, None).spec, {**frozen, **state.params}), None)
    hub.save(student, tmp_path / "student")
    assert hub.load(tmp_path / "student").fingerprint == student.fingerprint
    assert dataclasses.replace(method, mixer="hedgehog") == method
