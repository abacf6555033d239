"""Pallas kernels for NVIDIA GPUs (by Triton): SSD, causal linear attention and gated linear attention, both directions.

The sums of a chunk of Q frames are those of pallas_scan.py and pallas_gla.py, whose functions are used. But a GPU runs
the programs of a grid in any order, so no state can be handed from one to the next: the states between chunks come from
XLA (their sums are plain products, their recurrence is elementwise), and a kernel does what XLA would write out, the
Q x Q products and decays. Every program is one head of one chunk: B n H of them, all at once, also for gradients.

Products of fp32 inputs are in full fp32, those of bfloat16 inputs in TF32, which holds them exactly. In interpret mode
the same code runs on a CPU, which is how it is tested; the tests also lower it to Triton. It has run on no GPU yet.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxslim.models import pallas_gla, pallas_scan
from jaxslim.models.pallas_gla import Shape

SIZES = (16, 32, 64, 128)   # of P and N: powers of two, as all blocks of Triton; its products begin at 16


def shape(op: str, rows: int, frames: int, heads: int, groups: int, size: int, width: int) -> Shape | str:
    """How a problem of scan.ssd, scan.causal or scan.gla is cut, or why it cannot be. Chunks are of 64 frames where the
    gradients' program stays within a Hopper SM's shared memory and spills little, as compiled by Triton, else of 32."""
    if size not in SIZES or width not in SIZES:
        return f"heads of {size} x {width}; both must be {', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}"
    chunk = 64 if op != "gla" and size * width <= 64 * 64 else 32
    return Shape(rows, -(-frames // chunk) * chunk, heads, groups, size, width, chunk, together=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(cut: Shape, interpret: bool, x, w, total, k, q, state):
    """pallas_scan.recurrence: x (B, T, H P), w and total (the sum of g inside its chunk) (B, T, H), k, q (B, T, G N),
    state (B, H, P, N) -> y (B, T, H P) fp32, the last state."""
    return _save(cut, interpret, x, w, total, k, q, state)[0]


def _save(cut, interpret, x, w, total, k, q, state):
    before, last = _states(*_step(cut, x, w, total, k), state)
    y, = _call(cut, interpret, _scan_outputs, "y", ("x", "w", "w", "k", "k", "s"), ("x",), x, w, total, k, q, before)
    return (y, last), (x, w, total, k, q, before, last)


def _backward(cut: Shape, interpret: bool, saved, grads):
    x, w, total, k, q, before, last = saved
    dy, dlast = (g.astype(jnp.float32) for g in grads)
    reads = _many(cut, q, cut.groups), jnp.exp(_many(cut, total, cut.heads))                         # up
    local = jnp.einsum("bnihp,bnihs->bnhps", _many(cut, dy, cut.heads) * reads[1], _heads(cut, reads[0]))
    behind, dstate = _states(_step(cut, x, w, total, k)[0], local, dlast, reverse=True)
    dx, dw, dtotal, dk, dq = _call(
        cut, interpret, _scan_gradients, "gradient", ("x", "w", "w", "k", "k", "s", "s", "x"),
        ("x", "w", "w", "n", "n"), x, w, total, k, q, before, behind, dy)
    kept = (_after(before, last) * behind).sum((-2, -1))                                             # (B, n, H)
    dtotal = dtotal.reshape(cut.rows, -1, cut.chunk, cut.heads).at[:, :, -1].add(kept).reshape(total.shape)
    dk, dq = (_shared(cut, g).astype(v.dtype) for g, v in ((dk, k), (dq, q)))
    return dx.astype(x.dtype), dw, dtotal, dk, dq, dstate


recurrence.defvjp(_save, _backward)
ssd = functools.partial(pallas_scan.ssd, run=recurrence)
causal = functools.partial(pallas_scan.causal, run=recurrence)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated(cut: Shape, interpret: bool, q, k, v, g, state):
    """pallas_gla.recurrence: q, k, g (B, T, H N), v (B, T, H P), state (B, H, P, N) -> y (B, T, H P) fp32, the last
    state."""
    return _gated_save(cut, interpret, q, k, v, g, state)[0]


def _gated_save(cut, interpret, q, k, v, g, state):
    g_, k_, v_ = (_many(cut, x, cut.heads) for x in (g, k, v))
    up, down = _both(g_)
    added = jnp.einsum("bnihp,bnihs->bnhps", v_, k_ * down)
    before, last = _states(up[:, :, -1, :, None], added, state)
    y, = _call(cut, interpret, _gated_outputs, "gla", ("n", "n", "x", "n", "s"), ("x",), q, k, v, g, before)
    return (y, last), (q, k, v, g, before, last)


def _gated_backward(cut: Shape, interpret: bool, saved, grads):
    q, k, v, g, before, last = saved
    dy, dlast = (x.astype(jnp.float32) for x in grads)
    up, _ = _both(_many(cut, g, cut.heads))
    local = jnp.einsum("bnihp,bnihs->bnhps", _many(cut, dy, cut.heads), up * _many(cut, q, cut.heads))
    behind, dstate = _states(up[:, :, -1, :, None], local, dlast, reverse=True)
    dq, dk, dv, dg = _call(cut, interpret, _gated_gradients, "gla_gradient", ("n", "n", "x", "n", "s", "s", "x"),
                           ("n", "n", "x", "n"), q, k, v, g, before, behind, dy)
    kept = (_after(before, last) * behind).sum(-2)[:, :, None]                                       # (B, n, 1, H, N)
    dg = (_many(cut, dg, cut.heads) + kept).reshape(g.shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dg, dstate


gated.defvjp(_gated_save, _gated_backward)
gla = functools.partial(pallas_gla.gla, run=gated)


# ---- states between chunks, by XLA ----

def _many(cut: Shape, x, parts: int):
    """(B, T, parts S) -> (B, n, Q, parts, S) fp32."""
    return x.astype(jnp.float32).reshape(cut.rows, -1, cut.chunk, parts, x.shape[-1] // parts)


def _heads(cut: Shape, x):                                               # (..., G, N) -> (..., H, N)
    return jnp.repeat(x, cut.each, -2)


def _shared(cut: Shape, x):                                              # (B, T, H N) -> (B, T, G N), summed
    return x.reshape(*x.shape[:2], cut.groups, cut.each, cut.width).sum(3).reshape(*x.shape[:2], -1)


def _step(cut: Shape, x, w, total, k):
    """Of every chunk the decay (B, n, H, 1, 1) and what it adds to the state (B, n, H, P, N)."""
    total, w = _many(cut, total, cut.heads), _many(cut, w, cut.heads)                                # (B, n, Q, H, 1)
    end = total[:, :, -1:]
    added = jnp.einsum("bnihp,bnihs->bnhps", _many(cut, x, cut.heads) * (w * jnp.exp(end - total)),
                       _heads(cut, _many(cut, k, cut.groups)))
    return jnp.exp(end[:, :, 0])[..., None], added


def _both(g):
    """Decays up to each frame of a chunk and from it to the end, (B, n, Q, H, N)."""
    after = jnp.flip(jnp.cumsum(jnp.flip(g, 2), 2), 2) - g
    return jnp.exp(jnp.cumsum(g, 2)), jnp.exp(after)


def _states(kept, added, state, reverse: bool = False):
    """s = kept s + added over chunks: s before each (B, n, H, P, N) and the last one; `reverse`: from the end."""
    turned = tuple(jnp.moveaxis(x, 1, 0) for x in (kept, added))
    last, before = jax.lax.scan(lambda s, now: (now[0] * s + now[1], s), state, turned, reverse=reverse)
    return jnp.moveaxis(before, 0, 1), last


def _after(before, last):
    return jnp.concatenate([before[:, 1:], last[:, None]], 1)


# ---- kernels: a program is a head of a chunk ----

def _call(cut: Shape, interpret: bool, kernel, name: str, takes, gives, *args):
    """`takes`, `gives`: of every array what it is. x: P of the head, n: N of the head, k: N of its group, w: one
    number, s: a state."""
    here = lambda b, h, c: (b, c, h)  # noqa: E731
    frames = {"x": (cut.size, here), "n": (cut.width, here), "w": (1, here),
              "k": (cut.width, lambda b, h, c: (b, c, h // cut.each))}
    specs = {n: pl.BlockSpec((None, cut.chunk, size), place) for n, (size, place) in frames.items()}
    specs["s"] = pl.BlockSpec((None, None, None, cut.size, cut.width), lambda b, h, c: (b, c, h, 0, 0))
    out = [jax.ShapeDtypeStruct((cut.rows, cut.frames, cut.heads * frames[n][0]), jnp.float32) for n in gives]
    more = {} if interpret else {"compiler_params": triton.CompilerParams(
        num_warps=4 if cut.size * cut.width < 64 * 64 or cut.chunk < 64 else 8, num_stages=1)}
    return pl.pallas_call(functools.partial(kernel, cut), out_shape=out, interpret=interpret, name=f"jaxslim_{name}",
                          grid=(cut.rows, cut.heads, cut.frames // cut.chunk),
                          in_specs=[specs[n] for n in takes], out_specs=[specs[n] for n in gives], **more)(*args)


def _read(*refs):
    return (ref[...].astype(jnp.float32) for ref in refs)


def _products(*refs):
    """(dot, sums) of pallas_gla for inputs of the dtype of these."""
    exact = all(ref.dtype == jnp.float32 for ref in refs)
    how = None if exact else jax.lax.DotAlgorithmPreset.TF32_TF32_F32

    def dot(a, b, over):
        return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision=how,
                                   preferred_element_type=jnp.float32)

    return dot, lambda chosen, g: dot(jnp.where(chosen, 1.0, 0.0), g, (1, 0))


def _decays(cut: Shape, w, total):
    lower, diagonal = pallas_scan._squares(cut.chunk)
    final = jax.lax.broadcasted_iota(jnp.int32, (cut.chunk, 1), 0) == cut.chunk - 1
    end = jnp.sum(jnp.where(final, total, 0.0), 0, keepdims=True)                                    # (1, 1)
    return *pallas_scan.decays(w, total, end, lower, diagonal), diagonal


def _scan_outputs(cut: Shape, x_ref, w_ref, total_ref, k_ref, q_ref, s_ref, y_ref):
    x, w, total, k, q, s = _read(x_ref, w_ref, total_ref, k_ref, q_ref, s_ref)
    dot, _ = _products(x_ref, k_ref, q_ref)
    _, weights, up, _, _ = _decays(cut, w, total)
    y_ref[...] = dot(dot(q, k, (1, 1)) * weights, x, (1, 0)) + up * dot(q, s, (1, 1))


def _scan_gradients(cut: Shape, x_ref, w_ref, total_ref, k_ref, q_ref, s_ref, ds_ref, dy_ref, *out):
    x, w, total, k, q, s, ds, dy = _read(x_ref, w_ref, total_ref, k_ref, q_ref, s_ref, ds_ref, dy_ref)
    dot, _ = _products(x_ref, k_ref, q_ref)
    decay, weights, up, down, diagonal = _decays(cut, w, total)
    *grads, _ = pallas_scan.gradients(x, w, decay, weights, up, down, k, q, dot(q, k, (1, 1)), s, ds, dy, diagonal, dot)
    for ref, grad in zip(out, grads):
        ref[...] = grad


def _places(cut: Shape):
    return (jax.lax.broadcasted_iota(jnp.int32, (cut.chunk,) * 2, axis) for axis in (0, 1))


def _gated_outputs(cut: Shape, q_ref, k_ref, v_ref, g_ref, s_ref, y_ref):
    y_ref[...], _ = pallas_gla.outputs(cut, *_read(q_ref, k_ref, v_ref, g_ref, s_ref), *_places(cut),
                                       *_products(q_ref, k_ref, v_ref))


def _gated_gradients(cut: Shape, q_ref, k_ref, v_ref, g_ref, s_ref, ds_ref, dy_ref, *out):
    *grads, _, _ = pallas_gla.gradients(cut, *_read(q_ref, k_ref, v_ref, g_ref, s_ref, ds_ref, dy_ref), *_places(cut),
                                        *_products(q_ref, k_ref, v_ref))
    for ref, grad in zip(out, grads):
        ref[...] = grad
