"""Adapters as values: put on a model, taken off, swapped. Every function returns a new Slim; none changes one.

A `Bundle` is one adapter by itself: what its blocks get in the Spec, its arrays under the names they have in a model
with one slot, and the output layer if that was trained too. A model holds any number of them ("slots": a leading axis
of every adapter array); which one a row uses is an array, so that choosing and swapping compile nothing again.
"""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import bind
from jaxslim.models.roles import FAMILIES, roles
from jaxslim.models.roles import blocks as every
from jaxslim.slim import Array, Slim
from jaxslim.spec import Adapter, Spec, SpecError, canonical, nearest

LEAF = re.compile(r"\.adapter\.(norm|down|up)\.(weight|bias)$|\.lora_[AB]\.weight$|\.adapter_layer\.")
SAMPLE = 4096   # numbers of each array that go into a base's fingerprint
FREE = ("width", "slots", "scale", "bias")   # in which adapters that share a block may differ


class AdapterError(ValueError):
    """An adapter that does not fit; says which block or leaf, and what to do."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One adapter. `blocks`: block id -> {"adapter": {...}} or {"lora": {...}}, without slots."""

    blocks: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Array]
    head: Mapping[str, Array] = dataclasses.field(default_factory=dict)    # the output layer, if it goes along
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)      # base, family, method, ...

    @property
    def size(self) -> int:
        """Numbers in the adapter, the output layer left out."""
        return sum(int(np.size(v)) for v in self.params.values())


# ---- on a model ----


def insert(model: Slim, placement: Mapping[str, Mapping[str, Any]], key=None, init: str = "identity") -> Slim:
    """The model with new adapters on the blocks of `placement`: the up matrices zero, the down ones random.

    Args: init: "identity" (biases zero: the same outputs as before) or "praxis" (biases random, as its code has them).
    """
    spec = model.spec
    for block, fields in placement.items():
        old = spec.blocks.get(block, {})
        if taken := [r for r in fields.get("lora", {}) if r in old.get("lora", {})] or (
                ["adapter"] if "adapter" in fields and "adapter" in old else []):
            raise SpecError(f"Block {block} has {', '.join(taken)} already; delete or merge that adapter first.")
        lora = {"lora": {**old.get("lora", {}), **fields["lora"]}} if "lora" in fields else {}
        spec = spec.with_block(block, **{**fields, **lora})
    seed = 0 if key is None else np.asarray(jax.random.key_data(key))
    rng, params = np.random.default_rng(seed), dict(model.params)
    for name, want in bind.shapes(spec).items():
        if name in params:
            continue
        value = np.zeros(want.shape, np.float32)
        if name.endswith("norm.weight"):
            value += 1
        elif name.endswith("down.weight"):
            value = xavier(rng, want.shape)
        elif name.endswith("lora_A.weight"):
            value = rng.uniform(-1, 1, want.shape).astype(np.float32) * want.shape[-1] ** -0.5
        elif init == "praxis" and name.endswith(("down.bias", "up.bias")):
            value = rng.uniform(-1, 1, want.shape).astype(np.float32) * (3 / want.shape[-1]) ** 0.5
        params[name] = jnp.asarray(value)
    return model.replace(spec=spec, params=params)


def xavier(rng, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform with variance 2 / (in + out) over the last two axes."""
    return rng.uniform(-1, 1, shape).astype(np.float32) * np.float32((6 / (shape[-1] + shape[-2])) ** 0.5)


def has_bias(spec: Spec, block: str) -> bool:
    """Whether the linear that ends a block has a bias; adapters beside it have one only then."""
    return f"{roles(spec, block)['o' if 'o' in roles(spec, block) else 'down']}.bias" in bind.shapes(spec)


def leaves(spec: Spec, block: str) -> list[str]:
    """Names of the adapter and LoRA arrays of a block."""
    fields, names = spec.blocks.get(block, {}), roles(spec, block)
    found = [f"{names[r]}.lora_{x}.weight" for r in fields.get("lora", {}) for x in "AB"]
    if "adapter" in fields:
        found += [f"{names['owner']}.adapter.{part}.{leaf}" for part in ("norm", "down", "up")
                  for leaf in ("weight", "bias")]
    return [name for name in found if name in bind.shapes(spec)]


def up_leaves(spec: Spec, block: str) -> list[str]:
    """Those that scale what a block's adapter adds."""
    return [name for name in leaves(spec, block) if ".adapter.up." in name]


def blocks(spec: Spec) -> list[str]:
    """Blocks with an adapter or LoRA that is not merged."""
    return [b for b, f in spec.blocks.items()
            if f.get("lora") or "adapter" in f and f["adapter"]["kind"] != "merged"]


def drop(model: Slim, without: list[str]) -> Slim:
    """The model without the adapters of these blocks."""
    params, spec = dict(model.params), model.spec
    for block in without:
        for name in leaves(spec, block):
            del params[name]
        spec = spec.with_block(block, adapter=None, lora=None)
    return model.replace(spec=spec, params=params, active=model.active if spec.slots else None)


def in_order(spec: Spec) -> list[str]:
    """Blocks with adapters, from the lowest layer up."""
    return sorted(blocks(spec), key=every(spec).index)


def curve(model: Slim, score, order: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Scores with ever fewer adapters: [{"kept", "dropped", "parameters", "score"}], the whole model first.

    Args:
      score: model -> number (or dict). Dropped adapters are zeroed, so everything compiles once.
      order: blocks in the order in which their adapters go; None = from the lowest layer up, as the TPA paper prunes.
    """
    order, params, gone = list(in_order(model.spec) if order is None else order), dict(model.params), None
    left, rows = sum(np.size(params[k]) for b in order for k in leaves(model.spec, b)), []
    for kept in range(len(order), -1, -1):
        rows.append({"kept": kept, "dropped": gone, "parameters": int(left),
                     "score": score(model.replace(params=dict(params)))})
        if kept:
            gone = order[len(order) - kept]
            left -= sum(np.size(params[k]) for k in leaves(model.spec, gone))
            params |= {k: jnp.zeros_like(params[k]) for k in leaves(model.spec, gone)
                       if ".adapter.up." in k or k.endswith("lora_B.weight")}
    return rows


def base(model: Slim) -> Slim:
    """The model without its adapters (merged ones stay); an output layer that came with one stays too."""
    spec, gone = _bare(model.spec)
    return model.replace(spec=spec, params={k: v for k, v in model.params.items() if k not in gone}, adapters=(),
                         active=None)


@functools.lru_cache(maxsize=64)
def _bare(spec: Spec) -> tuple[Spec, frozenset[str]]:
    """A Spec without adapters, and the names that go with them."""
    gone = frozenset(name for b in blocks(spec) for name in leaves(spec, b))
    for block in blocks(spec):
        spec = spec.with_block(block, adapter=None, lora=None)
    return spec, gone


# ---- several on one model ----


def index(model: Slim, name: str | None) -> int:
    """Slot of the adapter `name`; None is the only one."""
    if name is None and len(model.adapters) == 1:
        return 0
    if name not in model.adapters:
        raise AdapterError(f"No adapter {name!r} on this model; it has {', '.join(model.adapters) or 'none'}."
                           f"{nearest(str(name), model.adapters)}")
    return model.adapters.index(name)


def ids(model: Slim, names) -> np.ndarray:
    """`adapter_ids` (B,) of rows that want these adapters by name; None is the model without one."""
    return np.array([-1 if n is None else index(model, n) for n in names], np.int32)


def extract(model: Slim, name: str | None = None, head: bool = False, **meta: Any) -> Bundle:
    """One adapter of a model, by itself. `head`: with the output layer (or the decoder)."""
    from jaxslim.methods.adapter import is_head

    slot, many = index(model, name), model.spec.slots > 1
    params = {leaf: model.params[leaf][slot] if many else model.params[leaf]
              for b in blocks(model.spec) for leaf in leaves(model.spec, b)}
    return Bundle({b: _without_slots(model.spec.blocks[b]) for b in blocks(model.spec)}, params,
                  {k: v for k, v in model.params.items() if head and is_head(k)}, meta)


def _without_slots(fields: Mapping[str, Any]) -> dict[str, Any]:
    clean = lambda f: {k: v for k, v in f.items() if k != "slots"}  # noqa: E731
    return ({"adapter": clean(fields["adapter"])} if "adapter" in fields else {}) | (
        {"lora": {r: clean(f) for r, f in fields["lora"].items()}} if fields.get("lora") else {})


def put(model: Slim, name: str, bundle: Bundle) -> Slim:
    """The model with `bundle` as its adapter `name`, a new slot or in place of the one that has the name.

    In place, and no wider than what the slot has, only arrays change: whatever was compiled stays so.
    """
    head = dict(bundle.head)
    if not bundle.blocks:   # MMS: all of it is stored in the model already
        return _with_head(model, head)
    if name in model.adapters and (fit := _fitted(model.spec, bundle)) is not None:
        new = {k: jnp.asarray(v) for k, v in fit.items()}
        if model.spec.slots > 1:
            new = _set({k: model.params[k] for k in new}, new, model.adapters.index(name))
        return _with_head(model.replace(params={**model.params, **new}), head)
    others = {n: extract(model, n) for n in model.adapters if n != name}
    order = {n: bundle if n == name else others[n] for n in dict.fromkeys((*model.adapters, name))}
    out = stack(base(model), order)
    active = model.active
    if len(order) > 1 and active is None:   # who was alone stays the one that is used
        active = np.int32(0)
    return _with_head(out.replace(active=active), head)


@jax.jit
def _set(old: dict[str, Array], new: dict[str, Array], slot: Array) -> dict[str, Array]:
    return {k: v.at[slot].set(new[k]) for k, v in old.items()}


def delete(model: Slim, name: str) -> Slim:
    """The model without the adapter `name`; the first of those left is used."""
    slot = index(model, name)
    left = {n: extract(model, n) for i, n in enumerate(model.adapters) if i != slot}
    return stack(base(model), left).replace(active=np.int32(0) if len(left) > 1 else None)


def stack(model: Slim, bundles: Mapping[str, Bundle]) -> Slim:
    """A model without adapters, with these: narrower ones and absent blocks are filled up with zeros."""
    if not bundles:
        return model
    placement: dict[str, dict] = {}
    for bundle in bundles.values():
        for block, fields in bundle.blocks.items():
            mine = placement.setdefault(block, {})
            if "adapter" in fields:
                mine["adapter"] = _joined(block, mine.get("adapter"), fields["adapter"])
            for role, f in fields.get("lora", {}).items():
                old = mine.setdefault("lora", {}).get(role)
                mine["lora"][role] = dict(f) if old is None or old["rank"] < f["rank"] else old
    for fields in placement.values():
        for f in (fields.get("adapter"), *fields.get("lora", {}).values()):
            if f is not None and len(bundles) > 1:
                f["slots"] = len(bundles)
    out = insert(model, placement)
    fitted = [_fitted(out.spec, b, n) for n, b in bundles.items()]
    names = [k for k in out.params if k not in model.params]
    params = {k: jnp.stack([f[k] for f in fitted]) if len(fitted) > 1 else jnp.asarray(fitted[0][k]) for k in names}
    return out.replace(params={**out.params, **params}, adapters=tuple(bundles), active=None)


def _joined(block: str, old: Mapping | None, new: Mapping) -> dict:
    if old is None:
        return dict(new)
    for key in ("kind", "input", "norm", "act"):
        a, b = (getattr(Adapter(**{"input": None, **f}), key) for f in (old, new))
        if a != b:
            raise AdapterError(f"Block {block}: adapters with {key} {a!r} and {b!r} cannot stand on one model; merge "
                               "one, or use two models.")
    both = {**old, "width": max(old["width"], new["width"])}
    both.pop("bias", None)
    return both if old.get("bias", True) or new.get("bias", True) else {**both, "bias": False}


def _fitted(spec: Spec, bundle: Bundle, name: str | None = None) -> dict[str, np.ndarray] | None:
    """The bundle's arrays in the shapes of one slot of `spec`, zeros where it has nothing; scales go into the up
    matrices. None if it does not fit and has no `name` yet."""
    want, out = {k: x.shape for k, x in bind.shapes(spec).items()}, {}
    many = spec.slots > 1
    for block, fields in bundle.blocks.items():
        here = _without_slots(spec.blocks.get(block, {}))
        a, b = here.get("adapter"), fields.get("adapter")
        plain = lambda f: {k: v for k, v in f.items() if k not in FREE}  # noqa: E731
        fits = b is None or a is not None and plain(a) == plain(b) and a["width"] >= b["width"]
        fits = fits and all(r in here.get("lora", {}) and here["lora"][r]["rank"] >= f["rank"]
                            for r, f in fields.get("lora", {}).items())
        if not fits:
            return None
    for block in blocks(spec):
        mine, theirs = bundle.blocks.get(block, {}), spec.blocks[block]
        for leaf in leaves(spec, block):
            shape = want[leaf][1:] if many else want[leaf]
            value = bundle.params.get(leaf, np.zeros([0] * len(shape), np.float32))
            if leaf.endswith("lora_B.weight") and value.size:
                role = next(r for r in theirs["lora"] if leaf.startswith(roles(spec, block)[r] + ".lora_"))
                own, ours = (f["alpha"] / f["rank"] for f in (mine["lora"][role], theirs["lora"][role]))
                value = value if own == ours else value * np.float32(own / ours)
            elif ".adapter.up." in leaf and value.size:
                own, ours = mine["adapter"].get("scale", 1.0), theirs["adapter"].get("scale", 1.0)
                value = value if own == ours else value * np.float32(own / ours)
            if value.shape != shape:
                value = np.pad(value, [(0, full - have) for have, full in zip(value.shape, shape, strict=True)])
            out[leaf] = value.astype(np.float32) if value.dtype != np.float32 else value
    return out


def _with_head(model: Slim, head: Mapping[str, Array]) -> Slim:
    if not head:
        return model
    spec, params = model.spec, {**model.params, **{k: jnp.asarray(v, jnp.float32) for k, v in head.items()}}
    last = roles(spec, "head")["owner"] + ".weight"
    if spec.head == "ctc" and last in head and len(head[last]) != spec["vocab_size"]:
        spec = spec.replace(config={**spec.config, "vocab_size": len(head[last])})
    bind.check(spec, params, "The output layer of the adapter")
    return model.replace(spec=spec, params=params)


def select(model: Slim, name: str | None = None) -> Slim:
    """The model with one of its adapters, as its only one."""
    if model.spec.slots == 1:
        return model.replace(active=None)
    slot = index(model, name)
    return stack(base(model), {model.adapters[slot]: extract(model, model.adapters[slot])})


# ---- the base ----


def base_fingerprint(model: Slim) -> str:
    """sha256 of what an adapter stands on: family, changed blocks, and a sample of every array of the encoder.

    Up to SAMPLE evenly spaced numbers an array, as bfloat16: the same for a base stored in bfloat16, and fast enough to
    check a 600 M base at every load. The output layer is left out, since adapters may bring their own.
    """
    bare = base(model)
    inner = "" if bare.spec.head == "none" else FAMILIES[bare.spec.family].prefix + "."
    digest = hashlib.sha256(f"{bare.spec.family} {canonical(dict(bare.spec.blocks))}".encode())
    for name in sorted(k for k in bare.params if k.startswith(inner) and not k.startswith(bind.AUXILIARY)):
        x = np.asarray(bare.params[name]).reshape(-1)
        x = x[:: max(1, x.size // SAMPLE)]
        x = x.astype(jnp.bfloat16).view(np.uint16) if jnp.issubdtype(x.dtype, jnp.floating) else x
        digest.update(f"{name.removeprefix(inner)} {np.shape(bare.params[name])} ".encode() + x.tobytes())
    return digest.hexdigest()
