"""Block ids and the Hugging Face names behind them: the only place that knows both.

Block ids are the same for all families: `frontend.I`, `encoder.I`, `encoder.I.attention`, `encoder.I.ffn` (Conformers:
`ffn1`, `ffn2`, `conv`), `decoder.I.attention`, `decoder.I.cross`, `decoder.I.ffn`, `head`. Recipes, taps, gates,
reports and errors speak of blocks; parameters carry Hugging Face names.
"""
from __future__ import annotations

from typing import NamedTuple

from jaxslim.spec import Spec


class Family(NamedTuple):
    """Names of one family. `{}` is the layer number; names of roles are relative to the layer (or front-end layer)."""

    prefix: str                          # of the encoder inside a model with a head
    layer: dict[str, str]                # "encoder" (and "decoder") -> a layer's name
    parts: dict[str, dict[str, str]]     # part of a layer -> role -> name; "owner" is the part itself
    frontend: str = ""                   # a front-end layer's name


QKVO = {"owner": "attention", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
        "o": "attention.out_proj", "norm": "layer_norm"}
FFN = {"owner": "feed_forward", "up": "feed_forward.intermediate_dense", "down": "feed_forward.output_dense",
       "norm": "final_layer_norm"}
SPEECH = Family("wav2vec2", {"encoder": "encoder.layers.{}"}, {"attention": QKVO, "ffn": FFN},
                "feature_extractor.conv_layers.{}")
FAMILIES = {"wav2vec2": SPEECH, "hubert": SPEECH._replace(prefix="hubert")}
HEADS = {"ctc": "lm_head"}


def prefix(spec: Spec) -> str:
    """'wav2vec2.' for a model with a head, '' for the bare encoder."""
    return "" if spec.head == "none" else FAMILIES[spec.family].prefix + "."


def blocks(spec: Spec) -> tuple[str, ...]:
    """All block ids of a model, front to back."""
    family = FAMILIES[spec.family]
    front = [f"frontend.{i}" for i in range(len(spec["conv_dim"]))] if family.frontend else []
    inner = [f"{layer}.{part}" for layer in layers(spec) for part in family.parts]
    return (*front, *inner, *(["head"] if spec.head != "none" else []))


def layers(spec: Spec) -> tuple[str, ...]:
    """Ids of the transformer layers; each is also the name of the tap with the layer's output."""
    return tuple(f"encoder.{i}" for i in range(spec["num_hidden_layers"]))


def roles(spec: Spec, block: str) -> dict[str, str]:
    """Role -> HF module name (no `.weight`): owner, q, k, v, o, norm | owner, up, down, norm | owner, conv, norm."""
    family, p = FAMILIES[spec.family], prefix(spec)
    side, *rest = block.split(".")
    if side == "head":
        return {"owner": HEADS[spec.head]}
    if side == "frontend":
        owner = p + family.frontend.format(rest[0])
        return {"owner": owner, "conv": f"{owner}.conv", "norm": f"{owner}.layer_norm"}
    owner = p + family.layer[side].format(rest[0])
    if len(rest) == 1:
        return {"owner": owner}
    return {role: f"{owner}.{name}" for role, name in family.parts[rest[1]].items()}
