"""Layers with Hugging Face names and torch memory layout, and the functions they share.

Shape legend (all files): B batch, T frames (S when keys differ from queries), D model, H heads, K head dim, F FFN
units or features, R rank, V vocab, C channels, W conv width. Linear weights are (out, in), conv weights (out, in, W).
Parameters are created as shapes; `bind.py` puts the arrays in. Norms, softmax and sums over time run in fp32.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

ATTENTION_BLOCK = 256  # query rows whose scores exist at the same time on the blocked path


class Call(NamedTuple):
    """How one forward pass runs: `key` is an array or None, the rest is static."""

    key: jax.Array | None = None
    taps: frozenset[str] = frozenset()
    hidden: bool = False
    remat: str = "none"          # none | dots | full
    attention: str = "auto"      # auto | dense | blocked

    def on_cpu(self) -> bool:
        """Whether to run the programs made for the CPU; "dense" asks for the simple ones everywhere."""
        return self.attention == "blocked" or self.attention == "auto" and jax.default_backend() == "cpu"

    def fold(self, site: int) -> Call:
        """The same call with a key of its own for one layer or site."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, site))

    def keep(self, values: dict[str, jax.Array], mask: jax.Array | None) -> dict[str, jax.Array]:
        """The wanted ones of `values` (B, T, *), padded frames zero."""
        return {k: zero_padding(v, mask) for k, v in values.items() if k in self.taps}


def param(*shape: int) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


class Linear(nnx.Module):
    """y = x W^T + b. With `rank` the weight is the product up (out, R) down (R, in); `lora` adds B A alpha / R."""

    def __init__(self, din: int, dout: int, bias: bool = True, rank: int | None = None, lora: dict | None = None):
        if rank is None:
            self.weight = param(dout, din)
        else:
            self.down, self.up = Weight(rank, din), Weight(dout, rank)
        if bias:
            self.bias = param(dout)
        if lora:
            self.lora_A, self.lora_B = Weight(lora["rank"], din), Weight(dout, lora["rank"])
        self.lora_scale = lora["alpha"] / lora["rank"] if lora else None
        self.factored, self.has_bias = rank is not None, bias

    def __call__(self, x: jax.Array) -> jax.Array:                       # (..., in) -> (..., out)
        y = matmul(matmul(x, self.down()), self.up()) if self.factored else matmul(x, self.weight[...])
        if self.lora_scale is not None:
            y = y + self.lora_scale * matmul(matmul(x, self.lora_A()), self.lora_B())
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


class Weight(nnx.Module):
    """A bare `<name>.weight`."""

    def __init__(self, *shape: int):
        self.weight = param(*shape)

    def __call__(self) -> jax.Array:
        return self.weight[...]


class Bias(nnx.Module):
    """A bare `<name>.bias`: all that is left of a linear whose inputs were pruned away."""

    def __init__(self, dim: int):
        self.bias = param(dim)

    def __call__(self) -> jax.Array:
        return self.bias[...]


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        self.weight, self.bias, self.eps = param(dim), param(dim), eps

    def __call__(self, x: jax.Array) -> jax.Array:                       # (..., D)
        h = x.astype(jnp.float32)
        mean = h.mean(-1, keepdims=True)
        h = h - mean
        h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + self.eps)
        return (h * self.weight[...] + self.bias[...]).astype(x.dtype)


class TimeNorm(nnx.Module):
    """torch GroupNorm with one channel a group: each channel over the whole time axis, padding included."""

    def __init__(self, dim: int, eps: float = 1e-5):
        self.weight, self.bias, self.eps = param(dim), param(dim), eps

    def __call__(self, x: jax.Array) -> jax.Array:                       # (B, T, C)
        h = x.astype(jnp.float32)
        h = h - h.mean(1, keepdims=True)
        h = h * jax.lax.rsqrt((h * h).mean(1, keepdims=True) + self.eps)
        return (h * self.weight[...] + self.bias[...]).astype(x.dtype)


class BatchNorm(nnx.Module):
    """torch BatchNorm1d over channels with stored statistics (they are parameters here, never updated)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        self.weight, self.bias, self.running_mean, self.running_var = (param(dim) for _ in range(4))
        self.num_batches_tracked = nnx.Param(jax.ShapeDtypeStruct((), jnp.int32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:                       # (B, T, C)
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + self.eps)
        return (x * scale + (self.bias[...] - self.running_mean[...] * scale)).astype(x.dtype)


class Conv(nnx.Module):
    def __init__(self, din: int, dout: int, width: int, bias: bool = True):
        self.weight = param(dout, din, width)
        if bias:
            self.bias = param(dout)
        self.has_bias = bias

    def __call__(self, x: jax.Array, stride: int, call: Call) -> jax.Array:   # (B, T, C) -> (B, T', C')
        y = conv1d(x, self.weight[...], stride, call)
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (..., in) times w (out, in) transposed -> (..., out)."""
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def conv1d(x: jax.Array, w: jax.Array, stride: int, call: Call) -> jax.Array:
    """Convolution over time without padding: x (B, T, C), w (out, C, W) -> (B, T', out)."""
    return (_conv1d_cpu if call.on_cpu() else _conv1d)(x, w.astype(x.dtype), stride)


def _conv1d(x, w, stride):
    return jax.lax.conv_general_dilated(x, w, (stride,), "VALID", dimension_numbers=("NWC", "OIW", "NWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv1d_cpu(x, w, stride):
    """The same; on CPU XLA's convolution is fast, but its gradients are not: they are those of `_conv1d_matmul`."""
    return _conv1d(x, w, stride)


def _conv1d_matmul(x, w, stride):
    """One matrix product for each `stride` taps, on frames folded `stride` at a time."""
    (rows, length, channels), width = x.shape, w.shape[2]
    out = (length - width) // stride + 1
    folds = -(-width // stride)
    need = (out + folds - 1) * stride
    x = jnp.pad(x, ((0, 0), (0, max(need - length, 0)), (0, 0)))[:, :need].reshape(rows, -1, stride * channels)
    w = w.transpose(0, 2, 1).reshape(w.shape[0], -1)                     # (out, W C), taps first
    y = 0
    for j in range(folds):
        taps = w[:, j * stride * channels : (j + 1) * stride * channels]
        y = y + matmul(x[:, j : j + out, : taps.shape[1]], taps)
    return y


_conv1d_cpu.defvjp(lambda x, w, stride: (_conv1d(x, w, stride), (x, w)),
                   lambda stride, kept, dy: jax.vjp(lambda x, w: _conv1d_matmul(x, w, stride), *kept)[1](dy))


def grouped_conv1d(x: jax.Array, w: jax.Array, groups: int, padding: tuple[int, int], call: Call) -> jax.Array:
    """Grouped convolution over time: x (B, T, C), w (out, C / groups, W) -> (B, T', out). On CPU in runs of taps."""
    if not call.on_cpu():
        return jax.lax.conv_general_dilated(x, w.astype(x.dtype), (1,), [padding], feature_group_count=groups,
                                            dimension_numbers=("NWC", "OIW", "NWC"))
    run = 16
    dout, din, width = w.shape
    w = jnp.pad(w, ((0, 0), (0, 0), (0, -width % run))).astype(x.dtype)
    w = w.reshape(groups, dout // groups, din, -1, run).transpose(3, 0, 4, 2, 1)       # (W/run, G, run, I, O)
    w = w.reshape(w.shape[0], groups, run * din, -1)
    x = jnp.pad(x, ((0, 0), (padding[0], padding[1] - width % -run), (0, 0)))
    rows, length, _ = x.shape
    out = length - w.shape[0] * run + 1
    x = x.reshape(rows, length, groups, din).transpose(2, 0, 1, 3)                     # (G, B, T, I)
    x = jnp.concatenate([x[:, :, i : i + length - run + 1] for i in range(run)], -1)
    y = sum(jnp.einsum("gbtx,gxo->gbto", x[:, :, j * run : j * run + out], taps) for j, taps in enumerate(w))
    return y.transpose(1, 2, 0, 3).reshape(rows, out, dout)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU; jax.nn.gelu goes through erfc, which is 2.7 times slower on CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "swish": jax.nn.silu, "tanh": jnp.tanh,
               "gelu_new": jax.nn.gelu, "gelu_pytorch_tanh": jax.nn.gelu}


def activation(name: str):
    if name not in ACTIVATIONS:
        raise ValueError(f"Activation {name!r} of the config is not supported; known are {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def dropout(x: jax.Array, rate: float, call: Call, site: int) -> jax.Array:
    if call.key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(call.key, site), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def frame_mask(lengths: jax.Array | None, frames: int) -> jax.Array | None:
    """(B,) lengths -> (B, T) bool, True = valid; None stays None (nothing is padded)."""
    return None if lengths is None else jnp.arange(frames) < lengths[:, None]


def zero_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x (B, T, ...) with padded frames set to zero."""
    return x if mask is None else jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)


def attention(q, k, v, mask, scale: float, call: Call, rate: float = 0.0) -> jax.Array:
    """Softmax attention. q (B, T, H, K), k (B, S, H, K), v (B, S, H, Kv), mask (B, S) -> (B, T, H, Kv).

    The blocked path holds the scores of ATTENTION_BLOCK queries at a time, so memory is linear in T.
    """
    rows = lambda q, call: _attention_rows(q, k, v, mask, scale, call, rate)  # noqa: E731
    length = q.shape[1]
    if not call.on_cpu() or length <= ATTENTION_BLOCK:
        return rows(q, call)
    blocks = -(-length // ATTENTION_BLOCK)
    q = jnp.pad(q, ((0, 0), (0, blocks * ATTENTION_BLOCK - length), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(q.shape[0], blocks, ATTENTION_BLOCK, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda x: rows(x[0], call.fold(x[1])), (q, jnp.arange(blocks)))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1, *out.shape[3:])[:, :length]


def _attention_rows(q, k, v, mask, scale, call, rate):
    scores = jnp.einsum("bthk,bshk->bhts", q * scale, k).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, -1), rate, call, 0)
    return jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v)
