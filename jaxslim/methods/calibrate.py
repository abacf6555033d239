"""Second moments of what flows through attention and FFN blocks, from one streaming pass over training data.

Nothing of the pass is kept but sums. A batch is one call of a jitted program that runs the model, watches the linears
of the wanted blocks and reduces at once (fp32, padding and filler rows left out); batches are added up in double
precision on the host. On a mesh the batch is split, the sums come back whole.

What is measured of a block, all means per frame:

    attention  q (H, K, K), q_mean (H, K): queries as the scores see them, bias included
               k (H, K, K): keys about the mean of their own clip; a score that all keys of a row share changes nothing
               k_means (H, K, K): the clips' means; k + k_means is the plain second moment
               p (H, K, K): position keys of Transformer-XL about the mean over a row
               c (H, V, V), c_mean (H, V): contexts, what the output linear reads
    ffn        x (D, D), x_mean (D,): input; y (D, D), y_mean (D,): output; h (F, F), h_mean (F,): units behind the
               activation; slope (2, F): mean and mean square of the activation's derivative
"""
from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import bind
from jaxslim.models import layers as L
from jaxslim.models.roles import roles
from jaxslim.slim import Slim, inputs
from jaxslim.spec import Spec, kind
from jaxslim.train import mesh as M

log = logging.getLogger(__name__)
HELD_BACK = {"test", "heldout", "validation", "valid", "dev", "eval"}
# what is measured for a kind of compression
NEEDS = {"qk": ("q", "k"), "vo": ("c",), "units": ("h",), "up": ("x", "slope"), "down": ("y",)}
WORDS = {"q": "queries", "k": "keys", "p": "position keys", "c": "contexts", "x": "inputs", "y": "outputs",
         "h": "units", "slope": "slopes of the activation"}


class CalibrationError(ValueError):
    """Statistics that cannot be used; says which block, what is wrong, and what is missing."""


class Calibration(NamedTuple):
    moments: dict[str, dict[str, np.ndarray]]   # block -> name -> float64, as in the module docstring
    frames: dict[str, int]                      # block -> frames seen


class Everything(L.Call):
    """A call whose blocks see whole clips, never chunks: what is watched must not be inside a loop."""

    def chunked(self, frames: int) -> bool:
        return False


def calibrate(model: Slim, batches, wanted: Mapping[str, tuple[str, ...]], *, frames: int = 0, memory: float = 2e9,
              mesh=None) -> Calibration:
    """Moments of the blocks in `wanted` (block -> kinds of compression: keys of NEEDS).

    Args:
      batches: `batches()` is one pass over training data (data.batch.Batches, or any callable).
      frames: stop after so many valid frames; 0 = the whole pass.
      memory: bytes of sums at most; blocks that do not fit together are measured in several passes.
      mesh: where it runs; by default all devices.
    Raises:
      CalibrationError: the data is a test or validation split by its name, there is no frame, or a value is not finite.
    """
    refuse_held_back(batches)
    mesh = mesh or M.make()
    params = M.place(model.params, mesh)
    moments, seen = {}, {}
    for some in _groups(model.spec, wanted, memory):
        sums: dict[str, dict[str, np.ndarray]] = {}
        for batch in batches():
            for block, new in measure(model.spec, params, batch, some, mesh).items():
                old = sums.setdefault(block, {})
                for name, x in new.items():
                    if not np.isfinite(x).all():
                        raise CalibrationError(f"Calibration: the {WORDS[name.partition('_')[0]]} of {block} are not "
                                               "finite; look for broken audio (`jaxslim data check`) or weights.")
                    old[name] = old.get(name, 0.0) + x
            if frames and max(sums[b]["n"] for b in some) >= frames:
                break
        if not sums or not all(s["n"] > 0 for s in sums.values()):
            raise CalibrationError("Calibration: the data has no frame. Give the recipe training data.")
        for block, s in sums.items():
            counts = {"k": s.get("n_keys"), "k_means": s.get("n_keys"), "p": s.get("n_pairs")}
            moments[block] = {name: x / counts.get(name, s["n"]) for name, x in s.items() if not name.startswith("n")}
            seen[block] = int(s["n"])
    log.info("Calibration: %d frames, %d blocks.", max(seen.values()), len(seen))
    return Calibration(moments, seen)


def refuse_held_back(batches) -> None:
    """Raises CalibrationError when the data's own name says it is for scoring."""
    name = getattr(getattr(batches, "rows", None), "name", "")
    for part in name.split("+"):
        last = re.split(r"[/\\:]", part.strip().rstrip("/"))[-1].lower()
        if found := HELD_BACK & set(re.split(r"[^a-z]+", last)):
            raise CalibrationError(f"Calibration on {part.strip()!r} is refused: its name says {found.pop()!r}, and "
                                   "what is scored must not be calibrated on. Use training data.")


def require(block: str, have: int, rank: int, what: str, per_rank: int = 4) -> None:
    """Raises CalibrationError when `have` frames are too few to fit `rank` directions (four frames each is ours)."""
    if have < per_rank * rank:
        raise CalibrationError(
            f"Calibration saw {have} frames, but {what} {rank} of {block} needs {per_rank * rank} ({per_rank} for "
            f"each); {per_rank * rank - have} more are missing. Give more training data or a larger `frames`.")


def _groups(spec: Spec, wanted: Mapping[str, tuple[str, ...]], memory: float) -> list[dict[str, tuple[str, ...]]]:
    """Blocks in groups whose sums (double on the host, single on the device) stay below `memory` bytes."""
    groups, used = [{}], 0.0
    for block, kinds in wanted.items():
        if kind(block) in ("attention", "cross"):
            a = spec.attention(block)
            size = len(a.heads) * (3 * a.qk_dim**2 + a.v_dim**2)
        else:
            size = 2 * spec.of(block, "hidden_size") ** 2 + ("units" in kinds) * spec.ffn(block).units ** 2
        if groups[-1] and used + 12 * size > memory:
            groups.append({})
            used = 0.0
        groups[-1][block] = kinds
        used += 12 * size
    return groups


def measure(spec: Spec, params, batch: dict[str, Any], wanted: Mapping[str, tuple[str, ...]],
            mesh) -> dict[str, dict[str, np.ndarray]]:
    """Sums over one batch (this host's rows of it) as float64 numpy; `n`, `n_keys`, `n_pairs` are counts."""
    sums = program(spec, tuple((b, tuple(k)) for b, k in wanted.items()), mesh)(params, place(batch, mesh))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))


def place(batch: dict[str, Any], mesh) -> dict[str, jax.Array]:
    """What a model is called with, on the mesh, and `real` (B,): False for filler rows and those that make the batch
    divisible."""
    given = inputs(batch)
    rows = len(next(iter(given.values())))
    missing = -rows % max(M.shards(mesh) // jax.process_count(), 1)
    given = {k: np.pad(np.asarray(v), [(0, missing)] + [(0, 0)] * (np.ndim(v) - 1)) for k, v in given.items()}
    real = np.pad(np.asarray(batch.get("row", np.zeros(rows))) >= 0, (0, missing))
    return M.batch({**given, "real": real}, mesh)


@functools.lru_cache(maxsize=32)
def program(spec: Spec, wanted, mesh):
    return jax.jit(functools.partial(_sums, spec, wanted), out_shardings=M.NamedSharding(mesh, M.P()))


def _sums(spec: Spec, wanted, params, given) -> dict[str, dict[str, jax.Array]]:
    given = dict(given)
    real, masks, seen = given.pop("real"), {}, {}

    class Call(Everything):
        def keep(self, values, mask):
            masks.update(dict.fromkeys(values, mask))
            return {}

    module = bind.bind(spec, params)
    for block, _ in wanted:
        for role, name in roles(spec, block).items():
            if role in ("q", "k", "o", "up", "down") or role == "pos" and f"{name}.weight" in params:
                _watch(module, name, seen)
    module(Call(), **given)
    out = {}
    for block, kinds in wanted:
        names, needs = roles(spec, block), {n for k in kinds for n in NEEDS[k]}
        x = seen[names["q" if "q" in names else "up"]][0]
        mask = masks[f"{block}.in"]
        if mask is None and block.startswith("decoder."):
            mask = given.get("decoder_attention_mask")
        mask = jnp.broadcast_to(real[:, None], x.shape[:2]) if mask is None else mask.astype(bool) & real[:, None]
        if "q" in names:
            out[block] = _attention(spec, block, names, seen, mask, real, needs)
        else:
            out[block] = _ffn(spec, block, names, seen, mask, needs)
    return out


def _watch(module, name: str, seen: dict) -> None:
    """Makes linear `name` of this trace's module leave its input and output in `seen`."""
    linear = bind.submodule(module, name)
    base = type(linear)

    def call(self, x):
        y = base.__call__(self, x)
        seen[name] = x, y
        return y

    linear.__class__ = type(base.__name__, (base,), {"__call__": call})


def _gram(x, mask):
    """x (B, T, ..., K), mask (B, T) -> sum of x x^T (..., K, K) and of x (..., K), fp32."""
    x = L.zero_padding(x.astype(jnp.float32), mask)
    return jnp.einsum("bt...k,bt...l->...kl", x, x, precision="highest"), x.sum((0, 1))


def _attention(spec: Spec, block: str, names, seen, mask, real, needs) -> dict[str, jax.Array]:
    heads = len(spec.attention(block).heads)
    split = lambda y: y.reshape(*y.shape[:-1], heads, -1).astype(jnp.float32)  # noqa: E731
    out = {"n": mask.sum().astype(jnp.float32)}
    if "q" in needs:
        out["q"], out["q_mean"] = _gram(split(seen[names["q"]][1]), mask)
        k = split(seen[names["k"]][1])                                                   # (B, S, H, K)
        keys = mask if kind(block) != "cross" else jnp.broadcast_to(real[:, None], k.shape[:2])
        count = keys.sum(1).astype(jnp.float32)                                          # (B,)
        mean = L.zero_padding(k, keys).sum(1) / jnp.maximum(count, 1.0)[:, None, None]   # (B, H, K)
        out["k"] = _gram(k - mean[:, None], keys)[0]
        out["k_means"] = jnp.einsum("b,bhk,bhl->hkl", count, mean, mean, precision="highest")
        out["n_keys"] = count.sum()
        if "pos" in names and names["pos"] in seen:
            out["p"], out["n_pairs"] = _positions(split(seen[names["pos"]][1]), count, mask), (count**2).sum()
    if "c" in needs:
        out["c"], out["c_mean"] = _gram(split(seen[names["o"]][0]), mask)
    return out


def _positions(p, count, mask):
    """Position keys p (2 T - 1, H, K), row i for distance T - 1 - i: sum over all pairs of frames of a clip of
    p p^T about the mean over the pair's query -> (H, K, K). count (B,) frames, mask (B, T)."""
    T = mask.shape[1]
    distance = jnp.abs(jnp.arange(T - 1, -T, -1))
    pairs = jnp.maximum(count[:, None] - distance, 0.0).sum(0)                           # (2 T - 1,)
    total = jnp.einsum("p,phk,phl->hkl", pairs, p, p, precision="highest")
    running = jnp.concatenate([jnp.zeros_like(p[:1]), jnp.cumsum(p, 0)])                 # (2 T, H, K)
    first = T - 1 - jnp.arange(T)                                                        # row of key 0, by query
    last = first[None] + count[:, None].astype(jnp.int32)                                # (B, T)
    mean = (running[last] - running[first][None]) / jnp.maximum(count, 1.0)[:, None, None, None]
    weight = jnp.where(mask, count[:, None], 0.0)
    return total - jnp.einsum("bt,bthk,bthl->hkl", weight, mean, mean, precision="highest")


def _ffn(spec: Spec, block: str, names, seen, mask, needs) -> dict[str, jax.Array]:
    (x, before), (h, y) = seen[names["up"]], seen[names["down"]]
    out = {"n": mask.sum().astype(jnp.float32)}
    for name, value in (("x", x), ("h", h), ("y", y)):
        if name in needs:
            out[name], out[f"{name}_mean"] = _gram(value, mask)
    if "slope" in needs:
        act = L.activation(spec.of(block, "hidden_act"))
        slope = jax.jvp(act, (before.astype(jnp.float32),), (jnp.ones(before.shape, jnp.float32),))[1]
        slope = L.zero_padding(slope, mask)
        out["slope"] = jnp.stack([slope.sum((0, 1)), (slope**2).sum((0, 1))])
    return out
