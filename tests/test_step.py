"""The training step: accumulation, skipped steps, donation, groups, weight decay, schedules."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxslim.config import ConfigError, Group, Train
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.generate import Generate
from jaxslim.methods.linearize import Linearize
from jaxslim.slim import Method, Term
from jaxslim.train import losses
from jaxslim.train import mesh as M
from jaxslim.train import step as S

MODEL = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0,
                  num_hidden_layers=1, conv_dim=[12, 16], conv_kernel=[10, 8], conv_stride=[5, 8],
                  num_feat_extract_layers=2)
CFG = Train(groups={"main": Group(learning_rate=1e-2, schedule="constant")}, max_steps=10)


def batch(*samples, seed=0, labels=(3, 4, 5)):
    """Rows of these lengths; every row has one label fewer than the one before."""
    values, mask = tiny.waves(*samples, seed=seed)
    texts = np.full((len(samples), 6), losses.IGNORE, np.int32)
    for i in range(len(samples)):
        n = max(1, 6 - i)
        texts[i, :n] = np.resize(labels, n)
    return {"input_values": values, "attention_mask": mask, "labels": texts}


GENERATE = Generate(target_layers=(0, 1), skip=False, distance="l1_cosine", gram_weight=0.1)
RAGGED = batch(2000, 700, 1900, 450, 1500, 600, 800, 1200)


def setup(method, student=MODEL, cfg=CFG, mesh=None):
    mesh = mesh or M.make("data=1", jax.devices()[:1])
    state, frozen, tx = S.init(method, student, cfg, mesh)
    return state, frozen, S.make(method, student.spec, tx, cfg, state, mesh)


def same(have, want, tolerance):
    assert have.keys() == want.keys()
    for name in want:
        tiny.close(have[name], want[name], tolerance)


@pytest.mark.parametrize("method, taught", [(Finetune(), False), (Linearize(logit_weight=0.5), True),
                                            (Linearize(objective="align"), True),
                                            pytest.param(GENERATE, True, marks=pytest.mark.slow)],
                         ids=["ctc", "cald", "align", "generate"])
def test_microbatches_equal_one_batch(method, taught):
    student = method.start(MODEL, None, None)
    results = []
    for accumulate in (1, 4):
        sgd = dataclasses.replace(CFG, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
        mesh = M.make("data=1", jax.devices()[:1])
        labels = S.groups(method, student.params, sgd)
        tx = optax.partition({"main": optax.sgd(1.0)}, labels)  # the update is the gradient
        state = S.init(method, student, sgd, mesh)[0]
        state = state._replace(optimizer=tx.init({k: student.params[k] for k in labels}))
        frozen = {k: v for k, v in student.params.items() if k not in labels}
        step = S.make(method, student.spec, tx, sgd, state, mesh)
        state, metrics = step(state, frozen, MODEL if taught else None, RAGGED)
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    (one, metrics), (many, again) = results
    moved = max(np.abs(one[k] - np.asarray(student.params[k])).max() for k in one)
    assert moved > 1e-3
    same(many, one, 1e-5)
    assert {k: float(v) for k, v in again.items()} == pytest.approx({k: float(v) for k, v in metrics.items()}, rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Broken(Method):
    """Finite at even steps only, either in the loss or in the gradient."""

    where: str = "loss"

    def loss(self, student, targets, batch, key, step):
        odd = step % 2 == 1
        total = sum((v.astype(jnp.float32) ** 2).sum() for v in student.params.values())
        if self.where == "loss":
            total = jnp.where(odd, jnp.nan, total)
        else:  # the gradient of sqrt at 0 is infinite
            total = total + jnp.sqrt(jnp.where(odd, 0.0, 1.0) * total)
        return {"x": Term(total, jnp.float32(1.0))}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where):
    state, frozen, step = setup(Broken(where))
    seen = []
    for _ in range(4):
        before, moments = jax.device_get(state.params), jax.device_get(state.optimizer)
        state, metrics = step(state, frozen, None, RAGGED)
        after, moments_after = jax.device_get(state.params), jax.device_get(state.optimizer)
        seen.append((int(state.step), int(state.skipped), int(state.skipped_in_a_row),
                     any(np.any(before[k] != after[k]) for k in before)))
        if not seen[-1][3]:  # moments and the schedule's count stand still as well
            jax.tree.map(np.testing.assert_array_equal, moments, moments_after)
        assert all(np.isfinite(v).all() for v in after.values())
    assert seen == [(1, 0, 0, True), (2, 1, 1, False), (3, 1, 0, True), (4, 2, 1, False)]


def test_skipped_in_a_row():
    @dataclasses.dataclass(frozen=True)
    class Never(Method):
        def loss(self, student, targets, batch, key, step):
            return {"x": Term(jnp.nan * student.params["lm_head.bias"].sum(), jnp.float32(1.0))}

    state, frozen, step = setup(Never())
    for _ in range(3):
        state, metrics = step(state, frozen, None, RAGGED)
    assert int(state.skipped) == int(state.skipped_in_a_row) == 3 and np.isnan(metrics["loss"])


def test_teacher_and_student_may_share_arrays():
    state, frozen, step = setup(Linearize(guidance="target"))
    teacher = MODEL
    for _ in range(2):
        state, _ = step(state, frozen, teacher, RAGGED)
    assert not any(v.is_deleted() for v in MODEL.params.values())
    assert np.isfinite(MODEL(input_values=RAGGED["input_values"]).logits).all()
    assert not any(v.is_deleted() for v in frozen.values())


def test_frozen_parameters_stay():
    state, frozen, step = setup(Finetune(freeze=("feature_extractor", "layers.0")))
    assert not state.params.keys() & frozen.keys() and state.params.keys() | frozen.keys() == MODEL.params.keys()
    assert all("feature_extractor" in k or "layers.0" in k for k in frozen)
    for leaf in jax.tree.leaves(state.optimizer):  # nor has the optimiser moments of them
        assert leaf.ndim == 0 or leaf.shape in {v.shape for v in state.params.values()}
    before = len([x for x in jax.tree.leaves(state.optimizer) if x.ndim])
    assert before == 2 * len(state.params)


def test_groups_that_do_not_match():
    with pytest.raises(S.ConfigMismatch, match=r"train.groups has no \['main'\]; Finetune trains \['main'\]"):
        setup(Finetune(), cfg=dataclasses.replace(CFG, groups={"mian": Group()}))
    with pytest.raises(S.ConfigMismatch, match="nothing to train"):
        setup(Finetune(freeze=("",)))


def test_groups_have_their_own_rates():
    @dataclasses.dataclass(frozen=True)
    class Two(Method):
        def group(self, name):
            return "head" if "lm_head" in name else "rest"

        def loss(self, student, targets, batch, key, step):
            return {"x": Term(sum(v.sum() for v in student.params.values()), jnp.float32(1.0))}

    groups = {"head": Group(1e-2, schedule="constant"), "rest": Group(1e-3, schedule="constant")}
    cfg = dataclasses.replace(CFG, groups=groups)
    state, frozen, step = setup(Two(), cfg=cfg)
    state, _ = step(state, frozen, None, RAGGED)
    for name, value in state.params.items():  # Adam's first step is the rate itself
        want = 1e-2 if "lm_head" in name else 1e-3
        np.testing.assert_allclose(MODEL.params[name] - value, want, rtol=1e-2, err_msg=name)


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    """Matrices move by orthogonal directions of RMS 0.2 x learning rate, vectors and kernels as AdamW moves them."""
    rng = np.random.default_rng(0)
    params = {"w": np.float32(rng.normal(size=(8, 24))), "b": np.float32(rng.normal(size=8)),
              "k": np.float32(rng.normal(size=(4, 3, 5)))}
    grads = {k: np.float32(rng.normal(size=v.shape)) for k, v in params.items()}
    moved = {}
    for kind in ("muon", "adamw"):
        cfg = dataclasses.replace(CFG, max_grad_norm=0.0, groups={"main": Group(optimizer=kind, learning_rate=0.1,
                                                                                schedule="constant")})
        tx = S.optimizer(cfg, dict.fromkeys(params, "main"))
        moved[kind] = tx.update(grads, tx.init(params), params)[0]
    for name in ("b", "k"):
        np.testing.assert_allclose(moved["muon"][name], moved["adamw"][name], rtol=1e-6)
    step = np.asarray(moved["muon"]["w"])
    sizes = np.linalg.svd(step, compute_uv=False)
    assert sizes.max() / sizes.min() < 2 and np.sum(step * grads["w"]) < 0  # Newton-Schulz is not exact
    assert np.sqrt(np.mean(step**2)) == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ConfigError, match="adamw or muon"):
        Group(optimizer="lion")


def test_vectors_get_no_weight_decay():
    @dataclasses.dataclass(frozen=True)
    class Nothing(Method):
        def loss(self, student, targets, batch, key, step):
            return {"x": Term(0.0 * sum(v.sum() for v in student.params.values()), jnp.float32(1.0))}

    cfg = dataclasses.replace(CFG, groups={"main": Group(0.1, schedule="constant", weight_decay=0.5)})
    state, frozen, step = setup(Nothing(), cfg=cfg)
    state, _ = step(state, frozen, None, RAGGED)
    for name, value in state.params.items():
        factor = 1.0 if value.ndim < 2 else 1 - 0.1 * 0.5
        np.testing.assert_allclose(value, factor * MODEL.params[name], rtol=1e-5, atol=1e-8, err_msg=name)


def test_the_gradient_is_clipped_by_its_global_norm():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    for limit, want in ((1e-3, 1e-3), (0.0, 10.0**0.5), (100.0, 10.0**0.5)):  # 0 is no limit
        tx = S.optimizer(dataclasses.replace(CFG, max_grad_norm=limit), dict.fromkeys(params, "main"))
        _, state = jax.jit(tx.update)(params, tx.init(params), params)  # the gradients are all 1
        first = {x.shape: [] for x in params.values()}
        for leaf in jax.tree.leaves(state):
            if leaf.ndim:
                first[leaf.shape].append(float(leaf.max()))  # mu, nu
        mu = [max(v) / 0.1 for v in first.values()]  # (1 - beta1) times the clipped gradient
        assert mu == pytest.approx([want / 10.0**0.5] * 2, rel=1e-4)


@pytest.mark.parametrize("kind, end", [("linear", 0.1), ("cosine", 0.1), ("constant", 1.0)])
def test_schedules(kind, end):
    f = S.schedule(Group(2.0, warmup_steps=4, schedule=kind, final_factor=0.1), 20)
    assert [float(f(i)) for i in (0, 2, 4)] == pytest.approx([0.0, 1.0, 2.0])
    assert float(f(20)) == pytest.approx(2 * end) and float(f(12)) <= 2.0
    assert float(S.schedule(Group(2.0, schedule=kind), 20)(0)) == 2.0


# ---- losses ----


def test_ctc_equals_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 12, 5)).astype(np.float32)
    labels = np.array([[1, 2, 2, 3], [4, 1, -100, -100], [1, 1, 1, 1]], np.int32)
    lengths = np.array([12, 5, 9], np.int32)
    term, unfit = losses.ctc(jnp.asarray(logits), jnp.asarray(lengths), jnp.asarray(labels), 0)
    want = torch.nn.functional.ctc_loss(torch.from_numpy(logits).log_softmax(-1).transpose(0, 1),
                                        torch.from_numpy(labels).clamp(min=0), torch.from_numpy(lengths),
                                        torch.tensor([4, 2, 4]), blank=0, reduction="sum")
    assert float(term.sum) == pytest.approx(float(want), rel=1e-5) and float(term.count) == 10 and int(unfit) == 0


def test_labels_longer_than_their_frames_weigh_nothing():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 6, 5)), jnp.float32)
    labels = np.full((4, 6), -100, np.int32)
    labels[0, :3] = [1, 2, 3]            # fits
    labels[1, :4] = [1, 1, 1, 1]         # 4 + 3 repeats > 6 frames
    labels[2, :3] = [1, 2, 3]            # 3 > 2 valid frames
    lengths = jnp.array([6, 6, 2, 0])    # the last is a filler row
    value = lambda logits, rows: losses.ctc(logits[rows], lengths[rows], labels[rows], 0)  # noqa: E731
    term, unfit = value(logits, np.arange(4))
    alone, _ = value(logits, np.arange(1))
    assert float(term.sum) == pytest.approx(float(alone.sum)) and float(term.count) == 3 and int(unfit) == 2
    grads = jax.grad(lambda x: value(x, np.arange(4))[0].sum)(logits)
    assert np.isfinite(grads).all() and not np.any(grads[1:]) and np.any(grads[0])


def test_a_batch_in_which_nothing_fits_changes_nothing_but_the_count():
    data = batch(450, 450, labels=(3, 3))
    data["labels"] = np.full((2, 60), 3, np.int32)  # 60 labels, 11 frames
    state, frozen, step = setup(Finetune())
    before = jax.device_get(state.params)
    state, metrics = step(state, frozen, None, data)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0 and int(state.skipped) == 0
    assert float(metrics["loss/unfit"]) == 1.0  # all rows
    same(jax.device_get(state.params), before, 0.0)
    _, metrics = step(state, frozen, None, {**data, "labels": np.where(np.arange(60) < [[4], [60]], 3, -100)})
    assert float(metrics["loss/unfit"]) == 0.5 and float(metrics["loss"]) > 0


@pytest.mark.parametrize("distance", losses.DISTANCES)
def test_hidden_distances(distance):
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 2, 5, 8)).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2]])
    term = losses.hidden(jnp.asarray(s), jnp.asarray(t), mask, distance)

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    cosine = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    want = {"mse": ((s - t) ** 2).mean(-1), "ln_mse": ((norm(s) - norm(t)) ** 2).mean(-1), "cosine": 1 - cosine,
            "channel_mse": ((s - t) ** 2 / (1e-2 * t[mask].var(0).mean() + t[mask].var(0))).mean(-1),
            "l1": np.abs(s - t).mean(-1), "log_sigmoid": np.log1p(np.exp(-cosine))}
    want |= {f"l1_{name}": want["l1"] + want[name] for name in ("cosine", "log_sigmoid")}
    assert float(term.sum) == pytest.approx(want[distance][mask].sum(), rel=1e-5) and float(term.count) == 7
    least = np.log1p(np.exp(-1.0)) * 7 if distance.endswith("log_sigmoid") else 0.0
    same = losses.hidden(jnp.asarray(s), jnp.asarray(s), mask, distance)
    assert float(same.sum) == pytest.approx(least, abs=1e-5)
    assert not np.any(jax.grad(lambda t: losses.hidden(jnp.asarray(s), t, mask, distance).sum)(jnp.asarray(t)))


def test_an_unknown_distance():
    with pytest.raises(ValueError, match="'l2': use mse, ln_mse, .* or l1_log_sigmoid"):
        losses.hidden(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), np.ones((1, 1), bool), "l2")


@pytest.mark.parametrize("name", ["gram", "cka"])
def test_relations_between_frames(name):
    """Widths may differ; a rotation of the channels changes nothing; padding and its gradient are nothing."""
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((3, 6, 8)).astype(np.float32), rng.standard_normal((3, 6, 5)).astype(np.float32)
    lengths = [6, 4, 1]
    mask = np.arange(6) < np.array(lengths)[:, None]
    distance, total, count = getattr(losses, name), 0.0, 0
    for x, y, n in zip(s.astype(np.float64), t.astype(np.float64), lengths):
        x, y = x[:n], y[:n]
        if name == "gram":
            total, count = total + ((x @ x.T / 8 - y @ y.T / 5) ** 2).sum(), count + n * n
        elif n > 1:
            x, y = x - x.mean(0), y - y.mean(0)
            norm = np.linalg.norm
            total, count = total + 1 - norm(x.T @ y) ** 2 / norm(x.T @ x) / norm(y.T @ y), count + 1
    term = distance(s, t, mask)
    assert float(term.sum) == pytest.approx(total, rel=1e-5) and float(term.count) == count
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0].astype(np.float32)
    assert float(distance(s, s @ rotation, mask).sum) == pytest.approx(0.0, abs=1e-4)
    assert float(distance(np.where(mask[..., None], s, 1e3), t, mask).sum) == pytest.approx(total, rel=1e-5)
    grads = jax.grad(lambda s: distance(s, t, mask).sum)(jnp.asarray(s))
    assert np.isfinite(grads).all() and not np.any(np.asarray(grads)[~mask]) and np.any(grads)
    assert not np.any(jax.grad(lambda t: distance(s, t, mask).sum)(jnp.asarray(t)))


def test_kl():
    rng = np.random.default_rng(0)
    s, t = jnp.asarray(rng.standard_normal((2, 1, 3, 5)), jnp.float32)
    mask = np.array([[True, True, False]])
    term = losses.kl(s, t, mask, 2.0)
    p, q = jax.nn.softmax(t / 2, -1), jax.nn.softmax(s / 2, -1)
    want = 4 * (p * jnp.log(p / q)).sum(-1)[0, :2].sum()
    assert float(term.sum) == pytest.approx(float(want), rel=1e-4) and float(term.count) == 2
    assert float(losses.kl(s, s, mask).sum) == 0.0
