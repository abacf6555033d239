"""Block ids and the Hugging Face names behind them: the only place that knows both.

Block ids are the same for all families: `frontend.I`, `encoder.I`, `encoder.I.attention`, `encoder.I.ffn` (Conformers:
`ffn1`, `ffn2`, `conv`), `decoder.I.attention`, `decoder.I.cross`, `decoder.I.ffn`, `head`. Recipes, taps, gates,
reports and errors speak of blocks; parameters carry Hugging Face names.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from jaxslim.spec import Spec


class Family(NamedTuple):
    """Names of one family. `{}` is the layer number; names of roles are relative to the layer (or front-end layer)."""

    prefix: str                          # of the encoder inside a model with a head
    layer: dict[str, str]                # "encoder" (and "decoder") -> a layer's name
    parts: dict[str, dict[str, str]]     # part of a layer -> role -> name; "owner" is the part itself
    frontend: str = ""                   # a front-end layer's name
    rest: dict[str, str] = {}            # parts that are no block -> name: "projection", "positional", "adapter"
    heads: dict[str, str] = {}           # head -> name of its last linear
    conv: str = ".conv"                  # the convolution of a front-end layer (number {}, from 1: {1}), relative to it


QKVO = {"owner": "attention", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
        "o": "attention.out_proj", "norm": "layer_norm"}
FFN = {"owner": "feed_forward", "up": "feed_forward.intermediate_dense", "down": "feed_forward.output_dense",
       "norm": "final_layer_norm", "bottleneck": "adapter_layer"}
HEAD = re.compile(r"^(lm_head|classifier|projector)\.")   # arrays of a head on a wav2vec2-like or text encoder
HEADS = {"ctc": "lm_head", "classification": "classifier", "frames": "classifier", "xvector": "classifier"}
REST = {"projection": "feature_projection", "positional": "encoder.pos_conv_embed", "adapter": "adapter"}
SPEECH = Family("wav2vec2", {"encoder": "encoder.layers.{}"}, {"attention": QKVO, "ffn": FFN},
                "feature_extractor.conv_layers.{}", REST, HEADS)
GENERATOR = "encoder.generator"                       # models/generative.py; its layers are named as the encoder's
GENERATING = ("wav2vec2", "hubert", "wavlm")          # families that can be the front of a generative student
FAMILIES = {"wav2vec2": SPEECH, "hubert": SPEECH._replace(prefix="hubert"), "wavlm": SPEECH._replace(prefix="wavlm")}

CONFORMER = Family("wav2vec2_conformer", {"encoder": "encoder.layers.{}"}, {
    "ffn1": {"owner": "ffn1", "up": "ffn1.intermediate_dense", "down": "ffn1.output_dense", "norm": "ffn1_layer_norm"},
    "attention": {"owner": "self_attn", "q": "self_attn.linear_q", "k": "self_attn.linear_k", "v": "self_attn.linear_v",
                  "o": "self_attn.linear_out", "pos": "self_attn.linear_pos", "bias_u": "self_attn.pos_bias_u",
                  "bias_v": "self_attn.pos_bias_v", "norm": "self_attn_layer_norm"},
    "conv": {"owner": "conv_module", "up": "conv_module.pointwise_conv1", "down": "conv_module.pointwise_conv2",
             "conv": "conv_module.depthwise_conv", "inner": "conv_module.batch_norm", "norm": "conv_module.layer_norm"},
    "ffn2": {"owner": "ffn2", "up": "ffn2.intermediate_dense", "down": "ffn2.output_dense", "norm": "ffn2_layer_norm",
             "last": "final_layer_norm"}}, SPEECH.frontend, REST, HEADS)
W2V_BERT = CONFORMER._replace(
    prefix="wav2vec2_bert", frontend="",
    parts=CONFORMER.parts | {"conv": CONFORMER.parts["conv"] | {"inner": "conv_module.depthwise_layer_norm"}},
    rest={"projection": "feature_projection", "intermediate": "intermediate_ffn", "adapter": "adapter"})
PARAKEET = Family("encoder", {"encoder": "layers.{}"}, {
    "ffn1": {"owner": "feed_forward1", "up": "feed_forward1.linear1", "down": "feed_forward1.linear2",
             "norm": "norm_feed_forward1"},
    "attention": {"owner": "self_attn", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
                  "o": "self_attn.o_proj", "pos": "self_attn.relative_k_proj", "bias_u": "self_attn.bias_u",
                  "bias_v": "self_attn.bias_v", "norm": "norm_self_att"},
    "conv": {"owner": "conv", "up": "conv.pointwise_conv1", "down": "conv.pointwise_conv2",
             "conv": "conv.depthwise_conv", "inner": "conv.norm", "norm": "norm_conv"},
    "ffn2": {"owner": "feed_forward2", "up": "feed_forward2.linear1", "down": "feed_forward2.linear2",
             "norm": "norm_feed_forward2", "last": "norm_out"}}, rest={"projection": "subsampling"},
    heads={"ctc": "ctc_head"})
FAMILIES |= {"wav2vec2-conformer": CONFORMER, "wav2vec2-bert": W2V_BERT, "parakeet_ctc": PARAKEET,
             "parakeet_encoder": PARAKEET}

_HALF = {"owner": "{}", "up": "{}.ffw_layer_1", "down": "{}.ffw_layer_2", "norm": "{}.pre_layer_norm",
         "after": "{}.post_layer_norm"}
FAMILIES["gemma3n_audio"] = Family("audio_tower", {"encoder": "conformer.{}"}, {
    "ffn1": {role: name.format("ffw_layer_start") for role, name in _HALF.items()},
    "attention": {"owner": "attention", "q": "attention.attn.q_proj", "k": "attention.attn.k_proj",
                  "v": "attention.attn.v_proj", "o": "attention.post", "per_dim": "attention.attn.per_dim_scale",
                  "pos": "attention.attn.relative_position_embedding.pos_proj", "norm": "attention.pre_attn_norm",
                  "after": "attention.post_norm"},
    "conv": {"owner": "lconv1d", "up": "lconv1d.linear_start", "down": "lconv1d.linear_end",
             "conv": "lconv1d.depthwise_conv1d", "inner": "lconv1d.conv_norm", "norm": "lconv1d.pre_layer_norm"},
    "ffn2": {role: name.format("ffw_layer_end") for role, name in _HALF.items()} | {"last": "norm"}},
    rest={"projection": "subsample_conv_projection"})

SELF = {"owner": "self_attn", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.out_proj", "norm": "self_attn_layer_norm"}
FAMILIES["whisper"] = Family(
    "model", {"encoder": "encoder.layers.{}", "decoder": "decoder.layers.{}"},
    {"attention": SELF, "cross": {role: name.replace("self_attn", "encoder_attn") for role, name in SELF.items()},
     "ffn": {"owner": "fc1", "up": "fc1", "down": "fc2", "norm": "final_layer_norm"}}, "encoder.conv{1}",
    {"positional": "encoder.embed_positions"}, {"seq2seq": "proj_out"}, conv="")
BERT = Family(
    "bert", {"encoder": "encoder.layer.{}"},
    {"attention": {"owner": "attention", "q": "attention.self.query", "k": "attention.self.key",
                   "v": "attention.self.value", "o": "attention.output.dense", "norm": "attention.output.LayerNorm"},
     "ffn": {"owner": "intermediate", "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}},
    rest={"embedding": "embeddings", "pooler": "pooler"}, heads={"classification": "classifier"})
FAMILIES |= {"bert": BERT, "roberta": BERT._replace(prefix="roberta"), "distilbert": Family(
    "distilbert", {"encoder": "transformer.layer.{}"},
    {"attention": {"owner": "attention", "q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin",
                   "o": "attention.out_lin", "norm": "sa_layer_norm"},
     "ffn": {"owner": "ffn", "up": "ffn.lin1", "down": "ffn.lin2", "norm": "output_layer_norm"}},
    rest={"embedding": "embeddings"}, heads={"classification": "classifier"})}
FAMILIES["gpt_neox"] = Family(
    "gpt_neox", {"encoder": "layers.{}"},
    {"attention": {"owner": "attention", "qkv": "attention.query_key_value", "o": "attention.dense",
                   "norm": "input_layernorm"},
     "ffn": {"owner": "mlp", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
             "norm": "post_attention_layernorm"}},
    rest={"embedding": "embed_in"}, heads={"causal": "lm_head"})


# Parameters of the convolutions at the front; of Whisper also the encoder's positions, which transformers never trains.
FRONTEND = r"(^|\.)(feature_extractor\.conv_layers|encoder\.conv\d|encoder\.embed_positions)\."


def prefix(spec: Spec) -> str:
    """'wav2vec2.' for a model with a head, '' for the bare encoder."""
    return "" if spec.head == "none" else FAMILIES[spec.family].prefix + "."


def blocks(spec: Spec) -> tuple[str, ...]:
    """All block ids of a model, front to back."""
    family = FAMILIES[spec.family]
    fronts = 2 if spec.family == "whisper" else len(spec["conv_dim"]) if family.frontend else 0
    front = [f"frontend.{i}" for i in range(fronts)]
    last = ["generator"] * bool(spec.generator and spec.family in GENERATING) + ["head"] * (spec.head != "none")
    inner = [f"{layer}.{part}" for layer in layers(spec) for part in family.parts
             if part != "cross" or layer.startswith("decoder.")]
    return (*front, *inner, *last)


def layers(spec: Spec) -> tuple[str, ...]:
    """Ids of the transformer layers; each is also the name of the tap with the layer's output."""
    sides = FAMILIES[spec.family].layer
    return tuple(f"{side}.{i}" for side in sides for i in range(spec.of(side, "num_hidden_layers")))


def roles(spec: Spec, block: str) -> dict[str, str]:
    """Role -> HF module name (no `.weight`): owner, q, k, v, o, norm | owner, up, down, norm | owner, conv, norm."""
    family, p = FAMILIES[spec.family], prefix(spec)
    side, *rest = block.split(".")
    if side == "head":
        return {"owner": family.heads[spec.head]}
    if side == "frontend":
        owner = p + family.frontend.format(rest[0], int(rest[0]) + 1)
        return {"owner": owner, "conv": owner + family.conv, "norm": f"{owner}.layer_norm"}
    if side == "generator" and not rest:
        return {"owner": p + GENERATOR}
    owner = p + family.layer.get(side, GENERATOR + ".layers.{}").format(rest[0])
    if len(rest) == 1:
        return {"owner": owner}
    return {role: f"{owner}.{name}" for role, name in family.parts[rest[1]].items()}
