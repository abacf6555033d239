"""`prng: hash`: random bits for dropout that cost few operations, for accelerators.

Threefry, JAX's default, spends about a hundred integer operations a number, which a TPU compiles for half a minute a
feed-forward block; the TPU's own generator (rbg) is not split over a mesh: every device draws the numbers of all (seen
in the compiled step). Here a number is a hash of its position and the key: a dozen operations, split with the array it
is for, and the same on every mesh. Keys are derived by Threefry. Good enough for dropout; not for cryptography.

The hash is `lowbias32` (Chris Wellons, Prospecting for hash functions, 2018), twice.
"""
from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extend

_THREEFRY = "threefry2x32"


def _hash(x: jax.Array) -> jax.Array:
    """lowbias32 of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Random bits of `shape`; key (2,) uint32. Positions count modulo 2**32."""
    if bit_width == 64:
        high, low = (_bits(k, 32, shape).astype(jnp.uint64) for k in _split(key, (2,)))
        return high << 32 | low
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    bits = _hash(_hash(place * np.uint32(0x9E3779B9) + key[0]) ^ key[1])
    return bits if bit_width == 32 else (bits >> (32 - bit_width)).astype(f"uint{bit_width}")


def _wrap(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key, impl=_THREEFRY)


def _seed(seed: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed, impl=_THREEFRY))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.key_data(jax.random.split(_wrap(key), shape))


def _fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(_wrap(key), data))


@functools.cache
def implementation():
    """For `jax.random.key(seed, impl=...)`."""
    return extend.define_prng_impl(key_shape=(2,), seed=_seed, split=_split, random_bits=_bits, fold_in=_fold_in,
                                   name="jaxslim_hash", tag="jsh")


def key(seed: int, prng: str) -> jax.Array:
    """A key of the generator `prng`: hash, or one of JAX's."""
    return jax.random.key(seed, impl=implementation() if prng == "hash" else prng)
