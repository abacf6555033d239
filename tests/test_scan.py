"""Chunked recurrences against the plain ones, in float64 and frame by frame."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslim import cost
from jaxslim.models import scan

B, T, H, G, P, N = 2, 45, 4, 2, 5, 6
LENGTHS = np.array([45, 29])


def softplus(x):
    return np.log1p(np.exp(x))


def ssd_inputs(rng, t=T):
    return dict(x=rng.standard_normal((B, t, H, P)), dt=softplus(rng.standard_normal((B, t, H))),
                a=-np.exp(rng.standard_normal(H)), b=rng.standard_normal((B, t, G, N)),
                c=rng.standard_normal((B, t, G, N)))


def ssd(x, dt, a, b, c):
    b, c = (np.repeat(v, H // G, 2) for v in (b, c))
    s, ys = np.zeros((B, H, P, N)), []
    for t in range(x.shape[1]):
        s = np.exp(dt[:, t] * a)[..., None, None] * s + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        ys.append((s * c[:, t, :, None]).sum(-1))
    return np.stack(ys, 1), s


def selective_inputs(rng, t=T):
    return dict(x=rng.standard_normal((B, t, P)), dt=softplus(rng.standard_normal((B, t, P))),
                a=-np.exp(rng.standard_normal((P, N))), b=rng.standard_normal((B, t, N)),
                c=rng.standard_normal((B, t, N)))


def selective(x, dt, a, b, c):
    s, ys = np.zeros((B, P, N)), []
    for t in range(x.shape[1]):
        s = np.exp(dt[:, t, :, None] * a) * s + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        ys.append((s * c[:, t, None]).sum(-1))
    return np.stack(ys, 1), s


def delta_inputs(rng, t=T):
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    base = unit(rng.standard_normal((B, 1, H, N)))  # keys much alike: the hard case of the triangular system
    return dict(q=rng.standard_normal((B, t, H, N)), k=unit(base + 0.3 * rng.standard_normal((B, t, H, N))),
                v=rng.standard_normal((B, t, H, P)), beta=1 / (1 + np.exp(-rng.standard_normal((B, t, H)) - 1)),
                g=-0.1 * softplus(rng.standard_normal((B, t, H))))


def delta(q, k, v, beta, g):
    s, ys = np.zeros((B, H, N, P)), []
    for t in range(q.shape[1]):
        s = np.exp(g[:, t])[..., None, None] * s
        read = (s * k[:, t, :, :, None]).sum(2)                                          # (B, H, P)
        s = s + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - read))[:, :, None]
        ys.append((s * q[:, t, :, :, None]).sum(2))
    return np.stack(ys, 1), s


def gla_inputs(rng, t=T):
    g = -softplus(3 * rng.standard_normal((B, t, H, N)))
    g[:, :, 0] *= 30.0  # of one head strong and weak decays in turn, where a difference of long sums would lose digits
    return dict(q=rng.standard_normal((B, t, H, N)), k=rng.standard_normal((B, t, H, N)),
                v=rng.standard_normal((B, t, H, P)), g=g)


def gla(q, k, v, g):
    s, ys = np.zeros((B, H, N, P)), []
    for t in range(q.shape[1]):
        s = np.exp(g[:, t])[..., None] * s + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append((s * q[:, t, :, :, None]).sum(2))
    return np.stack(ys, 1), s


def causal_inputs(rng, t=T):
    return dict(q=rng.random((B, t, H, N)), k=rng.random((B, t, H, N)), v=rng.standard_normal((B, t, H, P)))


def causal(q, k, v):
    s, ys = np.zeros((B, H, N, P)), []
    for t in range(q.shape[1]):
        s = s + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append((s * q[:, t, :, :, None]).sum(2))
    return np.stack(ys, 1), s


CASES = {"ssd": (ssd, ssd_inputs, ("dt",)), "selective": (selective, selective_inputs, ("dt",)),
         "delta": (delta, delta_inputs, ("beta", "g")), "causal": (causal, causal_inputs, ("k",)),
         "gla": (gla, gla_inputs, ("k", "g"))}
CASE = pytest.mark.parametrize("name", CASES)
FORMS = pytest.mark.parametrize("name, more", [*((n, {}) for n in CASES), *(
    (n, {"in_turn": True}) for n in ("ssd", "delta", "causal"))])


@functools.partial(jax.jit, static_argnames=("name", "chunk", "in_turn"))
def chunked(name, inputs, state=None, chunk=16, **more):
    return getattr(scan, name)(**inputs, state=state, chunk=chunk, **more)


def draw(name, t=T, seed=0):
    return CASES[name][1](np.random.default_rng(seed), t)


def near(have, want, tolerance):
    error = np.abs(np.asarray(have, np.float64) - want).max() / max(1.0, np.abs(want).max())
    assert error <= tolerance, error


@FORMS
def test_equals_the_recurrence_whatever_the_chunk(name, more):
    inputs = draw(name)
    want = CASES[name][0](**inputs)
    for chunk in (16, 64):  # 45 frames: no multiple; 64: one chunk
        have = chunked(name, inputs, chunk=chunk, **more)
        near(have[0], want[0], 1e-5)
        near(have[1], want[1], 1e-5)


@FORMS
def test_gradients_equal_those_of_the_recurrence(name, more):
    """Of a random projection of the output and of the last state, by every input, along random directions; the
    oracle's as central differences in float64."""
    inputs = draw(name, t=21)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape) for x in CASES[name][0](**inputs)]

    def loss(outputs):
        return sum((w * x).sum() for w, x in zip(weights, outputs))

    have = jax.jit(jax.grad(lambda i: loss(getattr(scan, name)(**i, chunk=8, **more))))(
        {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()})
    for k, x in inputs.items():
        for _ in range(3):
            d = 1e-6 * rng.standard_normal(x.shape)
            up, down = (loss(CASES[name][0](**inputs | {k: x + sign * d})) for sign in (1, -1))
            error = abs((up - down) / 2e-6 - (np.asarray(have[k], np.float64) * d).sum() / 1e-6)
            assert error <= 1e-4 * np.linalg.norm(have[k]), (k, error)


@CASE
def test_padding_in_both_directions(name):
    """Padded frames leave the state alone; a flipped padded row is the flipped row behind zeros."""
    inputs, valid = draw(name), np.arange(T) < LENGTHS[:, None]
    masked = {k: np.where(valid.reshape(B, T, *[1] * (v.ndim - 2)), v, 0) if k in CASES[name][2] else v
              for k, v in inputs.items()}
    over_time = {k: v.ndim > 1 and v.shape[1] == T for k, v in inputs.items()}
    for flip in (False, True):
        def turn(i, flip=flip):
            return {k: v[:, ::-1] if flip and over_time[k] else v for k, v in i.items()}

        y, state = (np.asarray(x) for x in chunked(name, turn(masked)))
        y = y[:, ::-1] if flip else y
        for row, length in enumerate(LENGTHS):
            alone = {k: v[:, :length] if over_time[k] else v for k, v in inputs.items()}
            want = CASES[name][0](**turn(alone))
            near(y[row, :length], want[0][row, ::-1] if flip else want[0][row], 1e-5)
            near(state[row], want[1][row], 1e-5)


@pytest.mark.parametrize("name", ["ssd", "delta", "gla", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "selective", "causal"))])
def test_in_pieces(name):
    """The state carried from piece to piece, frame by frame too, and by `segments`."""
    inputs = draw(name)
    want, last = chunked(name, inputs)
    timed = {k: v for k, v in inputs.items() if k != "a"}
    fixed = {k: v for k, v in inputs.items() if k == "a"}
    state, ys, cuts = None, [], [0, 1, 2, 3, 24, T]
    for start, stop in zip(cuts, cuts[1:]):
        y, state = chunked(name, {k: v[:, start:stop] for k, v in timed.items()} | fixed, state)
        ys.append(y)
    near(np.concatenate(ys, 1), np.asarray(want, np.float64), 1e-5)
    near(state, np.asarray(last, np.float64), 1e-5)

    def piece(state, timed):
        y, state = getattr(scan, name)(**timed, **fixed, state=state, chunk=16)
        return state, y

    again, y = jax.jit(lambda s, i: scan.segments(piece, s, i, 10))(jnp.zeros_like(last), timed)
    near(y, np.asarray(want, np.float64), 1e-5)
    near(again, np.asarray(last, np.float64), 1e-5)


@FORMS
def test_macs_by_formula(name, more):
    formula = {"ssd": lambda t: scan.ssd_macs(t, H, P, G, N, 16),
               "selective": lambda t: scan.selective_macs(t, P, N, 16),
               "delta": lambda t: scan.delta_macs(t, H, N, P, 16), "causal": lambda t: scan.causal_macs(t, H, N, P, 16),
               "gla": lambda t: scan.gla_macs(t, H, N, P, 16)}
    for t in (16, 45):
        traced = cost.jaxpr_macs(jax.make_jaxpr(functools.partial(chunked, name, **more))(draw(name, t)))
        assert traced == B * formula[name](t)


def test_macs_of_secondary_chunks():
    for chunk in (8, 32, 64):
        run = functools.partial(chunked, "gla", chunk=chunk)
        assert cost.jaxpr_macs(jax.make_jaxpr(run)(draw("gla", 70))) == B * scan.gla_macs(70, H, N, P, chunk)


def test_strong_decay_and_no_decay():
    """Decays to zero within a frame, and none over a thousand frames: finite, gradients too."""
    rng = np.random.default_rng(2)
    inputs = {k: jnp.asarray(v, jnp.float32) for k, v in ssd_inputs(rng, 200).items()}
    for scale in (1e4, 0.0):
        scaled = inputs | {"a": inputs["a"] * scale}
        y, grads = jax.jit(jax.value_and_grad(lambda i: scan.ssd(**i)[0].sum()))(scaled)
        assert np.isfinite(y) and all(np.isfinite(g).all() for g in grads.values())


def test_gated_linear_attention_forgets_all_at_once_or_nothing():
    """A gate that is shut is a start from nothing, without NaN; open gates are linear attention."""
    inputs = {k: jnp.asarray(v, jnp.float32) for k, v in gla_inputs(np.random.default_rng(2), 30).items()}
    shut = inputs | {"g": jnp.zeros_like(inputs["g"]).at[:, 21].set(-jnp.inf)}

    def loss(inputs):
        y = scan.gla(**inputs, chunk=8)[0]
        return (y**2).sum(), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(shut)
    assert all(np.isfinite(g).all() for g in grads.values())
    parts = {k: v for k, v in inputs.items() if k != "g"}
    before, after = ({k: v[:, a:b] for k, v in parts.items()} for a, b in ((0, 21), (21, 30)))
    near(y, np.concatenate([causal(**part)[0] for part in (before, after)], 1), 1e-5)


def test_unit_inverse():
    m = np.tril(np.ones((16, 16)), -1)  # powers of m grow to thousands; the inverse is of zeros and ones
    have = jax.jit(scan.unit_inverse)(jnp.asarray(m, jnp.float32))
    np.testing.assert_allclose(have, np.linalg.inv(np.eye(16) + m), atol=1e-6)
