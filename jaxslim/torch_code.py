"""PyTorch code for models that transformers has no class for, written from the Spec into the model's folder.

`assets/hf_template/` holds the code as it stands for wav2vec2; here names are changed to the family's and what the
Spec does not need is left out: a line that ends in `# part: NAME`, or everything from such a line to the next.

The folder opens with `AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)`, without jaxslim. Without that
argument, or with a stock class, transformers would take the weights it knows and draw the rest at random; so such a
folder has a `model_type` of its own and a value in GUARDED's place at which every stock class stops. What config.json
said there stands under `jaxslim_stock`, and `restore` puts it back.
"""
from __future__ import annotations

import importlib.resources
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from jaxslim.models.roles import FAMILIES
from jaxslim.spec import Spec, kind

FILES = ("configuration_jaxslim.py", "modeling_jaxslim.py")
STOCK = "jaxslim_stock"
GUARDED = ("hidden_act", "activation_function", "activation")   # the first that a config has is replaced
GUARD = "jaxslim: open this folder with AutoModel... and trust_remote_code=True"
# Families whose attention the template's can stand in for -> the class it replaces (of Whisper, the encoder's).
ATTENTION = {"wav2vec2": "Wav2Vec2Attention", "hubert": "HubertAttention", "wavlm": "WavLMAttention",
             "bert": "BertSelfAttention", "roberta": "RobertaSelfAttention", "distilbert": "DistilBertSelfAttention",
             "whisper": "WhisperAttention"}
SHAPES = {"mixer", "options", "heads", "qk_dim", "v_dim", "scale"}  # fields that need the template's attention
ANY = SHAPES | {"lora", "q_rank", "k_rank", "v_rank", "o_rank"}     # WavLM's reads the weights of its linears itself
WRITTEN = {"frontend": {"channels"}, "ffn": {"units", "up_rank", "down_rank", "lora"}, "attention": ANY}
MIXERS = ("softmax", "hedgehog")
ROLES = ("owner", "q", "k", "v", "o", "up", "down")
TEXT = ("bert", "roberta", "distilbert")
# Ending of an architecture -> the Auto class that opens it.
AUTO = {"Model": "AutoModel", "ForCTC": "AutoModelForCTC",
        "ForSequenceClassification": "AutoModelForAudioClassification",  # of TEXT: AutoModelForSequenceClassification
        "ForAudioFrameClassification": "AutoModelForAudioFrameClassification", "ForXVector": "AutoModelForAudioXVector",
        "ForConditionalGeneration": "AutoModelForSpeechSeq2Seq"}


def unsupported(spec: Spec) -> str | None:
    """Why the template cannot build this model, in a sentence; None when it can."""
    speech = FAMILIES[spec.family].frontend.startswith("feature_extractor.conv_layers")
    if spec.family.startswith("parakeet"):
        return f"{spec.family} has changed blocks, and for Parakeet no PyTorch code is written in this release."
    for block, fields in spec.blocks.items():
        what = {"ffn1": "ffn", "ffn2": "ffn", "cross": "attention"}.get(kind(block), kind(block))
        lacking = fields.keys() - WRITTEN.get(what, set())
        if what == "attention" and not (spec.family in ATTENTION and block.startswith("encoder.")):
            lacking |= fields.keys() & SHAPES  # elsewhere linears are replaced where they stand, and no more
        if what == "frontend" and not speech:
            lacking |= fields.keys()
        if fields.get("mixer", "softmax") not in MIXERS or fields.get("options", {}).get("window"):
            lacking |= {"mixer", "options"} & fields.keys()
        if lacking:
            return (f"Block {block} of {spec.family} has {', '.join(sorted(lacking))}, for which no PyTorch code is "
                    "written in this release.")
    return None


def files(spec: Spec, architecture: str) -> dict[str, str]:
    """File name -> text of the code that opens a model with this Spec; none when it is `unsupported`."""
    if unsupported(spec):
        return {}
    family, prefix = FAMILIES[spec.family], split(architecture)[0]
    folder = importlib.resources.files("jaxslim") / "assets" / "hf_template"
    configuration, modeling = ((folder / name).read_text(encoding="utf-8") for name in FILES)
    wanted = {"frontend" for b in spec.blocks if kind(b) == "frontend"}
    needs = ANY if spec.family == "wavlm" else SHAPES
    if any(kind(b) == "attention" and fields.keys() & needs for b, fields in spec.blocks.items()):
        wanted |= {"attention", "gated" if spec.family == "wavlm" else "plain"}
        modeling = modeling.replace("Wav2Vec2Attention", ATTENTION[spec.family])
    modeling = _keep(modeling, wanted)
    parts = {part: {r: names[r] for r in ROLES if r in names} for part, names in family.parts.items()}
    shapes, layers = ", ".join(f'"{field}"' for field in sorted(needs)), _dict(family.layer)
    table = "".join(f'    "{part}": {_dict(names)},\n' for part, names in parts.items())
    for pattern, text in ((r"(?<=^SHAPES = \{).*?(?=\})", shapes), (r"(?<=^LAYERS = ).*?(?=  #)", layers),
                          (r"(?<=its name in the layer\n).*?(?=^\}\n)", table)):
        modeling = re.sub(pattern, lambda _, text=text: text, modeling, flags=re.MULTILINE | re.DOTALL)
    modeling = _rename(modeling, spec.family, prefix).rstrip() + "\n"
    for name in dict.fromkeys((f"{prefix}Model", architecture)):
        modeling += (f"\n\nclass {name}(stock.{name}):\n    config_class = JaxslimConfig\n\n"
                     "    def __init__(self, config, *args, **kwargs):\n"
                     "        super().__init__(config, *args, **kwargs)\n        slim(self)\n")
    configuration = configuration.replace('"jaxslim-wav2vec2"', f'"jaxslim-{spec.family}"')
    configuration = _rename(configuration, spec.family, prefix).replace('"hidden_act"', f'"{_guarded(spec.config)}"')
    return dict(zip(FILES, (configuration, modeling), strict=True))


def config(spec: Spec, architecture: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, the config.json of a model with changed blocks, made so that only the written code opens it."""
    values, act = dict(values), _guarded(values)
    stock = {k: values[k] for k in ("architectures", "auto_map", act) if k in values}
    stock["type"] = values["model_type"]  # by another name: a stock class takes a part with its model_type for its own
    values |= {"jaxslim": spec.to_json(), STOCK: stock, "model_type": f"jaxslim-{spec.family}", act: GUARD}
    if unsupported(spec):  # no code: then nothing but jaxslim opens it
        return values
    values["auto_map"] = {"AutoConfig": "configuration_jaxslim.JaxslimConfig",
                          "AutoModel": f"modeling_jaxslim.{split(architecture)[0]}Model",
                          auto_class(spec, architecture): f"modeling_jaxslim.{architecture}"}
    return values


def auto_class(spec: Spec, architecture: str) -> str:
    """Name of the Auto class that opens the architecture."""
    name = AUTO[split(architecture)[1]]
    return name.replace("Audio", "Sequence") if spec.family in TEXT else name


def restore(values: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `config`: config.json with the stock values where others stood in for them."""
    values = dict(values)
    stock = values.pop(STOCK, None)
    if stock is None:
        return values
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "auto_map") and v != GUARD}
    return values | {"model_type" if k == "type" else k: v for k, v in stock.items()}


def _guarded(values: Mapping[str, Any]) -> str:
    return next((key for key in GUARDED if key in values), GUARDED[0])


def split(architecture: str) -> tuple[str, str]:
    """'Wav2Vec2ForCTC' -> ('Wav2Vec2', 'ForCTC')."""
    match = re.fullmatch(r"(.+?)(Model|For[A-Z]\w*)", architecture)
    return match[1], match[2]


def _keep(text: str, wanted: set[str]) -> str:
    """Drops the parts that are not wanted, and the markers."""
    lines, part = [], None
    for line in text.splitlines():
        code, marker, name = line.partition("# part: ")
        if marker and not code.strip():
            part = name
        elif marker:
            lines += [code.rstrip()] if name in wanted else []
        elif part is None or part in wanted:
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def _rename(text: str, family: str, prefix: str) -> str:
    package = family.replace("-", "_")
    return (text.replace("models.wav2vec2.modeling_wav2vec2", f"models.{package}.modeling_{package}")
            .replace("Wav2Vec2", prefix))


def _dict(names: Mapping[str, str]) -> str:
    pairs = [f'"{key}":~"{name}"' for key, name in names.items()]  # lines break between pairs only
    return "{" + "\n        ".join(textwrap.wrap(", ".join(pairs), 105)).replace("~", " ") + "}"
