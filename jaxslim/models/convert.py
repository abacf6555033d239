"""What a mixer starts from in the place of softmax attention: copies, parts made of q, k, v and o, new values."""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxslim.models import recurrent
from jaxslim.models.roles import layers, roles
from jaxslim.spec import MIXERS, Spec, SpecError
from jaxslim.spec import Attention as Fields

SILU_IS_1 = 1.2784645
OPEN = 5.0   # before the sigmoid of gla's decays: exp(-0.0004) a frame with tau 16


def options(mixer: str, a: Fields, given: dict[str, Any], init: str, bias: bool) -> dict[str, Any]:
    """All options of `mixer` in place of the attention block `a`: those given, and what follows from its shape."""
    fit: dict[str, Any] = {}
    if mixer in ("t2r", "hedgehog"):
        fit["features"] = a.qk_dim
    elif mixer in recurrent.KINDS:
        if mixer != "mamba":
            fit["head_dim"] = a.v_dim
        if mixer == "gla":
            fit["key_dim"] = a.qk_dim
        if init == "attention":
            fit |= {"inner": len(a.heads) * a.v_dim, "bias": bias}
            fit |= {"groups": len(a.heads), "state": a.qk_dim} if mixer == "mamba2" else {}
        if given.get("direction") == "shared":
            fit["conv"] = 7
    return {**MIXERS[mixer], **fit, **given}


def convert(spec: Spec, block: str, mixer: str, given: dict[str, Any], params: dict[str, Any], init: str,
            rng: np.random.Generator) -> tuple[Spec, dict[str, np.ndarray], dict[str, str]]:
    """`block` of a model (softmax attention, parameters `params`) with another mixer.

    Args: init "attention" takes what it can from q, k, v, o; "random" draws a recurrent mixer as its authors do.
    Returns: the Spec; the block's parameters that are not the old ones; their origins, "mapped" (made of the old) or
      "new". Names of the block that the Spec has no more are to be dropped.
    """
    spec.with_block(block, mixer=mixer, options=None)  # refuses a mixer that there is not
    a, names, width = spec.attention(block), roles(spec, block), spec.of(block, "hidden_size")
    owner = names["owner"] + "."
    if mixer not in recurrent.KINDS:
        o = options(mixer, a, given, init, False)
        new = spec.with_block(block, mixer=mixer, options=o)
        out = {}
        if mixer in ("t2r", "hedgehog"):
            shape = (len(a.heads), o["features"], a.qk_dim)
            for side in ("feature_q", "feature_k"):
                out[f"{side}.weight"] = np.broadcast_to(np.eye(*shape[1:], dtype=np.float32), shape).copy()
                if mixer == "t2r":
                    out[f"{side}.bias"] = np.zeros(shape[:2], np.float32)
        if o.get("window"):
            out["window_factor"] = np.zeros(len(a.heads), np.float32)   # half; `linearize` measures it
        if mixer == "linformer":
            first = o["sharing"] != "layer" or not any(
                spec.attention(f"{layer}.attention").options.get("sharing") == "layer" for layer in layers(spec))
            for side in ("E", "F")[: 2 if o["sharing"] == "none" else first]:
                out[side] = rng.standard_normal((o["length"], o["features"])).astype(np.float32)
        return new, {owner + k: v for k, v in out.items()}, dict.fromkeys([owner + k for k in out], "new")
    fields = spec.blocks.get(block, {})
    if a.ranks or a.lora or fields.get("int8"):
        raise SpecError(f"Block {block}: its q, k, v, o are factored, int8 or have LoRA; merge them before mixer "
                        f"{mixer}.")
    old = projections(spec, block, params)
    for r, size in (("q", a.qk_dim), ("k", a.qk_dim), ("v", a.v_dim)):
        old.setdefault(f"{r}.bias", np.zeros(len(a.heads) * size, np.float32))   # Whisper's k has none
    ahead = {"direction": "causal"} if spec.head == "causal" or spec.family == "gpt_neox" else {}
    o = options(mixer, a, {**ahead, **given}, init, "o.bias" in old)
    old.setdefault("o.bias", np.zeros(width, np.float32))
    gone = dict.fromkeys(("heads", "qk_dim", "v_dim", "scale", "lora", "int8", "activations"))  # of q, k, v, o
    new = spec.with_block(block, **gone | {"mixer": mixer, "options": o})
    recurrent.check(mixer, width, o, block)
    out = drawn(mixer, width, o, rng)
    mapped: dict[str, np.ndarray] = {}
    if init == "attention":
        inner = len(a.heads) * a.v_dim
        fits = {"inner": inner, "groups": len(a.heads), "state": a.qk_dim, "head_dim": a.v_dim, "key_dim": a.qk_dim}
        fits = {k: v for k, v in fits.items() if k in o and not (mixer == "mamba" and k == "state")}
        if bad := [f"{k}={o[k]}, not {v}" for k, v in fits.items() if (o[k] or width) != v]:
            raise SpecError(f"Block {block}: init attention copies q, k, v, o into mixer {mixer}, so it cannot have "
                            f"{', '.join(bad)}; leave them out, or use init: random.")
        if mixer == "gated_deltanet" and a.qk_dim != a.v_dim:
            raise SpecError(f"Block {block}: gated_deltanet has square heads, but q and v have {a.qk_dim} and "
                            f"{a.v_dim}; use init: random.")
        mapped = from_attention(mixer, o, out, old)
    return new, {owner + k: v for k, v in (out | mapped).items()}, {
        owner + k: "mapped" if k in mapped else "new" for k in out}


def projections(spec: Spec, block: str, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Attention's parameters by role ("q.weight", "q.bias", ...), those of one matrix for q, k, v taken apart."""
    names = roles(spec, block)
    old = {f"{r}.{kind}": np.asarray(params[name]) for r in "qkvo" for kind in ("weight", "bias")
           if (name := f"{names.get(r)}.{kind}") in params}
    for kind in ("weight", "bias"):
        if "qkv" in names and (name := f"{names['qkv']}.{kind}") in params:
            x = np.asarray(params[name])
            x = x.reshape(len(spec.attention(block).heads), 3, -1, *x.shape[1:])                     # (H, 3, K, ...)
            old |= {f"{r}.{kind}": x[:, i].reshape(-1, *x.shape[3:]) for i, r in enumerate("qkv")}
    return old


def drawn(mixer: str, width: int, o: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """New parameters as the authors' code draws them (linears and convolutions: PyTorch's default), by name below the
    block's owner."""
    out = {}
    for name in {"shared": ("shared",), "causal": ("fwd",)}.get(o["direction"], ("fwd", "bwd")):
        out |= {f"{name}.{leaf}": value.astype(np.float32) for leaf, value in _drawn(mixer, width, o, rng).items()}
    return out


def _drawn(mixer: str, width: int, o: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    inner, shared = o["inner"] or width, o["direction"] == "shared"
    count, n = inner // o.get("head_dim", 1), o.get("state")
    sizes = {"mamba": lambda *_: (inner, inner), "gated_deltanet": recurrent.delta_sizes, "gla": recurrent.gla_sizes,
             "mamba2": recurrent.hydra_sizes if shared else recurrent.mamba2_sizes}[mixer](width, o)

    def uniform(*shape, fan=None):
        bound = (fan or shape[-1]) ** -0.5
        return rng.uniform(-bound, bound, shape)

    if mixer == "gla":
        keys, rank = sizes[1], o["rank"]
        out = {"in_proj.weight": uniform(sum(sizes), width), "in_proj.bias": uniform(sum(sizes), fan=width),
               "gk_proj.weight": uniform(keys, rank), "gk_proj.bias": uniform(keys, fan=rank),
               "norm.weight": np.ones(o["head_dim"]), "out_proj.weight": uniform(width, inner)}
        return out | ({"out_proj.bias": uniform(width, fan=inner)} if o["bias"] else {})
    dt = np.maximum(np.exp(rng.uniform(math.log(1e-3), math.log(0.1), count)), 1e-4)
    out = {"in_proj.weight": uniform(sum(sizes), width), "out_proj.weight": uniform(width, inner)}
    if o["bias"]:
        out |= {"in_proj.bias": uniform(sum(sizes), fan=width), "out_proj.bias": uniform(width, fan=inner)}
    out |= {"conv1d.weight": uniform(sizes[mixer != "mamba"], 1, o["conv"]),
            "conv1d.bias": uniform(sizes[mixer != "mamba"], fan=o["conv"])}
    inverse = dt + np.log(-np.expm1(-dt))                                                # softplus^-1
    if mixer == "mamba":
        rank = o["rank"] or -(-width // 16)
        return out | {"x_proj.weight": uniform(rank + 2 * n, inner), "dt_proj.weight": uniform(inner, rank),
                      "dt_proj.bias": inverse, "D": np.ones(inner),
                      "A_log": np.log(np.broadcast_to(np.arange(1.0, n + 1), (inner, n)))}
    out |= {"dt_bias": inverse, "norm.weight": np.ones(o["head_dim"] if mixer == "gated_deltanet" else inner),
            "A_log": np.zeros(count) if shared else np.log(rng.uniform(1, 16, count))}
    if shared:
        out["fc_D.weight"] = uniform(count, inner)
    return out if mixer == "gated_deltanet" else out | {"D": np.ones(count)}


def from_attention(mixer: str, o: dict[str, Any], new: dict[str, np.ndarray],
                   old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of `new` that attention's parameters `old` ("q.weight", "q.bias", ...) give, in part or whole: x <- V,
    B <- K, C <- Q (of gated_deltanet q, k, v), out <- O, and z, dt stay new (The Mamba in the Llama, arXiv 2408.15237,
    section 2.2). Ours: the convolution lets what was copied through unchanged (1 at the present frame, no bias), and of
    mamba only x and out are given. gla starts as linear attention under its norm: its output gate is 1 and its decays
    are nearly none. With two directions each gets the copies, and half of O when their sum is taken."""
    inner, out = old["v.weight"].shape[0], {}
    half = 0.5 if o["direction"] == "sum" else 1.0
    two, gated = o["direction"] == "shared", mixer == "gla"
    keys = old["k.weight"].shape[0]
    parts = {"mamba": [("v", 0)], "gated_deltanet": [(r, (i + 1) * inner) for i, r in enumerate("qkv")],
             "gla": [("q", inner), ("k", inner + keys), ("v", inner + 2 * keys)]}.get(
        mixer, [("v", inner)] + [(r, 2 * inner + i * o.get("groups", 1) * o.get("state", 1))
                                 for i, r in enumerate("kqkq" if two else "kq")])
    for prefix in dict.fromkeys(name.partition(".")[0] for name in new):
        for kind in ("weight", "bias") if o["bias"] or gated else ("weight",):
            value = new[f"{prefix}.in_proj.{kind}"].copy()
            for role, at in parts:
                value[at : at + len(old[f"{role}.{kind}"])] = old[f"{role}.{kind}"]
            if gated:
                value[:inner] = SILU_IS_1 if kind == "bias" else 0.0
            out[f"{prefix}.in_proj.{kind}"] = value
            if f"{prefix}.out_proj.{kind}" in new:
                out[f"{prefix}.out_proj.{kind}"] = old[f"o.{kind}"] * half
        if gated:
            out[f"{prefix}.gk_proj.bias"] = np.full(keys, OPEN, np.float32)
            continue
        conv, bias = (np.zeros_like(new[f"{prefix}.conv1d.{kind}"]) for kind in ("weight", "bias"))
        conv[:, 0, (conv.shape[2] - 1) // 2 if two else -1] = 1.0
        out |= {f"{prefix}.conv1d.weight": conv, f"{prefix}.conv1d.bias": bias}
    return out
