"""Low rank of pairs of matrices, as curves: what is lost at every rank, and the cut that loses it.

Attention (AdaPTwin, arXiv 2406.08904, compresses such pairs; statistics and formulas are ours, the paper's are not
public). A head's scores are (W_q x + b_q)(W_k y + b_k)^T: any invertible P and P^-T between the two matrices change
nothing, nor does b_k, which a softmax over keys cannot see; a value bias passes the softmax, whose rows sum to one, and
belongs to the output bias. With G_a, G_b the second moments on the two sides, R_a^T R_a = G_a, R_b^T R_b = G_b and the
SVD R_a R_b^T = U S V^T, the pair P_a = R_a^-1 U S^1/2, P_b = R_a^T U S^-1/2 (so P_a P_b^T = 1) orders the K dimensions
of a head by what they carry; keeping r of them costs exactly the sum of the other S^2 when the sides are independent:

    Q-K: G_a = E[q q^T], G_b = covariance of the keys of a clip; error: squared score, less its mean over a row.
    V-O: G_a = W_o^T W_o, G_b = covariance of the contexts; their mean goes to the output bias. Error: squared output.

Transformer-XL positions have two query biases u, v and position keys: G_a is the mean over both, G_b the sum over
content and position keys (what the two share is left out; ours). Rotary positions of these families turn the input of
the projections, so they leave P free.

FFN: `units` keeps the neurons that explain the output best, by pivoted Cholesky, and fits the second matrix to them
(least squares, the rest of the mean into the bias); `up`, `down` are whitened SVDs of single matrices, `up` as seen
through the mean slope of the activation and the second matrix.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxslim.models import positions
from jaxslim.models.roles import roles
from jaxslim.spec import Spec, SpecError, kind

FLOOR = 1e-7   # of the largest eigenvalue: directions below count as if they had this much
KINDS = {"attention": ("qk", "vo"), "ffn": ("units", "up", "down")}   # the baseline also has q, k, v, o
FIELD = {"qk": "qk_dim", "vo": "v_dim", "units": "units"}             # of the Spec; others are <role>_rank


class Curve(NamedTuple):
    """What block `block` loses by `kind` at every rank."""

    block: str
    kind: str                  # qk | vo | units | up | down | q | k | v | o
    tail: np.ndarray           # (full + 1,) expected squared error when r are kept; 0 at the end
    cut: Callable              # (spec, params, r, dense) -> (spec, params): r kept; dense: stock shapes, for probing

    @property
    def full(self) -> int:
        return len(self.tail) - 1


def curves(spec: Spec, params, moments, block: str, kinds, twin: str = "whitened",
           centered: bool = True) -> list[Curve]:
    """Curves of a block. `twin`: "whitened" (data), "product" (SVD of the products, no data), "separate" (plain SVD of
    each matrix by itself, no data); the last two are baselines. `moments` is of calibrate.Calibration.

    Raises:
      SpecError: the block cannot be cut that way; says why.
    """
    check(spec, block, kinds)
    names, out = roles(spec, block), []
    if "q" in names:
        if not spec.attention(block).heads:
            return []
        if twin == "separate":
            return [linear(spec, params, block, role, None) for role in "qkvo"]
        if "qk" in kinds:
            out.append(queries_keys(spec, params, block, moments if twin == "whitened" else None, centered))
        if "vo" in kinds:
            out.append(values_output(spec, params, block, moments if twin == "whitened" else None, centered))
    elif spec.ffn(block).units:
        if "units" in kinds and twin == "whitened":
            out.append(neurons(spec, params, block, moments))
        out += [linear(spec, params, block, role, moments if twin == "whitened" else None)
                for role in ("up", "down") if role in kinds]
    return out


def check(spec: Spec, block: str, kinds) -> None:
    """Raises SpecError when the block cannot be cut as `kinds` say."""
    fields = spec.blocks.get(block, {})
    if taken := [key for key in fields if key in ("lora", "gates", "int8", "adapter") or key.endswith("_rank")]:
        raise SpecError(f"lowrank: {block} has {', '.join(taken)} already; merge or finish that first, or choose other "
                        "`sides` and `kinds`.")
    if kind(block) not in ("attention", "cross") or not spec.attention(block).heads:
        return
    mixer = spec.attention(block).mixer
    if "qk" in kinds and mixer == "hedgehog":
        raise SpecError(f"lowrank: {block} is {mixer}: its feature maps are no product of queries and keys, so only "
                        "V-O can be cut. Leave qk out of `kinds`.")
    if mixer not in ("softmax", "hedgehog") and {"qk", "vo"} & set(kinds):
        raise SpecError(f"lowrank: {block} is {mixer}, which has no product of projections to cut. Compress before "
                        "linearizing, or leave qk and vo out of `kinds`.")
    if "qk" in kinds and kind(block) == "attention" and positions.kind(spec) == "relative_key":
        raise SpecError(f"lowrank: {block} has relative_key positions, whose embeddings all heads share, so the heads "
                        "cannot be rotated apart. Leave qk out of `kinds`.")


# ---- linear algebra, float64, heads in front ----


def root(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R and R^-1 with R^T R = gram (..., K, K), small eigenvalues lifted to FLOOR of the largest."""
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, np.maximum(FLOOR * values[..., -1:], 1e-30)) ** 0.5
    turned = np.swapaxes(vectors, -1, -2)
    return values[..., :, None] * turned, vectors / values[..., None, :]


def balance(ga: np.ndarray, gb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P_a, P_b (H, K, K) with P_a P_b^T = 1 and columns in the order of S (H, K); module docstring."""
    ra, inverse = root(ga)
    rb, _ = root(gb)
    u, s, _ = np.linalg.svd(ra @ np.swapaxes(rb, -1, -2))
    size = np.sqrt(np.maximum(s, np.maximum(FLOOR * s[..., :1], 1e-30)))[..., None, :]
    return inverse @ u * size, np.swapaxes(ra, -1, -2) @ u / size, s


def tails(squares: np.ndarray) -> np.ndarray:
    """(..., K) errors by dimension, falling -> (K + 1,) error when the first r are kept, summed over heads."""
    squares = squares.reshape(-1, squares.shape[-1]).sum(0)
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def keep(p: np.ndarray, r: int, dense: bool) -> np.ndarray:
    """The first r columns of p (..., K); dense: the others as zeros."""
    return np.where(np.arange(p.shape[-1]) < r, p, 0.0) if dense else p[..., :r]


# ---- attention ----


def _rows(params, name: str, heads: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight (H, K, D) and bias (H, K) of a projection, float64."""
    w = np.asarray(params[f"{name}.weight"], np.float64)
    b = params.get(f"{name}.bias")
    return w.reshape(heads, -1, w.shape[-1]), None if b is None else np.asarray(b, np.float64).reshape(heads, -1)


def _put(new: dict, old, name: str, value: np.ndarray) -> None:
    new[name] = np.asarray(value, np.asarray(old[name]).dtype)


def queries_keys(spec: Spec, params, block: str, m, centered: bool) -> Curve:
    names, heads = roles(spec, block), len(spec.attention(block).heads)
    relative = positions.kind(spec) == "relative" and kind(block) == "attention"
    (wq, bq), (wk, _) = (_rows(params, names[role], heads) for role in "qk")
    biases = [np.asarray(params[names[r]], np.float64) for r in ("bias_u", "bias_v")] if relative else []
    if m is None:
        ga, gb = (w @ np.swapaxes(w, -1, -2) for w in (wq, wk))
        if relative:
            wp = _rows(params, names["pos"], heads)[0]
            gb = gb + wp @ np.swapaxes(wp, -1, -2)
    else:
        ga = np.mean([shifted(m["q"], m["q_mean"], b) for b in biases], 0) if relative else m["q"]
        gb = m["k"] + (0.0 if centered else m["k_means"]) + (m["p"] if relative else 0.0)
    pa, pb, s = balance(ga, gb)
    scale = spec.attention(block).scale

    def cut(spec, params, r, dense=False):
        new, a, b = dict(params), keep(pa, r, dense), keep(pb, r, dense)
        turn = lambda p, w: (np.swapaxes(p, 1, 2) @ w).reshape(-1, w.shape[-1])  # noqa: E731
        _put(new, params, f"{names['q']}.weight", turn(a, wq))
        _put(new, params, f"{names['k']}.weight", turn(b, wk))
        if bq is not None:
            _put(new, params, f"{names['q']}.bias", np.einsum("hkr,hk->hr", a, bq).reshape(-1))
        if f"{names['k']}.bias" in params:
            _put(new, params, f"{names['k']}.bias", np.zeros(heads * a.shape[-1]))
        if relative:
            _put(new, params, f"{names['pos']}.weight", turn(b, _rows(params, names["pos"], heads)[0]))
            for role, bias in zip(("bias_u", "bias_v"), biases, strict=True):
                _put(new, params, names[role], np.einsum("hkr,hk->hr", a, bias))
        return spec if dense else spec.with_block(block, qk_dim=r, scale=scale), new

    return Curve(block, "qk", tails(s**2) * scale**2, cut)


def shifted(second: np.ndarray, mean: np.ndarray, by: np.ndarray) -> np.ndarray:
    """E[(q + b)(q + b)^T] from E[q q^T] (H, K, K) and E[q] (H, K)."""
    cross = mean[:, :, None] * by[:, None, :]
    return second + cross + np.swapaxes(cross, 1, 2) + by[:, :, None] * by[:, None, :]


def values_output(spec: Spec, params, block: str, m, centered: bool) -> Curve:
    names, heads = roles(spec, block), len(spec.attention(block).heads)
    (wv, bv), wo = _rows(params, names["v"], heads), np.asarray(params[f"{names['o']}.weight"], np.float64)
    wo = np.ascontiguousarray(wo.reshape(wo.shape[0], heads, -1).transpose(1, 0, 2))     # (H, D, V)
    folded = f"{names['o']}.bias" in params       # without an output bias a mean has nowhere to go
    mean = np.zeros(wv.shape[:2]) if m is None or not (folded and centered) else m["c_mean"]
    gb = wv @ np.swapaxes(wv, -1, -2) if m is None else m["c"] - mean[:, :, None] * mean[:, None, :]
    pa, pb, s = balance(np.swapaxes(wo, -1, -2) @ wo, gb)

    def cut(spec, params, r, dense=False):
        new, a, b = dict(params), keep(pa, r, dense), keep(pb, r, dense)
        _put(new, params, f"{names['v']}.weight", (np.swapaxes(b, 1, 2) @ wv).reshape(-1, wv.shape[-1]))
        _put(new, params, f"{names['o']}.weight", (wo @ a).transpose(1, 0, 2).reshape(wo.shape[1], -1))
        if folded:
            shift = mean - np.einsum("hkr,hjr,hj->hk", a, b, mean - (0.0 if bv is None else bv))
            new_bias = np.asarray(params[f"{names['o']}.bias"], np.float64) + np.einsum("hdk,hk->d", wo, shift)
            _put(new, params, f"{names['o']}.bias", new_bias)
        if bv is not None:
            _put(new, params, f"{names['v']}.bias",
                 np.zeros(heads * b.shape[-1]) if folded else np.einsum("hkr,hk->hr", b, bv).reshape(-1))
        return spec if dense else spec.with_block(block, v_dim=r), new

    return Curve(block, "vo", tails(s**2), cut)


# ---- one matrix ----


def linear(spec: Spec, params, block: str, role: str, m) -> Curve:
    """W (out, in) as up (out, r) down (r, in): whitened by the block's moments, or the plain SVD without."""
    name = roles(spec, block)[role]
    w, bias = np.asarray(params[f"{name}.weight"], np.float64), f"{name}.bias"
    gone = np.zeros(len(w))      # mean of W x: what of it is dropped goes to the bias
    if m is None:
        u, s, v = np.linalg.svd(w, full_matrices=False)
        up, down, squares = u * s**0.5, s[:, None] ** 0.5 * v, s**2
    elif role == "down":         # principal directions of the output
        values, up = (x[..., ::-1] for x in np.linalg.eigh(m["y"] - np.outer(m["y_mean"], m["y_mean"])))
        squares, down = np.maximum(values, 0.0), up.T @ w
        if bias in params:
            gone = m["y_mean"] - np.asarray(params[bias], np.float64)
    else:
        center = m["x_mean"] if bias in params else np.zeros(w.shape[1])
        r, inverse = root(m["x"] - np.outer(center, center))
        wide, gone = w @ r.T, w @ center                                                 # (F, D) on white inputs
        slope, square = m["slope"]
        second = np.asarray(params[f"{roles(spec, block)['down']}.weight"], np.float64)
        seen = (second * slope) @ wide                                                   # through the mean slope
        spread = np.maximum(square - slope**2, 0.0) * (second**2).sum(0)                 # and what varies of it
        values, v = (x[..., ::-1] for x in np.linalg.eigh(seen.T @ seen + wide.T @ (spread[:, None] * wide)))
        squares, up, down = np.maximum(values, 0.0), wide @ v, v.T @ inverse.T
    dropped = lambda r: gone - up[:, :r] @ (np.linalg.pinv(up[:, :r]) @ gone)  # noqa: E731
    if m is not None and role == "up":
        dropped = lambda r: gone - up[:, :r] @ (down[:r] @ m["x_mean"])  # noqa: E731
    size = np.sqrt(np.maximum(np.linalg.norm(down, axis=1), 1e-30) / np.maximum(np.linalg.norm(up, axis=0), 1e-30))

    def cut(spec, params, r, dense=False):
        new, old = dict(params), np.asarray(params[f"{name}.weight"])
        a, b = up[:, :r] * size[:r], down[:r] / size[:r, None]                           # similar ranges, for int8
        if dense:
            _put(new, params, f"{name}.weight", a @ b)
        else:
            del new[f"{name}.weight"]
            new |= {f"{name}.up.weight": a.astype(old.dtype), f"{name}.down.weight": b.astype(old.dtype)}
        if bias in params and m is not None:
            _put(new, params, bias, np.asarray(params[bias], np.float64) + dropped(r))
        return spec if dense else spec.with_block(block, **{f"{role}_rank": r}), new

    return Curve(block, role, tails(squares), cut)


# ---- neurons ----


def neurons(spec: Spec, params, block: str, m, ridge: float = 1e-6) -> Curve:
    """Neurons in the order of a greedy choice (a few at a time), each time those that explain most of the output's
    variance given the ones before; the second matrix is then fitted to the chosen ones."""
    names = roles(spec, block)
    w = np.asarray(params[f"{names['down']}.weight"], np.float64)                        # (D, F)
    bias = f"{names['down']}.bias"
    mean = m["h_mean"] if bias in params else np.zeros(w.shape[1])
    cov = m["h"] - np.outer(mean, mean)
    cov = cov + ridge * max(np.trace(cov) / len(cov), 1e-30) * np.eye(len(cov))
    order, tail = pivots(w, cov)

    def cut(spec, params, r, dense=False):
        new, chosen = dict(params), np.sort(order[:r])
        fitted = np.linalg.solve(cov[np.ix_(chosen, chosen)], cov[chosen] @ w.T).T       # (D, r)
        if dense:
            full = np.zeros_like(w)
            full[:, chosen] = fitted
            _put(new, params, f"{names['down']}.weight", full)
        else:
            _put(new, params, f"{names['down']}.weight", fitted)
            for part in ("weight", "bias"):
                if (key := f"{names['up']}.{part}") in params:
                    new[key] = np.asarray(params[key])[chosen]
        if bias in params:
            _put(new, params, bias, np.asarray(params[bias], np.float64) + w @ mean - fitted @ mean[chosen])
        return spec if dense else spec.with_block(block, units=r), new

    return Curve(block, "units", tail, cut)


def pivots(w: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the F neurons, and the error E|W (h - its best fit from the first r)|^2 for r = 0 .. F.

    w (D, F), cov (F, F). F / 128 neurons are taken at a time, so that the work is matrix products."""
    left, seen, free = cov.copy(), w @ cov, np.arange(len(cov))    # of the neurons not chosen yet: (f, f), (D, f), (f,)
    errors, order, step, diagonal = [float(np.sum(seen * w))], [], max(1, len(cov) // 128), np.diag(cov)
    while free.size:
        now = np.diag(left)
        gain = np.where(now > 1e-12 * diagonal[free], (seen**2).sum(0) / np.maximum(now, 1e-30), -1.0)
        picked = np.argsort(-gain, kind="stable")[:step]
        values, vectors = np.linalg.eigh(left[np.ix_(picked, picked)])
        sure = values > 1e-10 * max(values[-1], 1e-30)                                   # two of them may be the same
        whiten = (vectors[:, sure] / np.sqrt(values[sure])).T
        rest = np.setdiff1d(np.arange(len(free)), picked)
        columns, explained = whiten @ left[np.ix_(picked, rest)], whiten @ seen[:, picked].T   # (b, f'), (b, D)
        gone = (explained**2).sum() / len(picked)
        errors += [max(errors[-1] - gone * (i + 1), 0.0) for i in range(len(picked))]
        order += free[picked].tolist()
        left = left[np.ix_(rest, rest)] - columns.T @ columns
        seen, free = seen[:, rest] - explained.T @ columns, free[rest]
    return np.array(order), np.array([*errors[:-1], 0.0])
