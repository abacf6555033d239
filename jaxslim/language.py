"""Languages of MMS models (arXiv 2305.13516): one small file of attention adapters and output layer per language."""
from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxslim import weights as stored
from jaxslim.spec import nearest

OWN = (".adapter_layer.", "lm_head.")  # what names of parameters that belong to a language hold


def files(language: str) -> tuple[str, ...]:
    """Names under which a language may lie in a model's folder, best first."""
    return tuple(f"adapter.{language}.{ending}" for ending in ("safetensors", "bin"))


def switch(weights: Mapping[str, Any], config: dict[str, Any], path: pathlib.Path, language: str) -> dict[str, Any]:
    """Weights with those of `language`, as `load_adapter` of transformers; `config` gets its vocab_size, and the
    language as `target_lang`.

    Raises:
      HubError: the model has no adapters, the folder not this language, or the file is of another model.
    """
    if config.get("adapter_attn_dim") is None:
        raise stored.HubError(f"language={language!r}: {path.name} has no language adapters (adapter_attn_dim in "
                              "config.json); load it without a language.")
    file = next((path / name for name in files(language) if (path / name).is_file()), None)
    if file is None:
        known = sorted({f.name.split(".")[1] for f in path.glob("adapter.*.*")})
        raise stored.HubError(f"{path} has no {files(language)[0]} or .bin; there is {', '.join(known[:8]) or 'none'}"
                              f"{' ...' if len(known) > 8 else ''}.{nearest(language, known)}")
    read = stored._safetensors if file.suffix == ".safetensors" else stored._bin
    adapter = {k: np.asarray(v) for k, v in read(file).items()}
    want = {k for k in weights if any(own in k for own in OWN)}
    if want != set(adapter):
        odd = sorted(want ^ set(adapter))[0]
        raise stored.HubError(f"{file} {'lacks' if odd in want else 'has an unexpected'} {odd}; it is the adapter of "
                              "another model.")
    config["vocab_size"], config["target_lang"] = len(adapter["lm_head.weight"]), language
    return {**weights, **adapter}


def tokenizer_config(text: str, language: str) -> str:
    """tokenizer_config.json with another target language."""
    return json.dumps(json.loads(text) | {"target_lang": language}, indent=2, ensure_ascii=False) + "\n"
