"""Adapters in files: `adapter_config.json` and `adapter_model.safetensors`, and those of PEFT, AdapterHub and MMS.

A LoRA is written in the layout of PEFT, so `peft.PeftModel.from_pretrained` opens it; a bottleneck in a layout of ours
(PEFT has none), under the names that its arrays have in a model. Both say which base they stand on, by a fingerprint.
Reading is strict: another base, a missing, extra or misshapen array, a setting that is not known here is an error.
"""
from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxslim import __version__, adapters
from jaxslim import weights as stored
from jaxslim.adapters import AdapterError, Bundle
from jaxslim.models import bind
from jaxslim.models.roles import FAMILIES, blocks, layers, roles
from jaxslim.slim import Slim
from jaxslim.spec import LINEARS, SpecError, kind

SCHEMA = 1
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = {"schema", "library", "family", "head", "blocks", "saved", "parameters", "bytes", "base_fingerprint",
        "base_model_name_or_path", "name"}      # of schema 1
PREFIX = "base_model.model."                    # of PEFT
PEFT_OFF = {"bias": "none", "use_dora": False, "use_bdlora": None, "layer_replication": None, "lora_bias": False,
            "alora_invocation_tokens": None, "target_parameters": None}   # what an import must not ask for
HUB_OFF = {"mh_adapter": False, "cross_adapter": False, "ln_before": False, "ln_after": False, "use_gating": False,
           "phm_layer": False, "inv_adapter": None, "is_parallel": True, "original_ln_after": True}


# ---- writing ----


def save(model: Slim, folder: str | os.PathLike, name: str | None = None, *, head: bool = False,
         base_name: str | None = None) -> dict[str, Any]:
    """Writes one adapter of a model; returns its config.

    Args:
      name: of the adapter; None is the only one.
      head: with the output layer (or the decoder), if it was trained.
      base_name: what `base_model_name_or_path` says.
    Raises:
      AdapterError: no such adapter, or `folder` holds other files.
    """
    bundle = adapters.extract(model, name, head=head)
    if not bundle.params:
        raise AdapterError("This model has no adapter to save.")
    target = pathlib.Path(folder)
    if target.exists() and (odd := [f.name for f in target.iterdir() if f.name not in (CONFIG, WEIGHTS, "README.md")]):
        raise AdapterError(f"{target} holds files that are not of an adapter ({odd[0]}); choose another folder.")
    arrays = {k: np.asarray(v, np.float32) for k, v in {**bundle.params, **bundle.head}.items()}
    ours = {"schema": SCHEMA, "library": f"jaxslim {__version__}", "name": name or model.adapters[0],
            "family": model.spec.family, "head": model.spec.head, "blocks": dict(bundle.blocks),
            "saved": sorted(bundle.head), "parameters": bundle.size, "bytes": sum(v.nbytes for v in arrays.values()),
            "base_fingerprint": adapters.base_fingerprint(model), "base_model_name_or_path": base_name}
    lora_only = not any("adapter" in f for f in bundle.blocks.values())
    config, metadata = ours, {"format": "pt"}
    if lora_only:   # PEFT warns of keys it does not know, so what is ours goes with the arrays
        config, metadata = _peft_config(model, bundle, ours), {**metadata, "jaxslim": json.dumps(
            {k: v for k, v in ours.items() if k != "blocks"})}
    if lora_only:
        arrays = {PREFIX + k: v for k, v in arrays.items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, target / WEIGHTS, metadata=metadata)
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def _peft_config(model: Slim, bundle: Bundle, ours: dict) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it."""
    linears = {roles(model.spec, b)[r]: f for b, fields in bundle.blocks.items() for r, f in fields["lora"].items()}
    first = next(iter(linears.values()))
    differ = lambda key: {n: f[key] for n, f in linears.items() if f[key] != first[key]}  # noqa: E731
    return {"peft_type": "LORA", "task_type": None, "r": first["rank"], "lora_alpha": first["alpha"],
            "target_modules": sorted(linears), "rank_pattern": differ("rank"), "alpha_pattern": differ("alpha"),
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
            "init_lora_weights": True, "base_model_name_or_path": ours["base_model_name_or_path"],
            "modules_to_save": sorted({k.rpartition(".")[0] for k in bundle.head}) or None}


# ---- reading ----


def load(model: Slim, path: str | os.PathLike, name: str | None = None, *, force: bool = False) -> Slim:
    """The model with the adapter of a folder or file; in place of the one of that name, if there is one.

    Args: name: None is the adapter's own. force: though its base has another fingerprint.
    """
    bundle = read(model, path, force=force)
    return adapters.put(model, name or bundle.meta["name"], bundle)


def read(model: Slim, path: str | os.PathLike, *, force: bool = False) -> Bundle:
    """The adapter of a folder or file, as it fits `model`: ours, PEFT's LoRA, AdapterHub's par_bn, or MMS's file.

    Raises:
      AdapterError: it stands on another base, or is damaged, or of a kind that is not known here.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _mms(model, path)
    config, arrays = describe(path), None
    file = next((path / n for n in (WEIGHTS, "adapter.safetensors", "adapter_model.bin", "pytorch_adapter.bin")
                 if (path / n).is_file()), None)
    if file is None:
        raise AdapterError(f"{path} has no {WEIGHTS}; copy the adapter again, completely.")
    arrays = _arrays(file)
    if config.get("peft_type"):
        bundle = _peft(model, config, arrays, path)
    elif "schema" in config:
        bundle = _ours(model, config, arrays, path)
    elif "config" in config:
        bundle = _adapterhub(model, config, arrays, path)
    else:
        raise AdapterError(f"{path / CONFIG} is of no kind known here (jaxslim, PEFT's LoRA, AdapterHub's par_bn).")
    _check(model, bundle, path)
    wanted = bundle.meta.get("base_fingerprint")
    if wanted and not force and wanted != (mine := adapters.base_fingerprint(model)):
        raise AdapterError(f"{path} was trained on another base (fingerprint {wanted[:12]}, this model has "
                           f"{mine[:12]}); load that base, or force it.")
    return bundle


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """adapter_config.json of a folder; under `jaxslim` what we stored beside the arrays of a LoRA."""
    path = pathlib.Path(path)
    if not (path / CONFIG).is_file():
        raise AdapterError(f"{path} has no {CONFIG}; an adapter is a folder with {CONFIG} and {WEIGHTS}.")
    config = stored.read_json(path / CONFIG)
    if config.get("peft_type") and (path / WEIGHTS).is_file():
        with safetensors.safe_open(path / WEIGHTS, framework="np") as file:
            config["jaxslim"] = json.loads((file.metadata() or {}).get("jaxslim", "{}"))
    return config


def found(root: str | os.PathLike) -> list[dict[str, Any]]:
    """One row for each adapter in a folder and its sub-folders: path, kind, parameters, bytes, base."""
    rows = []
    for file in sorted(pathlib.Path(root).rglob(CONFIG)):
        config = describe(file.parent)
        ours = config.get("jaxslim") or config
        what = config.get("peft_type") or next(
            (f["adapter"]["kind"] for f in config.get("blocks", {}).values() if "adapter" in f), "AdapterHub")
        sizes = [f.stat().st_size for f in file.parent.iterdir() if f.suffix in (".safetensors", ".bin")]
        rows.append({"path": os.fspath(file.parent), "name": ours.get("name", file.parent.name), "kind": what,
                     "blocks": len(config.get("blocks", config.get("target_modules") or ())),
                     "parameters": ours.get("parameters"), "bytes": sum(sizes),
                     "base": config.get("base_model_name_or_path") or (ours.get("base_fingerprint") or "")[:12]})
    return rows


def _arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    reader = stored._safetensors if file.suffix == ".safetensors" else stored._bin
    return {k: np.asarray(v, np.float32) for k, v in reader(file).items()}


def _check(model: Slim, bundle: Bundle, path) -> None:
    """Names and shapes of a bundle against what its blocks would have in this model."""
    spec = adapters.base(model).spec
    have = set(bind.shapes(spec))
    try:
        for block, fields in bundle.blocks.items():
            spec = spec.with_block(block, **fields)
        want = {k: x.shape for k, x in bind.shapes(spec).items() if k not in have}
    except (SpecError, KeyError, ValueError, IndexError) as error:
        raise AdapterError(f"{path} does not fit this {spec.family} model: {str(error).rstrip('.')}.") from error
    problems = [f"missing {k}" for k in want if k not in bundle.params]
    problems += [f"unexpected {k}" for k in bundle.params if k not in want]
    problems += [f"misshapen {k}: {np.shape(bundle.params[k])}, expected {want[k]}" for k in want
                 if k in bundle.params and np.shape(bundle.params[k]) != want[k]]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterError(f"{path} does not fit this {spec.family} model: {'; '.join(problems[:4])}{more}.")


def _ours(model: Slim, config: Mapping[str, Any], arrays, path) -> Bundle:
    if config["schema"] != SCHEMA:
        unknown = sorted(set(config) - KEYS)
        raise AdapterError(f"{path / CONFIG} has schema {config['schema']}, this release reads {SCHEMA}"
                           f"{'; unknown keys ' + ', '.join(unknown) if unknown else ''}. Update jaxslim.")
    if unknown := sorted(set(config) - KEYS):
        raise AdapterError(f"{path / CONFIG}: unknown keys {', '.join(unknown)}; was it written by a newer jaxslim?")
    head = {k: arrays.pop(k) for k in config["saved"] if k in arrays}
    if gone := set(config["saved"]) - set(head):
        raise AdapterError(f"{path} lacks {sorted(gone)[0]} of the output layer; copy the adapter again.")
    return Bundle(config["blocks"], arrays, head, dict(config))


def _peft(model: Slim, config: Mapping[str, Any], arrays, path) -> Bundle:
    """LoRA of PEFT: names of modules become blocks and roles."""
    if config["peft_type"] != "LORA":
        raise AdapterError(f"{path / CONFIG}: peft_type {config['peft_type']} is not supported; LORA is.")
    for key, off in PEFT_OFF.items():
        if config.get(key, off) not in (off, None):
            raise AdapterError(f"{path / CONFIG}: {key}={config[key]!r} is not supported; only {off!r} is.")
    spec = model.spec
    where = {roles(spec, b)[r]: (b, r) for b in blocks(spec) if kind(b) in LINEARS for r in LINEARS[kind(b)]}
    params, head, made = {}, {}, {}
    for key, value in arrays.items():
        key = key.removeprefix(PREFIX).replace(".default.", ".").replace("modules_to_save.", "")
        linear, lora, leaf = key.rpartition(".lora_")
        if not lora:
            head[key] = value
            continue
        if linear not in where or leaf not in ("A.weight", "B.weight"):
            raise AdapterError(f"{path}: {key} matches no linear of this {spec.family} model; known are "
                               f"{', '.join(list(where)[:3])}, ...")
        params[key] = value
        block, role = where[linear]
        rank = value.shape[0] if leaf == "A.weight" else value.shape[1]
        alpha = _pattern(config.get("alpha_pattern"), linear, config.get("lora_alpha", 8))
        alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha
        made.setdefault(block, {}).setdefault("lora", {})[role] = {"rank": int(rank), "alpha": float(alpha)}
    if odd := [k for k in head if k not in model.params]:
        raise AdapterError(f"{path}: {odd[0]} is neither LoRA nor a parameter of this model.")
    ours = config.get("jaxslim") or {}
    return Bundle(made, params, head, {"name": path.name, **ours})


def _pattern(table: Mapping[str, Any] | None, name: str, default):
    """PEFT's rank_pattern and alpha_pattern: the first whose key ends the name."""
    return next((v for k, v in (table or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _adapterhub(model: Slim, config: Mapping[str, Any], arrays, path) -> Bundle:
    """`par_bn` of AdapterHub: beside the FFN, reading the layer's un-normalised input (`post_forward` in its code)."""
    own = config["config"]
    for key, off in HUB_OFF.items():
        if own.get(key, off) not in (off, None):
            raise AdapterError(f"{path / CONFIG}: {key}={own[key]!r} is not supported; only par_bn is.")
    if not isinstance(own.get("scaling", 4.0), int | float):
        raise AdapterError(f"{path / CONFIG}: scaling={own['scaling']!r} is not supported; a number is.")
    spec, made, params = model.spec, {}, {}
    where = {roles(spec, layer)["owner"]: layer for layer in layers(spec)}
    inner = FAMILIES[spec.family].prefix + "."
    for key, value in arrays.items():
        match = re.fullmatch(r"(.+?)\.(?:output|output_adapters)\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)",
                             key)
        layer = match and next((where[n] for n in (match[1], inner + match[1], match[1].removeprefix(inner))
                                if n in where), None)
        if layer is None:
            raise AdapterError(f"{path}: {key} is of no layer of this {spec.family} model, or not of a par_bn adapter.")
        block = f"{layer}.{'ffn2' if 'ffn2' in FAMILIES[spec.family].parts else 'ffn'}"
        part = match[2].partition(".")[0]
        params[f"{roles(spec, block)['owner']}.adapter.{part}.{match[3]}"] = value
        if (part, match[3]) == ("down", "weight"):
            made[block] = {"adapter": {"kind": "parallel", "input": "raw", "width": len(value), "act": own.get(
                "non_linearity", "relu"), "scale": float(own.get("scaling", 4.0))}}
    return Bundle(made, params, {}, {"name": config.get("name", path.name)})


def _mms(model: Slim, file: pathlib.Path) -> Bundle:
    """`adapter.<language>.safetensors` of an MMS model: attention adapters and output layer."""
    arrays = _arrays(file)
    mine = {k for k in model.params if ".adapter_layer." in k or k.startswith("lm_head.")}
    if not any(".adapter_layer." in k for k in mine):
        raise AdapterError(f"{file}: this {model.spec.family} model has no MMS adapters (adapter_attn_dim).")
    if mine != set(arrays):
        odd = sorted(mine ^ set(arrays))[0]
        raise AdapterError(f"{file} {'lacks' if odd in mine else 'has an unexpected'} {odd}; it is of another model.")
    for k, v in arrays.items():
        if not k.startswith("lm_head.") and v.shape != model.params[k].shape:
            raise AdapterError(f"{file}: {k} has shape {v.shape}, this model's has {model.params[k].shape}.")
    return Bundle({}, {}, arrays, {"name": file.name.split(".")[1]})
