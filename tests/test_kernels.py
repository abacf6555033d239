"""Pallas kernels in interpret mode against the plain recurrence in float64; which version runs where, and why."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslim.models import attention, attention_kernels, kernels, layers, pallas_gla, pallas_gpu, pallas_scan, scan

CASES = [  # frames, heads, groups, P, N, lengths
    ("tpu", 200, 4, 1, 8, 16, (200, 77)), ("gpu", 200, 4, 2, 16, 32, (200, 77)),
    pytest.param(("tpu", 1, 2, 2, 8, 8, (1, 0)), marks=pytest.mark.slow),
    pytest.param(("tpu", 128, 2, 2, 9, 16, (128, 5)), marks=pytest.mark.slow),
    pytest.param(("tpu", 131, 6, 2, 8, 24, (130, 1)), marks=pytest.mark.slow),
    pytest.param(("gpu", 65, 2, 2, 64, 128, (65, 0)), marks=pytest.mark.slow)]


def kernel(place, op, *sizes):
    """The kernel for TPU or GPU, in interpret mode."""
    module = pallas_gpu if place == "gpu" else pallas_gla if op == "gla" else pallas_scan
    cut = module.shape(op, *sizes) if place == "gpu" else module.shape(*sizes)
    return lambda *args: getattr(module, op)(*args, cut=cut, interpret=True)


def problem(frames, heads, groups, size, width, lengths, seed=0):
    """x, dt (0 on padding), a, b, c, state; garbage in padded x, b, c."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(frames) < np.array(lengths)[:, None])[..., None]
    normal = lambda *s: rng.standard_normal(s)  # noqa: E731
    rows = len(lengths)
    return (normal(rows, frames, heads, size), mask * rng.uniform(0.01, 2.0, (rows, frames, heads)),
            -rng.uniform(0.1, 4.0, heads), *(normal(rows, frames, groups, width) / width**0.5 for _ in range(2)),
            normal(rows, heads, size, width))


def recurrence(x, dt, a, b, c, s):
    """s_t = exp(dt_t A) s_{t-1} + dt_t x_t b_t^T, y_t = s_t c_t, one frame after another."""
    each = x.shape[2] // b.shape[2]

    def step(s, now):
        x, dt, b, c = now
        s = jnp.exp(dt * a)[..., None, None] * s + (dt[..., None] * x)[..., None] * b[:, :, None]
        return s, jnp.einsum("bhpn,bhn->bhp", s, c)

    b, c = (jnp.repeat(v, each, 2) for v in (b, c))
    s, y = jax.lax.scan(step, s, tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, b, c)))
    return jnp.moveaxis(y, 0, 1), s


def gated(q, k, v, g, s):
    """s_t = diag(exp(g_t)) s_{t-1} + k_t v_t^T, y_t = s_t^T q_t, one frame after another."""
    def step(s, now):
        q, k, v, g = now
        s = jnp.exp(g)[..., None] * s + k[..., None] * v[:, :, None]
        return s, jnp.einsum("bhkv,bhk->bhv", s, q)

    s, y = jax.lax.scan(step, s, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g)))
    return jnp.moveaxis(y, 0, 1), s


def exact(args, seed=9, recurrence=recurrence):
    """Results and gradients of the recurrence in float64, and the directions of these."""
    with jax.enable_x64(True):
        args = [jnp.asarray(v, jnp.float64) for v in args]
        out, back = jax.vjp(jax.jit(recurrence), *args)
        rng = np.random.default_rng(seed)
        probes = [rng.standard_normal(v.shape).astype(np.float32) for v in out]
        grads = back(tuple(jnp.asarray(p, jnp.float64) for p in probes))
        return [np.asarray(v) for v in out], [np.asarray(v) for v in grads], probes


def relative(have, want):
    want = np.asarray(want, np.float64)
    return float(np.abs(np.asarray(have, np.float64) - want).max() / max(np.abs(want).max(), 1e-6))


@pytest.mark.parametrize("case", CASES)
def test_ssd_and_its_gradients(case):
    place, *sizes, lengths = case
    args = problem(*sizes, lengths)
    small = [jnp.asarray(v, jnp.float32) for v in args]
    (y, last), back = jax.vjp(jax.jit(kernel(place, "ssd", len(lengths), *sizes)), *small)
    want, wants, probes = exact(args)
    assert relative(y, want[0]) < 1e-5 and relative(last, want[1]) < 1e-5
    grads = back(tuple(map(jnp.asarray, probes)))
    for name, have, true in zip(("x", "dt", "a", "b", "c", "state"), grads, wants, strict=True):
        assert relative(have, true) < 1e-4, name
    for row, length in enumerate(lengths):  # padding takes part in nothing
        assert not np.any(grads[0][row, length:]) and not np.any(grads[3][row, length:])


@pytest.mark.parametrize("place, length, size", [
    ("tpu", 150, 9), ("gpu", 150, 16), pytest.param("tpu", 1, 9, marks=pytest.mark.slow)])
def test_linear_attention_and_its_gradients(place, length, size):
    rng, (heads, width) = np.random.default_rng(1), (2, 16)
    q, k, v = (rng.standard_normal((2, length, heads, n)) for n in (width, width, size))
    k[1, length // 2 :] = 0.0                                                 # padding
    state = rng.standard_normal((2, heads, width, size))
    small = [jnp.asarray(x, jnp.float32) for x in (q, k, v, state)]
    (y, last), back = jax.vjp(jax.jit(kernel(place, "causal", 2, length, heads, heads, size, width)), *small)
    one, none = np.ones((2, length, heads)), np.zeros(heads)
    want, grads, probes = exact((v, one, none, k, q, np.swapaxes(state, 2, 3)))
    assert relative(y, want[0]) < 1e-5 and relative(np.swapaxes(last, 2, 3), want[1]) < 1e-5
    dq, dk, dv, ds = back((jnp.asarray(probes[0]), jnp.swapaxes(jnp.asarray(probes[1]), 2, 3)))
    for have, true in ((dq, grads[4]), (dk, grads[3]), (dv, grads[0]), (np.swapaxes(ds, 2, 3), grads[5])):
        assert relative(have, true) < 1e-4


def gla_problem(frames, heads, size, width, lengths, strength=1.0):
    """q, k, v, g, state; k and g are 0 on padding. The decays of one head are `strength` times those of the others."""
    rng, rows = np.random.default_rng(3), len(lengths)
    mask = (np.arange(frames) < np.array(lengths)[:, None])[..., None, None]
    q, k, g = (rng.standard_normal((rows, frames, heads, width)) for _ in range(3))
    g = -np.log1p(np.exp(2 * g)) * np.where(np.arange(heads) == 0, strength, 0.1)[:, None]
    v, state = rng.standard_normal((rows, frames, heads, size)), rng.standard_normal((rows, heads, width, size))
    return q / width**0.5, mask * k, v, mask * g, state


@pytest.mark.parametrize("place, frames, heads, size, width, lengths, strength", [
    ("tpu", 200, 2, 9, 16, (200, 77), 20.0), ("gpu", 100, 2, 32, 16, (100, 77), 20.0),
    pytest.param("tpu", 1, 1, 8, 8, (1,), 1.0, marks=pytest.mark.slow),
    pytest.param("tpu", 257, 4, 16, 8, (257, 128), 1.0, marks=pytest.mark.slow),
    pytest.param("tpu", 128, 2, 64, 64, (128, 5), 0.0, marks=pytest.mark.slow),
    pytest.param("gpu", 128, 2, 64, 64, (128, 5), 0.0, marks=pytest.mark.slow)])
def test_gated_linear_attention_and_its_gradients(place, frames, heads, size, width, lengths, strength):
    args = gla_problem(frames, heads, size, width, lengths, strength)
    small = [jnp.asarray(v, jnp.float32) for v in args]
    (y, last), back = jax.vjp(jax.jit(kernel(place, "gla", len(lengths), frames, heads, heads, size, width)), *small)
    want, wants, probes = exact(args, recurrence=gated)
    assert relative(y, want[0]) < 1e-5 and relative(last, want[1]) < 1e-5
    grads = back(tuple(map(jnp.asarray, probes)))
    for name, have, true in zip(("q", "k", "v", "g", "state"), grads, wants, strict=True):
        assert relative(have, true) < 1e-4, name
        for head in range(heads):                                             # strong decays have small gradients
            axis = 1 if name == "state" else 2
            assert relative(*(np.take(np.asarray(x), head, axis) for x in (have, true))) < 1e-4, (name, head)


@pytest.mark.slow
def test_gated_linear_attention_with_bfloat16_inputs():
    args = [jnp.asarray(v, jnp.float32) for v in gla_problem(100, 2, 16, 16, (100, 40))]
    half = [*(v.astype(jnp.bfloat16) for v in args[:3]), *args[3:]]
    want = exact([np.asarray(v, np.float64) for v in args], recurrence=gated)[0]
    for fn in (scan.plain_gla, *(kernel(place, "gla", 2, 100, 2, 2, 16, 16) for place in ("tpu", "gpu"))):
        y, last = jax.jit(fn)(*half)
        assert y.dtype == jnp.float32 and relative(y, want[0]) < 2e-2 and relative(last, want[1]) < 2e-2


def halved(args):
    """x, b and c in bfloat16."""
    return [v.astype(jnp.bfloat16) if v.ndim == 4 and i != 5 else v for i, v in enumerate(args)]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["tpu", "gpu"])
def test_bfloat16_inputs(place):
    args = [jnp.asarray(v, jnp.float32) for v in problem(100, 2, 1, 16, 16, (100, 40))]
    y, last = kernel(place, "ssd", 2, 100, 2, 1, 16, 16)(*halved(args))
    want = exact([np.asarray(v, np.float64) for v in args])[0]
    assert y.dtype == jnp.float32 and relative(y, want[0]) < 2e-2 and relative(last, want[1]) < 2e-2


@pytest.mark.parametrize("sizes, together, chunk", [
    ((16, 1, 64, 128), 1, 128), ((12, 12, 64, 64), 2, 128), ((12, 12, 65, 64), 12, 128), ((3, 3, 8, 16), 3, 128)])
def test_how_a_problem_is_cut(sizes, together, chunk):
    """Whole lanes or all of an axis; and chunks whose VMEM fits."""
    heads, groups, size, width = sizes
    cut = pallas_scan.shape(8, 1500, heads, groups, size, width)
    assert (cut.together, cut.chunk) == (together, chunk) and cut.frames % chunk == 0 and cut.vmem() <= pallas_scan.VMEM
    for lanes in (cut.inside * size, cut.together * width):
        assert lanes % 128 == 0 or cut.together == groups
    assert "MiB of VMEM" in pallas_scan.shape(8, 1500, 64, 1, 128, 256)
    cut = pallas_gla.shape(8, 1500, 12, 12, 64, 64)
    assert (cut.together, cut.chunk, cut.levels) == (2, 128, 7) and cut.vmem() <= pallas_scan.VMEM
    assert "MiB of VMEM" in pallas_gla.shape(8, 1500, 3, 3, 500, 500)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("op", ["ssd", "causal", "gla"])
def test_the_kernels_for_gpu_lower_to_triton(op, half):
    """Forward and gradients, two programs; no GPU is needed until Triton compiles them."""
    if op == "gla":
        args = [jnp.asarray(v, jnp.float32) for v in gla_problem(70, 2, 64, 32, (70,))]
        args = [v.astype(jnp.bfloat16) if half and i < 3 else v for i, v in enumerate(args)]
    else:
        args = [jnp.asarray(v, jnp.float32) for v in problem(70, 4, 2, 64, 128, (70,))]
        x, _, _, b, c, state = args = halved(args) if half else args
        args = args if op == "ssd" else [jnp.repeat(c, 2, 2), jnp.repeat(b, 2, 2), x, jnp.swapaxes(state, 2, 3)]
    heads, groups, size, width = {"gla": (2, 2, 64, 32), "ssd": (4, 2, 64, 128), "causal": (4, 4, 64, 128)}[op]
    cut = pallas_gpu.shape(op, 1, 70, heads, groups, size, width)
    loss = lambda *v: sum(x.sum() for x in getattr(pallas_gpu, op)(*v, cut=cut))  # noqa: E731
    absent = jax.sharding.AbstractDevice("NVIDIA H100", None, "cuda")  # newer versions of JAX ask which GPU it is for
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=absent)):
        traced = jax.jit(jax.value_and_grad(loss, range(len(args)))).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_what_runs_where(monkeypatch, caplog):
    """The table decides; a kernel that was asked for and cannot run says so once, and XLA's result comes."""
    args = [jnp.asarray(v, jnp.float32) for v in problem(10, 2, 1, 4, 4, (10,))]
    want = scan.plain_ssd(*args)[0]
    kernels.fall_back.cache_clear()
    monkeypatch.setenv(kernels.VARIABLE, "kernel")
    for _ in range(2):
        np.testing.assert_array_equal(scan.ssd(*args)[0], want)
    assert [r.getMessage() for r in caplog.records] == [
        "ssd: no kernel here, XLA runs instead: there is one for GPU and TPU, this is cpu."]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert isinstance(kernels.recurrence("ssd", 1, 10, 2, 1, 64, 128).keywords["cut"], pallas_gpu.Shape)
    assert kernels.recurrence("ssd", 1, 10, 2, 1, 4, 64) is None and "4 x 64" in caplog.records[-1].getMessage()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert kernels.recurrence("ssd", 1, 10, 2, 1, 4, 4).func is pallas_scan.ssd
    assert kernels.recurrence("ssd", 1, 10, 64, 1, 128, 256) is None and "MiB" in caplog.records[-1].getMessage()
    assert kernels.recurrence("gla", 1, 10, 2, 2, 4, 4).func is pallas_gla.gla
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert kernels.recurrence("causal", 1, 10, 2, 2, 4, 4) is None
    assert "several devices" in caplog.records[-1].getMessage()
    with kernels.PLAIN(True):
        assert not kernels.wanted("ssd")
    assert kernels.wanted("ssd")
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    monkeypatch.setattr(kernels, "table", lambda: {"cpu": {"ssd": "kernel", "causal": "xla"}})
    assert kernels.wanted("ssd") and not kernels.wanted("causal")
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="use auto, xla, kernel"):
        kernels.wanted("ssd")


@pytest.mark.parametrize("queries, keys, causal, masked", [
    (150, 150, True, True), pytest.param(40, 140, False, True, marks=pytest.mark.slow),
    pytest.param(128, 128, False, False, marks=pytest.mark.slow)])
def test_splash_attention(queries, keys, causal, masked):
    """In interpret mode against the plain program, values narrower than keys, with gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, size)), jnp.float32)
               for n, size in ((queries, 16), (keys, 16), (keys, 8)))
    mask = jnp.arange(keys) < jnp.array([keys, 9])[:, None] if masked else None
    plain = lambda *a: attention.attention(*a, mask, 0.3, layers.Call(attention="dense"), causal=causal)  # noqa: E731
    kernel = lambda *a: attention_kernels.splash(*a, mask, 0.3, causal, interpret=True)  # noqa: E731
    (want, back), (have, other) = jax.vjp(plain, q, k, v), jax.vjp(kernel, q, k, v)
    assert relative(have, want) < 1e-5
    probe = jnp.asarray(rng.standard_normal(want.shape), jnp.float32)
    for a, b in zip(other(probe), back(probe)):
        assert relative(a, b) < 1e-4


def test_the_call_for_cudnn_by_its_xla_version():
    """The same arguments as for cuDNN give what the plain program gives: masks of keys, causal, bias."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, 2, 8)), jnp.float32) for _ in range(3))
    mask, bias = jnp.arange(9) < jnp.array([9, 4])[:, None], jnp.asarray(rng.standard_normal((2, 2, 9, 9)), jnp.float32)
    for m, b, causal in ((None, None, False), (mask, None, True), (mask, bias, False)):
        have = attention_kernels.cudnn(q, k, v, m, 0.3, b, causal, implementation="xla")
        want = attention.attention(q, k, v, m, 0.3, layers.Call(attention="dense"), bias=b, causal=causal)
        assert relative(have, want) < 1e-5


def test_attention_falls_back_with_a_reason(monkeypatch, caplog):
    monkeypatch.setenv(kernels.VARIABLE, "kernel")
    kernels.fall_back.cache_clear()
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    ask = lambda **more: kernels.attention(**{**dict(q=x, k=x, v=x, mask=None, rate=0.0, bias=None,  # noqa: E731
                                                     causal=False), **more})
    cases = {"cpu": [(dict(), "this is cpu")],
             "gpu": [(dict(), None), (dict(q=x.astype(jnp.float32)), "float32"), (dict(v=x[..., :4]), "8 and 4"),
                     (dict(rate=0.1), "dropout"), (dict(q=x[..., :4], k=x[..., :4], v=x[..., :4]), "steps of 8")],
             "tpu": [(dict(), None), (dict(v=x[..., :4]), None), (dict(bias=x), "no bias"), (dict(rate=0.1), "dropout"),
                     (dict(mask=jnp.ones((1, 4, 4), bool)), "every query")]}
    for backend, tries in cases.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for changes, why in tries:
            assert (ask(**changes) is None) == (why is not None), (backend, why)
            assert why is None or why in caplog.records[-1].getMessage() or why == "dropout"
