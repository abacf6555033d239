"""Hugging Face folder or hub id <-> Slim: config.json and weights in, the same out, strict about every name.

A model is named by `bundled:NAME`, a local folder (or `gs://...`), or a hub id `org/name[@revision]` (places.py). What
is read is checked against `models.bind.shapes`: missing, unexpected or misshapen weights are an error that lists them,
except for the few names in architectures.py (LEFTOVERS, OPTIONAL). What is written opens in `transformers`: a stock
model as it is, one with changed blocks through the code that `torch_code` writes beside it.
"""
from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxslim import __version__, torch_code
from jaxslim import language as languages
from jaxslim import weights as stored
from jaxslim.architectures import TEXT, audio_part, family_of, rename, trim
from jaxslim.architectures import architecture as _architecture
from jaxslim.compare import compare
from jaxslim.models import bind
from jaxslim.places import CARRIED, CONFIG, OURS, folder, hub_reason
from jaxslim.slim import Slim
from jaxslim.spec import Spec, SpecError
from jaxslim.train import mesh as meshes
from jaxslim.weights import INDEX, WEIGHTS, HubError  # noqa: F401
from jaxslim.weights import read_json as _json
from jaxslim.weights import reason as _reason

COUNTS, MOST = ("layers", "attention_heads", "n_heads"), 1000   # keys of a config, and what is never too many
THREADS = 8  # arrays that are copied out of a file at a time
ADAPTERS = "jaxslim_adapters"   # in config.json: the names of a model's adapters; they change no shape


def load(name: str | os.PathLike, *, revision: str | None = None, dtype: Any = None, mesh: Any = None,
         language: str | None = None) -> Slim:
    """Reads a model.

    Args:
      name: `bundled:NAME`, a local folder, or a hub id (`org/name` or `org/name@revision`).
      revision: branch, tag or commit of a hub id.
      dtype: of the parameters; None means float32, whatever the file holds.
      mesh: devices (train.mesh.make) that the parameters go to by its rules as they are read: the host never holds
        more than one file of a sharded checkpoint. None is the default device.
      language: of an MMS model, such as "fra": its adapters and output layer take the place of the stored ones.
    Raises:
      HubError: nothing there, not a model this release reads, or weights that do not fit the config.
    """
    path = folder(name, revision=revision, language=language)
    config = audio_part(torch_code.restore(_config(path, str(name))))
    adapters = tuple(config.pop(ADAPTERS, ()))
    family, head = family_of(config, str(path / CONFIG))
    weights = rename(stored.read(path, str(name)), family)
    if language is not None:
        weights = languages.switch(weights, config, path, language)
    if head is None:
        lm = any(k.startswith("lm_head.") for k in weights)
        head = "causal" if family == "gpt_neox" and lm else "ctc" if family not in TEXT and lm else "none"
    if family in TEXT and head == "none" and not any("pooler." in k for k in weights):
        config["add_pooling_layer"] = False  # what transformers calls the switch; its configs do not record it
    _check_counts(config, len(weights), path / CONFIG)
    for key in ("dtype", "torch_dtype"):  # how a file stores weights says nothing about the model
        config.pop(key, None)
    if "jaxslim" not in config:  # a stock model is stored as what it is read as
        config["architectures"] = [_architecture(family, head)]
    try:
        spec = Spec.from_json(config) if "jaxslim" in config else Spec(config, family, head)
        want = bind.shapes(spec)
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, MemoryError, RecursionError) as error:
        detail = error if isinstance(error, SpecError) else f"{path / CONFIG} does not describe a model ({error!r})"
        raise HubError(f"{name}: {str(detail).rstrip('.')}.") from error
    weights = trim(weights, spec, want)
    try:
        bind.check(spec, weights, f"{path / WEIGHTS}")
    except SpecError as error:
        raise HubError(f"{error} Config and weights must come from the same model.") from error
    if spec.head == "ctc":
        _check_vocabulary(path, spec)
    dtype = jnp.dtype(dtype or jnp.float32)
    read = lambda k: np.asarray(weights.pop(k), dtype if jnp.issubdtype(want[k].dtype, jnp.floating)  # noqa: E731
                                else want[k].dtype)  # torch: counters are int64
    params, names = {}, list(weights)  # in the order of the files, each closed after its last array
    with ThreadPoolExecutor(THREADS) as pool:
        for some in (names[i : i + THREADS] for i in range(0, len(names), THREADS)):
            arrays = dict(zip(some, pool.map(read, some)))
            params |= jax.device_put(arrays) if mesh is None else jax.block_until_ready(meshes.place(arrays, mesh))
    return Slim(spec, {k: params[k] for k in want}, adapters=adapters)


def read_config(name: str | os.PathLike) -> dict[str, Any]:
    """config.json of a model, as `load` reads it. Raises HubError."""
    return audio_part(torch_code.restore(_config(folder(name), str(name))))


def save(model: Slim, folder: str | os.PathLike, *, source: str | os.PathLike | None = None, dtype: Any = None,
         verify: Callable[[pathlib.Path], None] | None = None) -> None:
    """Writes config.json and model.safetensors, all or nothing: into a sibling first, then renamed.

    A folder that an earlier `save` wrote is replaced (files there that are none of a model's are kept); any other
    folder with content is refused. `config.json` names as `dtype` what the parameters are in memory: a float32 model
    stored as float16 still opens as float32.

    Args:
      model: training-only parameters (`aux.`) are left out.
      folder: where to; `gs://...` works too, without the rename.
      source: folder or name of a model whose tokenizer, processor and licence files are copied along.
      dtype: of the stored floats, such as "float16" to halve the file; None = as they are.
      verify: called with the written folder before it is put in place; what it raises leaves `folder` as it was.
    Raises:
      HubError: the folder is not ours or cannot be written, or the model does not fit its Spec.
    """
    carried = () if source is None else _carried(source)
    text = os.fspath(folder)
    if "://" in text:
        return _upload(model, text, carried, dtype, verify)
    target = pathlib.Path(text).expanduser().resolve()
    aside, old = (target.parent / f".{target.name}.{what}" for what in ("partial", "old"))
    try:
        if old.exists() and not target.exists():  # an earlier save was killed between its two renames
            old.rename(target)
        _check_ours(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write(model, aside, carried, dtype)
        if verify:
            verify(aside)
        if target.exists():
            for kept in target.iterdir():
                if kept.name not in OURS:
                    (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, aside / kept.name)
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise HubError(f"Cannot write {target}: {_reason(error)}. Choose a folder you may write to, "
                       "with free space.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def push(model: Slim, repo_id: str, *, source: str | os.PathLike | None = None, dtype: Any = None,
         private: bool | None = None, revision: str | None = None, token: str | None = None,
         commit_message: str = "Upload with jaxslim") -> str:
    """Saves to a hub repository, which is made if it does not exist; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as tmp:
        save(model, os.path.join(tmp, "model"), source=source, dtype=dtype)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=os.path.join(tmp, "model"), revision=revision,
                              commit_message=commit_message)
        except Exception as error:
            raise HubError(hub_reason(error, repo_id, revision)) from error
    return str(url)


def import_model(src: str | os.PathLike, dst: str | os.PathLike,
                 check: bool = False) -> list[tuple[str, float, float, bool]]:
    """Reads `src`, writes it to the folder `dst`; with `check` compares what was written with PyTorch transformers.

    Returns:
      Rows (tap, max abs difference, max abs of the reference, within tolerance); empty without `check`.
    """
    save(load(src), dst, source=src)
    readable = stored.best(f.name for f in folder(src).iterdir())  # transformers 5 opens no msgpack
    return compare(load(dst), dst if readable and "msgpack" in readable[0] else folder(src)) if check else []


# Reading


def _config(path: pathlib.Path, name: str) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        weights = [f.name for f in path.glob("*.safetensors")]
        what = f"has weights ({weights[0]}) but" if weights else "is not a model folder: it has"
        raise HubError(f"{name} {what} no {CONFIG}. A model folder holds {CONFIG} and "
                       f"{WEIGHTS}, as transformers saves them.")
    return _json(path / CONFIG)


def _check_counts(config: dict[str, Any], arrays: int, path: pathlib.Path) -> None:
    """Refuses a config with more layers or heads than could be meant, before as many are built."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            _check_counts(value, arrays, path)
        elif key.endswith(COUNTS) and isinstance(value, int | float) and value > max(arrays, MOST):
            raise HubError(f"{path}: {key} is {value}, and the weights are {arrays} arrays; the file is damaged, "
                           "download it again.")


def _check_vocabulary(path: pathlib.Path, spec: Spec) -> None:
    if not (path / "vocab.json").is_file():
        return
    ids = [i for i in _json(path / "vocab.json").values() if isinstance(i, int)]  # MMS nests one dict a language
    if ids and max(ids) >= spec["vocab_size"]:
        raise HubError(f"{path / 'vocab.json'} has ids up to {max(ids)}, but the model has {spec['vocab_size']} "
                       "outputs (vocab_size, lm_head); it is the vocabulary of another model.")


# Writing


def _carried(source: str | os.PathLike) -> list[pathlib.Path]:
    return [p for name in CARRIED if (p := folder(source) / name).is_file()]


def _check_ours(target: pathlib.Path) -> None:
    if target.exists() and not target.is_dir():
        raise HubError(f"{target} is a file; give a folder.")
    if not target.exists() or not any(target.iterdir()):
        return
    try:
        if (target / WEIGHTS).exists():
            with safetensors.safe_open(target / WEIGHTS, framework="np") as file:
                ours = "jaxslim" in (file.metadata() or {})
        else:  # an ONNX graph has its weights in it
            ours = "jaxslim" in json.loads((target / "parity.json").read_text())["versions"]
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise HubError(f"{target} holds files that jaxslim did not write, and they are not overwritten; "
                       "choose another output folder or empty it.")


def _write(model: Slim, target: pathlib.Path, carried, dtype) -> None:
    params = {k: np.asarray(v) for k, v in model.params.items() if not k.startswith(bind.AUXILIARY)}
    try:
        bind.check(model.spec, params, "The model to be saved")
    except SpecError as error:
        raise HubError(str(error)) from error
    floats = {str(v.dtype) for v in params.values() if jnp.issubdtype(v.dtype, jnp.floating)}
    store = None if dtype is None else jnp.dtype(dtype)
    tensors = {k: np.asarray(_stored(v, store), order="C") for k, v in sorted(params.items())}
    architecture = _architecture(model.spec.family, model.spec.head)
    config = {**model.spec.config, "architectures": [architecture], "model_type": model.spec.family,
              "dtype": floats.pop() if len(floats) == 1 else "float32"}
    if model.spec.slots:
        config[ADAPTERS] = list(model.adapters)
    if model.spec.blocks:
        config = torch_code.config(model.spec, architecture, config)
        for name, code in torch_code.files(model.spec, architecture).items():
            (target / name).write_text(code, encoding="utf-8")
    for file in carried:
        shutil.copyfile(file, target / file.name)
    if "target_lang" in config and (target / "tokenizer_config.json").is_file():
        text = (target / "tokenizer_config.json").read_text(encoding="utf-8")
        (target / "tokenizer_config.json").write_text(languages.tokenizer_config(text, config["target_lang"]))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (target / CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt", "jaxslim": __version__})
    shutil.copymode(target / CONFIG, target / WEIGHTS)  # safetensors makes files that only their owner may read


def _stored(array: np.ndarray, store: Any) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array if store is None else array.astype(store)
    return array.astype(np.int64) if array.ndim == 0 else array  # torch keeps BatchNorm's counter as int64


def _upload(model: Slim, url: str, carried, dtype, verify) -> None:
    from etils import epath

    remote = epath.Path(url)
    with tempfile.TemporaryDirectory() as tmp:
        _write(model, pathlib.Path(tmp), carried, dtype)
        if verify:
            verify(pathlib.Path(tmp))
        try:
            remote.mkdir(parents=True, exist_ok=True)
            for file in sorted(pathlib.Path(tmp).iterdir(), key=lambda f: f.name == CONFIG):  # config.json last
                epath.Path(file).copy(remote / file.name, overwrite=True)
        except OSError as error:
            raise HubError(f"Cannot write {url}: {_reason(error)}.") from error
