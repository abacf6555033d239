"""Models that do not exist yet: random weights for a config (training from scratch), a new head for a new vocabulary
or for other classes.

Both are written as an ordinary Hugging Face folder first, so that a run that is resumed starts from the same weights.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxslim import hub
from jaxslim.config import ConfigError
from jaxslim.data import load_rows
from jaxslim.data.language import write_tokenizer
from jaxslim.data.tools import vocabulary
from jaxslim.models import bind
from jaxslim.models.roles import HEAD
from jaxslim.slim import Slim
from jaxslim.spec import Spec, nearest

MELS = ("wav2vec2-bert",)       # families that read log-mel features
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
             "merges.txt")


def create(config: Mapping[str, Any], folder, data: str, seed: int, vocabulary_of: str = "model") -> str:
    """A CTC or language model of `config` (keys of config.json; `model_type` says which family) with random weights,
    and a character vocabulary of the texts in `data`; of a language model also "bytes", or the tokenizer.json of the
    model named by `vocabulary_of`. Returns the folder; one that is there already stays as it is.

    Raises:
      ConfigError: no or an unknown model_type, or a key that its config does not have.
    """
    folder = epath.Path(folder)
    if (folder / "config.json").exists():
        return str(folder)
    spec = _spec(config, 1)  # what is wrong with the config is said before anything is written
    if spec.head != "causal" and vocabulary_of not in ("model", "data"):
        raise ConfigError(f"vocabulary {vocabulary_of!r}: a new CTC model takes the characters of its texts (data).")
    if jax.process_index() == 0 and spec.head == "causal":
        spec = _spec(config, _tokens(vocabulary_of, folder, data))
        _write(Slim(spec, initial(spec, seed)), folder)
    elif jax.process_index() == 0:
        if not (folder / "vocab.json").exists():
            vocabulary(data, folder)
        spec = _spec(config, len(_vocabulary(folder)))
        (folder / "preprocessor_config.json").write_text(json.dumps(_processor(spec), indent=1))
        _write(Slim(spec, initial(spec, seed)), folder)
    _wait()
    return str(folder)


def with_vocabulary(model: str, folder, data: str, seed: int) -> str:
    """The model of that name with a new, random CTC head for the characters of `data`. Returns the folder."""
    folder = epath.Path(folder)
    if (folder / "config.json").exists():
        return str(folder)
    if jax.process_index() == 0:
        old, source = hub.load(model), hub.folder(model)
        if not (folder / "vocab.json").exists():
            vocabulary(data, folder)
        _copy(source, folder, PROCESSORS)
        config = dict(old.spec.config) | {"vocab_size": len(_vocabulary(folder)), "pad_token_id": 0,
                                          "bos_token_id": 1, "eos_token_id": 2}
        _write(_under(Spec(config, old.spec.family, "ctc", old.spec.blocks), old, seed), folder)
    _wait()
    return str(folder)


def with_labels(model: str, folder, data: str, seed: int) -> str:
    """The model of that name with a new, random classification head for the labels in `data`. Returns the folder.

    Raises:
      ConfigError: fewer than two labels.
    """
    folder = epath.Path(folder)
    if (folder / "config.json").exists():
        return str(folder)
    if jax.process_index() == 0:
        old, source = hub.load(model), hub.folder(model)
        names = sorted({str(x) for x in load_rows(data).column("label") if x not in (None, "")},
                       key=lambda x: (int(x) if x.isdecimal() else -1, x))   # numbers as numbers
        if len(names) < 2:
            raise ConfigError(f"labels: data: {data} has {len(names)} different values in the column `label`; at least "
                              "two are needed.")
        folder.mkdir(parents=True, exist_ok=True)
        _copy(source, folder, TOKENIZER if bind.FAMILIES[old.spec.family] == "bert" else PROCESSORS)
        classes = {"id2label": {str(i): x for i, x in enumerate(names)},
                   "label2id": {x: i for i, x in enumerate(names)}}
        config = {k: v for k, v in old.spec.config.items() if k not in ("architectures", "num_labels")} | classes
        _write(_under(old.spec.replace(config=config, head="classification"), old, seed), folder)
    _wait()
    return str(folder)


def _under(spec: Spec, old: Slim, seed: int) -> Slim:
    """The encoder of `old` under the head of `spec`, which is new and random."""
    new = initial(spec, seed)
    bare = {k.partition(".")[2]: k for k in new}    # an encoder without head has no prefix
    inner = {k if k in new else bare.get(k): v for k, v in old.params.items()}
    kept = {k: v for k, v in inner.items() if k in new and np.shape(v) == new[k].shape and not HEAD.match(k)}
    return Slim(spec, new | kept)


def initial(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Random parameters as transformers draws them for the wav2vec2 families: linear layers normal with
    `initializer_range`, convolutions Kaiming normal, norms 1 and 0. Embeddings of distances are drawn like linear
    layers, and biases are all 0: that is ours."""
    rng, scale, params = np.random.default_rng(seed), spec.get("initializer_range", 0.02), {}
    shapes = bind.shapes(spec)
    for name, want in shapes.items():
        noise = rng.standard_normal(want.shape)
        if name.endswith(("running_var", "norm.weight")) or "norm" in name and name.endswith(".weight"):
            value = np.ones(want.shape)
        elif name.endswith(("pos_bias_u", "pos_bias_v")):                 # Xavier uniform
            value = rng.uniform(-1, 1, want.shape) * math.sqrt(6 / sum(want.shape))
        elif name.endswith("masked_spec_embed"):
            value = rng.uniform(0, 1, want.shape)
        elif name.endswith("feature_projection.projection.weight"):
            value = rng.uniform(-1, 1, want.shape) / math.sqrt(want.shape[1])
        elif len(want.shape) < 2:
            value = np.zeros(want.shape)
        elif name.endswith("original1"):                                  # positional convolution
            value = noise * 2 / math.sqrt(want.shape[2] * spec["hidden_size"])
        elif len(want.shape) > 2 and not name.endswith("original0"):      # Kaiming normal
            value = noise * math.sqrt(2 / math.prod(want.shape[1:]))
        else:
            value = noise * scale
        params[name] = value.astype(want.dtype)
    for name in shapes:
        if name.endswith("original0"):                                    # the norm of what weight norm scales
            v = params[name.removesuffix("0") + "1"].astype(np.float64)
            params[name] = np.sqrt((v * v).sum((0, 1), keepdims=True)).astype(np.float32)
    return params


def _spec(config: Mapping[str, Any], tokens: int) -> Spec:
    from transformers import CONFIG_MAPPING

    family = config.get("model_type")
    known = [f for f, module in bind.FAMILIES.items() if module in ("wav2vec2", "conformer", "w2v_bert", "gpt_neox")]
    if family not in known:
        raise ConfigError(f"model: model_type {family!r} cannot be trained from scratch.{nearest(str(family), known)} "
                          f"Known are {', '.join(known)}.")
    defaults = CONFIG_MAPPING[family]().to_dict()
    for key in config:
        if key not in defaults:
            raise ConfigError(f"model: {family} has no key {key!r} in its config.{nearest(key, defaults)}")
    full = CONFIG_MAPPING[family](**{k: v for k, v in config.items() if k != "model_type"}).to_dict()
    if family == "gpt_neox":
        return Spec(full | {"vocab_size": tokens, "bos_token_id": 0, "eos_token_id": 0}, family, "causal")
    return Spec(full | {"vocab_size": tokens, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, family, "ctc")


def _tokens(name: str, folder, data: str) -> int:
    """Puts a language model's tokenizer into its folder; returns how many tokens it has."""
    if name in ("model", "data", "bytes"):
        folder.mkdir(parents=True, exist_ok=True)
        texts = [] if name == "bytes" else [t for t in load_rows(data).column("text") if t]
        return write_tokenizer(folder, "bytes" if name == "bytes" else "data", texts)
    source = hub.folder(name)
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"vocabulary {name}: it has no tokenizer.json; give bytes, data, or a model that has one.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (source / file).is_file():
            (folder / file).write_text((source / file).read_text())
    table = json.loads((source / "tokenizer.json").read_text())
    return 1 + max([*table["model"]["vocab"].values(), *(t["id"] for t in table.get("added_tokens", ()))])


def _processor(spec: Spec) -> dict[str, Any]:
    if spec.family in MELS:
        stride = 2
        return {"feature_extractor_type": "SeamlessM4TFeatureExtractor", "sampling_rate": 16000, "padding_value": 0.0,
                "feature_size": spec["feature_projection_input_dim"] // stride, "return_attention_mask": True,
                "num_mel_bins": spec["feature_projection_input_dim"] // stride, "stride": stride,
                "padding_side": "right"}
    return {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "do_normalize": True,
            "feature_size": 1, "padding_value": 0.0, "return_attention_mask": True}


def _copy(source, folder, names) -> None:
    for name in names:
        if (source / name).exists():
            (folder / name).write_text((source / name).read_text())


def _write(model: Slim, folder: epath.Path) -> None:
    """The folder may hold the tokenizer already, which hub.save takes for a foreign one: config.json last."""
    partial = folder / "new"
    hub.save(model, partial)
    for file in sorted(partial.iterdir(), key=lambda f: f.name == "config.json"):
        file.replace(folder / file.name)
    partial.rmtree()


def _vocabulary(folder) -> dict[str, int]:
    return json.loads((epath.Path(folder) / "vocab.json").read_text())


def _wait() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("jaxslim.scratch")


def changed(model: Slim, values: Mapping[str, Any]) -> Slim:
    """The model with other values in its Hugging Face config, such as dropout, on which no shape depends.

    Raises:
      ConfigError: a key that the config has not, or one that changes the parameters.
    """
    if unknown := sorted(set(values) - set(model.spec.config)):
        raise ConfigError(f"model_config: this {model.spec.family} model has no {unknown[0]!r}."
                          f"{nearest(unknown[0], model.spec.config)}")
    spec = model.spec.replace(config={**model.spec.config, **values})
    if bind.shapes(spec) != bind.shapes(model.spec):
        raise ConfigError(f"model_config: {dict(values)} would change the model's parameters; change only dropout, "
                          "layerdrop, SpecAugment and the like.")
    return model.replace(spec=spec)
