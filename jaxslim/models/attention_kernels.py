"""Softmax attention by others' kernels: cuDNN's on NVIDIA GPUs (jax.nn.dot_product_attention), splash attention on TPU
(jax.experimental.pallas.ops.tpu). Neither keeps the scores in memory. Both take key masks and causal attention; cuDNN
takes a bias on the scores too, splash values of another size than the keys. Neither has been run on hardware here:
splash runs in interpret mode in the tests and has been compiled by the TPU compiler, cuDNN has not been tried.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

BLOCKS = (512, 256, 128)   # of queries and keys at a time on TPU, the largest that divides the padded length


def cudnn_lacks(q, k, v, mask, rate: float, bias, causal: bool) -> str:
    """Why cuDNN cannot do it, or ''. Shapes as attention.attention."""
    if rate:
        return "attention dropout"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] != v.shape[-1]:
        return f"cuDNN attention takes keys and values of one size, not {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN attention takes head sizes of at most 128 in steps of 8, not {q.shape[-1]}"
    return ""


def cudnn(q, k, v, mask, scale: float, bias=None, causal: bool = False, implementation: str = "cudnn") -> jax.Array:
    """q (B, T, H, K), k, v (B, S, H, K), mask (B, [T,] S), bias (B, H, T, S) -> (B, T, H, K)."""
    seen = None if mask is None else mask[:, None] if mask.ndim == 3 else mask[:, None, None]         # (B, 1, T | 1, S)
    return jax.nn.dot_product_attention(q, k, v, None if bias is None else bias.astype(q.dtype), seen, scale=scale,
                                        is_causal=causal, implementation=implementation)


def splash_lacks(q, k, v, mask, rate: float, bias, causal: bool) -> str:
    """Why splash attention cannot do it, or ''."""
    if rate:
        return "attention dropout"
    if bias is not None:
        return "splash attention takes no bias on the scores"
    if mask is not None and mask.ndim == 3:
        return "splash attention takes masks of keys, not one for every query"
    if jax.device_count() > 1:
        return "a program over several devices does not split kernels"
    return ""


def splash(q, k, v, mask, scale: float, causal: bool = False, interpret: bool = False) -> jax.Array:
    """q (B, T, H, K), k (B, S, H, K), v (B, S, H, Kv), mask (B, S) -> (B, T, H, Kv). A row without any key sees its
    first one, which keeps it finite."""
    length, other = q.shape[1], k.shape[1]
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCKS[-1])) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    mask = mask | ((jnp.arange(other) == 0) & ~mask.any(1, keepdims=True))
    q, k, v, mask = pad(q * scale), pad(k), pad(v), pad(mask)
    kernel = _kernel(q.shape[2], q.shape[1], k.shape[1], causal, interpret)
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    ids = SegmentIds(jnp.ones(q.shape[:2], jnp.int32), mask.astype(jnp.int32))       # equal numbers see each other
    y = jax.vmap(kernel)(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)), ids)
    return y.transpose(0, 2, 1, 3)[:, :length]


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as s

    one = s.CausalMask((queries, keys)) if causal else s.FullMask((queries, keys))
    q, k = (next(b for b in BLOCKS if n % b == 0) for n in (queries, keys))
    blocks = s.BlockSizes(block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k,
                          block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k)
    with jax.ensure_compile_time_eval():  # made of the mask, once
        return s.make_splash_mha(s.MultiHeadMask([one] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1,
                                 interpret=interpret)
