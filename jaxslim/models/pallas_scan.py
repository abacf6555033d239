"""Pallas kernels for TPU: Mamba-2's SSD and causal linear attention, forward and backward, one program for both.

    s_t = exp(g_t) s_{t-1} + w_t x_t k_t^T,    y_t = s_t q_t                (per head; x, y: P wide, q, k: N wide)

SSD has g = dt A, w = dt, k = b, q = c; linear attention has g = 0, w = 1, x = v. The sums are those of scan.ssd, in
chunks of Q frames; what a kernel saves is traffic: the Q x Q scores and decays of a chunk and the state between chunks
stay in VMEM, so that every input is read once and every output written once. A program works on some groups with all
their heads, as many as fill whole lanes; the last grid axis walks over the chunks in order and carries the state. The
backward pass walks back with the gradient of the state, from the states that the forward pass leaves per chunk.

In interpret mode the same code runs on a CPU, which is how it is tested. It has run on no TPU yet: the TPU compiler
has compiled it (scripts/kernels_tpu.py).
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxslim.models import scan

LANES, MIB = 128, 2.0**20
VMEM = 14 * MIB          # that a program may use of the 16 MiB that the compiler gives to one by default
CHUNKS = (128, 64)       # frames of a chunk, the larger one where it fits


class Shape(NamedTuple):
    """Static sizes: B rows, T frames (padded), H heads in G groups, P and N as above, Q frames a chunk, J groups in a
    program."""

    rows: int
    frames: int
    heads: int
    groups: int
    size: int
    width: int
    chunk: int
    together: int

    @property
    def each(self) -> int:                                               # heads of a group
        return self.heads // self.groups

    @property
    def inside(self) -> int:                                             # heads of a program
        return self.together * self.each

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.rows, self.groups // self.together, self.frames // self.chunk

    def vmem(self, backward: bool = True) -> int:
        """Bytes of VMEM: blocks twice (one is worked on, one is on its way), fp32, lanes filled up; scratch once."""
        up = lambda n: -(-n // LANES) * LANES  # noqa: E731
        wide, narrow, few = (4 * self.chunk * up(n) for n in (
            self.inside * self.size, self.together * self.width, self.inside))
        state = 4 * self.inside * (-(-self.size // 8) * 8) * up(self.width)
        blocks = 3 * wide + 4 * narrow + 4 * few if backward else 2 * wide + 2 * narrow + 2 * few
        blocks += 3 * state
        return 2 * blocks + state + 6 * 4 * self.chunk * up(self.chunk)

    def macs(self, backward: bool = False) -> int:
        """Multiply-accumulates, forward or backward."""
        q, p, n = self.chunk, self.size, self.width
        one = (self.groups * q * n + self.heads * (q * p + 2 * p * n)) * self.frames * self.rows
        back = (self.groups * q * n + self.heads * (2 * q * p + 2 * q * n + 5 * p * n)) * self.frames * self.rows
        return back if backward else one

    def traffic(self, itemsize: int = 4, backward: bool = False, save: bool = False) -> int:
        """Bytes read and written, each array once."""
        frames = self.rows * self.frames
        wide, narrow, few = frames * self.heads * self.size, frames * self.groups * self.width, frames * self.heads
        state = self.rows * self.heads * self.size * self.width
        kept = state * self.grid[2]
        if backward:
            return itemsize * (2 * wide + 4 * narrow) + 4 * (wide + 4 * few + kept + 2 * state)
        return itemsize * (wide + 2 * narrow) + 4 * (wide + 2 * few + 2 * state + save * kept)


def shape(rows: int, frames: int, heads: int, groups: int, size: int, width: int, kind: type = Shape) -> Shape | str:
    """How a problem is cut, or why it cannot be."""
    whole = lambda j: j == groups or (j * width % LANES == 0 and j * heads // groups * size % LANES == 0)  # noqa: E731
    together = next(j for j in range(1, groups + 1) if groups % j == 0 and whole(j))
    need = 0
    for chunk in CHUNKS:
        s = kind(rows, -(-frames // chunk) * chunk, heads, groups, size, width, chunk, together)
        if (need := s.vmem()) <= VMEM:
            return s
    return (f"{s.inside} heads of {size} x {width} together need {need / MIB:.0f} MiB of VMEM, more than "
            f"{VMEM / MIB:.0f}")


def ssd(x, dt, a, b, c, state=None, *, cut, interpret: bool = False, run=None):
    """scan.ssd by the kernel; `cut` from `shape`; `run`: another recurrence with its own shape (pallas_gpu)."""
    sizes, (dt, x, b, c) = x.shape, (padded(v, cut) for v in (dt.astype(jnp.float32), x, b, c))
    total = jnp.cumsum(scan.chunks(dt * a, cut.chunk), 2).reshape(dt.shape)
    state = jnp.zeros((cut.rows, cut.heads, cut.size, cut.width)) if state is None else state
    y, last = (run or recurrence)(cut, interpret, x, dt, total, b, c, state.astype(jnp.float32))
    return y[:, : sizes[1]].reshape(sizes), last


def causal(q, k, v, state=None, *, cut, interpret: bool = False, run=None):
    """scan.causal by the kernel: no decay, weights of 1 (frames that complete the last chunk have k = 0)."""
    sizes, (q, k, v) = v.shape, (padded(x, cut) for x in (q, k, v))
    none = jnp.zeros((cut.rows, cut.frames, cut.heads), jnp.float32)
    state = jnp.zeros((cut.rows, cut.heads, cut.size, cut.width)) if state is None else jnp.swapaxes(state, 2, 3)
    y, last = (run or recurrence)(cut, interpret, v, none + 1.0, none, k, q, state.astype(jnp.float32))
    return y[:, : sizes[1]].reshape(sizes), jnp.swapaxes(last, 2, 3)


def padded(x, cut):
    """(B, t, ...) -> (B, T, all the rest): side by side, as they come out of a projection, before any copy is made."""
    x = x.reshape(*x.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, cut.frames - x.shape[1]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(cut: Shape, interpret: bool, x, w, total, k, q, state):
    """x (B, T, H P), w and total (the sum of g inside its chunk) (B, T, H), k and q (B, T, G N), state (B, H, P, N) ->
    y (B, T, H P) fp32, the last state."""
    return _forward(cut, interpret, x, w, total, k, q, state, save=False)[:2]


def _forward(cut: Shape, interpret: bool, x, w, total, k, q, state, save: bool):
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    blocks = specs(cut, lambda c: c)
    outs = [f32((cut.rows, cut.frames, cut.heads * cut.size)), f32(state.shape)]
    outs += [f32((cut.rows, cut.grid[2], *state.shape[1:]))] if save else []
    y, last, *kept = pl.pallas_call(
        functools.partial(_forward_kernel, cut, save), out_shape=outs, grid=cut.grid,
        in_specs=[blocks[n] for n in ("x", "w", "w", "k", "k", "state")],
        out_specs=[blocks[n] for n in ("x", "state", "kept")[: len(outs)]],
        scratch_shapes=[pltpu.VMEM((cut.inside, cut.size, cut.width), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=2 * cut.macs(), bytes_accessed=cut.traffic(x.dtype.itemsize, save=save),
                                      transcendentals=cut.rows * cut.frames * cut.heads * (cut.chunk + 2)),
        interpret=interpret, name="jaxslim_recurrence", **compiler(interpret),
    )(x, _few(w, cut), _few(total, cut), k, q, state)
    return y, last, (kept[0] if save else None)


def _save(cut, interpret, x, w, total, k, q, state):
    y, last, kept = _forward(cut, interpret, x, w, total, k, q, state, save=True)
    return (y, last), (x, w, total, k, q, kept)


def _backward(cut: Shape, interpret: bool, saved, grads):
    x, w, total, k, q, kept = saved
    dy, dlast = (g.astype(jnp.float32) for g in grads)
    blocks = specs(cut, lambda c: cut.grid[2] - 1 - c)
    like = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)  # noqa: E731
    few = _few(w, cut)
    dx, dw, dtotal, dk, dq, dstate = pl.pallas_call(
        functools.partial(_backward_kernel, cut), grid=cut.grid,
        out_shape=[like(x), like(few), like(few), like(k), like(q), like(dlast)],
        in_specs=[blocks[n] for n in ("x", "w", "w", "k", "k", "kept", "x", "state")],
        out_specs=[blocks[n] for n in ("x", "w", "w", "k", "k", "state")],
        scratch_shapes=[pltpu.VMEM((cut.inside, cut.size, cut.width), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=2 * cut.macs(True), bytes_accessed=cut.traffic(x.dtype.itemsize, True),
                                      transcendentals=cut.rows * cut.frames * cut.heads * (cut.chunk + 2)),
        interpret=interpret, name="jaxslim_recurrence_gradient", **compiler(interpret),
    )(x, few, _few(total, cut), k, q, kept, dy, dlast)
    many = lambda v: v.transpose(0, 2, 1, 3).reshape(w.shape)  # noqa: E731
    return dx, many(dw), many(dtotal), dk, dq, dstate


recurrence.defvjp(_save, _backward)


def compiler(interpret: bool) -> dict:
    order = ("parallel", "parallel", "arbitrary")
    return {} if interpret else {"compiler_params": pltpu.CompilerParams(dimension_semantics=order)}


def _few(w, cut: Shape):                                                 # (B, T, H) -> (B, programs, T, heads of one)
    return w.astype(jnp.float32).reshape(*w.shape[:2], -1, cut.inside).transpose(0, 2, 1, 3)


def specs(cut: Shape, place) -> dict[str, pl.BlockSpec]:
    """Blocks of a program (b, j, c); `place` says which chunk is the c-th."""
    at = lambda b, j, c: (b, place(c), j)  # noqa: E731
    return {"x": pl.BlockSpec((1, cut.chunk, cut.inside * cut.size), at),
            "k": pl.BlockSpec((1, cut.chunk, cut.together * cut.width), at),
            "w": pl.BlockSpec((1, 1, cut.chunk, cut.inside), lambda b, j, c: (b, j, place(c), 0)),
            "state": pl.BlockSpec((1, cut.inside, cut.size, cut.width), lambda b, j, c: (b, j, 0, 0)),
            "kept": pl.BlockSpec((1, 1, cut.inside, cut.size, cut.width), lambda b, j, c: (b, place(c), j, 0, 0))}


def _dot(a, b, over):
    """Product over axes `over` = (of a, of b), fp32."""
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _squares(size: int):
    """Row and column numbers of a (Q, Q) tile, compared: lower triangle, diagonal."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row >= column, row == column


def _turn(v, diagonal, axis: int):
    """(Q, 1) -> (1, Q) with axis 0, back with axis 1: a transposition that the vector unit does by a sum."""
    return jnp.sum(jnp.where(diagonal, v, 0.0), axis, keepdims=True)


def decays(w, total, end, lower, diagonal):
    """Of one head, from w and total (Q, 1) and the last of total (1, 1): decay from j to i (Q, Q), the same times w_j,
    exp of the decay up to i and from i to the end (Q, 1)."""
    decay = jnp.exp(jnp.where(lower, total - _turn(total, diagonal, 0), -1e30))
    return decay, decay * _turn(w, diagonal, 0), jnp.exp(total), jnp.exp(end - total)


def gradients(x, w, decay, weights, up, down, k, q, products, s, ds, dy, diagonal, dot):
    """Of one head and chunk, from the state before s, the gradients of the state behind ds (P, N) and of y (Q, P): of
    x, w, total but for the state's share at the last frame, k, q; and what w's gradient has of the state (Q, 1)."""
    dscores = dot(dy, x, (1, 1))                                                                     # (Q, Q)
    change = dscores * weights                                                                       # of the products
    dq = dot(change, k, (1, 0)) + up * dot(dy, s, (1, 0))
    dk = dot(change, q, (0, 0)) + down * w * dot(x, ds, (1, 0))
    written = dot(k, ds, (1, 1))                                                                     # (Q, P)
    dx = dot(products * weights, dy, (0, 0)) + down * w * written
    gain = down * jnp.sum(x * written, 1, keepdims=True)                                             # (Q, 1)
    column = _turn(jnp.sum(dscores * products * decay, 0, keepdims=True), diagonal, 1)               # (Q, 1) over j
    read = up * jnp.sum(dot(q, s, (1, 1)) * dy, 1, keepdims=True)
    dtotal = jnp.sum(change * products, 1, keepdims=True) - w * column + read - w * gain
    return dx, column + gain, dtotal, dk, dq, gain


def _head(cut: Shape, h: int, x_ref, w_ref, total_ref, lower, diagonal):
    """Of one head: x (Q, P), w (Q, 1), `decays`, the decay over the chunk."""
    x = x_ref[0, :, h * cut.size : (h + 1) * cut.size].astype(jnp.float32)
    w, total = w_ref[0, 0, :, h : h + 1], total_ref[0, 0, :, h : h + 1]                              # (Q, 1)
    end = total_ref[0, 0, cut.chunk - 1 : cut.chunk, h : h + 1]                                      # (1, 1)
    return x, w, *decays(w, total, end, lower, diagonal), jnp.exp(end)


def _forward_kernel(cut: Shape, save: bool, x_ref, w_ref, total_ref, k_ref, q_ref, first_ref, y_ref, last_ref, *refs):
    state, chunk = refs[-1], pl.program_id(2)
    lower, diagonal = _squares(cut.chunk)

    @pl.when(chunk == 0)
    def _():
        state[...] = first_ref[0]

    if save:
        refs[0][0, 0] = state[...]
    for j in range(cut.together):
        k, q = (ref[0, :, j * cut.width : (j + 1) * cut.width].astype(jnp.float32) for ref in (k_ref, q_ref))
        products = _dot(q, k, (1, 1))                                                                # (Q, Q)
        for h in range(j * cut.each, (j + 1) * cut.each):
            x, w, _, weights, up, down, whole = _head(cut, h, x_ref, w_ref, total_ref, lower, diagonal)
            s = state[h]                                                                             # (P, N)
            y_ref[0, :, h * cut.size : (h + 1) * cut.size] = (
                _dot(products * weights, x, (1, 0)) + up * _dot(q, s, (1, 1)))
            state[h] = whole * s + _dot(x * (down * w), k, (0, 0))

    @pl.when(chunk == cut.grid[2] - 1)
    def _():
        last_ref[0] = state[...]


def _backward_kernel(cut: Shape, x_ref, w_ref, total_ref, k_ref, q_ref, kept_ref, dy_ref, dlast_ref,
                     dx_ref, dw_ref, dtotal_ref, dk_ref, dq_ref, dfirst_ref, carry):
    chunk = pl.program_id(2)
    lower, diagonal = _squares(cut.chunk)
    final = jax.lax.broadcasted_iota(jnp.int32, (cut.chunk, 1), 0) == cut.chunk - 1

    @pl.when(chunk == 0)
    def _():
        carry[...] = dlast_ref[0]

    for j in range(cut.together):
        lanes = slice(j * cut.width, (j + 1) * cut.width)
        k, q = (ref[0, :, lanes].astype(jnp.float32) for ref in (k_ref, q_ref))
        products, dk, dq = _dot(q, k, (1, 1)), jnp.zeros_like(k), jnp.zeros_like(q)
        for h in range(j * cut.each, (j + 1) * cut.each):
            mine = slice(h * cut.size, (h + 1) * cut.size)
            x, w, decay, weights, up, down, whole = _head(cut, h, x_ref, w_ref, total_ref, lower, diagonal)
            dy, s, ds = dy_ref[0, :, mine], kept_ref[0, 0, h], carry[h]
            dx, dw, dtotal, dk_h, dq_h, gain = gradients(x, w, decay, weights, up, down, k, q, products, s, ds, dy,
                                                         diagonal, _dot)
            dk, dq = dk + dk_h, dq + dq_h
            dx_ref[0, :, mine], dw_ref[0, 0, :, h : h + 1] = dx.astype(dx_ref.dtype), dw
            kept = jnp.sum(w * gain, keepdims=True) + whole * jnp.sum(s * ds, keepdims=True)
            dtotal_ref[0, 0, :, h : h + 1] = dtotal + jnp.where(final, kept, 0.0)
            carry[h] = whole * ds + _dot(up * dy, q, (0, 0))
        dk_ref[0, :, lanes], dq_ref[0, :, lanes] = dk.astype(dk_ref.dtype), dq.astype(dq_ref.dtype)

    @pl.when(chunk == cut.grid[2] - 1)
    def _():
        dfirst_ref[0] = carry[...]
