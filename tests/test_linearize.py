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
from jaxslim.methods import METHODS, linearize
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


# ---- start ----


def test_start_copies_all_and_adds_feature_maps():
    student = Linearize(features=6).start(WIDE, None, None)
    new = student.params.keys() - WIDE.params.keys()
    assert len(new) == 4 and all(k.endswith(("feature_q.weight", "feature_k.weight")) for k in new)
    assert all(student.params[k].shape == (4, 6, 8) for k in new)
    assert all(student.params[k] is WIDE.params[k] for k in WIDE.params)
    bind.check(student.spec, student.params)
    assert student.spec.attention("encoder.1.attention").options == {"features": 6, "window": 0, "causal": False}
    again = Linearize().start(student, None, None)  # layers that are linear stay as they are
    assert again.spec == student.spec
    some = Linearize(layers=(1,)).start(WIDE, None, None)
    assert list(some.spec.blocks) == ["encoder.1.attention"]


def test_start_refuses():
    with pytest.raises(SpecError, match=r"layers \[0, 2\] of a model with layers 0 to 1"):
        Linearize(layers=(0, 2)).start(WIDE, None, None)
    with pytest.raises(SpecError, match="unknown mixer 'mamba3'; known are"):
        Linearize(mixer="mamba3").start(WIDE, None, None)
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
        "encoder.0": (0.0, 7.5), "encoder.1": (0.0, 7.5), "kl": (pytest.approx(0.0, abs=1e-7), 1.0)}
    assert terms["ctc"] == value(Finetune(), WIDE, None)["ctc"] and terms["ctc"][0] > 0


NOISY = WIDE.replace(spec=WIDE.spec.replace(config={**WIDE.spec.config, "hidden_dropout": 0.1, "layerdrop": 0.1,
                                                    "mask_time_prob": 0.3, "mask_time_length": 3}),
                     params={**WIDE.params, "wav2vec2.masked_spec_embed": jnp.ones(32)})


@pytest.mark.parametrize("noise, zero", [("off", False), ("independent", False), ("shared", True)])
def test_zero_loss_of_an_identity_swap(noise, zero):
    """With dropout and masks on, the layer loss is exactly zero when teacher and student share them, and only then."""
    method, key = Linearize(noise=noise, embedding=True, distance="mse"), jax.random.key(3)

    @jax.jit
    def terms(model):
        return method.loss(model, method.targets(model, RAGGED, key, 0), RAGGED, key, 0)

    layer = [float(t.sum) for k, t in terms(NOISY).items() if k.startswith(("encoder", "embedding"))]
    assert len(layer) == 3 and (max(layer) == 0.0 if zero else min(layer) > 0.0)


def test_guidance(monkeypatch):
    def guided(steps, **options):
        return [Linearize(**options).teacher_at(MODEL, step) is not None for step in steps]

    steps = (0, 1, 2, 3, 100)
    assert guided(steps) == [True] * 5
    assert guided(steps, guidance="unguided") == [False] * 5
    assert guided(steps, guidance="hybrid", until=2) == [True, True, False, False, False]
    assert guided(steps, objective="align", guidance="unguided") == [True] * 5  # nothing to align without a teacher
    others = {name: tiny.slim(MODEL.spec, seed=i) for i, name in enumerate("abc")}
    monkeypatch.setattr(linearize._load, "__wrapped__", lambda name: others[name])
    linearize._waypoint.cache_clear()
    method = Linearize(guidance="waypoint", waypoints=tuple("abc"), waypoint_every=10)
    for step, name in ((0, "a"), (9, "a"), (10, "b"), (19, "b"), (20, "c"), (29, "c"), (30, "c"), (1000, "c")):
        assert method.teacher_at(MODEL, step).fingerprint == others[name].fingerprint, step
    others["b"] = WIDE
    linearize._waypoint.cache_clear()
    with pytest.raises(SpecError, match="waypoint b does not fit the wav2vec2 model"):
        method.teacher_at(MODEL, 10)


@pytest.mark.parametrize("options, message", [
    (dict(guidance="waypoint"), "guidance waypoint needs `waypoints`, the folders of models saved along"),
    (dict(guidance="waypoint", waypoints=("a",)), "needs `waypoints`.* and `waypoint_every`"),
    (dict(guidance="trajectory"), "guidance trajectory needs `source`, the pretrained model"),
    (dict(student_init="source"), "student_init source needs `source`"),
    (dict(guidance="hybrid"), "guidance hybrid needs `until`"),
    (dict(layer_schedule="linear"), "schedule needs `until`"),
])
def test_modes_without_what_they_need(options, message):
    with pytest.raises(SpecError, match=message):
        Linearize(**options)


def test_waypoints_swap_arrays_without_compiling():
    method = Linearize(features=6)
    state, frozen, step = setup(method, method.start(MODEL, None, None))
    seen = []
    for seed in (1, 2, 1):
        state, metrics = step(state, frozen, tiny.slim(MODEL.spec, seed=seed), RAGGED)
        seen.append(float(metrics["loss/encoder.0"]))
    assert step._cache_size() == 1 and abs(seen[0] - seen[1]) > 1e-3


def test_trajectory_trains_its_teacher_beside_the_student(monkeypatch):
    """The teacher's parameters are those that fine-tuning alone gives, updated every second step; the states that guide
    are those before the update; nothing of the guidance flows into the teacher."""
    monkeypatch.setattr(linearize, "_load", lambda name: {"pretrained": MODEL}[name])
    method = Linearize(guidance="trajectory", source="pretrained", student_init="source", layer_weight=100.0)
    group = Group(learning_rate=1e-2, schedule="constant", eps=1e-3)  # Adam makes rounding of zero gradients a step
    cfg = Train(groups={"main": group, "teacher": dataclasses.replace(group, every=2)}, max_steps=8)
    student = method.start(MODEL, None, None)
    live = {k for k in student.params if k.startswith("teacher/")}
    assert {k.removeprefix("teacher/") for k in live} == set(MODEL.params)
    state, frozen, step = setup(method, student, cfg)
    alone, cold, tune = setup(Finetune(freeze=("feature_extractor",)), MODEL, Train(groups={"main": group}))
    copies = lambda: jax.device_get({k: v for k, v in state.params.items() if k in live})  # noqa: E731
    for i in range(4):
        before = copies()
        guide = Slim(MODEL.spec, {k.removeprefix("teacher/"): jnp.asarray(v) for k, v in {**frozen, **before}.items()
                                  if k.startswith("teacher/")})
        pupil = Slim(student.spec, {k: jnp.asarray(v) for k, v in jax.device_get({**frozen, **state.params}).items()
                                    if k not in live})
        want = value(dataclasses.replace(method, guidance="target"), pupil, guide) if i in (0, 2) else None
        state, metrics = step(state, frozen, method.teacher_at(MODEL, i), RAGGED)
        if want:
            assert float(metrics["loss/encoder.0"]) == pytest.approx(want["encoder.0"][0], rel=1e-4)
            assert float(metrics["loss/ctc"]) == pytest.approx(want["ctc"][0], rel=1e-4)
        moved = any(np.any(before[k] != v) for k, v in copies().items())
        assert moved == (i % 2 == 1)
        if moved:
            alone, _ = tune(alone, cold, None, RAGGED)
            for k, v in alone.params.items():
                tiny.close(state.params["teacher/" + k], v, 2e-5)
    assert step._cache_size() == 1 and "loss/teacher/ctc" in metrics
    done = method.finish(Slim(student.spec, {**frozen, **state.params}), None)
    assert not any(k.startswith("teacher/") for k in done.params)
    bind.check(done.spec, done.params)


def test_the_source_gives_weights_and_the_parent_its_mixers(monkeypatch):
    source = tiny.slim(MODEL.spec.replace(head="none"), seed=9)  # before fine-tuning there is no CTC head
    monkeypatch.setattr(linearize, "_load", lambda name: source)
    aligned = tiny.slim(Linearize(objective="align", features=6).start(MODEL, None, None).spec, seed=4)
    student = Linearize(student_init="source", source="x").start(aligned, None, None)
    bind.check(student.spec, student.params)
    for name, value_ in student.params.items():
        if "feature_q" in name or "feature_k" in name:
            np.testing.assert_array_equal(value_, aligned.params[name])
        elif name.startswith("lm_head"):
            assert np.abs(value_).max() < (0.1 if name.endswith("weight") else 1e-9)
        else:
            np.testing.assert_array_equal(value_, source.params[name.removeprefix("wav2vec2.")])
    other = tiny.slim(MODEL.spec.replace(head="none").replace(config={**MODEL.spec.config, "intermediate_size": 40}))
    monkeypatch.setattr(linearize, "_load", lambda name: other)
    with pytest.raises(SpecError, match="is not the same model before fine-tuning; it lacks wav2vec2.encoder"):
        Linearize(student_init="source", source="x").start(MODEL, None, None)


def test_layer_map_and_schedules():
    deep = tiny.slim(MODEL.spec.replace(config={**MODEL.spec.config, "num_hidden_layers": 4}))
    method = Linearize(layer_map="proportional", logit_weight=2.0, layer_schedule="cosine", logit_schedule="linear",
                       until=4, task_weight=0.5)
    shallow = tiny.slim(MODEL.spec.replace(config={**MODEL.spec.config, "num_hidden_layers": 2}))
    taps = {f"encoder.{i}": 0 for i in range(4)}
    assert method.pairs(("encoder.0", "encoder.1"), taps) == {"encoder.0": "encoder.1", "encoder.1": "encoder.3"}
    assert Linearize(layer_map=(2, 2)).pairs(("encoder.0", "encoder.1"), taps) == dict.fromkeys(
        ("encoder.0", "encoder.1"), "encoder.2")
    with pytest.raises(SpecError, match="student has 2 layers, the teacher 4; set layer_map"):
        Linearize().pairs(("encoder.0", "encoder.1"), taps)
    with pytest.raises(SpecError, match=r"layer_map \[4\] must give one of the teacher's layers 0 to 3 for each"):
        Linearize(layer_map=(4,)).pairs(("encoder.0",), taps)

    @jax.jit
    def weights(step):
        terms = method.loss(shallow, method.targets(deep, RAGGED, None, step), RAGGED, None, step)
        return {k: t.weight * jnp.ones(()) for k, t in terms.items()}

    for step, layer, logit in ((0, 7.5, 2.0), (2, 3.75, 1.0), (4, 0.0, 0.0), (9, 0.0, 0.0)):
        have = {k: float(v) for k, v in weights(jnp.asarray(step)).items()}
        assert have == pytest.approx({"ctc": 0.5, "unfit": 0.0, "encoder.0": layer, "encoder.1": layer, "kl": logit},
                                     abs=1e-6)
    wide = tiny.slim(MODEL.spec.replace(config={**MODEL.spec.config, "hidden_size": 64}))
    with pytest.raises(SpecError, match="layer distances need equal frames and width"):
        value(Linearize(), MODEL, wide)


# ---- hybrids ----


def test_layers_that_stay():
    four = tiny.slim(WIDE.spec.replace(config={**WIDE.spec.config, "num_hidden_layers": 4}))

    def linear(**options):
        student = Linearize(**options).start(four, lambda: None, None)
        return [i for i in range(4) if student.spec.attention(f"encoder.{i}.attention").mixer == "hedgehog"]

    assert linear(keep=(1,)) == [0, 2, 3] and linear(keep="uniform:2") == [0, 2] and linear(keep="uniform:4") == []
    assert linear(keep="uniform:1", layers=(0, 1, 2)) == [0, 1]
    with pytest.raises(SpecError, match="keep 'best:2'; give layer numbers, uniform:N or ranked:N"):
        linear(keep="best:2")
    half = Linearize(keep=(1,)).start(WIDE, None, None)
    assert Linearize().start(half, None, None).spec == half.spec  # a later stage converts no more by itself
    assert Linearize(layers=(1,)).start(half, None, None).spec.attention("encoder.1.attention").mixer == "hedgehog"


def test_ranked_by_leave_one_in(caplog):
    """Layer 0's attention gives zero, so its conversion costs nothing: layer 1 is the one worth keeping."""
    teacher = WIDE.replace(params={k: 0 * v if "layers.0.attention.out_proj" in k else v
                                   for k, v in WIDE.params.items()})
    data = [{k: RAGGED[k] for k in ("input_values", "attention_mask")}] * 2
    with caplog.at_level("INFO"):
        student = Linearize(keep="ranked:1", rank_batches=2).start(teacher, data, None)
    assert [student.spec.attention(f"encoder.{i}.attention").mixer for i in (0, 1)] == ["hedgehog", "softmax"]
    lines = [r.getMessage() for r in caplog.records if "keep layer" in r.getMessage()]
    assert "keep layer 1 alone: error 0.0000" in lines[1] and "(kept)" in lines[1] and "(kept)" not in lines[0]
    assert "parameters copied, 0 mapped, 2 new." in caplog.text
    assert "new: wav2vec2.encoder.layers.N.attention.feature_q.weight (1)" in caplog.text


def test_the_shares_of_a_window():
    """Against all weights in float64, over batches, without padding; and the student starts from them."""
    teacher, names = tiny.slim(WIDE.spec, seed=3), ("attention_mask", "input_values")
    batches = [{**RAGGED, **dict(zip(names[::-1], tiny.waves(*lengths)))} for lengths in ((920, 400), (640, 800))]
    student = Linearize(options={"window": 4}).start(teacher, batches, None)
    for block in ("encoder.0.attention", "encoder.1.attention"):
        owner, total, near = f"wav2vec2.{block.replace('encoder.', 'encoder.layers.')}.", 0, 0.0
        p = {k.removeprefix(owner): np.asarray(v, np.float64) for k, v in teacher.params.items() if k.startswith(owner)}
        for batch in batches:
            out = teacher(**{k: batch[k] for k in names}, taps=(f"{block}.in",))
            for x, length in zip(np.asarray(out.taps[f"{block}.in"], np.float64), np.asarray(out.lengths)):
                x = x[:length]
                q, k = ((x @ p[f"{r}_proj.weight"].T + p[f"{r}_proj.bias"]).reshape(length, 4, 8) for r in "qk")
                weights = np.exp(np.einsum("ihk,jhk->hij", q, k) * 8**-0.5)
                weights /= weights.sum(-1, keepdims=True)
                close = np.abs(np.arange(length)[None] - np.arange(length)[:, None]) < 4
                near, total = near + (weights * close).sum((1, 2)), total + length
        share = 1 / (1 + np.exp(-np.asarray(student.params[f"{owner}window_factor"])))
        np.testing.assert_allclose(share, near / total, rtol=1e-4)
    assert not np.any(Linearize(options={"window": 4}).start(teacher, None, None).params[f"{owner}window_factor"])


# ---- other families ----


TEXT = dict(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=40, pad_token_id=1)


@pytest.mark.parametrize("family, mixer, options", [
    ("roberta", "linformer", {"length": 40, "features": 5}),
    pytest.param("wavlm", "mamba2", {"chunk": 16}, marks=pytest.mark.slow),
    pytest.param("wav2vec2-conformer", "hedgehog", {}, marks=pytest.mark.slow),
    pytest.param("distilbert", "gated_deltanet", {"chunk": 16}, marks=pytest.mark.slow),
    pytest.param("roberta", "gla", {"chunk": 16}, marks=pytest.mark.slow)])
def test_both_objectives_on_other_families(family, mixer, options):
    """A gradient reaches every new parameter, whatever the family's names, by both objectives."""
    if family in ("roberta", "distilbert"):
        from transformers import CONFIG_MAPPING

        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                 "intermediate_size": "hidden_dim"} if family == "distilbert" else {}
        config_ = CONFIG_MAPPING[family](**{names.get(k, k): v for k, v in TEXT.items()}).to_dict()
        teacher = tiny.slim(config_, "classification")
        batch = {"input_ids": np.arange(2, 26).reshape(2, 12) % 40, "attention_mask": np.ones((2, 12), np.int32),
                 "labels": np.array([0, 1])}
        batch["attention_mask"][1, 7:] = 0
    else:
        small = dict(num_hidden_layers=1, conv_dim=[12, 16], conv_kernel=[10, 8], conv_stride=[5, 8],
                     num_feat_extract_layers=2, mask_time_prob=0.0)
        teacher, batch = tiny.slim(tiny.config(family, **small), "ctc"), RAGGED
    for objective in ("align", "cald"):
        method = Linearize(objective=objective, mixer=mixer, options=options, logit_weight=1.0)
        student = method.start(teacher, None, None)
        new = [k for k in student.params if k not in teacher.params]
        assert new and all(method.group(k) == "main" for k in new)

        @jax.jit
        def grads(trained, method=method, student=student):
            def total(trained):
                terms = method.loss(student.replace(params={**student.params, **trained}),
                                    method.targets(teacher, batch, None, 0), batch, None, 0)
                return sum(t.weight * t.sum / jnp.maximum(t.count, 1e-6) for t in terms.values())

            return jax.grad(total)(trained)

        for name, g in grads({k: student.params[k] for k in new}).items():
            assert np.isfinite(g).all() and np.abs(g).max() > 0, name


@pytest.mark.slow
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
    front = "wav2vec2.feature_extractor.conv_layers.0.conv.weight"
    assert [control.group(n) for n in (front, "lm_head.bias")] == ["frozen", "main"]
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
