"""A slimmed model back in the stock shape: the same outputs, opened by the stock class, at the stock size.

Missing heads, units and channels come back as zeros, products of factors as one matrix, LoRA merged. Query and key
sizes are filled up with zeros, and the query weights take up the difference between the stored scale and the stock one.
`fold` is for what needs no zeros: a model whose changes are all the same is a stock model with another config.
"""
from __future__ import annotations

import numpy as np

from jaxslim.errors import ClearError
from jaxslim.models import bind
from jaxslim.models.conformer import STYLES
from jaxslim.models.roles import prefix, roles
from jaxslim.slim import Slim
from jaxslim.spec import NAMES, Spec, SpecError, canonical, kind


class ExportError(ClearError):
    """A model that cannot take the wanted form; says which block and why."""


def fold(spec: Spec) -> Spec | None:
    """The Spec without changed blocks that describes the same parameters, or None when there is none."""
    plain, config, units = spec.replace(blocks={}), dict(spec.config), {}
    for block, fields in spec.blocks.items():
        stock = _stock(plain, block)
        fields = {k: v for k, v in fields.items() if canonical(v) != canonical(stock.get(k)) and v != {}}
        if kind(block) == "frontend" and set(fields) == {"channels"} and len(config.get("conv_dim", ())):
            i = int(block.split(".")[1])
            config["conv_dim"] = [*config["conv_dim"][:i], fields["channels"], *config["conv_dim"][i + 1:]]
        elif kind(block).startswith("ffn") and set(fields) == {"units"}:
            units.setdefault(block.split(".")[0], set()).add(fields["units"])
        elif fields:
            return None
    for side, counts in units.items():
        key = NAMES.get(spec.family, {}).get("intermediate_size", "intermediate_size").format(side=side)
        if len(counts) > 1 or 0 in counts or key not in config:
            return None
        config[key] = counts.pop()
    folded = Spec(config, spec.family, spec.head)
    return folded if _shapes(folded) == _shapes(spec) else None


def _stock(plain: Spec, block: str) -> dict:
    """The values of a block's fields that change nothing."""
    if kind(block) in ("attention", "cross"):
        a = plain.attention(block)
        return {"mixer": a.mixer, "heads": list(a.heads), "qk_dim": a.qk_dim, "v_dim": a.v_dim, "scale": a.scale}
    if kind(block).startswith("ffn"):
        return {"units": plain.ffn(block).units}
    if kind(block) == "conv":
        return {"channels": plain.conv(block)}
    return {"channels": plain.channels(int(block.split(".")[1]))} if kind(block) == "frontend" else {}


def _shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in bind.shapes(spec).items()}


def expand(model: Slim) -> Slim:
    """The model in the shape of its config.

    Raises:
      ExportError: a block has no equal in the stock shape.
    """
    spec, plain = model.spec, model.spec.replace(blocks={})
    _refuse(spec, plain)
    want, params = bind.shapes(plain), {k: np.asarray(v) for k, v in model.params.items()
                                        if not k.startswith(bind.AUXILIARY)}
    for block, fields in spec.blocks.items():
        if kind(block) in ("attention", "cross"):
            _attention(spec, block, params, want)
        elif kind(block).startswith("ffn"):
            for role, name in roles(spec, block).items():
                if role in ("up", "down"):
                    _merge(params, name, role, fields)
                    _pad(params, want, name)
        elif kind(block) == "conv":
            _conv(roles(spec, block), params, want)
        elif kind(block) == "frontend":
            for name in [k for k in params if k.startswith((roles(spec, block)["owner"].rpartition(".")[0] + ".",
                                                            prefix(spec) + "feature_projection."))]:
                _pad_to(params, want, name)
    params = {k: v.astype(model.params[k].dtype if k in model.params else np.float32) for k, v in params.items()}
    try:
        bind.check(plain, params, "The expanded model")
    except SpecError as error:
        raise ExportError(f"hf-dense: {error} Some changed block has parameters that cannot be filled up with zeros; "
                          "use --format hf.") from error
    return Slim(plain, params)


def _refuse(spec: Spec, plain: Spec) -> None:
    reasons = []
    for block in spec.blocks:
        stock = _stock(plain, block)
        for field in spec.blocks[block].keys() & {"adapter", "int8"}:
            reasons.append(f"{block}: its {field} has no stock form; merge it first, or take it away")
        if kind(block) in ("attention", "cross"):
            a = spec.attention(block)
            if a.mixer != "softmax":
                reasons.append(f"{block}: mixer {a.mixer} is no softmax attention and equals none")
            elif a.heads and (a.qk_dim > stock["qk_dim"] or a.v_dim > stock["v_dim"]):
                reasons.append(f"{block}: heads larger than the stock ones")
        elif kind(block).startswith("ffn") and spec.ffn(block).units > stock["units"]:
            reasons.append(f"{block}: more units than the stock model")
        elif kind(block) == "frontend" and spec.channels(i := int(block.split(".")[1])) != stock["channels"]:
            if spec.get("feat_extract_norm") == "layer":
                reasons.append(f"{block}: layer norm over the channels, whose mean and variance zeros would change")
            elif i == len(spec.get("conv_dim", ())) - 1 and spec.get("feat_proj_layer_norm", True):
                reasons.append(f"{block}: the projection's layer norm reads these channels; zeros would change its "
                               "mean and variance")
        elif kind(block) == "conv" and not STYLES[spec.family].stored_norm:
            reasons.append(f"{block}: layer norm over the channels, whose mean and variance zeros would change")
        elif kind(block) not in ("frontend", "ffn", "ffn1", "ffn2", "conv"):
            reasons.append(f"{block}: {', '.join(spec.blocks[block])} has no stock form in this release")
    if reasons:
        raise ExportError(f"hf-dense cannot express this model in the stock shape: {'; '.join(reasons)}. "
                          "Use --format hf.")


def _merge(params: dict, name: str, role: str, fields) -> None:
    """`name`'s factors and LoRA -> one weight, in double precision until it is stored."""
    if f"{name}.up.weight" in params:
        up, down = (params.pop(f"{name}.{part}.weight").astype(np.float64) for part in ("up", "down"))
        params[f"{name}.weight"] = up @ down
    if f"{name}.lora_A.weight" in params:
        a, b = (params.pop(f"{name}.lora_{x}.weight").astype(np.float64) for x in "AB")
        lora = fields["lora"][role]
        params[f"{name}.weight"] = params[f"{name}.weight"] + lora["alpha"] / lora["rank"] * (b @ a)


def _attention(spec: Spec, block: str, params: dict, want) -> None:
    a, names, fields = spec.attention(block), roles(spec, block), spec.blocks[block]
    if not a.heads:  # what no head reads may be anything
        params |= {k: np.zeros(x.shape, np.float32) for k, x in want.items()
                   if k.startswith(names["owner"] + ".") and k not in params}
    plain = spec.replace(blocks={}).attention(block)
    total, dim, heads = len(plain.heads), plain.qk_dim, list(a.heads)
    for role in "qkvo":
        name, size = names[role], a.qk_dim if role in "qk" else a.v_dim
        _merge(params, name, role, fields)
        for key in (f"{name}.weight", f"{name}.bias"):
            if key not in want or role == "o" and key.endswith("bias"):
                continue
            if not heads:
                continue
            x = np.moveaxis(params[key], -1, 0) if role == "o" else params[key]            # (H size, ...)
            full = np.zeros((total, dim, *x.shape[1:]), np.result_type(x, np.float32))
            full[heads, :size] = x.reshape(len(heads), size, *x.shape[1:])
            full = full.reshape(total * dim, *x.shape[1:])
            full = full * (a.scale / plain.scale) if role == "q" and a.scale != plain.scale else full
            params[key] = np.moveaxis(full, 0, -1) if role == "o" else full


    extra = {role: names[role] for role in ("pos", "bias_u", "bias_v") if role in names}
    ratio = a.scale / plain.scale
    for role, name in extra.items():  # relative positions: by head, as the queries
        key = f"{name}.weight" if role == "pos" else name
        if key in want and heads:
            x = params[key].reshape(len(heads), a.qk_dim, -1)
            full = np.zeros((total, dim, x.shape[2]), np.result_type(x, np.float32))
            full[heads, : a.qk_dim] = x
            params[key] = (full if role == "pos" else full * ratio).reshape(want[key].shape)
    if (key := f"{names['owner']}.distance_embedding.weight") in want and heads:
        _pad_to(params, want, key)


def _conv(names: dict[str, str], params: dict, want) -> None:
    """Channels of a Conformer's convolution module that give zero: their gates are shut, their norm has no weight."""
    if f"{names['up']}.weight" not in params:  # no channels are left
        for key, x in want.items():
            if key.startswith(tuple(f"{names[role]}." for role in ("up", "conv", "inner", "down"))):
                params.setdefault(key, np.zeros(x.shape, np.float32))
        return
    for key in (f"{names['up']}.weight", f"{names['up']}.bias"):
        if key in want:  # values and gates are two halves
            full = want[key].shape[0] // 2
            halves = [np.pad(x, [(0, full - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in np.split(params[key], 2)]
            params[key] = np.concatenate(halves)
    for name in [k for k in want if k.startswith((names["conv"] + ".", names["inner"] + ".", names["down"] + "."))]:
        if want[name].shape:
            _pad_to(params, want, name)


def _pad(params: dict, want, linear: str) -> None:
    for key in (f"{linear}.weight", f"{linear}.bias"):
        if key in want:
            params.setdefault(key, np.zeros((0,) * len(want[key].shape), np.float32))
            _pad_to(params, want, key)


def _pad_to(params: dict, want, key: str) -> None:
    """Zeros at the end of every axis, up to the stock shape."""
    x, shape = params[key], want[key].shape
    if x.ndim == len(shape) and all(have <= full for have, full in zip(x.shape, shape, strict=True)):
        params[key] = np.pad(x, [(0, full - have) for have, full in zip(x.shape, shape, strict=True)])
