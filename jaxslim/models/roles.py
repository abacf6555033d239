"""Block ids and the Hugging Face names behind them: the only place that knows both.

Block ids are the same for all families: `frontend.I`, `encoder.I`, `encoder.I.attention`, `encoder.I.ffn`, `head`.
Recipes, taps, gates, reports and errors speak of blocks; parameters carry Hugging Face names.
"""
from __future__ import annotations

from jaxslim.spec import Spec

# family -> prefix of the encoder inside a model with a head ("" without one)
PREFIX = {"wav2vec2": "wav2vec2", "hubert": "hubert"}
HEADS = {"ctc": "lm_head"}


def prefix(spec: Spec) -> str:
    """'wav2vec2.' for a model with a head, '' for the bare encoder."""
    return "" if spec.head == "none" else PREFIX[spec.family] + "."


def blocks(spec: Spec) -> tuple[str, ...]:
    """All block ids of a model, front to back."""
    front = [f"frontend.{i}" for i in range(len(spec["conv_dim"]))]
    layers = [b for i in range(spec["num_hidden_layers"]) for b in (f"encoder.{i}.attention", f"encoder.{i}.ffn")]
    return (*front, *layers, *(["head"] if spec.head != "none" else []))


def layers(spec: Spec) -> tuple[str, ...]:
    """Ids of the transformer layers; each is also the name of the tap with the layer's output."""
    return tuple(f"encoder.{i}" for i in range(spec["num_hidden_layers"]))


def roles(spec: Spec, block: str) -> dict[str, str]:
    """Role -> HF module name (no `.weight`): owner, q, k, v, o | owner, up, down | owner, conv, norm."""
    p = prefix(spec)
    part, *rest = block.split(".")
    if part == "frontend":
        owner = f"{p}feature_extractor.conv_layers.{rest[0]}"
        return {"owner": owner, "conv": f"{owner}.conv", "norm": f"{owner}.layer_norm"}
    if part == "head":
        return {"owner": HEADS[spec.head]}
    owner = f"{p}encoder.layers.{rest[0]}"
    if rest[1:] == ["attention"]:
        a = f"{owner}.attention"
        return {"owner": a, "q": f"{a}.q_proj", "k": f"{a}.k_proj", "v": f"{a}.v_proj", "o": f"{a}.out_proj",
                "norm": f"{owner}.layer_norm"}
    if rest[1:] == ["ffn"]:
        f = f"{owner}.feed_forward"
        return {"owner": f, "up": f"{f}.intermediate_dense", "down": f"{f}.output_dense",
                "norm": f"{owner}.final_layer_norm"}
    return {"owner": owner}
