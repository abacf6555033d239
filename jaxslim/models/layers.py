"""Layers with Hugging Face names and torch memory layout, and the functions they share.

Shape legend (all files): B batch, T frames (S when keys differ from queries), D model, H heads, K head dim, F FFN
units or features, R rank, V vocab, C channels, W conv width. Linear weights are (out, in), conv weights (out, in, W).
Parameters are created as shapes; `bind.py` puts the arrays in. Norms, softmax and sums over time run in fp32.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CHUNK = 512   # frames of long audio that go through frame-wise layers at a time on CPU


class Call(NamedTuple):
    """How one forward pass runs: `key` is an array or None, the rest is static."""

    key: jax.Array | None = None
    taps: frozenset[str] = frozenset()
    hidden: bool = False
    remat: str = "none"          # none | dots | full
    attention: str = "auto"      # auto | dense | blocked
    whole: bool = False          # never in chunks: adapter ids by frame
    layers: str = "loop"         # loop | scan
    collect: Callable | None = None   # (name, weight made from others) -> whole on every device

    def on_cpu(self) -> bool:
        """Whether to run the programs made for the CPU; "dense" asks for the simple ones everywhere."""
        return self.attention == "blocked" or self.attention == "auto" and jax.default_backend() == "cpu"

    def chunked(self, frames: int) -> bool:
        """Whether `frames` frames are many enough to go through the CPU in chunks (evaluation only)."""
        return self.key is None and not self.whole and self.on_cpu() and frames >= 2 * CHUNK

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
        self.slots, self.adapter_ids = lora.get("slots", 1) if lora else 0, None
        if lora:
            lead = (self.slots,) if self.slots > 1 else ()
            self.lora_A, self.lora_B = Weight(*lead, lora["rank"], din), Weight(*lead, dout, lora["rank"])
        self.lora_scale = lora["alpha"] / lora["rank"] if lora else None
        self.factored, self.has_bias, self.int8 = rank is not None, bias, False

    def quantize(self, dynamic: bool = False) -> None:
        """`weight` becomes int8 and gets a scale for each output (out,). `dynamic`: x becomes int8 too, as it comes."""
        self.weight = nnx.Param(jax.ShapeDtypeStruct(self.weight.shape, jnp.int8))
        self.weight_scale, self.int8 = param(self.weight.shape[0]), "dynamic" if dynamic else "weight"

    def __call__(self, x: jax.Array) -> jax.Array:                       # (..., in) -> (..., out)
        if self.int8 == "dynamic":
            y = int8_matmul(x, self.weight[...], self.weight_scale[...])
        else:
            y = matmul(matmul(x, self.down()), self.up()) if self.factored else matmul(x, self.weight[...])
        if self.int8 == "weight":
            y = y * self.weight_scale[...].astype(y.dtype)
        if self.lora_scale is not None:
            y = y + self.lora_scale * bottleneck(x, self.lora_A(), self.lora_B(), self.adapter_ids)
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


class Weight(nnx.Module):
    """A bare `<name>.weight`."""

    def __init__(self, *shape: int):
        self.weight = param(*shape)

    def __call__(self) -> jax.Array:
        return self.weight[...]


def lookup(table: jax.Array, ids: jax.Array, padding: int | None) -> jax.Array:
    """Rows (..., D) of an embedding (N, D); that of `padding` is never trained, as torch's `padding_idx`."""
    rows = table[ids]
    return rows if padding is None else jnp.where((ids == padding)[..., None], jax.lax.stop_gradient(rows), rows)


class Bias(nnx.Module):
    """A bare `<name>.bias`: all that is left of a linear whose inputs were pruned away."""

    def __init__(self, dim: int):
        self.bias = param(dim)

    def __call__(self) -> jax.Array:
        return self.bias[...]


class LayerNorm(nnx.Module):
    """With `gated`, mean and variance are those of the open channels (gates.py), as they are once the rest is cut."""

    def __init__(self, dim: int, eps: float = 1e-5, gated: bool = False):
        self.weight, self.bias, self.eps, self.gated = param(dim), param(dim), eps, gated
        if gated:
            self.open = param(dim)                                       # 1 = open, 0 = closed

    def __call__(self, x: jax.Array) -> jax.Array:                       # (..., D)
        mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
        if self.gated:
            share = self.open[...] / jnp.maximum(self.open[...].sum(), 1.0)
            mean = lambda h: (h * share).sum(-1, keepdims=True)  # noqa: E731
        h = x.astype(jnp.float32)
        h = h - mean(h)
        h = h * jax.lax.rsqrt(mean(h * h) + self.eps)
        return (h * self.weight[...] + self.bias[...]).astype(x.dtype)


class TimeNorm(nnx.Module):
    """torch GroupNorm with one channel a group: each channel over the whole time axis, padding included."""

    def __init__(self, dim: int, eps: float = 1e-5):
        self.weight, self.bias, self.eps = param(dim), param(dim), eps

    def __call__(self, x: jax.Array, moments=None) -> jax.Array:         # (B, T, C)
        """`moments`: mean and variance (B, 1, C) of a whole clip of which `x` is a part."""
        mean, variance = self.moments(x) if moments is None else moments
        h = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (h * self.weight[...] + self.bias[...]).astype(x.dtype)

    @staticmethod
    def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = x.astype(jnp.float32)
        mean = h.mean(1, keepdims=True)
        return mean, ((h - mean) ** 2).mean(1, keepdims=True)


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

    def __call__(self, x: jax.Array, stride: int, padding: int = 0) -> jax.Array:   # (B, T, C) -> (B, T', C')
        y = conv1d(x, self.weight[...], stride, padding)
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y

    def pointwise(self, x: jax.Array) -> jax.Array:                      # (B, T, C) -> (B, T, C')
        """A convolution of width 1 as a matrix product."""
        y = matmul(x, self.weight[...][:, :, 0])
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (..., in) times w (out, in) transposed -> (..., out). As one flat product: its gradients are twice as fast."""
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), w.astype(x.dtype), (((1,), (1,)), ((), ())))
    return y.reshape(*x.shape[:-1], w.shape[0])


def int8_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x (N, in) -> int8 (N, in) and scales (N, 1) of its rows, symmetric: round(x / s), s = max |x| / 127."""
    x = x.astype(jnp.float32)
    s = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-12) * np.float32(1 / 127)
    return jnp.round(x / s).astype(jnp.int8), s


@jax.custom_vjp
def int8_matmul(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """x (..., in) times int8 w (out, in) transposed, whose outputs have scales (out,), with x in int8 by row, summed in
    int32, exactly for up to 133,000 inputs. Gradients are those of the product with x as it was (straight through)."""
    q, s = int8_rows(x.reshape(-1, x.shape[-1]))
    y = jax.lax.dot_general(q, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * s * scale).astype(x.dtype).reshape(*x.shape[:-1], w.shape[0])


def _int8_forward(x, w, scale):
    y = int8_matmul(x, w, scale)
    return y, (y, w, scale)


def _int8_backward(kept, dy):
    y, w, scale = kept
    dx = jnp.einsum("...o,oi->...i", dy * scale.astype(dy.dtype), w.astype(dy.dtype))
    dscale = (dy.astype(jnp.float32) * y.astype(jnp.float32)).reshape(-1, len(scale)).sum(0) / scale
    return dx, None, dscale


int8_matmul.defvjp(_int8_forward, _int8_backward)


def bottleneck(x: jax.Array, down: jax.Array, up: jax.Array, ids: jax.Array | None = None, act=lambda h: h,
               down_bias: jax.Array | None = None, up_bias: jax.Array | None = None) -> jax.Array:
    """up act(down x) of an adapter or LoRA, (B, ..., in) -> (B, ..., out), zero where the id is -1.

    down (n, in), up (out, n); with a leading axis of slots, `ids` chooses: one for all (), by example (B,), or by frame
    (B, T). By example the weights are gathered; by frame every slot is computed and all but the chosen one zeroed.
    """
    plus = lambda y, b: y if b is None else y + b.astype(y.dtype)  # noqa: E731
    if ids is None or down.ndim == 2 or ids.ndim == 0:
        if down.ndim == 3:
            down, up, down_bias, up_bias = (None if w is None else w[jnp.maximum(ids, 0)]
                                            for w in (down, up, down_bias, up_bias))
        y = plus(matmul(act(plus(matmul(x, down), down_bias)), up), up_bias)
    elif ids.ndim == 1:
        pick = lambda w: None if w is None else w[jnp.maximum(ids, 0)]  # noqa: E731
        over = lambda b: None if b is None else b.reshape(len(b), *(1,) * (x.ndim - 2), -1)  # noqa: E731
        h = act(plus(jnp.einsum("b...i,bni->b...n", x, pick(down).astype(x.dtype)), over(pick(down_bias))))
        y = plus(jnp.einsum("b...n,bon->b...o", h, pick(up).astype(x.dtype)), over(pick(up_bias)))
    else:
        slots, width, _ = down.shape
        chosen = jax.nn.one_hot(ids, slots, dtype=x.dtype)                                           # (B, T, S)
        h = matmul(x, down.reshape(slots * width, -1)).reshape(*x.shape[:2], slots, width)
        h = act(plus(h, down_bias)) * chosen[..., None]
        y = matmul(h.reshape(*x.shape[:2], -1), jnp.moveaxis(up, 0, 1).reshape(up.shape[1], -1))
        y = y if up_bias is None else y + matmul(chosen, up_bias.T)
    if ids is None:
        return y
    return jnp.where((ids >= 0).reshape(ids.shape + (1,) * (y.ndim - ids.ndim)), y, 0)


def conv1d(x: jax.Array, w: jax.Array, stride: int, padding: int = 0) -> jax.Array:
    """Convolution over time, zeros on both sides: x (B, T, C), w (out, C, W) -> (B, T', out)."""
    w = jax.lax.optimization_barrier(w.astype(x.dtype).transpose(2, 1, 0))  # XLA's CPU is slow on other orders
    return jax.lax.conv_general_dilated(x, w, (stride,), [(padding, padding)],
                                        dimension_numbers=("NWC", "WIO", "NWC"))


def grouped_conv1d(x: jax.Array, w: jax.Array, groups: int, padding: tuple[int, int], call: Call) -> jax.Array:
    """Grouped convolution over time: x (B, T, C), w (out, C / groups, W) -> (B, T', out).

    XLA's grouped convolution is slow on CPU, its gradients 13 times slower than this: overlap-save blocks of 2 W
    frames, taken to frequencies and back by products with a DFT matrix, where the convolution is a small product for
    each frequency and group. fp32 whatever the dtype.
    """
    if not call.on_cpu():
        return jax.lax.conv_general_dilated(x, w.astype(x.dtype), (1,), [padding], feature_group_count=groups,
                                            dimension_numbers=("NWC", "OIW", "NWC"))
    (dout, din, width), size = w.shape, 2 * w.shape[2]
    rows, length = x.shape[0], x.shape[1] + sum(padding)
    out = length - width + 1
    blocks = -(-out // width)
    tail = (blocks + 1) * width - length
    h = jnp.pad(x.astype(jnp.float32), ((0, 0), (padding[0], padding[1] + tail), (0, 0)))
    h = h.reshape(rows, blocks + 1, width, groups * din)
    h = jnp.concatenate([h[:, :-1], h[:, 1:]], 2)                                        # (B, N, 2W, C)
    bins = width + 1
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(bins)) / size
    forward = np.stack([np.cos(angle), -np.sin(angle)], 1).astype(np.float32)            # (2W, 2, bins)
    h = jnp.einsum("bnlc,lzf->zfbnc", h, forward).reshape(2, bins, rows * blocks, groups, din)
    g = jnp.einsum("oik,kzf->zfoi", w.astype(jnp.float32), forward[:width]).reshape(2, bins, groups, -1, din)
    product = lambda a, b: jnp.einsum("fngi,fgoi->fgno", a, b)  # noqa: E731
    real = product(h[0], g[0]) + product(h[1], g[1])                                     # correlation: conj(g)
    imaginary = product(h[1], g[0]) - product(h[0], g[1])
    scale = np.where((np.arange(bins) % width) == 0, 1.0, 2.0)[:, None] / size           # bins 0 and W occur once
    back = np.stack([np.cos(angle.T) * scale, -np.sin(angle.T) * scale]).astype(np.float32)[:, :, :width]
    y = jnp.einsum("fgno,ft->ntgo", real, back[0]) + jnp.einsum("fgno,ft->ntgo", imaginary, back[1])
    return y.reshape(rows, blocks * width, dout)[:, :out].astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU; jax.nn.gelu goes through erfc, which is 2.7 times slower on CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "swish": jax.nn.silu, "tanh": jnp.tanh,
               "gelu_new": jax.nn.gelu, "gelu_pytorch_tanh": jax.nn.gelu}


def activation(name: str):
    if name not in ACTIVATIONS:
        raise ValueError(f"Activation {name!r} of the config is not supported; known are {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def two_activations(act, other, width: int):
    """`act`, but `other` on the last `width` units."""
    return lambda x: jnp.where(jnp.arange(x.shape[-1]) < x.shape[-1] - width, act(x), other(x))


def dropout(x: jax.Array, rate: float, call: Call, site: int) -> jax.Array:
    if call.key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(call.key, site), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def frame_mask(lengths: jax.Array | None, frames: int) -> jax.Array | None:
    """(B,) lengths -> (B, T) bool, True = valid; None stays None (nothing is padded)."""
    return None if lengths is None else jnp.arange(frames) < lengths[:, None]


def valid_frames(lengths: jax.Array | None, x: jax.Array) -> jax.Array:
    """`frame_mask` for x (B, T, ...), all True where nothing is padded: (B, T)."""
    mask = frame_mask(lengths, x.shape[1])
    return jnp.ones(x.shape[:2], bool) if mask is None else mask


def zero_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x (B, T, ...) with padded frames set to zero."""
    return x if mask is None else jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)


POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def remat(fn, call: Call):
    """fn, keeping for the backward pass what `call.remat` says."""
    return fn if call.remat == "none" else jax.checkpoint(fn, policy=POLICIES[call.remat])


def run(layers, x: jax.Array, mask: jax.Array | None, call: Call, **shared):
    """All layers one after another: (B, T, D) -> (B, T, D), states (embedding, then every layer), taps."""
    if call.layers == "scan":
        from jaxslim.models import stack

        return stack.run(layers, x, mask, call, **shared)
    states, taps = [x], call.keep({"embedding": x}, mask)
    for layer in layers:
        with jax.named_scope(layer.name):
            x, new = remat(functools.partial(layer, mask=mask, call=call, **shared), call)(x)
        states.append(x)
        taps |= new
    return x, states, taps


def in_chunks(fn, x: jax.Array, call: Call) -> jax.Array:
    """fn(x) for a frame-wise fn on (B, T, D), long audio on CPU a chunk of frames at a time: what fn makes in between
    stays in the cache, so time stays proportional to T."""
    if not call.chunked(x.shape[1]):
        return fn(x)
    return from_chunks(jax.lax.map(fn, to_chunks(x)), x.shape[1])


def to_chunks(x: jax.Array) -> jax.Array:
    """(B, T, ...) -> (chunks, B, CHUNK, ...), zero padded at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)


def from_chunks(y: jax.Array, frames: int) -> jax.Array:
    """(chunks, B, frames of each, D) -> (B, frames, D)."""
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[-1])[:, :frames]
