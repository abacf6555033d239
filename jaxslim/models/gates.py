"""Hard-concrete gates (Louizos et al., arXiv 1712.01312, section 2.3) on heads, units, channels, ranks and sub-layers.

A gate scales what one unit gives to the matrix that reads it, so `fold` multiplies the gates into those matrices and
leaves an ordinary model: no activation is touched, and a step costs a few products over weights. A unit whose gate is
zero then feeds nothing; `cut` leaves it out and the outputs stay what they were. That needs one more thing: a layer
norm over prunable channels takes mean and variance over the open ones (`layers.LayerNorm`, `open`).

* Places: after the activation for units and channels, before the output projection for heads. The ranks of Q-K and V-O
  are the inner dimensions of an attention block, each shared by its heads, best after `lowrank` has rotated them
  (`rotate`); their gates stand on keys and in front of the output projection. The channels of the
  last front-end convolution are gated behind the layer norm that reads them (DPHuBERT gates before it and keeps a
  vector of scales; ours needs none). A block's gate spares its output bias, which is all that an empty block keeps.
* `log_alpha` is the parameter, `<owner>.gate_heads | _units | _channels | _qk | _vo | _block`, fp32. Which blocks have
  gates stands in the Spec.
* Without a key (evaluation) as many units of a block are open as are expected to be, those with the largest log_alpha;
  rounding is carried on from layer to layer, so that the whole model keeps the expected count. This is ours: DPHuBERT
  rounds each layer by itself.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.models import positions
from jaxslim.models.roles import prefix, roles
from jaxslim.spec import Spec, SpecError, kind

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3                # stretched interval; CoFi's and DPHuBERT's temperature
SHIFT = -TEMPERATURE * math.log(-LOW / HIGH)
NOISE = 3000                                             # site of random numbers beside the layers' own
FIELD = {"frontend": "channels", "conv": "channels", "attention": "heads", "cross": "heads",
         "ffn": "units", "ffn1": "units", "ffn2": "units"}  # kind of a block -> what it is made of
DIMS = {"qk": "qk_dim", "vo": "v_dim"}                   # ranks: units of their own beside the heads
HEADED = ("softmax", "linformer", "elu", "t2r", "hedgehog")  # mixers whose heads meet only in the output projection


class Place(NamedTuple):
    """Where an array carries the units of a block: along `axis`, which is lead x units x inner."""

    name: str
    axis: int
    lead: int = 1
    inner: int = 1


class Group(NamedTuple):
    """Gated units of a block that are counted together."""

    key: str                     # the block's id; for ranks block:qk, block:vo
    block: str
    unit: str                    # channels | heads | units | qk | vo
    size: int
    rows: tuple[Place, ...]      # arrays that make them
    reads: tuple[Place, ...]     # arrays that read them; gates are folded in here
    norms: tuple[str, ...]       # layer norms over them
    gone: tuple[str, ...]        # arrays that an empty block has not


class Gate(NamedTuple):
    """State of a block's gates: (units,) fp32 each."""

    value: jax.Array
    open: jax.Array              # 1 or 0


def gated(spec: Spec, block: str) -> bool:
    return bool(spec.blocks.get(block, {}).get("gates"))


def names(spec: Spec, key: str) -> dict[str, str]:
    """What is gated -> name of the parameter; of a block all but its ranks."""
    block, _, dims = key.partition(":")
    owner, every = roles(spec, block)["owner"], spec.blocks.get(block, {}).get("gates", {})
    return {what: f"{owner}.gate_{what}" for what in every if (what == dims if dims else what not in DIMS)}


def keys(spec: Spec, block: str) -> list[str]:
    """The groups of units of a block that have gates."""
    every = spec.blocks.get(block, {}).get("gates", {})
    return [block] * bool(set(every) - set(DIMS)) + [f"{block}:{what}" for what in DIMS if what in every]


def size(spec: Spec, key: str) -> int:
    """Heads, units, channels or ranks."""
    block, _, dims = key.partition(":")
    if dims:
        return getattr(spec.attention(block), DIMS[dims])
    what = kind(block)
    if what == "frontend":
        return spec.channels(int(block.split(".")[1]))
    if what == "conv":
        return spec.conv(block)
    return spec.attention(block).count if what in ("attention", "cross") else spec.ffn(block).units


@functools.lru_cache(maxsize=64)
def shapes(spec: Spec) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of all gates of a model."""
    return {name: jax.ShapeDtypeStruct((1 if what == "block" else size(spec, key),), jnp.float32)
            for block in spec.blocks for key in keys(spec, block) for what, name in names(spec, key).items()}


def plain(spec: Spec) -> Spec:
    """The Spec without gates."""
    return spec.replace(blocks={b: {k: v for k, v in f.items() if k != "gates"} for b, f in spec.blocks.items()})


def emptied(spec: Spec) -> Spec:
    """The Spec with every gate closed (one channel left in a front-end convolution, and one rank)."""
    for key in [key for b in spec.blocks for key in keys(spec, b)]:
        spec = with_units(spec, key, range(least(key)))
    return plain(spec)


def least(key: str) -> int:
    """Units that are always left."""
    return int(kind(key.partition(":")[0]) == "frontend" or ":" in key)


def with_units(spec: Spec, key: str, kept) -> Spec:
    """The Spec in which a group keeps the units with these numbers. Heads keep their original numbers."""
    if len(kept) == size(spec, key):
        return spec
    block, _, dims = key.partition(":")
    if dims:  # the scale of the scores stays that of the original size
        scale = {"scale": spec.attention(block).scale} if dims == "qk" else {}
        return spec.with_block(block, **{DIMS[dims]: len(kept)}, **scale)
    field = FIELD[kind(block)]
    value = [spec.attention(block).heads[i] for i in kept] if field == "heads" else len(kept)
    return spec.with_block(block, **{field: value})


@functools.lru_cache(maxsize=64)
def groups(spec: Spec) -> tuple[Group, ...]:
    """All gated units, front to back. Raises SpecError for a block whose units cannot be gated."""
    from jaxslim.models import bind  # which asks here for the names of gates

    have, left = bind.shapes(plain(spec)), bind.shapes(emptied(spec))
    gone = [name for name in have if name not in left]
    found = []
    for block in sorted((b for b in spec.blocks if gated(spec, b)), key=_order):
        owners = tuple(f"{name}." for role, name in roles(spec, block).items() if role != "norm")
        for key in keys(spec, block):
            dims = key.partition(":")[2]
            rows, reads, norms = _ranks(spec, block, dims) if dims else _places(spec, block)
            rows, reads = (tuple(p for p in places if p.name in have) for places in (rows, reads))
            found.append(Group(key, block, dims or FIELD[kind(block)], size(spec, key), rows, reads,
                               tuple(n for n in norms if f"{n}.weight" in have),
                               () if dims else tuple(n for n in gone if n.startswith(owners))))
    return tuple(found)


def _order(block: str) -> tuple:
    return block.startswith("decoder."), not block.startswith("frontend."), [
        int(word) if word.isdigit() else -1 for word in block.split(".")], block


def _out(linear: str, **how) -> list[Place]:
    return [Place(f"{linear}.{x}", 0, **how) for x in ("weight", "up.weight", "lora_B.weight", "bias")]


def _in(linear: str, **how) -> list[Place]:
    return [Place(f"{linear}.{x}", 1, **how) for x in ("weight", "down.weight", "lora_A.weight")]


def _places(spec: Spec, block: str) -> tuple[list[Place], list[Place], list[str]]:
    """(arrays that make the units, arrays that read them, layer norms over them)"""
    what, r = kind(block), roles(spec, block)
    if what == "frontend":
        i = int(block.split(".")[1])
        rows, norms = _out(r["conv"]) + _out(r["norm"]), [r["norm"]] if spec.get("feat_extract_norm") == "layer" else []
        following = f"frontend.{i + 1}"
        if spec.family == "whisper" and i == 1:
            raise SpecError(f"Block {block}: its channels are the model's width, which is not pruned.")
        if spec.family == "whisper" or i + 1 < len(spec["conv_dim"]):
            return rows, _in(roles(spec, following)["conv"]), norms
        projection = prefix(spec) + "feature_projection"
        return (rows + _out(f"{projection}.layer_norm"), _in(f"{projection}.projection"),
                [*norms, f"{projection}.layer_norm"])
    if what == "conv":
        inner = [Place(f"{r['inner']}.{x}", 0) for x in ("weight", "bias", "running_mean", "running_var")]
        stored = spec.family == "wav2vec2-conformer" or "parakeet" in spec.family
        return (_out(r["up"], lead=2) + _out(r["conv"]) + inner, _in(r["down"]), [] if stored else [r["inner"]])
    if what in ("attention", "cross"):
        a = spec.attention(block)
        if a.mixer not in HEADED:
            raise SpecError(f"Block {block}: mixer {a.mixer} has no separate heads, so gates on heads are undefined "
                            "there; leave the block out, or prune before linearising.")
        if "heads" not in spec.blocks[block]["gates"] and not a.count:
            raise SpecError(f"Block {block} has no heads left to gate.")
        rows = [*_out(r["q"], inner=a.qk_dim), *_out(r["k"], inner=a.qk_dim), *_out(r["v"], inner=a.v_dim),
                *(Place(f"{r['owner']}.feature_{x}.{y}", 0) for x in "qk" for y in ("weight", "bias")),
                Place(f"{r['owner']}.window_factor", 0)]
        if "pos" in r:
            rows += [*_out(r["pos"], inner=a.qk_dim), Place(r["bias_u"], 0), Place(r["bias_v"], 0)]
        return rows, _in(r["o"], inner=a.v_dim), []
    return _out(r["up"]), _in(r["down"]), []


def _ranks(spec: Spec, block: str, dims: str) -> tuple[list[Place], list[Place], list[str]]:
    """As _places, for the inner dimensions of Q-K or V-O, which all heads of the block share."""
    a, r = spec.attention(block), roles(spec, block)
    if not a.count:
        raise SpecError(f"Block {block} has no heads left, so no ranks to gate.")
    if a.mixer not in (("softmax",) if dims == "qk" else HEADED):
        what = "Q and K" if dims == "qk" else "V and O"
        raise SpecError(f"Block {block}: mixer {a.mixer} has no product of {what}, so gates on its ranks are undefined "
                        "there; leave the block out, or prune before linearising.")
    if dims == "vo":
        return _out(r["v"], lead=a.count), _in(r["o"], lead=a.count), []
    if kind(block) == "attention" and positions.kind(spec) == "relative_key":
        raise SpecError(f"Block {block} has relative_key positions, whose embeddings all heads share; gates on the "
                        "ranks of Q-K are not made for them.")
    rows, reads = _out(r["q"], lead=a.count), _out(r["k"], lead=a.count)
    if "pos" in r:
        rows += [Place(r["bias_u"], 1), Place(r["bias_v"], 1)]
        reads += _out(r["pos"], lead=a.count)
    return rows, reads, []


# ---- from parameters to open units ----


def probability(log_alpha: jax.Array) -> jax.Array:
    """P(gate > 0)."""
    return jax.nn.sigmoid(log_alpha + SHIFT)


def expected(spec: Spec, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Group -> expected number of open units, (), differentiable; the gates are independent."""
    found = {}
    for group in groups(spec):
        gate = {what: probability(params[name]) for what, name in names(spec, group.key).items()}
        inside = [p.sum() for what, p in gate.items() if what != "block"] or [jnp.float32(group.size)]
        found[group.key] = inside[0] * (gate["block"][0] if "block" in gate else 1.0)
    return found


def sample(spec: Spec, params: Mapping[str, Any], key: jax.Array) -> dict[str, Gate]:
    """Group -> gates drawn at random, one draw for the whole batch."""
    every = shapes(spec)
    noise = jax.random.uniform(jax.random.fold_in(key, NOISE), (sum(x.shape[0] for x in every.values()),),
                               minval=1e-6, maxval=1 - 1e-6)
    noise = dict(zip(every, jnp.split(noise, np.cumsum([x.shape[0] for x in every.values()])[:-1]), strict=True))

    def draw(name):
        logit = jnp.log(noise[name]) - jnp.log1p(-noise[name])
        return stretch((logit + params[name].astype(jnp.float32)) / TEMPERATURE)

    gate = {name: draw(name) for name in every}
    return {g.key: _joined(spec, g, gate, {name: (z > 0).astype(jnp.float32) for name, z in gate.items()})
            for g in groups(spec)}


def settle(spec: Spec, params: Mapping[str, Any]) -> dict[str, Gate]:
    """Group -> the gates of evaluation: the expected number of units open, each with the median of its values (ours;
    equation 13 of arXiv 1712.01312 leaves the temperature out, DPHuBERT multiplies by 0.8)."""
    value = {name: stretch(params[name].astype(jnp.float32) / TEMPERATURE) for name in shapes(spec)}
    kept, carry = {}, {}
    chance: dict[tuple, list[tuple[str, jax.Array]]] = {}
    for g in groups(spec):  # whole blocks: as many of a kind as are expected, the likeliest
        if "block" in (gate := names(spec, g.key)):
            chance.setdefault(_kin(g.key), []).append((gate["block"], probability(params[gate["block"]])))
    for found in chance.values():
        p = jnp.concatenate([p for _, p in found])
        keep = (_rank(-p) < jnp.round(p.sum())).astype(jnp.float32)
        kept |= {name: keep[i : i + 1] for i, (name, _) in enumerate(found)}
    uniform = {}
    for g in groups(spec):
        for what, name in names(spec, g.key).items():
            if what != "block":
                uniform.setdefault(_kin(g.key), []).append(probability(params[name]).sum())
    for g in groups(spec):
        gate, kin = names(spec, g.key), _kin(g.key)
        for what, name in gate.items():
            if what == "block":
                continue
            options = spec.blocks[g.block]["gates"][what]
            tile = options.get("tile", 1)
            present = kept[gate["block"]][0] if "block" in gate else 1.0
            want = probability(params[name]).sum()
            if options.get("uniform"):
                want = sum(uniform[kin]) / len(uniform[kin])
            elif kind(g.block) != "frontend":  # units of a kind cost the same in every layer
                want = want + carry.get(kin, 0.0)
            count = jnp.clip(tile * jnp.round(want / tile), tile * least(g.key), g.size)
            if not options.get("uniform"):
                carry[kin] = jnp.where(present > 0, want - count, carry.get(kin, 0.0))
            kept[name] = (_rank(-params[name].astype(jnp.float32)) < count).astype(jnp.float32)
    return {g.key: _joined(spec, g, {n: value[n] * kept[n] for n in names(spec, g.key).values()}, kept)
            for g in groups(spec)}


def masked(spec: Spec, kept: Mapping[str, Any]) -> dict[str, Gate]:
    """Group -> gates that are open for the units with the numbers `kept[key]`; the rest of the groups is open."""
    state = {}
    for g in groups(spec):
        mask = np.zeros(g.size, np.float32)
        mask[list(kept.get(g.key, range(g.size)))] = 1.0
        state[g.key] = Gate(mask, mask)
    return state


def _kin(key: str) -> tuple[str, str]:
    """Groups that share a rounding: the same part of the layers of one side."""
    block, _, dims = key.partition(":")
    return block.split(".")[0], (kind(block) if kind(block) != "frontend" else block) + dims


def _rank(x: jax.Array) -> jax.Array:
    """Place of each entry when sorted, the smallest 0; equal ones in order."""
    return jnp.argsort(jnp.argsort(x, stable=True), stable=True)


def stretch(logit: jax.Array) -> jax.Array:
    """Hard concrete of a (noisy) logit, in [0, 1] (arXiv 1712.01312, equations 11 and 12)."""
    return jnp.clip(jax.nn.sigmoid(logit) * (HIGH - LOW) + LOW, 0.0, 1.0)


def _joined(spec: Spec, group: Group, value: Mapping[str, Any], open: Mapping[str, Any]) -> Gate:
    """A block's own gate times those of its units."""
    ones = jnp.ones(group.size)
    product = lambda table: functools.reduce(  # noqa: E731
        lambda a, b: a * b, (table[name] for name in names(spec, group.key).values()), ones)
    return Gate(product(value), product(open))


# ---- from gated to plain ----


def reads(spec: Spec) -> frozenset[str]:
    """Arrays into which `fold` multiplies gates."""
    return frozenset(place.name for group in groups(spec) for place in group.reads) if shapes(spec) else frozenset()


def fold(spec: Spec, params: Mapping[str, Any], state: Mapping[str, Gate]) -> dict[str, Any]:
    """Parameters of the model with its gates multiplied in: what `bind` takes, `<norm>.open` included."""
    out = {name: x for name, x in params.items() if name not in shapes(spec)}
    for group in groups(spec):
        gate = state[group.key]
        for place in group.reads:
            x = out[place.name]
            scale = gate.value[None, :, None] * np.ones((place.lead, 1, place.inner), np.float32)
            scale = scale.reshape(*[1] * place.axis, -1, *[1] * (x.ndim - place.axis - 1))
            out[place.name] = (x.astype(np.float32) * scale).astype(x.dtype)
        everywhere = any(o.get("norm") == "all" for o in spec.blocks[group.block]["gates"].values())
        out |= {f"{norm}.open": np.ones(group.size, np.float32) if everywhere else gate.open for norm in group.norms}
    return out


def cut(spec: Spec, params: Mapping[str, Any], state: Mapping[str, Gate]) -> tuple[Spec, dict[str, np.ndarray]]:
    """(Spec, parameters) without closed units and without gates. Same outputs as `fold`'s, up to rounding.

    A front-end convolution keeps one channel and an attention block one rank, if need be a silent one.
    """
    from jaxslim.models import bind

    state = {b: Gate(np.asarray(g.value, np.float32), np.asarray(g.open)) for b, g in state.items()}
    out = {name: np.asarray(x) for name, x in fold(spec, {k: np.asarray(v) for k, v in params.items()}, state).items()}
    small, stays = spec, {}  # (array, axis) -> entries that stay: an axis may carry heads and ranks
    for group in groups(spec):
        kept = np.flatnonzero(state[group.key].open)
        kept = kept if len(kept) >= least(group.key) else np.array([0])
        small = with_units(small, group.key, kept.tolist())
        for place in {*group.rows, *group.reads}:
            mask = np.zeros((place.lead, group.size, place.inner), bool)
            mask[:, kept] = True
            at = place.name, place.axis
            stays[at] = mask.reshape(-1) & stays.get(at, True)
    for (name, axis), mask in stays.items():
        out[name] = np.compress(mask, out[name], axis)
    small = plain(small)
    want = bind.shapes(small)
    return small, {name: out[name] if name in out else np.zeros(x.shape, np.float32) for name, x in want.items()} | {
        name: x for name, x in out.items() if name.startswith(bind.AUXILIARY)}
