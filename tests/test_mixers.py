"""Every mixer: its definition, padding, long audio, pieces, MACs, what a conversion copies; Mamba-2 also in PyTorch."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxslim import cost
from jaxslim.models import bind, convert, mixers
from jaxslim.models import layers as L
from jaxslim.spec import MIXERS, SpecError

SPEC = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0).spec
BLOCK, OWNER = "encoder.1.attention", "wav2vec2.encoder.layers.1.attention"
SMALL = {"head_dim": 8, "chunk": 16}
CASES = {  # name -> mixer, options; hidden size 32, 4 heads of 8
    "linformer": ("linformer", {"length": 2000, "features": 5}),
    "linformer kv": ("linformer", {"length": 70, "features": 5, "sharing": "kv"}),
    "elu": ("elu", {}), "t2r": ("t2r", {"features": 6}), "hedgehog": ("hedgehog", {"features": 6}),
    "window": ("hedgehog", {"features": 6, "window": 7}),
    "causal": ("elu", {"causal": True}), "causal window": ("t2r", {"features": 6, "causal": True, "window": 7}),
    "mamba2": ("mamba2", {**SMALL, "state": 6}),
    "mamba2 groups": ("mamba2", {**SMALL, "state": 6, "groups": 2, "direction": "mean", "bias": True, "inner": 48}),
    "mamba2 causal": ("mamba2", {**SMALL, "state": 6, "direction": "causal"}),
    "hydra": ("mamba2", {**SMALL, "state": 6, "direction": "shared", "conv": 7, "groups": 2}),
    "mamba": ("mamba", {"state": 4, "chunk": 16}),
    "mamba causal": ("mamba", {"state": 4, "chunk": 16, "direction": "causal", "rank": 3}),
    "gated_deltanet": ("gated_deltanet", {**SMALL, "direction": "sum"}),
    "gla": ("gla", {**SMALL, "key_dim": 4, "rank": 3, "tau": 4}),
    "gla causal": ("gla", {**SMALL, "key_dim": 8, "chunk": 32, "direction": "causal", "bias": True, "inner": 48}),
    "gated_deltanet causal": ("gated_deltanet", {**SMALL, "direction": "causal", "bias": True}),
}
ALIKE = ("linformer kv", "t2r", "mamba2 causal", "mamba causal", "gated_deltanet causal", "causal",
         "gla causal")  # parts of others
CASE = pytest.mark.parametrize("name", CASES)
MOST = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in CASES])
CAUSAL = ["causal window", "mamba2 causal", "gla causal", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "causal", "mamba causal", "gated_deltanet causal"))]


def block_of(name, seed=3):
    """The converted block with random parameters, and them."""
    mixer, options = CASES[name]
    model = tiny.slim(SPEC.with_block(BLOCK, mixer=mixer, options=options), seed=seed)
    params = {k.removeprefix(OWNER + "."): np.asarray(v, np.float64) for k, v in model.params.items() if OWNER in k}
    return bind.submodule(bind.bind(model.spec, model.params), OWNER), params


def run(block, x, mask=None, kind="dense"):
    return np.asarray(jax.jit(lambda x, m: block(x, m, L.Call(attention=kind)))(x, mask))


def inputs(*lengths, seed=0, fill=0.0):
    rng = np.random.default_rng(seed)
    x, mask = rng.standard_normal((len(lengths), max(lengths), 32)), tiny.waves(*lengths)[1] == 1
    return np.where(mask[..., None], x, fill).astype(np.float32), mask


# ---- definitions ----


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def norm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w


def convolved(x, p, left):
    """Depthwise over (T, C), `left` frames of zeros before."""
    w = p["conv1d.weight"][:, 0]
    x = np.pad(x, ((left, w.shape[1] - 1 - left), (0, 0)))
    return silu(np.stack([(x[t : t + w.shape[1]] * w.T).sum(0) for t in range(len(x) - w.shape[1] + 1)])
                + p["conv1d.bias"])


def one_mamba2(x, p, o):
    """(T, D) -> (T, D), frame by frame."""
    inner, groups, n = p["norm.weight"].size, o.get("groups", 1), o["state"]
    z, h, b, c, dt = np.split(x @ p["in_proj.weight"].T + p.get("in_proj.bias", 0),
                              np.cumsum([inner, inner, groups * n, groups * n]), -1)
    h, b, c = np.split(convolved(np.concatenate([h, b, c], -1), p, o.get("conv", 4) - 1),
                       [inner, inner + groups * n], -1)
    dt, a = softplus(dt + p["dt_bias"]), -np.exp(p["A_log"])
    count = a.size
    y, s = [], np.zeros((count, inner // count, n))
    for t in range(len(x)):
        b_, c_ = (np.repeat(v[t].reshape(groups, n), count // groups, 0)[:, None] for v in (b, c))
        h_ = h[t].reshape(count, -1, 1)
        s = np.exp(dt[t] * a)[:, None, None] * s + dt[t][:, None, None] * h_ * b_
        y.append(((s * c_).sum(-1) + p["D"][:, None] * h_[..., 0]).reshape(-1))
    y = (np.stack(y) * silu(z)).reshape(len(x), groups, -1)
    return norm(y, 1.0).reshape(len(x), -1) * p["norm.weight"] @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


def one_mamba(x, p, o):
    n, rank = o["state"], o.get("rank", 2)
    h, z = np.split(x @ p["in_proj.weight"].T, 2, -1)
    h = convolved(h, p, 3)
    dt, b, c = np.split(h @ p["x_proj.weight"].T, [rank, rank + n], -1)
    dt, a = softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]), -np.exp(p["A_log"])
    y, s = [], np.zeros_like(a)
    for t in range(len(x)):
        s = np.exp(dt[t][:, None] * a) * s + (dt[t] * h[t])[:, None] * b[t]
        y.append((s * c[t]).sum(-1) + p["D"] * h[t])
    return np.stack(y) * silu(z) @ p["out_proj.weight"].T


def one_gated_deltanet(x, p, o):
    inner = p["out_proj.weight"].shape[1]
    count, size = inner // 8, 8
    z, qkv, beta, dt = np.split(x @ p["in_proj.weight"].T + p.get("in_proj.bias", 0),
                                np.cumsum([inner, 3 * inner, count]), -1)
    q, k, v = (h.reshape(len(x), count, size) for h in np.split(convolved(qkv, p, 3), 3, -1))
    q, k = (h / np.sqrt((h * h).sum(-1, keepdims=True) + 1e-6) for h in (q, k))
    g, beta, y, s = -np.exp(p["A_log"]) * softplus(dt + p["dt_bias"]), sigmoid(beta), [], np.zeros((count, size, size))
    for t in range(len(x)):
        kk = np.eye(size) - beta[t][:, None, None] * k[t][:, :, None] * k[t][:, None]
        s = np.exp(g[t])[:, None, None] * kk @ s + beta[t][:, None, None] * k[t][:, :, None] * v[t][:, None]
        y.append((s * (q[t] * size**-0.5)[:, :, None]).sum(1))
    return (norm(np.stack(y), p["norm.weight"]).reshape(len(x), -1) * silu(z)) @ p["out_proj.weight"].T + p.get(
        "out_proj.bias", 0)


def one_gla(x, p, o):
    inner, keys = p["out_proj.weight"].shape[1], p["gk_proj.bias"].size
    z, q, k, v, low = np.split(x @ p["in_proj.weight"].T + p["in_proj.bias"], np.cumsum([inner, keys, keys, inner]), -1)
    alpha = sigmoid(low @ p["gk_proj.weight"].T + p["gk_proj.bias"]) ** (1 / o.get("tau", 16))
    q, k, v, alpha = (h.reshape(len(x), inner // 8, -1) for h in (q, k, v, alpha))
    y, s = [], np.zeros((inner // 8, o["key_dim"], 8))
    for t in range(len(x)):
        s = alpha[t][:, :, None] * s + k[t][:, :, None] * v[t][:, None]
        y.append((s * (q[t] * o["key_dim"]**-0.5)[:, :, None]).sum(1))
    return (norm(np.stack(y), p["norm.weight"]).reshape(len(x), -1) * silu(z)) @ p["out_proj.weight"].T + p.get(
        "out_proj.bias", 0)


def hydra(x, p, o):
    """Both directions as T x T matrices, which is how Hydra's paper writes them."""
    inner, groups, n = p["norm.weight"].size, o["groups"], o["state"]
    z, xbc, dt = np.split(x @ p["in_proj.weight"].T, [inner, 2 * inner + 4 * groups * n], -1)
    h, *bc = np.split(convolved(xbc, p, 3), inner + groups * n * np.arange(4), -1)
    count, y = p["A_log"].size, (h @ p["fc_D.weight"].T + p["D"]).repeat(8, -1) * h
    for way in (0, 1):
        b, c = (np.repeat(v.reshape(-1, groups, n), count // groups, 1) for v in bc[2 * way : 2 * way + 2])
        d = softplus(dt[:, way * count : (way + 1) * count] + p["dt_bias"])
        for t in range(len(x)):
            others = range(t) if way == 0 else range(t + 1, len(x))
            t0 = t - 1 if way == 0 else t + 1          # the state is read one frame before the present one
            for s in others:
                between = d[s + 1 : t0 + 1] if way == 0 else d[t0:s]
                weight = np.exp(-np.exp(p["A_log"]) * between.sum(0)) * (c[t0] * b[s]).sum(-1) * d[s]
                y[t] += (weight[:, None] * h[s].reshape(count, -1)).reshape(-1)
    return norm(y, p["norm.weight"]) * silu(z) @ p["out_proj.weight"].T


def linear(x, p, o, mixer):
    q, k, v = ((x @ p[f"{r}_proj.weight"].T + p[f"{r}_proj.bias"]).reshape(len(x), 4, 8) for r in "qkv")

    def phi(x, side):
        if mixer == "elu":
            return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
        h = np.einsum("thk,hfk->thf", x, p[f"feature_{side}.weight"])
        if mixer == "t2r":
            return np.maximum(h + p[f"feature_{side}.bias"], 0)
        return np.concatenate([np.exp(s * h) / np.exp(s * h).sum(-1, keepdims=True) for s in (1, -1)], -1)

    ahead = np.arange(len(x))[None] - np.arange(len(x))[:, None]
    allowed = (ahead <= 0) if o.get("causal") else np.full(ahead.shape, True)
    weights = np.einsum("thf,shf->hts", phi(q, "q"), phi(k, "k")) * allowed
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    if w := o.get("window"):
        near = np.exp(np.einsum("thk,shk->hts", q, k) * 8**-0.5) * (allowed & (np.abs(ahead) < w))
        share = sigmoid(p["window_factor"])[:, None, None]
        weights = share * near / near.sum(-1, keepdims=True) + (1 - share) * weights
    y = np.einsum("hts,shk->thk", weights, v).reshape(x.shape)
    return y @ p["out_proj.weight"].T + p["out_proj.bias"]


def linformer(x, p, o):
    q, k, v = ((x @ p[f"{r}_proj.weight"].T + p[f"{r}_proj.bias"]).reshape(len(x), 4, 8) for r in "qkv")
    k, v = (np.einsum("shk,sr->rhk", h, p.get(e, p["E"])[: len(x)]) / np.sqrt(len(x)) for h, e in ((k, "E"), (v, "F")))
    weights = np.exp(np.einsum("thk,rhk->htr", q, k) * 8**-0.5)
    y = np.einsum("htr,rhk->thk", weights / weights.sum(-1, keepdims=True), v).reshape(x.shape)
    return y @ p["out_proj.weight"].T + p["out_proj.bias"]


def definition(name, x, params):
    mixer, o = CASES[name]
    if mixer in mixers.MAPS:
        return linear(x, params, o, mixer)
    if mixer == "linformer":
        return linformer(x, params, o)
    way = lambda prefix: {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}  # noqa: E731
    if o.get("direction") == "shared":
        return hydra(x, way("shared."), o)
    one = globals()[f"one_{mixer}"]
    y = one(x, way("fwd."), o)
    if o.get("direction") == "causal":
        return y
    y = y + one(x[::-1], way("bwd."), o)[::-1]
    return y / 2 if o.get("direction") == "mean" else y


@MOST
def test_equals_its_definition_in_a_padded_batch(name):
    """Each row in float64 without padding; the padded batch in fp32, garbage where nothing should look."""
    block, params = block_of(name)
    x, mask = inputs(45, 30, fill=50.0)
    y = run(block, x, mask)
    for row, length in enumerate((45, 30)):
        tiny.close(y[row, :length], definition(name, x[row, :length].astype(np.float64), params), 1e-5)
    other = np.where(mask[..., None], x, -7.0).astype(np.float32)
    np.testing.assert_array_equal(y[mask], run(block, other, mask)[mask])


@pytest.mark.parametrize("name", ["causal window", "window", "mamba2", *(pytest.param(
    name, marks=pytest.mark.slow) for name in ("gated_deltanet", "hydra", "mamba"))])
def test_long_audio_on_the_cpu(name):
    """The programs for many frames (chunks of frames, shifted sums) give what the plain ones give."""
    block, _ = block_of(name)
    x, mask = inputs(2 * L.CHUNK + 30, L.CHUNK + 5)
    have, want = (run(block, x, mask, kind) for kind in ("blocked", "dense"))
    tiny.close(have[mask], want[mask], 2e-5)


@pytest.mark.parametrize("name", [name if name in ("window", "hydra", "linformer") else pytest.param(
    name, marks=pytest.mark.slow) for name in CASES])
def test_gradients_are_finite_and_reach_every_parameter(name):
    block, _ = block_of(name)
    graph, params = bind.nnx.split(block)
    x, mask = inputs(45, 30)

    def loss(params):
        y = bind.nnx.merge(graph, params)(x, mask, L.Call(attention="dense"))
        return (jnp.where(mask[..., None], y, 0.0) ** 2).sum()

    for path, g in bind.nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(g.get_value()).all() and (np.abs(g.get_value()).max() > 0 or path[-2:] == ("k_proj", "bias"))


@pytest.mark.parametrize("name", CAUSAL)
def test_pieces_and_steps_equal_the_whole(name):
    block, _ = block_of(name)
    x, _ = inputs(45, 45)
    want = run(block, x)
    extend = jax.jit(lambda x, state: block.extend(x, None, state, L.Call()))
    state, ys, cuts = block.state(2), [], [0, 1, 2, 3, 24, 45]
    for start, stop in zip(cuts, cuts[1:]):
        y, state = extend(x[:, start:stop], state)
        ys.append(y)
    tiny.close(np.concatenate(ys, 1), want, 1e-5)
    later = run(block, np.concatenate([x[:, :30], 1 + x[:, 30:]], 1))
    np.testing.assert_allclose(later[:, :30], want[:, :30], atol=1e-6)  # nothing looks ahead
    assert np.abs(later[:, 30:] - want[:, 30:]).max() > 1e-2


@CASE
def test_macs_by_formula(name):
    mixer, options = CASES[name]
    spec = SPEC.with_block(BLOCK, mixer=mixer, options=options)
    for seconds in (0.03, 0.14):  # 12 and 56 frames
        assert cost.macs(spec, seconds, 2).total == cost.traced_macs(spec, seconds, 2)


def test_mamba2_equals_pytorch():
    """Both directions, written anew from the paper in PyTorch: one decay matrix for the whole clip, no recurrence."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    block, params = block_of("mamba2")
    p = {k: torch.from_numpy(v) for k, v in params.items()}
    x, _ = inputs(45)
    o = CASES["mamba2"][1]

    def one(x, way):
        w = {k.removeprefix(way): v for k, v in p.items() if k.startswith(way)}
        z, xbc, dt = F.linear(x, w["in_proj.weight"]).split([32, 32 + 2 * o["state"], 4], -1)
        xbc = F.conv1d(xbc.T[None], w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=xbc.shape[1])[0, :, :45]
        h, b, c = F.silu(xbc).T.split([32, o["state"], o["state"]], -1)
        dt = F.softplus(dt + w["dt_bias"])                                               # (T, H)
        total = (dt * -w["A_log"].exp()).cumsum(0)
        decay = (total[:, None] - total[None]).exp() * torch.ones(45, 45).tril()[..., None]          # (T, S, H)
        h = h.unflatten(-1, (4, 8))
        y = torch.einsum("tn,sn,tsh,sh,shp->thp", c, b, decay, dt, h) + w["D"][:, None] * h
        y = y.flatten(1) * F.silu(z)
        y = y * (y.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w["norm.weight"]
        return F.linear(y, w["out_proj.weight"])

    u = torch.from_numpy(x[0].astype(np.float64))
    tiny.close(run(block, x)[0], one(u, "fwd.") + one(u.flip(0), "bwd.").flip(0), 1e-5)


# ---- sharing, conversion ----


def test_linformer_shares_one_matrix_over_layers():
    options = {"length": 70, "features": 5, "sharing": "layer"}
    spec = SPEC
    for i in (0, 1):
        spec = spec.with_block(f"encoder.{i}.attention", mixer="linformer", options=options)
    model = tiny.slim(spec)
    assert [k for k in model.params if k.endswith((".E", ".F"))] == ["wav2vec2.encoder.layers.0.attention.E"]
    module = bind.bind(model.spec, model.params)
    have, want = (bind.submodule(module, OWNER.replace("1", str(i))).E[...] for i in (1, 0))
    np.testing.assert_array_equal(have, want)
    kv = SPEC
    for i in (0, 1):
        kv = kv.with_block(f"encoder.{i}.attention", mixer="linformer", options={**options, "sharing": "kv"})
    apart = {**{k: v for k, v in model.params.items()}, OWNER + ".E": want}
    values, mask = tiny.waves(2000, 700)
    tiny.close(model(input_values=values, attention_mask=mask).logits,
               model.replace(spec=kv, params=apart)(input_values=values, attention_mask=mask).logits, 1e-6)
    with pytest.raises(SpecError, match=r"encoder.1.attention: sharing layer, but its projection is \(60, 5\)"):
        bind.shapes(spec.with_block(BLOCK, options={**options, "length": 60}))


@pytest.mark.parametrize("name", ["mamba2", "mamba2 causal", "hydra", "gated_deltanet", "mamba"])
def test_what_a_conversion_copies(name):
    mixer, o = CASES[name]
    teacher = tiny.slim(SPEC)
    given = {k: v for k, v in o.items() if k in ("direction", "chunk")}
    spec, new, origins = convert.convert(SPEC, BLOCK, mixer, given, teacher.params, "attention",
                                         np.random.default_rng(0))
    assert set(new) == set(origins) == {k for k in bind.shapes(spec) if OWNER in k}
    assert all(new[k].shape == bind.shapes(spec)[k].shape for k in new)
    leaf = lambda end: new[next(k for k in new if k.endswith(end))]  # noqa: E731
    old = {k.removeprefix(OWNER + "."): np.asarray(v) for k, v in teacher.params.items() if OWNER in k}
    weight, bias = leaf("in_proj.weight"), leaf("in_proj.bias")
    order = {"mamba": "v", "gated_deltanet": "-qkv"}.get(mixer, "-vkqkq" if name == "hydra" else "-vkq")
    for i, role in enumerate(order):
        part = slice(32 * i, 32 * (i + 1))
        assert (role == "-") == (not np.array_equal(weight[part], old.get(f"{role}_proj.weight")))
        assert role == "-" or np.array_equal(bias[part], old[f"{role}_proj.bias"])
    half = 0.5 if o.get("direction", "sum") == "sum" else 1.0
    np.testing.assert_array_equal(leaf("out_proj.weight"), half * old["out_proj.weight"])
    assert {origins[k] for k in new if "_proj.weight" in k and "x_" not in k and "dt_" not in k} == {"mapped"}
    assert {origins[k] for k in new if k.endswith(("A_log", "D", "dt_bias", "dt_proj.bias"))} == {"new"}
    kernel = leaf("conv1d.weight")  # lets its input through
    assert (kernel.sum((1, 2)) == 1).all() and kernel[:, 0, 3 if name == "hydra" else -1].all()


def test_a_conversion_to_gated_linear_attention_starts_as_linear_attention():
    """q, k, v and o are attention's, the output gate is 1, the decays are nearly none; heads with fewer keys too."""
    for fields, direction in ((dict(qk_dim=5), "causal"), ({}, "sum")):
        before = SPEC.with_block(BLOCK, **fields)
        teacher = tiny.slim(before)
        spec, new, origins = convert.convert(before, BLOCK, "gla", {"direction": direction, "rank": 3}, teacher.params,
                                             "attention", np.random.default_rng(0))
        assert spec.attention(BLOCK).options["key_dim"] == fields.get("qk_dim", 8)
        assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in bind.shapes(spec).items() if k in new}
        assert {k.rpartition("fwd.")[2] for k in new if origins[k] == "new" and "fwd." in k} == {
            "gk_proj.weight", "norm.weight"}
        gone = [k for k in teacher.params if OWNER in k]
        params = {k: v for k, v in teacher.params.items() if k not in gone} | new
        block = bind.submodule(bind.bind(spec, params), OWNER)
        old = {k.removeprefix(OWNER + "."): np.asarray(teacher.params[k], np.float64) for k in gone}
        x, mask = inputs(45)
        q, k, v = ((x[0] @ old[f"{r}_proj.weight"].T + old[f"{r}_proj.bias"]).reshape(45, 4, -1) for r in "qkv")
        scores = np.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
        sums = [np.einsum("hts,shk->thk", part, v) for part in (np.tril(scores), np.triu(scores))]
        sums = sums[: 1 + (direction == "sum")]
        want = sum(norm(y, 1.0).reshape(45, -1) @ old["out_proj.weight"].T for y in sums) / len(sums)
        have = run(block, x, mask)[0]
        assert np.abs(have - want - old["out_proj.bias"]).max() < 0.05 * np.abs(want).max()


def test_new_values_are_as_the_authors_draw_them():
    rng = np.random.default_rng(0)
    o = {**MIXERS["mamba2"], "direction": "causal"}
    new = convert.drawn("mamba2", 1024, o, rng)
    assert {k: v.shape for k, v in new.items()} == {
        "fwd.in_proj.weight": (2320, 1024), "fwd.conv1d.weight": (1280, 1, 4), "fwd.conv1d.bias": (1280,),
        "fwd.dt_bias": (16,), "fwd.A_log": (16,), "fwd.D": (16,), "fwd.norm.weight": (1024,),
        "fwd.out_proj.weight": (1024, 1024)}  # CALD's layer for wav2vec2-large
    assert sum(v.size for v in new.values()) == pytest.approx(3.43e6, rel=2e-3)
    dt = softplus(new["fwd.dt_bias"])
    assert dt.min() >= 1e-4 and dt.max() <= 0.1001 and (new["fwd.D"] == 1).all()
    assert 1 <= np.exp(new["fwd.A_log"]).min() and np.exp(new["fwd.A_log"]).max() <= 16
    mamba = convert.drawn("mamba", 64, {**MIXERS["mamba"], "direction": "causal"}, rng)
    np.testing.assert_allclose(np.exp(mamba["fwd.A_log"][5]), np.arange(1, 17), rtol=1e-6)
    assert mamba["fwd.dt_proj.weight"].shape == (64, 4) and np.abs(mamba["fwd.dt_proj.weight"]).max() <= 0.5


# ---- bad input ----


@pytest.mark.parametrize("mixer, options, message", [
    ("mamba", {"direction": "shared"}, "encoder.1.attention: mixer mamba has no direction 'shared'; it has sum, "),
    ("mamba2", {"direction": "both"}, "no direction 'both'"),
    ("mamba2", {"head_dim": 7}, "32 channels do not make heads of 7 in 1 groups; change head_dim, groups or inner"),
    ("gated_deltanet", {"head_dim": 8, "chunk": 24}, "chunk 24 is no power of two"),
    ("gla", {"head_dim": 8, "chunk": 24}, "encoder.1.attention: mixer gla: chunk 24 is no power of two"),
    ("gla", {"head_dim": 8, "tau": 0}, "mixer gla: tau 0; it must be positive"),
    ("gla", {"head_dim": 8, "rank": -1}, "mixer gla: rank -1; it must be positive"),
    ("gla", {"head_dim": 7}, "mixer gla: 32 channels do not make heads of 7"),
    ("gla", {"conv": 4}, "mixer gla has no option 'conv'"),
    ("linformer", {"sharing": "all"}, "sharing 'all' of linformer is none of"),
    ("elu", {"window": -1}, "window -1; it is a number of frames"),
    ("elu", {"features": 3}, "mixer elu has no option 'features'"),
])
def test_options_that_make_no_mixer(mixer, options, message):
    with pytest.raises(SpecError, match=message):
        bind.shapes(SPEC.with_block(BLOCK, mixer=mixer, options=options))


def test_other_bad_input():
    block, _ = block_of("linformer kv")
    with pytest.raises(ValueError, match="encoder.1.attention: 71 frames, but its Linformer projection has 70 rows"):
        run(block, inputs(71)[0])
    for name in ("hedgehog", "mamba2", "linformer"):
        with pytest.raises(SpecError, match="looks at later frames, so it cannot stream; convert it to a causal one"):
            block_of(name)[0].state(1)
    factored = SPEC.with_block(BLOCK, q_rank=2)
    with pytest.raises(SpecError, match="are factored, int8 or have LoRA; merge them before mixer mamba2"):
        convert.convert(factored, BLOCK, "mamba2", {}, tiny.slim(factored).params, "attention", None)
    with pytest.raises(SpecError, match="mamba2 has no q, k, v, o, so no rank"):
        bind.shapes(SPEC.with_block(BLOCK, mixer="mamba2", options={"head_dim": 8}, q_rank=2))
    with pytest.raises(SpecError, match="cannot have key_dim=4, not 8; leave them out, or use init: random"):
        convert.convert(SPEC, BLOCK, "gla", {"key_dim": 4}, tiny.slim(SPEC).params, "attention",
                        np.random.default_rng(0))
    with pytest.raises(SpecError, match="cannot have state=5, not 8; leave them out, or use init: random"):
        convert.convert(SPEC, BLOCK, "mamba2", {"state": 5}, tiny.slim(SPEC).params, "attention",
                        np.random.default_rng(0))


def test_sharding_rules_of_mixer_leaves():
    """Every matrix of a mixer is split where that is possible; decays, norms and small tensors are in every place."""
    from jax.sharding import AbstractMesh
    from jax.sharding import PartitionSpec as P

    from jaxslim.train import mesh as M

    devices, split = AbstractMesh((1, 2, 2), M.AXES), {}
    for name in CASES:
        mixer, options = CASES[name]
        for leaf, want in bind.shapes(SPEC.with_block(BLOCK, mixer=mixer, options=options)).items():
            if OWNER in leaf:
                split[leaf.removeprefix(OWNER + ".").partition(".")[2] or leaf.rpartition(".")[2]] = M.spec_for(
                    leaf, want.shape, devices)
    assert split["in_proj.weight"] == split["x_proj.weight"] == split["fc_D.weight"] == P(None, "fsdp")
    assert split["out_proj.weight"] == P("fsdp", "tensor") and split["dt_proj.weight"] == split[
        "gk_proj.weight"] == P("fsdp")
    for leaf in ("A_log", "D", "dt_bias", "norm.weight", "conv1d.weight", "conv1d.bias", "gk_proj.bias", "E", "F"):
        assert split[leaf] == P(), leaf
