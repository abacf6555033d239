"""Which family and head a checkpoint is of, by the names that transformers gives, and its weights under our names."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxslim.models import bind
from jaxslim.models.roles import prefix
from jaxslim.spec import Spec
from jaxslim.weights import HubError

# architecture -> (family, head). The first of each (family, head) is what is written.
SPEECH_HEADS = {"Model": "none", "ForCTC": "ctc", "ForSequenceClassification": "classification",
                "ForAudioFrameClassification": "frames", "ForXVector": "xvector", "ForPreTraining": "none"}
ARCHITECTURES = {name + end: (family, head) for family, name in
                 {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM",
                  "wav2vec2-conformer": "Wav2Vec2Conformer", "wav2vec2-bert": "Wav2Vec2Bert"}.items()
                 for end, head in SPEECH_HEADS.items()
                 if family != "hubert" or end in ("Model", "ForCTC", "ForSequenceClassification")}
ARCHITECTURES |= {"ParakeetForCTC": ("parakeet_ctc", "ctc"), "ParakeetEncoder": ("parakeet_encoder", "none")}
ARCHITECTURES |= {"WhisperForConditionalGeneration": ("whisper", "seq2seq"), "WhisperModel": ("whisper", "none")}
ARCHITECTURES["Gemma3nAudioEncoder"] = ("gemma3n_audio", "none")
TEXT = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
ARCHITECTURES |= {name + end: (family, head) for family, name in TEXT.items() for end, head in
                  {"Model": "none", "ForSequenceClassification": "classification", "ForMaskedLM": "none"}.items()}
ARCHITECTURES["BertForPreTraining"] = ("bert", "none")
ARCHITECTURES |= {"GPTNeoXForCausalLM": ("gpt_neox", "causal"), "GPTNeoXModel": ("gpt_neox", "none")}
# Head -> (an output matrix that is stored once, under the second name, when the config ties it).
TIED = {"seq2seq": ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        "causal": ("lm_head.weight", "gpt_neox.embed_in.weight")}
# Weights that a checkpoint may have and a bare encoder does not use: the heads of pre-training.
QUANTIZER = r"(quantizer|project_hid|project_q)\."
LEFTOVERS = {"wav2vec2": QUANTIZER, "hubert": r"(final_proj|label_embs_concat)\b", "wavlm": QUANTIZER,
             "wav2vec2-conformer": QUANTIZER, "wav2vec2-bert": r"$^", "parakeet_encoder": r"$^",
             "gemma3n_audio": r"(model|lm_head)\.",   # the text and vision of a whole Gemma 3n
             "whisper": r"proj_out\.", "bert": r"cls\.", "roberta": r"lm_head\.",
             "distilbert": r"vocab_(transform|layer_norm|projector)\.", "gpt_neox": r"lm_head\."}
# Weights that checkpoints of fine-tuned models lack (transformers draws them at random): only SpecAugment reads them.
# Old text checkpoints hold their position numbers too, a pooler that RoBERTa's classifier does not read, and GPT-NeoX's
# causal masks and rotary frequencies.
OPTIONAL = (r"(.*\.)?(masked_spec_embed|embeddings\.position_ids)|roberta\.pooler\..*"
            r"|(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
ALIASES = ((r"\.weight_g$", ".parametrizations.weight.original0"),  # weight norm before torch 2
           (r"\.weight_v$", ".parametrizations.weight.original1"),
           (r"(layer_norm|LayerNorm)\.gamma$", r"\1.weight"), (r"(layer_norm|LayerNorm)\.beta$", r"\1.bias"))
OLD_NAMES = {"whisper": ((r"^lm_head\.", "proj_out."),),  # what its Flax class called the output matrix
             "gemma3n_audio": ((r"^(model\.)?audio_tower\.", ""),),
             "gpt_neox": ((r"^embed_out\.", "lm_head."),)}


def family_of(config: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Family and head; head None = the weights must tell. `where` names the config in errors."""
    ours = config.get("jaxslim")
    if isinstance(ours, dict):
        return str(ours.get("family", "")), str(ours.get("head", "none"))
    named, kind = config.get("architectures") or [], str(config.get("model_type"))
    named = list(map(str, named)) if isinstance(named, list) else [str(named)]
    for name in (a.removeprefix("Flax") for a in named):
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not named and kind in bind.FAMILIES:
        return kind, None
    what = f"architecture {named[0]}" if named else f"model_type {kind!r}"
    known = [a for a, (family, _) in ARCHITECTURES.items() if family == kind]
    code = " It wants to run its own code (auto_map), which is never done." if "auto_map" in config else ""
    raise HubError(f"{where}: {what} is not supported; supported are "
                   f"{', '.join(known) if named and known else ', '.join(bind.FAMILIES) + ' (as model_type)'}.{code}")


def audio_part(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the audio encoder of a whole Gemma 3n; any other config as it is."""
    if config.get("model_type") != "gemma3n":
        return config
    return {**config.get("audio_config", {}), "model_type": "gemma3n_audio", "architectures": ["Gemma3nAudioEncoder"]}


def architecture(family: str, head: str) -> str:
    """The class of transformers that opens the family with this head."""
    return next(a for a, pair in ARCHITECTURES.items() if pair == (family, head))


def rename(weights: dict[str, Any], family: str) -> dict[str, Any]:
    """Weights of old checkpoints by their present names."""
    for old, new in (*ALIASES, *OLD_NAMES.get(family, ())):
        weights = {re.sub(old, new, k): v for k, v in weights.items()}
    return weights


def trim(weights: dict[str, np.ndarray], spec: Spec, want: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights as the model names them: encoder without prefix, no leftovers of pre-training, optional ones there."""
    if spec.head == "none":
        inner = prefix(spec.replace(head="ctc"))  # what the encoder is called inside a model with a head
        weights = {k.removeprefix(inner): v for k, v in weights.items()}
        weights = {k: v for k, v in weights.items() if not re.match(LEFTOVERS[spec.family], k)}
    if spec.head in TIED:
        weights = _untwin(weights, *TIED[spec.head], want)
    weights = {k: v for k, v in weights.items() if k in want or not re.fullmatch(OPTIONAL, k)}
    return weights | {k: np.zeros(x.shape, x.dtype) for k, x in want.items()
                      if k not in weights and re.fullmatch(OPTIONAL, k)}


def _untwin(weights: dict[str, np.ndarray], name: str, home: str, want: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tied weights once, under `home`, whichever of the two names the file has; untied ones as they are."""
    if name not in weights or name in want:
        return weights
    twin = weights.get(home, weights[name])
    if twin.shape != weights[name].shape or not np.array_equal(twin, weights[name]):
        raise HubError(f"{name} and {home} differ, but config.json ties them; set tie_word_embeddings to false there.")
    return {k: v for k, v in weights.items() if k != name} | {home: twin}
