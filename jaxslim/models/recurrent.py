"""Mixers with a recurrence over time in place of attention: a state of fixed size instead of all keys.

* mamba2: Mamba-2 (arXiv 2405.21060, section 7; modules as in mamba_ssm's Mamba2), CALD's mixer for speech.
* mamba: Mamba (arXiv 2312.00752, section 3.4), CALD's for language models.
* gated_deltanet: Gated DeltaNet (arXiv 2412.06464, figure 1) with one input projection for all.
* gla: gated linear attention (arXiv 2312.06635, section 4.4), the same; it has no convolution.

A recurrence looks back only. `direction` says what the mixer makes of that:
* causal: one, forward. Takes and gives a state, so audio can come in pieces.
* sum: a second one with parameters of its own runs from each row's end; outputs are added (CALD, figure 2).
* mean: as sum, halved (ConMamba, arXiv 2407.09732).
* shared: of mamba2 only: Hydra (arXiv 2407.09941, section 3): both directions share projections, convolution, norm and
  output; each sees the frames beyond the present one, which has a learnt weight of its own.

Padded frames enter convolutions as zeros and leave states alone, so a flip of the padded batch is a flip of each row.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxslim.models import layers as L
from jaxslim.models import scan
from jaxslim.spec import SpecError

DIRECTIONS = ("sum", "mean", "shared", "causal")
State = tuple[jax.Array, ...]   # last inputs of the convolution (B, W - 1, C) if there is one, state of the recurrence


class Conv(nnx.Module):
    """Depthwise convolution over time with SiLU; weight (C, 1, W) as in torch."""

    def __init__(self, channels: int, width: int):
        self.weight, self.bias = L.param(channels, 1, width), L.param(channels)

    def __call__(self, x: jax.Array, call: L.Call) -> jax.Array:         # (B, T + W - 1, C) -> (B, T, C)
        w, length = self.weight[...].astype(x.dtype), x.shape[1] - self.weight.shape[2] + 1
        if call.on_cpu():  # XLA's grouped convolution is slow there
            y = sum(x[:, i : i + length] * w[:, 0, i] for i in range(w.shape[2]))
        else:
            y = jax.lax.conv_general_dilated(x, w, (1,), [(0, 0)], feature_group_count=x.shape[2],
                                             dimension_numbers=("NWC", "OIW", "NWC"))
        return jax.nn.silu(y + self.bias[...].astype(x.dtype))

    def causal(self, x, before, call: L.Call):                           # (B, T, C), (B, W - 1, C) -> the same
        x = jnp.concatenate([before.astype(x.dtype), x], 1)
        return self(x, call), x[:, x.shape[1] - before.shape[1]:]


class Mamba2(nnx.Module):
    """in_proj gives [z | x B C | dt]; `groups` of heads share B and C, and a norm, as in mamba_ssm."""

    def __init__(self, width: int, o: dict[str, Any]):
        self.inner, self.groups, self.width, self.chunk = o["inner"] or width, o["groups"], o["state"], o["chunk"]
        self.heads = self.inner // o["head_dim"]
        self.sizes = mamba2_sizes(width, o)
        self.in_proj = L.Linear(width, sum(self.sizes), o["bias"])
        self.conv1d = Conv(self.sizes[1], o["conv"])
        self.A_log, self.D, self.dt_bias = (L.param(self.heads) for _ in range(3))
        self.norm = L.Weight(self.inner)
        self.out_proj = L.Linear(self.inner, width, o["bias"])

    def state(self, rows: int) -> State:
        return (jnp.zeros((rows, self.conv1d.weight.shape[2] - 1, self.sizes[1])),
                jnp.zeros((rows, self.heads, self.inner // self.heads, self.width)))

    def __call__(self, x, mask, state: State, call: L.Call):             # (B, T, D) -> (B, T, D), state
        z, xbc, dt = split(self.in_proj(x), self.sizes)
        xbc, before = self.conv1d.causal(L.zero_padding(xbc, mask), state[0], call)
        h, b, c = split(xbc, (self.inner, *[self.groups * self.width] * 2))
        h, b, c = heads(h, self.heads), heads(b, self.groups), heads(c, self.groups)
        dt = L.zero_padding(jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...]), mask)
        y, after = scan.ssd(h, dt, -jnp.exp(self.A_log[...]), b, c, state[1], self.chunk, call.on_cpu())
        y = (y + self.D[...][:, None] * h).reshape(*x.shape[:2], -1) * jax.nn.silu(z.astype(jnp.float32))
        y = rms(heads(y, self.groups)).reshape(y.shape) * self.norm()
        return self.out_proj(y.astype(x.dtype)), (before, after)


class Hydra(nnx.Module):
    """in_proj gives [z | x, B C forward, B C backward | dt forward, dt backward]."""

    def __init__(self, width: int, o: dict[str, Any]):
        self.inner, self.groups, self.width, self.chunk = o["inner"] or width, o["groups"], o["state"], o["chunk"]
        self.heads = self.inner // o["head_dim"]
        self.sizes = hydra_sizes(width, o)
        self.in_proj = L.Linear(width, sum(self.sizes), o["bias"])
        self.conv1d = Conv(self.sizes[1], o["conv"])
        self.A_log, self.D, self.dt_bias = (L.param(self.heads) for _ in range(3))
        self.fc_D = L.Weight(self.heads, self.inner)
        self.norm = L.Weight(self.inner)
        self.out_proj = L.Linear(self.inner, width, o["bias"])

    def __call__(self, x, mask, call: L.Call):                           # (B, T, D) -> (B, T, D)
        z, xbc, dt = split(self.in_proj(x), self.sizes)
        centred = self.conv1d.weight.shape[2] - 1
        xbc = jnp.pad(L.zero_padding(xbc, mask), ((0, 0), (centred // 2, centred - centred // 2), (0, 0)))
        h, *bc = split(self.conv1d(xbc, call), (self.inner, *[self.groups * self.width] * 4))
        h, dt = L.zero_padding(h, mask), dt.astype(jnp.float32)
        dt = [L.zero_padding(jax.nn.softplus(d + self.dt_bias[...]), mask) for d in split(dt, [self.heads] * 2)]
        both = lambda forward, backward: jnp.concatenate([forward, backward[:, ::-1]])  # noqa: E731
        b, c = (heads(both(bc[i], bc[i + 2]), self.groups) for i in (0, 1))                          # (2B, T, G, N)
        x2 = heads(both(h, h), self.heads)
        y, _ = scan.ssd(x2, both(*dt), -jnp.exp(self.A_log[...]), b, c, None, self.chunk, call.on_cpu())
        y = jnp.pad(y, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]         # what lies beyond the present frame
        y = y[: len(x)] + y[len(x):, ::-1]
        present = L.matmul(h, self.fc_D()).astype(jnp.float32) + self.D[...]                         # (B, T, H)
        y = (y + present[..., None] * heads(h, self.heads)).reshape(*x.shape[:2], -1)
        y = rms(y) * self.norm() * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(y.astype(x.dtype))


class Mamba(nnx.Module):
    """in_proj gives [x | z]; x_proj of the convolved x gives [dt, of low rank | B | C]."""

    def __init__(self, width: int, o: dict[str, Any]):
        self.inner, self.width, self.chunk = o["inner"] or width, o["state"], o["chunk"]
        self.rank = o["rank"] or -(-width // 16)
        self.in_proj = L.Linear(width, 2 * self.inner, o["bias"])
        self.conv1d = Conv(self.inner, o["conv"])
        self.x_proj = L.Linear(self.inner, self.rank + 2 * self.width, bias=False)
        self.dt_proj = L.Linear(self.rank, self.inner)
        self.A_log, self.D = L.param(self.inner, self.width), L.param(self.inner)
        self.out_proj = L.Linear(self.inner, width, o["bias"])

    def state(self, rows: int) -> State:
        return (jnp.zeros((rows, self.conv1d.weight.shape[2] - 1, self.inner)),
                jnp.zeros((rows, self.inner, self.width)))

    def __call__(self, x, mask, state: State, call: L.Call):             # (B, T, D) -> (B, T, D), state
        h, z = split(self.in_proj(x), [self.inner] * 2)
        h, before = self.conv1d.causal(L.zero_padding(h, mask), state[0], call)
        dt, b, c = split(self.x_proj(h), (self.rank, self.width, self.width))
        dt = L.zero_padding(jax.nn.softplus(self.dt_proj(dt).astype(jnp.float32)), mask)
        y, after = scan.selective(h, dt, -jnp.exp(self.A_log[...].astype(jnp.float32)), b, c, state[1], self.chunk)
        y = (y + self.D[...] * h) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(y.astype(x.dtype)), (before, after)


class GatedDeltaNet(nnx.Module):
    """in_proj gives [z | q k v | beta | dt]."""

    def __init__(self, width: int, o: dict[str, Any]):
        self.inner, self.chunk = o["inner"] or width, o["chunk"]
        self.heads = self.inner // o["head_dim"]
        self.sizes = delta_sizes(width, o)
        self.in_proj = L.Linear(width, sum(self.sizes), o["bias"])
        self.conv1d = Conv(self.sizes[1], o["conv"])
        self.A_log, self.dt_bias = L.param(self.heads), L.param(self.heads)
        self.norm = L.Weight(o["head_dim"])
        self.out_proj = L.Linear(self.inner, width, o["bias"])

    def state(self, rows: int) -> State:
        size = self.inner // self.heads
        return (jnp.zeros((rows, self.conv1d.weight.shape[2] - 1, self.sizes[1])),
                jnp.zeros((rows, self.heads, size, size)))

    def __call__(self, x, mask, state: State, call: L.Call):             # (B, T, D) -> (B, T, D), state
        z, qkv, beta, dt = split(self.in_proj(x), self.sizes)
        qkv, before = self.conv1d.causal(L.zero_padding(qkv, mask), state[0], call)
        q, k, v = (heads(h.astype(jnp.float32), self.heads) for h in split(qkv, [self.inner] * 3))
        beta = L.zero_padding(jax.nn.sigmoid(beta.astype(jnp.float32)), mask)
        g = -jnp.exp(self.A_log[...]) * jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        y, after = scan.delta(unit(q) * q.shape[-1] ** -0.5, unit(k), v, beta, L.zero_padding(g, mask), state[1],
                              self.chunk, call.on_cpu())
        y = (rms(y) * self.norm()).reshape(*x.shape[:2], -1) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(y.astype(x.dtype)), (before, after)


class GatedLinearAttention(nnx.Module):
    """in_proj gives [z | q k v | low]; the decays of all key channels are sigmoid(gk_proj(low))^(1 / tau)."""

    def __init__(self, width: int, o: dict[str, Any]):
        self.sizes, self.tau, self.chunk = gla_sizes(width, o), o["tau"], o["chunk"]
        self.inner, keys = self.sizes[:2]
        self.heads = self.inner // o["head_dim"]
        self.in_proj = L.Linear(width, sum(self.sizes))
        self.gk_proj = L.Linear(o["rank"], keys)
        self.norm = L.Weight(o["head_dim"])
        self.out_proj = L.Linear(self.inner, width, o["bias"])

    def state(self, rows: int) -> State:
        return (jnp.zeros((rows, self.heads, self.sizes[1] // self.heads, self.inner // self.heads)),)

    def __call__(self, x, mask, state: State, call: L.Call):             # (B, T, D) -> (B, T, D), state
        z, q, k, v, low = split(self.in_proj(x), self.sizes)
        g = jax.nn.log_sigmoid(self.gk_proj(low).astype(jnp.float32)) / self.tau
        k, g = L.zero_padding(k, mask), L.zero_padding(g, mask)
        q, k, v, g = (heads(h.astype(jnp.float32), self.heads) for h in (q, k, v, g))
        y, after = scan.gla(q * q.shape[-1] ** -0.5, k, v, g, state[0], self.chunk)
        y = (rms(y) * self.norm()).reshape(*x.shape[:2], -1) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(y.astype(x.dtype)), (after,)


KINDS = {"mamba2": Mamba2, "mamba": Mamba, "gated_deltanet": GatedDeltaNet, "gla": GatedLinearAttention}


def parts(mixer: str, width: int, options: dict[str, Any]) -> dict[str, nnx.Module]:
    """The modules of a mixer, by name below its block."""
    if options["direction"] == "shared":
        return {"shared": Hydra(width, options)}
    return {name: KINDS[mixer](width, options) for name in ("fwd", "bwd")[: 2 - (options["direction"] == "causal")]}


def run(block: nnx.Module, x: jax.Array, mask: jax.Array | None, call: L.Call) -> jax.Array:
    """(B, T, D) -> (B, T, D) by the `parts` and `direction` of a block."""
    if block.direction == "shared":
        return block.shared(x, mask, call)
    y = extend(block.fwd, x, mask, block.fwd.state(len(x)), call)[0]
    if block.direction == "causal":
        return y
    turned = None if mask is None else mask[:, ::-1]
    y = y + extend(block.bwd, x[:, ::-1], turned, block.bwd.state(len(x)), call)[0][:, ::-1]
    return y / 2 if block.direction == "mean" else y


def extend(one: nnx.Module, x, mask, state: State, call: L.Call) -> tuple[jax.Array, State]:
    """One direction over frames that follow those of `state`: (B, T, D) -> (B, T, D), state."""
    if not call.chunked(x.shape[1]):
        return one(x, mask, state, call)
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    state, y = scan.segments(lambda s, part: one(*part, s, call)[::-1], state, (x, mask), L.CHUNK)
    return y, state


def split(x: jax.Array, sizes) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), -1)


def heads(x: jax.Array, count: int) -> jax.Array:                        # (B, T, H K) -> (B, T, H, K)
    return x.reshape(*x.shape[:2], count, -1)


def rms(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


def unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def mamba2_sizes(width: int, o: dict[str, Any]) -> tuple[int, ...]:
    inner = o["inner"] or width
    return inner, inner + 2 * o["groups"] * o["state"], inner // o["head_dim"]


def hydra_sizes(width: int, o: dict[str, Any]) -> tuple[int, ...]:
    inner = o["inner"] or width
    return inner, inner + 4 * o["groups"] * o["state"], 2 * (inner // o["head_dim"])


def delta_sizes(width: int, o: dict[str, Any]) -> tuple[int, ...]:
    inner = o["inner"] or width
    return inner, 3 * inner, *[inner // o["head_dim"]] * 2


def gla_sizes(width: int, o: dict[str, Any]) -> tuple[int, ...]:
    inner = o["inner"] or width
    keys = inner // o["head_dim"] * o["key_dim"]
    return inner, keys, keys, inner, o["rank"]


def check(mixer: str, width: int, o: dict[str, Any], block: str) -> None:
    """Raises SpecError for options that make no mixer."""
    inner, size = o["inner"] or width, o.get("head_dim", 1)
    if o["direction"] not in DIRECTIONS or o["direction"] == "shared" and mixer != "mamba2":
        known = [d for d in DIRECTIONS if d != "shared" or mixer == "mamba2"]
        raise SpecError(f"Block {block}: mixer {mixer} has no direction {o['direction']!r}; it has {', '.join(known)}.")
    if inner % size or (inner // size) % o.get("groups", 1):
        raise SpecError(f"Block {block}: mixer {mixer}: {inner} channels do not make heads of {size} in "
                        f"{o.get('groups', 1)} groups; change head_dim, groups or inner.")
    for field in ("key_dim", "rank", "tau") if mixer == "gla" else ():
        if not o[field] > 0:
            raise SpecError(f"Block {block}: mixer {mixer}: {field} {o[field]}; it must be positive.")
    if mixer in ("gated_deltanet", "gla") and (o["chunk"] < 1 or o["chunk"] & (o["chunk"] - 1)):
        raise SpecError(f"Block {block}: mixer {mixer}: chunk {o['chunk']} is no power of two.")


def macs(mixer: str, width: int, o: dict[str, Any], T: int) -> int:
    """Multiply-accumulates for one row of T frames."""
    inner, size = o["inner"] or width, o.get("head_dim", 1)
    count, twice = inner // size, 1 if o["direction"] == "causal" else 2
    if mixer == "mamba":
        rank, n = o["rank"] or -(-width // 16), o["state"]
        frame = inner * (3 * width + o["conv"] + 2 * rank + 2 * n)
        return twice * (T * frame + scan.selective_macs(T, inner, n, o["chunk"]))
    if mixer == "gated_deltanet":
        sizes, mixing = delta_sizes(width, o), scan.delta_macs(T, count, size, size, o["chunk"])
        return twice * (T * (width * (sum(sizes) + inner) + sizes[1] * o["conv"]) + mixing)
    if mixer == "gla":
        sizes, mixing = gla_sizes(width, o), scan.gla_macs(T, count, o["key_dim"], size, o["chunk"])
        return twice * (T * (width * (sum(sizes) + inner) + o["rank"] * sizes[1]) + mixing)
    shared = o["direction"] == "shared"
    sizes = (hydra_sizes if shared else mamba2_sizes)(width, o)
    mixing = scan.ssd_macs(T, count, size, o["groups"], o["state"], o["chunk"])
    frames = T * (width * (sum(sizes) + inner) + sizes[1] * o["conv"] + (inner * count if shared else 0))
    return frames + 2 * mixing if shared else twice * (frames + mixing)
