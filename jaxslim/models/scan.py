"""Recurrences over time in chunks: what is quadratic inside a chunk is a matrix product, between chunks a state is
carried. Each function takes the state before the first frame and returns the one after the last, so a long input may
come in pieces of any length; each equals its plain recurrence, written in its docstring, whatever the chunk.

A frame with dt = 0 (`ssd`, `selective`), beta = g = 0 (`delta`), k = g = 0 (`gla`) or k = 0 (`causal`) leaves the state
as it is: that is how padded frames are kept out, and why flipping a padded batch reverses each row in its own length.

All run in fp32. Shapes: B batch, T frames, n chunks of Q frames, H heads, G groups of R heads, P channels of a head,
N, F and K, V sizes of the state. Exponents of decays are sums of numbers <= 0 and masked before exp, so that neither
values nor gradients overflow. `ssd`, `gla` and `causal` run as a kernel where the recorded table says so (kernels.py);
their `plain_` forms are the oracle, and run everywhere else: all chunks at once, or with `in_turn` one by one, which is
faster on a CPU, where what a chunk needs stays in the cache. `*_macs` count the multiply-accumulates for one row, as
traced.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxslim.models import kernels


def segments(fn, state, xs, size: int):
    """fn(state, xs) -> (state, ys), on `size` frames of axis 1 at a time: memory of one segment, results of all. `fn`
    must leave the state alone at the zeros that complete the last segment."""
    rows, length = jax.tree.leaves(xs)[0].shape[:2]
    if length <= size:
        return fn(state, xs)
    cut = lambda x: jnp.moveaxis(chunks(x, size), 1, 0)  # noqa: E731
    state, ys = jax.lax.scan(fn, state, jax.tree.map(cut, xs))
    return state, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(rows, -1, *y.shape[3:])[:, :length], ys)


def run(plain, xs, state, chunk: int, in_turn: bool):
    """plain(*xs, state) -> (y, state). `in_turn`: a chunk after another, each made again for the gradient."""
    if not in_turn:
        return plain(*xs, state)
    state, y = segments(jax.checkpoint(lambda state, part: plain(*part, state)[::-1]), state, xs, chunk)
    return y, state


def chunks(x: jax.Array, size: int) -> jax.Array:
    """(B, T, ...) -> (B, n, Q, ...), zeros at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _decays(steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log decays (..., Q) -> their sums (..., Q), and the decay from j to i <= j, zero elsewhere (..., Q, Q)."""
    total = jnp.cumsum(steps, -1)
    lower = jnp.tril(jnp.ones((steps.shape[-1],) * 2, bool))
    return total, jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))


def ssd(x, dt, a, b, c, state=None, chunk: int = 64, in_turn: bool = False) -> tuple[jax.Array, jax.Array]:
    """Mamba-2's state space duality (arXiv 2405.21060, section 6): per head, with A = a < 0,

        s_t = exp(dt_t A) s_{t-1} + dt_t x_t b_t^T,    y_t = s_t c_t

    Args: x (B, T, H, P), dt (B, T, H) >= 0, a (H,), b and c (B, T, G, N) shared by H / G heads, state (B, H, P, N).
    Returns: y (B, T, H, P), the last state.
    """
    kernel = kernels.recurrence("ssd", *x.shape[:3], *b.shape[2:3], x.shape[3], b.shape[3])
    if kernel:
        return kernel(x, dt, a, b, c, state)
    state = jnp.zeros((len(x), *x.shape[2:], b.shape[3])) if state is None else state
    return run(lambda x, dt, *more: plain_ssd(x, dt, a, *more, chunk), (x, dt, b, c), state, chunk, in_turn)


def plain_ssd(x, dt, a, b, c, state=None, chunk: int = 64) -> tuple[jax.Array, jax.Array]:
    """`ssd` by XLA, all chunks at once."""
    rows, length, heads, size = x.shape
    groups, width = b.shape[2:]
    x, dt, b, c = (jnp.moveaxis(chunks(v.astype(jnp.float32), chunk), 3, 2) for v in (x, dt, b, c))
    shape = (*dt.shape[:2], groups, heads // groups, chunk)                              # B, n, G, R, Q
    x = (x * dt[..., None]).reshape(*shape, size)
    total, decay = _decays((dt * a[:, None]).reshape(shape))                             # (B, n, G, R, Q[, Q])
    y = ((c @ jnp.swapaxes(b, -1, -2))[:, :, :, None] * decay) @ x                       # (B, n, G, R, Q, P)
    to_end = jnp.exp(total[..., -1:] - total)[..., None]
    added = jnp.einsum("bngjs,bngrjp->bngrps", b, x * to_end)                            # (B, n, G, R, P, N)
    kept = jnp.exp(total[..., -1])[..., None, None]                                      # (B, n, G, R, 1, 1)
    zero = jnp.zeros(added.shape[:1] + added.shape[2:])
    state = zero if state is None else state.reshape(zero.shape)
    state, before = jax.lax.scan(lambda s, now: (now[0] * s + now[1], s), state,
                                 (jnp.moveaxis(kept, 1, 0), jnp.moveaxis(added, 1, 0)))
    y += jnp.einsum("bngis,nbgrps->bngrip", c, before) * jnp.exp(total)[..., None]
    y = jnp.moveaxis(y.reshape(*y.shape[:2], heads, chunk, size), 2, 3)                  # (B, n, Q, H, P)
    return y.reshape(rows, -1, heads, size)[:, :length], state.reshape(rows, heads, size, width)


def ssd_macs(frames: int, heads: int, size: int, groups: int, width: int, chunk: int) -> int:
    return -(-frames // chunk) * chunk * (chunk * (groups * width + heads * size) + 2 * heads * size * width)


def selective(x, dt, a, b, c, state=None, chunk: int = 32) -> tuple[jax.Array, jax.Array]:
    """Mamba's selective scan (arXiv 2312.00752, section 3.2): per channel, with a (C, N) < 0,

        s_t = exp(dt_t a) s_{t-1} + dt_t x_t b_t,    y_t = s_t . c_t

    There is no form by matrix products: an associative scan inside a chunk, made again for the gradient.

    Args: x, dt (B, T, C), b, c (B, T, N), state (B, C, N).
    Returns: y (B, T, C), the last state.
    """
    length = x.shape[1]
    parts = [jnp.moveaxis(chunks(v.astype(jnp.float32), chunk), 1, 0) for v in (x, dt, b, c)]
    state = jnp.zeros((x.shape[0], *a.shape)) if state is None else state

    def join(first, second):
        return first[0] * second[0], first[1] * second[0] + second[1]

    @jax.checkpoint
    def step(state, part):
        x, dt, b, c = part
        decay, added = jnp.exp(dt[..., None] * a), (dt * x)[..., None] * b[:, :, None]   # (B, Q, C, N)
        decay, added = jax.lax.associative_scan(join, (decay, added), axis=1)
        states = added + decay * state[:, None]
        return states[:, -1], jnp.einsum("bqcn,bqn->bqc", states, c)

    state, y = jax.lax.scan(step, state, tuple(parts))
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :length], state


def selective_macs(frames: int, channels: int, width: int, chunk: int) -> int:
    return -(-frames // chunk) * chunk * channels * width


def delta(q, k, v, beta, g, state=None, chunk: int = 64, in_turn: bool = False) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule (arXiv 2412.06464, section 3): per head,

        s_t = exp(g_t) (I - beta_t k_t k_t^T) s_{t-1} + beta_t k_t v_t^T,    y_t = s_t^T q_t

    in its WY form: inside a chunk the writes u solve a unit triangular system.

    Args: q, k (B, T, H, K), v (B, T, H, V), beta, g (B, T, H), state (B, H, K, V); `chunk` a power of two.
    Returns: y (B, T, H, V), the last state.
    """
    state = jnp.zeros((len(k), *k.shape[2:], v.shape[3])) if state is None else state
    return run(functools.partial(_delta, chunk=chunk), (q, k, v, beta, g), state, chunk, in_turn)


def _delta(q, k, v, beta, g, state, chunk: int) -> tuple[jax.Array, jax.Array]:
    rows, length, heads, _ = v.shape
    q, k, v, beta, g = (jnp.moveaxis(chunks(x.astype(jnp.float32), chunk), 3, 2) for x in (q, k, v, beta, g))
    total, decay = _decays(g)                                                            # (B, n, H, Q[, Q])
    above, product = jnp.exp(total)[..., None], functools.partial(jnp.einsum, "bnhik,bnhjk->bnhij")
    inverse = unit_inverse(jnp.tril(product(k * beta[..., None], k) * decay, -1))
    u, w = inverse @ (v * beta[..., None]), inverse @ (k * beta[..., None] * above)      # (B, n, H, Q, V | K)
    to_end = jnp.exp(total[..., -1:] - total)[..., None]

    def step(state, part):
        u, w, q, scores, k, kept = part
        new = u - w @ state                                                              # (B, H, Q, V)
        return kept * state + jnp.swapaxes(k, -1, -2) @ new, q @ state + scores @ new

    parts = (u, w, q * above, product(q, k) * decay, k * to_end, jnp.exp(total[..., -1])[..., None, None])
    state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(part, 1, 0) for part in parts))
    return y.transpose(1, 0, 3, 2, 4).reshape(rows, -1, heads, v.shape[-1])[:, :length], state


def unit_inverse(m: jax.Array) -> jax.Array:
    """(I + m)^-1 for strictly lower triangular m (..., Q, Q), Q a power of two: inverses of the diagonal blocks, twice
    as large each time. Only products, and no cancellation as in the series of powers of m."""
    size, lead = m.shape[-1], m.shape[:-2]
    inverse, s = jnp.ones((*lead, size, 1, 1), m.dtype), 1
    while s < size:
        blocks = jnp.swapaxes(m.reshape(*lead, size // s, s, size // s, s), -3, -2)
        even = jnp.arange(0, size // s, 2)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ (blocks[..., even + 1, even, :, :] @ first))
        inverse = jnp.concatenate([jnp.concatenate([first, jnp.zeros_like(first)], -1),
                                   jnp.concatenate([corner, second], -1)], -2)
        s *= 2
    return inverse[..., 0, :, :]


def delta_macs(frames: int, heads: int, k: int, v: int, chunk: int) -> int:
    inside = chunk**2 * (3 * k + 2 * v) + 3 * chunk * k * v + chunk * (chunk**2 - 1) // 3
    return -(-frames // chunk) * heads * inside


def gla(q, k, v, g, state=None, chunk: int = 64) -> tuple[jax.Array, jax.Array]:
    """Gated linear attention (arXiv 2312.06635, section 4): per head, with a decay for every channel of the keys,

        s_t = diag(exp(g_t)) s_{t-1} + k_t v_t^T,    y_t = s_t^T q_t

    Args: q, k, g <= 0 (B, T, H, K), v (B, T, H, V), state (B, H, K, V); `chunk` a power of two.
    Returns: y (B, T, H, V), the last state.
    """
    kernel = kernels.recurrence("gla", *v.shape[:3], v.shape[2], v.shape[3], k.shape[3])
    return (kernel or functools.partial(plain_gla, chunk=chunk))(q, k, v, g, state)


def plain_gla(q, k, v, g, state=None, chunk: int = 64) -> tuple[jax.Array, jax.Array]:
    """`gla` by XLA."""
    rows, length, heads, _ = v.shape
    parts = tuple(jnp.moveaxis(chunks(x.astype(jnp.float32), chunk), (1, 3), (0, 2)) for x in (q, k, v, g))
    state = jnp.zeros((rows, heads, k.shape[-1], v.shape[-1])) if state is None else state

    @jax.checkpoint
    def step(state, part):
        q, k, v, g = part                                                                # (B, H, Q, K | V)
        scores, before, after = decayed_products(q, k, g)
        y = scores @ v + (q * jnp.exp(before)) @ state
        kept = jnp.exp(before[..., -1, :, None])                                         # (B, H, K, 1)
        return kept * state + jnp.swapaxes(k * jnp.exp(after), -1, -2) @ v, y

    state, y = jax.lax.scan(step, state, parts)
    return y.transpose(1, 0, 3, 2, 4).reshape(rows, -1, heads, v.shape[-1])[:, :length], state


def decayed_products(q, k, g) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, g <= 0 (..., Q, K), Q a power of two -> scores (..., Q, Q) = sum over K of q_i k_j exp(g_{j+1} + ... + g_i)
    for j <= i, else zero; the sums of g up to each frame and after it (..., Q, K).

    The paper's secondary chunks (section 4.3), halved down to single frames: between the halves of a block the decay is
    that of the query since the middle times that of the key up to it. All exponents are sums of numbers <= 0, without a
    difference, so any decay is as exact as none.
    """
    lead, (size, width) = q.shape[:-2], q.shape[-2:]
    scores = (q * k).sum(-1)[..., None, None]                                            # (..., blocks, s, s)
    before, after, s = g[..., None, :], jnp.zeros_like(g)[..., None, :], 1               # (..., blocks, s, K)
    while s < size:
        blocks = lambda x: x.reshape(*lead, -1, s, width)  # noqa: B023, E731
        late = blocks(q)[..., 1::2, :, :] * jnp.exp(before[..., 1::2, :, :])
        early = blocks(k)[..., 0::2, :, :] * jnp.exp(after[..., 0::2, :, :])
        corner = late @ jnp.swapaxes(early, -1, -2)
        scores = jnp.concatenate([
            jnp.concatenate([scores[..., 0::2, :, :], jnp.zeros_like(corner)], -1),
            jnp.concatenate([corner, scores[..., 1::2, :, :]], -1)], -2)
        (first, second), (rest, last) = ((x[..., 0::2, :, :], x[..., 1::2, :, :]) for x in (before, after))
        before = jnp.concatenate([first, second + first[..., -1:, :]], -2)
        after = jnp.concatenate([rest + second[..., -1:, :], last], -2)
        s *= 2
    return scores[..., 0, :, :], before[..., 0, :, :], after[..., 0, :, :]


def gla_macs(frames: int, heads: int, k: int, v: int, chunk: int) -> int:
    inside = chunk * (chunk - 1) // 2 * k + chunk**2 * v + 2 * chunk * k * v
    return -(-frames // chunk) * heads * inside


def causal(q, k, v, state=None, chunk: int = 64, in_turn: bool = False) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention without its denominator (arXiv 2006.16236, section 3.3): s_t = s_{t-1} + k_t v_t^T,
    y_t = s_t^T q_t.

    Args: q, k (B, T, H, F), v (B, T, H, V), state (B, H, F, V).
    Returns: y (B, T, H, V), the last state.
    """
    kernel = kernels.recurrence("causal", *v.shape[:3], v.shape[2], v.shape[3], q.shape[3])
    if kernel:
        return kernel(q, k, v, state)
    state = jnp.zeros((len(k), *k.shape[2:], v.shape[3])) if state is None else state
    return run(functools.partial(plain_causal, chunk=chunk), (q, k, v), state, chunk, in_turn)


def plain_causal(q, k, v, state=None, chunk: int = 64) -> tuple[jax.Array, jax.Array]:
    """`causal` by XLA, all chunks at once."""
    rows, length, heads, _ = v.shape
    q, k, v = (jnp.moveaxis(chunks(x.astype(jnp.float32), chunk), 3, 2) for x in (q, k, v))
    y = jnp.tril(q @ jnp.swapaxes(k, -1, -2)) @ v                                        # (B, n, H, Q, V)
    added = jnp.moveaxis(jnp.swapaxes(k, -1, -2) @ v, 1, 0)                              # (n, B, H, F, V)
    state = jnp.zeros(added.shape[1:]) if state is None else state
    state, before = jax.lax.scan(lambda s, new: (s + new, s), state, added)
    y += q @ jnp.moveaxis(before, 0, 1)
    return jnp.moveaxis(y, 2, 3).reshape(rows, -1, heads, v.shape[-1])[:, :length], state


def causal_macs(frames: int, heads: int, features: int, v: int, chunk: int) -> int:
    return -(-frames // chunk) * chunk * heads * (chunk * (features + v) + 2 * features * v)
