"""Pallas kernel for TPU: gated linear attention (scan.gla), forward and backward.

    s_t = diag(exp(g_t)) s_{t-1} + k_t v_t^T,    y_t = s_t^T q_t            (per head; v, y: P wide, q, k, g: N wide)

Chunks, grid, states and heads of a program are those of pallas_scan.py; states are kept as (P, N). The products of a
chunk are made by halving, as in scan.decayed_products, but with whole matrices, which is what the matrix unit likes: of
every halving, queries of later halves and keys of earlier ones, each with its decay from or to the middle, stand in one
(Q, N) matrix x, and x x^T has the products of all pairs that meet at this halving. So decays are exp of sums of numbers
<= 0, made by one product of g with zeros and ones.

The gradient of g needs no such products (arXiv 2312.06635, section 4.3): what q_i k_j adds to the loss falls to all g
between j and i, so q dq - k dk, summed from the end, is its gradient; here a chunk at a time, with the state's share
for what lies behind the chunk, and without the pairs i = j, so that no long sums cancel.

In interpret mode the same code runs on a CPU, which is how it is tested. It has run on no TPU yet.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxslim.models import pallas_scan
from jaxslim.models.pallas_scan import LANES, _dot

FLOOR = -80.0   # of g: exp of it is nothing beside 1 in fp32, and zero times it is zero, unlike -inf


class Shape(pallas_scan.Shape):
    """As there, with g beside q and k: groups and heads are the same."""

    def vmem(self, backward: bool = True) -> int:
        up = lambda n: -(-n // LANES) * LANES  # noqa: E731
        wide, narrow = (4 * self.chunk * up(self.inside * n) for n in (self.size, self.width))
        state = 4 * self.inside * (-(-self.size // 8) * 8) * up(self.width)
        blocks = 3 * wide + 6 * narrow if backward else 2 * wide + 3 * narrow
        scratch = 6 * 4 * self.chunk * up(self.chunk) + 10 * 4 * self.chunk * up(self.width)
        return 2 * (blocks + 3 * state) + state + scratch

    @property
    def levels(self) -> int:                                             # halvings of a chunk
        return self.chunk.bit_length() - 1

    def macs(self, backward: bool = False) -> int:
        q, p, n, levels = self.chunk, self.size, self.width, self.levels
        one = (3 * levels + 3) * q * n + 3 * q * p + 5 * p * n if backward else (
            2 * levels + 2) * q * n + q * p + 2 * p * n
        return one * self.frames * self.rows * self.heads

    def traffic(self, itemsize: int = 4, backward: bool = False, save: bool = False) -> int:
        frames = self.rows * self.frames * self.heads
        wide, narrow = frames * self.size, frames * self.width
        state = self.rows * self.heads * self.size * self.width
        kept = state * self.grid[2]
        if backward:
            return itemsize * (2 * wide + 4 * narrow) + 4 * (wide + 2 * narrow + kept + 2 * state)
        return itemsize * (wide + 2 * narrow) + 4 * (wide + narrow + 2 * state + save * kept)

    def exponentials(self) -> int:
        return self.rows * self.frames * self.heads * self.width * (self.levels + 2)


shape = functools.partial(pallas_scan.shape, kind=Shape)


def gla(q, k, v, g, state=None, *, cut, interpret: bool = False, run=None):
    """scan.gla by the kernel; `cut` from `shape`; `run`: another recurrence with its own shape (pallas_gpu)."""
    sizes, (q, k, v, g) = v.shape, (pallas_scan.padded(x, cut) for x in (q, k, v, jnp.maximum(g, FLOOR)))
    state = jnp.zeros((cut.rows, cut.heads, cut.size, cut.width)) if state is None else jnp.swapaxes(state, 2, 3)
    y, last = (run or recurrence)(cut, interpret, q, k, v, g.astype(jnp.float32), state.astype(jnp.float32))
    return y[:, : sizes[1]].reshape(sizes), jnp.swapaxes(last, 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(cut: Shape, interpret: bool, q, k, v, g, state):
    """q, k, g (B, T, H N), v (B, T, H P), state (B, H, P, N) -> y (B, T, H P) fp32, the last state."""
    return _forward(cut, interpret, q, k, v, g, state, save=False)[:2]


def _forward(cut: Shape, interpret: bool, q, k, v, g, state, save: bool):
    f32, specs = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), pallas_scan.specs(cut, lambda c: c)
    outs = [f32(v.shape), f32(state.shape)] + [f32((cut.rows, cut.grid[2], *state.shape[1:]))] * save
    y, last, *kept = pl.pallas_call(
        functools.partial(_forward_kernel, cut, save), out_shape=outs, grid=cut.grid,
        in_specs=[specs[n] for n in ("k", "k", "x", "k", "state")],
        out_specs=[specs[n] for n in ("x", "state", "kept")[: len(outs)]],
        scratch_shapes=[pltpu.VMEM((cut.inside, cut.size, cut.width), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=2 * cut.macs(), bytes_accessed=cut.traffic(v.dtype.itemsize, save=save),
                                      transcendentals=cut.exponentials()),
        interpret=interpret, name="jaxslim_gla", **pallas_scan.compiler(interpret))(q, k, v, g, state)
    return y, last, (kept[0] if save else None)


def _save(cut, interpret, q, k, v, g, state):
    y, last, kept = _forward(cut, interpret, q, k, v, g, state, save=True)
    return (y, last), (q, k, v, g, kept)


def _backward(cut: Shape, interpret: bool, saved, grads):
    q, k, v, g, kept = saved
    dy, dlast = (x.astype(jnp.float32) for x in grads)
    specs = pallas_scan.specs(cut, lambda c: cut.grid[2] - 1 - c)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    return pl.pallas_call(
        functools.partial(_backward_kernel, cut), out_shape=tuple(map(like, (q, k, v, g, dlast))), grid=cut.grid,
        in_specs=[specs[n] for n in ("k", "k", "x", "k", "kept", "x", "state")],
        out_specs=tuple(specs[n] for n in ("k", "k", "x", "k", "state")),
        scratch_shapes=[pltpu.VMEM((cut.inside, cut.size, cut.width), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=2 * cut.macs(True), bytes_accessed=cut.traffic(v.dtype.itemsize, True),
                                      transcendentals=cut.exponentials()),
        interpret=interpret, name="jaxslim_gla_gradient", **pallas_scan.compiler(interpret),
    )(q, k, v, g, kept, dy, dlast)


recurrence.defvjp(_save, _backward)


def _sums(chosen, g):
    """Sums of g (Q, N) over the frames that are `chosen` (Q, Q) for each, in full fp32."""
    return jax.lax.dot_general(jnp.where(chosen, 1.0, 0.0), g, (((1,), (0,)), ((), ())),
                               precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _head(cut: Shape, h: int, q_ref, k_ref, v_ref, g_ref):
    """q, k, g (Q, N), v (Q, P) of one head, fp32; row and column numbers (Q, Q)."""
    narrow, wide = (slice(h * n, (h + 1) * n) for n in (cut.width, cut.size))
    q, k, v, g = (ref[0, :, at].astype(jnp.float32) for ref, at in (
        (q_ref, narrow), (k_ref, narrow), (v_ref, wide), (g_ref, narrow)))
    return q, k, v, g, *(jax.lax.broadcasted_iota(jnp.int32, (cut.chunk,) * 2, axis) for axis in (0, 1))


def _halvings(cut, q, k, g, row, column, sums=_sums):
    """Of every halving: the pairs of frames that meet (Q, Q), who is in a later half (Q, N), the decay from or to the
    middle, queries or keys with it (Q, N)."""
    frame = jax.lax.broadcasted_iota(jnp.int32, (cut.chunk, cut.width), 0)
    for level in range(cut.levels):
        mine, other = row >> level, column >> level
        late = (mine & 1) == 1
        decay = jnp.exp(sums((mine == other) & ((late & (column <= row)) | (~late & (column > row))), g))
        late = ((frame >> level) & 1) == 1
        yield (mine ^ other) == 1, late, decay, jnp.where(late, q, k) * decay


def outputs(cut, q, k, v, g, s, row, column, dot=_dot, sums=_sums):
    """y (Q, P) of a chunk behind the state s, and the sums of g up to each frame (Q, N)."""
    products = jnp.zeros((cut.chunk,) * 2, jnp.float32)
    for meet, _, _, x in _halvings(cut, q, k, g, row, column, sums):
        products += jnp.where(meet & (row > column), dot(x, x, (1, 1)), 0.0)
    before = sums(column <= row, g)
    return (dot(products, v, (1, 0)) + jnp.sum(q * k, 1, keepdims=True) * v
            + dot(q * jnp.exp(before), s, (1, 1))), before


def gradients(cut, q, k, v, g, s, ds, dy, row, column, dot=_dot, sums=_sums):
    """Of a chunk, from the state before, the gradients of the state behind and of y: of q, k, v, of g but for the
    state's share; the decays up to each frame and from it to the end (Q, N)."""
    up, down = jnp.exp(sums(column <= row, g)), jnp.exp(sums(column > row, g))                     # (Q, N)
    dproducts = jnp.where(row > column, dot(dy, v, (1, 1)), dot(v, dy, (1, 1)))                    # both triangles
    products, dq, dk = jnp.zeros_like(dproducts), up * dot(dy, s, (1, 0)), down * dot(v, ds, (1, 0))
    for meet, late, decay, x in _halvings(cut, q, k, g, row, column, sums):
        products += jnp.where(meet & (row < column), dot(x, x, (1, 1)), 0.0)                        # transposed
        dx = decay * dot(jnp.where(meet, dproducts, 0.0), x, (1, 0))
        dq, dk = dq + jnp.where(late, dx, 0.0), dk + jnp.where(late, 0.0, dx)
    dg = sums(column >= row, q * dq - k * dk)
    same, dsame = jnp.sum(q * k, 1, keepdims=True), jnp.sum(dy * v, 1, keepdims=True)                # pairs i = i
    dv = dot(products, dy, (1, 0)) + same * dy + dot(down * k, ds, (1, 1))
    return dq + dsame * k, dk + dsame * q, dv, dg, up, down


def _forward_kernel(cut: Shape, save: bool, q_ref, k_ref, v_ref, g_ref, first_ref, y_ref, last_ref, *refs):
    state, chunk = refs[-1], pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        state[...] = first_ref[0]

    if save:
        refs[0][0, 0] = state[...]
    for h in range(cut.inside):
        q, k, v, g, row, column = _head(cut, h, q_ref, k_ref, v_ref, g_ref)
        y_ref[0, :, h * cut.size : (h + 1) * cut.size], before = outputs(cut, q, k, v, g, state[h], row, column)
        after = jnp.exp(_sums(column > row, g))
        state[h] = jnp.exp(before[cut.chunk - 1 :]) * state[h] + _dot(v, k * after, (0, 0))

    @pl.when(chunk == cut.grid[2] - 1)
    def _():
        last_ref[0] = state[...]


def _backward_kernel(cut: Shape, q_ref, k_ref, v_ref, g_ref, kept_ref, dy_ref, dlast_ref,
                     dq_ref, dk_ref, dv_ref, dg_ref, dfirst_ref, carry):
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        carry[...] = dlast_ref[0]

    for h in range(cut.inside):
        narrow, wide = (slice(h * n, (h + 1) * n) for n in (cut.width, cut.size))
        q, k, v, g, row, column = _head(cut, h, q_ref, k_ref, v_ref, g_ref)
        dy, s, ds = dy_ref[0, :, wide], kept_ref[0, 0, h], carry[h]
        dq, dk, dv, dg, up, down = gradients(cut, q, k, v, g, s, ds, dy, row, column)
        after = up[cut.chunk - 1 :] * s + _dot(v, down * k, (0, 0))                                  # (P, N)
        dg_ref[0, :, narrow] = dg + jnp.sum(after * ds, 0, keepdims=True)
        dq_ref[0, :, narrow] = dq.astype(dq_ref.dtype)
        dk_ref[0, :, narrow] = dk.astype(dk_ref.dtype)
        dv_ref[0, :, wide] = dv.astype(dv_ref.dtype)
        carry[h] = up[cut.chunk - 1 :] * ds + _dot(dy, up * q, (0, 0))

    @pl.when(chunk == cut.grid[2] - 1)
    def _():
        dfirst_ref[0] = carry[...]
