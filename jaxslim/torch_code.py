"""PyTorch code for models that transformers has no class for, written from the Spec into the model's folder.

`assets/hf_template/` holds the code as it stands for wav2vec2; here names are changed to the family's and what the
Spec does not need is left out: a line that ends in `# part: NAME`, or everything from such a line to the next.

The folder opens with `AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)`, without jaxslim. Without that
argument, or with a stock class, transformers would take the weights it knows and draw the rest at random; so such a
folder has a `model_type` of its own and a value in GUARDED's place at which every stock class stops. What config.json
said there stands under `jaxslim_stock`, and `restore` puts it back.
"""
from __future__ import annotations

import hashlib
import importlib.resources
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from jaxslim.models import recurrent
from jaxslim.models.roles import FAMILIES
from jaxslim.spec import MIXERS, Generator, Spec, kind

FILES = ("configuration_jaxslim.py", "modeling_jaxslim.py")
STOCK = "jaxslim_stock"
GUARDED = ("hidden_act", "activation_function", "activation")   # the first that a config has is replaced
INNER = "encoder_config"   # Parakeet's section that holds it
GUARD = "jaxslim: open this folder with AutoModel... and trust_remote_code=True"
# Families whose attention the template's can stand in for -> the class it replaces.
ATTENTION = {"wav2vec2": "Wav2Vec2Attention", "hubert": "HubertAttention", "wavlm": "WavLMAttention",
             "bert": "BertSelfAttention", "roberta": "RobertaSelfAttention", "distilbert": "DistilBertSelfAttention",
             "whisper": "WhisperAttention", "wav2vec2-conformer": "Wav2Vec2ConformerSelfAttention",
             "wav2vec2-bert": "Wav2Vec2BertSelfAttention",
             **dict.fromkeys(("parakeet_ctc", "parakeet_encoder"), "ParakeetEncoderAttention")}
POSITIONS = {"wavlm": "gated", **dict.fromkeys(("wav2vec2-conformer", "wav2vec2-bert", "parakeet_ctc",
                                                "parakeet_encoder"), "distances")}  # the part that knows them
SHAPES = {"mixer", "options", "heads", "qk_dim", "v_dim", "scale"}  # fields that need the template's attention
ANY = SHAPES | {"lora", "adapter", "q_rank", "k_rank", "v_rank", "o_rank"}   # WavLM's reads its linears' weights
WRITTEN = {**dict.fromkeys(("frontend", "conv"), {"channels"}), "attention": ANY, "generator": Generator._fields,
           "ffn": {"units", "up_rank", "down_rank", "lora", "adapter"}}
ROLES = ("owner", "q", "k", "v", "o", "pos", "bias_u", "bias_v", "up", "down", "conv", "inner", "norm")
TEXT = ("bert", "roberta", "distilbert")
# Ending of an architecture -> the Auto class that opens it.
AUTO = {"Model": "AutoModel", "Encoder": "AutoModel", "ForCTC": "AutoModelForCTC",
        "ForSequenceClassification": "AutoModelForAudioClassification",  # of TEXT: AutoModelForSequenceClassification
        "ForAudioFrameClassification": "AutoModelForAudioFrameClassification", "ForXVector": "AutoModelForAudioXVector",
        "ForConditionalGeneration": "AutoModelForSpeechSeq2Seq"}


def unsupported(spec: Spec) -> str | None:
    """Why the template cannot build this model, in a sentence; None when it can."""
    if spec.blocks and spec.family == "gemma3n_audio":
        return "Gemma 3n's audio encoder has changed blocks, for which no PyTorch code is written in this release."
    if spec.slots > 1:
        return f"This model has {spec.slots} adapters, and PyTorch code is written for one; save one alone."
    if spec.generator and spec.get("adapter_attn_dim"):
        return "A generative student with MMS adapters has no PyTorch code in this release."
    for block, fields in spec.blocks.items():
        if block.startswith("generator."):
            return f"Block {block}, inside a generator, is changed; no PyTorch code is written for it in this release."
        what = {"ffn1": "ffn", "ffn2": "ffn", "cross": "attention"}.get(kind(block), kind(block))
        lacking = fields.keys() - WRITTEN.get(what, set())
        if what == "attention" and spec.family not in ATTENTION:
            lacking |= fields.keys() & SHAPES  # linears are replaced where they stand, and no more
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
    front = "whisper" if spec.family == "whisper" else "waves"
    wanted = {front for b in spec.blocks if kind(b) == "frontend"}
    wanted |= {"conv" for b in spec.blocks if kind(b) == "conv"}
    wanted |= {"adapter" for fields in spec.blocks.values() if "adapter" in fields}
    if spec.generator:
        wanted |= {"generator", "front_wavlm" if spec.family == "wavlm" else "front_plain"}
        own = (folder / "generator_jaxslim.py").read_text(encoding="utf-8")
        modeling = modeling.replace("# part: generated\n", own)
    wanted |= {"parakeet"} if prefix == "Parakeet" else set()
    needs = ANY if spec.family == "wavlm" else SHAPES
    mixed = [b for b, fields in spec.blocks.items() if kind(b) in ("attention", "cross") and fields.keys() & needs]
    if mixed:
        wanted |= {"attention", "gated" if spec.family == "wavlm" else "plain", POSITIONS.get(spec.family, "plain")}
        wanted |= {"decoder" for b in mixed if b.startswith("decoder.")}
        used = {spec.blocks[b].get("mixer", "softmax") for b in mixed}
        wanted |= {"recurrent" if m in recurrent.KINDS else m if m == "linformer" else "linear"
                   for m in used - {"softmax"}}
        own = (folder / "mixers_jaxslim.py").read_text(encoding="utf-8")
        modeling = modeling.replace("# part: mixers\n", own + "\n\n")
        table = "".join(f'    "{m}": {_dict(MIXERS[m])},\n' for m in sorted(used))
        modeling = modeling.replace("OPTIONS = {}", "OPTIONS = {\n" + table + "}")
    modeling = _keep(modeling, wanted)
    parts = {part: {r: names[r] for r in ROLES if r in names} for part, names in family.parts.items()}
    shapes, layers = ", ".join(f'"{field}"' for field in sorted(needs)), _dict(family.layer)
    table = "".join(f'    "{part}": {_dict(names)},\n' for part, names in parts.items())
    for pattern, text in ((r"(?<=^SHAPES = \{).*?(?=\})", shapes), (r"(?<=^LAYERS = ).*?(?=  #)", layers),
                          (r"(?<=its name in the layer\n).*?(?=^\}\n)", table)):
        modeling = re.sub(pattern, lambda _, text=text: text, modeling, flags=re.MULTILINE | re.DOTALL)
    modeling = _rename(modeling, spec.family, prefix).rstrip() + "\n"
    if mixed:
        modeling = modeling.replace(f" {prefix}Attention", f" {ATTENTION[spec.family]}").replace(
            f"({prefix}Attention)", f"({ATTENTION[spec.family]})")
    for name in classes(architecture):
        modeling += (f"\n\nclass {name}(stock.{name}):\n    config_class = JaxslimConfig\n\n"
                     "    def __init__(self, config, *args, **kwargs):\n"
                     "        super().__init__(config, *args, **kwargs)\n        slim(self)\n")
    if prefix == "Parakeet":
        own = "ParakeetCTCConfig" if spec.head == "ctc" else "ParakeetEncoderConfig"
        configuration = configuration.replace("Wav2Vec2Config", own)
    if isinstance(spec.config.get(INNER), Mapping):  # the activation stands in a section of its own
        configuration = configuration.replace(
            "values[GUARDED] = GUARD", 'values[GUARDED] = {**values[GUARDED], "hidden_act": GUARD}')
    configuration = configuration.replace('"jaxslim-wav2vec2"', f'"jaxslim-{spec.family}"')
    configuration = _rename(configuration, spec.family, prefix).replace('"hidden_act"', f'"{_guarded(spec.config)}"')
    digest = hashlib.sha256(modeling.encode()).hexdigest()[:16]
    configuration = configuration.replace('MODELING = ""', f'MODELING = "{digest}"')
    return dict(zip(FILES, (configuration, modeling), strict=True))


def config(spec: Spec, architecture: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, the config.json of a model with changed blocks, made so that only the written code opens it."""
    values, act = dict(values), _guarded(values)
    stock = {k: values[k] for k in ("architectures", "auto_map", act) if k in values}
    stock["type"] = values["model_type"]  # by another name: a stock class takes a part with its model_type for its own
    guard = {**values[act], "hidden_act": GUARD} if act == INNER else GUARD
    values |= {"jaxslim": spec.to_json(), STOCK: stock, "model_type": f"jaxslim-{spec.family}", act: guard}
    if unsupported(spec):  # no code: then nothing but jaxslim opens it
        return values
    values["auto_map"] = {"AutoConfig": "configuration_jaxslim.JaxslimConfig",
                          "AutoModel": f"modeling_jaxslim.{classes(architecture)[0]}",
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


def classes(architecture: str) -> list[str]:
    """Names of the classes that the code defines: the bare model, if there is one, and the one of the architecture."""
    prefix = split(architecture)[0]
    return [architecture] if prefix == "Parakeet" else list(dict.fromkeys((f"{prefix}Model", architecture)))


def _guarded(values: Mapping[str, Any]) -> str:
    if isinstance(values.get(INNER), Mapping):
        return INNER
    return next((key for key in GUARDED if key in values), GUARDED[0])


def split(architecture: str) -> tuple[str, str]:
    """'Wav2Vec2ForCTC' -> ('Wav2Vec2', 'ForCTC')."""
    match = re.fullmatch(r"(.+?)(Model|Encoder|For[A-Z]\w*)", architecture)
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
    package = "parakeet" if prefix == "Parakeet" else family.replace("-", "_")
    return (text.replace("models.wav2vec2.modeling_wav2vec2", f"models.{package}.modeling_{package}")
            .replace("Wav2Vec2", prefix))


def _dict(names: Mapping[str, Any]) -> str:
    shown = {k: f'"{v}"' if isinstance(v, str) else repr(v) for k, v in names.items()}
    pairs = [f'"{key}":~{value}' for key, value in shown.items()]  # lines break between pairs only
    return "{" + "\n        ".join(textwrap.wrap(", ".join(pairs), 92)).replace("~", " ") + "}"
