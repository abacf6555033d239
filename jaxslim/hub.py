"""Hugging Face folder or hub id <-> Slim: config.json and weights in, the same out, strict about every name.

A model is named by `bundled:NAME`, a local folder (or `gs://...`), or a hub id `org/name[@revision]`. What is read is
checked against `models.bind.shapes`: missing, unexpected or misshapen weights are an error that lists them, except for
the few names in LEFTOVERS and OPTIONAL. What is written opens in `transformers`: a stock model as it is, one with
changed blocks through the code that `torch_code` writes beside it.
"""
from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxslim import __version__, formulas, torch_code
from jaxslim import language as languages
from jaxslim import weights as stored
from jaxslim.models import bind
from jaxslim.models.roles import prefix
from jaxslim.slim import Slim
from jaxslim.spec import Spec, SpecError, nearest
from jaxslim.train import mesh as meshes
from jaxslim.weights import INDEX, WEIGHTS, HubError  # noqa: F401
from jaxslim.weights import read_json as _json
from jaxslim.weights import reason as _reason

CONFIG = "config.json"
CARRIED = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
           "special_tokens_map.json", "added_tokens.json", "normalizer.json", "preprocessor_config.json",
           "processor_config.json", "generation_config.json", "LICENSE", "NOTICE")  # go from a source folder along
OURS = (*CARRIED, CONFIG, WEIGHTS, "stage.json", "parity.json", *torch_code.FILES)  # what a new save replaces

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
TEXT = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
ARCHITECTURES |= {name + end: (family, head) for family, name in TEXT.items() for end, head in
                  {"Model": "none", "ForSequenceClassification": "classification", "ForMaskedLM": "none"}.items()}
ARCHITECTURES["BertForPreTraining"] = ("bert", "none")
# Head -> (an output matrix that is stored once, under the second name, when the config ties it).
TIED = {"seq2seq": ("proj_out.weight", "model.decoder.embed_tokens.weight")}
# Weights that a checkpoint may have and a bare encoder does not use: the heads of pre-training.
QUANTIZER = r"(quantizer|project_hid|project_q)\."
LEFTOVERS = {"wav2vec2": QUANTIZER, "hubert": r"(final_proj|label_embs_concat)\b", "wavlm": QUANTIZER,
             "wav2vec2-conformer": QUANTIZER, "wav2vec2-bert": r"$^", "parakeet_encoder": r"$^",
             "whisper": r"proj_out\.", "bert": r"cls\.", "roberta": r"lm_head\.",
             "distilbert": r"vocab_(transform|layer_norm|projector)\."}
# Weights that checkpoints of fine-tuned models lack (transformers draws them at random): only SpecAugment reads them.
# Old text checkpoints hold their position numbers too, and a pooler that RoBERTa's classifier does not read.
OPTIONAL = r"(.*\.)?(masked_spec_embed|embeddings\.position_ids)|roberta\.pooler\..*"
ALIASES = ((r"\.weight_g$", ".parametrizations.weight.original0"),  # weight norm before torch 2
           (r"\.weight_v$", ".parametrizations.weight.original1"),
           (r"(layer_norm|LayerNorm)\.gamma$", r"\1.weight"), (r"(layer_norm|LayerNorm)\.beta$", r"\1.bias"))
OLD_NAMES = {"whisper": ((r"^lm_head\.", "proj_out."),)}  # what its Flax class called the output matrix


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
    config = torch_code.restore(_config(path, str(name)))
    family, head = _family(config, path)
    weights = _rename(stored.read(path, str(name)), family)
    if language is not None:
        weights = languages.switch(weights, config, path, language)
    if head is None:
        head = "ctc" if family not in TEXT and any(k.startswith("lm_head.") for k in weights) else "none"
    if family in TEXT and head == "none" and not any("pooler." in k for k in weights):
        config["add_pooling_layer"] = False  # what transformers calls the switch; its configs do not record it
    for key in ("dtype", "torch_dtype"):  # how a file stores weights says nothing about the model
        config.pop(key, None)
    if "jaxslim" not in config:  # a stock model is stored as what it is read as
        config["architectures"] = [_architecture(family, head)]
    try:
        spec = Spec.from_json(config) if "jaxslim" in config else Spec(config, family, head)
        want = bind.shapes(spec)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        detail = error if isinstance(error, SpecError) else f"{path / CONFIG} does not describe a model ({error!r})"
        raise HubError(f"{name}: {str(detail).rstrip('.')}.") from error
    weights = _trim(weights, spec, want)
    try:
        bind.check(spec, weights, f"{path / WEIGHTS}")
    except SpecError as error:
        raise HubError(f"{error} Config and weights must come from the same model.") from error
    if spec.head == "ctc":
        _check_vocabulary(path, spec)
    dtype = jnp.dtype(dtype or jnp.float32)
    params = {}
    for k in list(weights):  # in the order of the files, each closed after its last array
        kept = dtype if jnp.issubdtype(want[k].dtype, jnp.floating) else want[k].dtype  # torch: counters are int64
        array = np.asarray(weights.pop(k), kept)
        params[k] = jax.device_put(array) if mesh is None else jax.block_until_ready(meshes.place({k: array}, mesh)[k])
    return Slim(spec, {k: params[k] for k in want})


def folder(name: str | os.PathLike, *, revision: str | None = None, language: str | None = None) -> pathlib.Path:
    """Local folder of a model, downloaded if it is a hub id; other files of it (tokenizer, card) lie there too."""
    text = os.fspath(name)
    if text.startswith("bundled:"):
        return _bundled(text.removeprefix("bundled:"))
    if "://" in text:
        return _fetch(text)
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise HubError(f"{text} is a file; give the folder that holds {CONFIG} and {WEIGHTS}.")
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(.+))?", text)
    if not match:
        raise HubError(f"{text} does not exist. A model is bundled:NAME, a folder, or a hub id (org/name[@revision]).")
    return _download(match[1], revision or match[2], () if language is None else languages.files(language))


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
            raise HubError(_hub_reason(error, repo_id, revision)) from error
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


def compare(model: Slim, reference: str | os.PathLike, seconds: float = 1.0, tolerance: float = 1e-4):
    """Layer by layer against the PyTorch model in the folder `reference`, on a fixed random waveform or text, in fp32.

    Returns:
      Rows (tap, max abs difference, max abs of the reference, within `tolerance * max(1, that maximum)`).
    """
    if model.spec.blocks:
        raise HubError(f"{reference}: blocks {', '.join(list(model.spec.blocks)[:4])} differ from the config, which "
                       "transformers cannot open; only a stock model can be compared with it.")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise HubError("The comparison needs PyTorch: pip install 'jaxslim[test]' (torch, CPU is enough).") from error

    torch_model = getattr(transformers, _architecture(model.spec.family, model.spec.head)).from_pretrained(
        reference, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    if model.spec.family in TEXT:
        probe = {"input_ids": rng.integers(5, model.spec["vocab_size"], (1, 16))}
    else:
        probe = {k: rng.standard_normal(x.shape, np.float32)
                 for k, x in formulas.inputs(model.spec, seconds, 1).items()}
    encoder = torch_model.get_submodule(prefix(model.spec).rstrip("."))  # "" is the model itself
    want = {}
    parts = [("frontend", "feature_extractor"), ("projection", "feature_projection"), ("projection", "subsampling")]
    parts = {tap: getattr(encoder, part) for tap, part in parts if hasattr(encoder, part)}
    for tap, module in parts.items():
        module.register_forward_hook(lambda _, __, out, tap=tap: want.__setitem__(tap, out))
    with torch.no_grad():
        out = torch_model(**{k: torch.from_numpy(v) for k, v in probe.items()}, output_hidden_states=True)
    want = {k: v[0] if isinstance(v, tuple) else v for k, v in want.items()}  # HuBERT: a tensor, wav2vec2: two
    if "frontend" in want:
        want["frontend"] = want["frontend"].transpose(1, 2)
    names = ["embedding", *(f"encoder.{i}" for i in range(len(out.hidden_states) - 1))]
    want |= dict(zip(names, out.hidden_states, strict=True))
    want["logits" if model.spec.head != "none" else "last_hidden_state"] = (
        out.logits if model.spec.head != "none" else out.last_hidden_state)

    have = model(**probe, output_hidden_states=True, taps=tuple(parts), dtype="float32")
    got = {**(have.taps or {}), **dict(zip(names, have.hidden_states, strict=True)), "logits": have.logits,
           "last_hidden_state": have.last_hidden_state}
    rows = []
    for tap, value in want.items():
        value = value.numpy()
        difference, scale = float(np.abs(np.asarray(got[tap]) - value).max()), float(np.abs(value).max())
        rows.append((tap, difference, scale, difference <= tolerance * max(1.0, scale)))
    return rows


# Where models are


def _bundled(name: str) -> pathlib.Path:
    package = pathlib.Path(__file__).parent
    places = [package / "assets", package.parent / "checkpoints"]  # installed; a checkout
    for place in places:
        if (place / name / CONFIG).is_file():
            return place / name
    known = sorted({p.parent.name for place in places for p in place.glob(f"*/{CONFIG}")})
    raise HubError(f"No bundled model {name!r}; there is {', '.join('bundled:' + k for k in known) or 'none'}."
                   f"{nearest(name, known)}")


def _download(repo: str, revision: str | None, more: tuple[str, ...] = ()) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "LICENSE", "NOTICE", *more]
    try:
        for kind in stored.KINDS:  # the first that the repository has
            path = pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted, *kind.patterns]))
            if (path / kind.file).is_file() or (path / kind.index).is_file():
                break
        return path
    except Exception as error:  # network, gated, not found: each has a class of its own, some not public
        raise HubError(_hub_reason(error, repo, revision)) from error


def _hub_reason(error: Exception, repo: str, revision: str | None) -> str:
    kinds = {cls.__name__ for cls in type(error).__mro__}  # GatedRepoError is a RepositoryNotFoundError too
    at = f"{repo}@{revision}" if revision else repo
    if "GatedRepoError" in kinds:
        return f"{at} is gated: accept its terms on https://huggingface.co/{repo}, then log in with `hf auth login`."
    if "RevisionNotFoundError" in kinds:
        return f"{repo} has no revision {revision!r}; its branches and tags are on https://huggingface.co/{repo}."
    if "RepositoryNotFoundError" in kinds:
        return (f"{at} is no local folder, and the hub has no such repository (or it is private: `hf auth login`). "
                "Check the spelling; a model is bundled:NAME, a folder, or org/name[@revision].")
    if "HFValidationError" in kinds:
        return f"{at} is no local folder and no valid hub id (org/name[@revision])."
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        import huggingface_hub.constants as constants

        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return (f"{at} is no local folder and not in the hub's cache on this machine, and {why}. "
                "Go online once to download it, or give a folder.")
    return f"Hub access to {at} failed: {_reason(error)}."


_fetched: list[tempfile.TemporaryDirectory] = []  # local copies of remote folders, for the life of the process


def _fetch(url: str) -> pathlib.Path:
    from etils import epath

    remote = epath.Path(url)
    if not remote.is_dir():
        raise HubError(f"{url} does not exist or is not a folder.")
    _fetched.append(tempfile.TemporaryDirectory())
    local = pathlib.Path(_fetched[-1].name)
    files = list(remote.iterdir())
    wanted = {*OURS, *stored.best(file.name for file in files)}
    for file in files:
        if file.name in wanted:
            file.copy(local / file.name)
    return local


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


# Reading


def _config(path: pathlib.Path, name: str) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        weights = [f.name for f in path.glob("*.safetensors")]
        what = f"has weights ({weights[0]}) but" if weights else "is not a model folder: it has"
        raise HubError(f"{name} {what} no {CONFIG}. A model folder holds {CONFIG} and "
                       f"{WEIGHTS}, as transformers saves them.")
    return _json(path / CONFIG)


def _family(config: Mapping[str, Any], path: pathlib.Path) -> tuple[str, str | None]:
    """Family and head; head None = the weights must tell."""
    ours = config.get("jaxslim")
    if isinstance(ours, dict):
        return ours.get("family", ""), ours.get("head", "none")
    named, kind = config.get("architectures") or [], config.get("model_type")
    for architecture in (a.removeprefix("Flax") for a in named):
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    if not named and kind in bind.FAMILIES:
        return kind, None
    what = f"architecture {named[0]}" if named else f"model_type {kind!r}"
    raise HubError(f"{path / CONFIG}: {what} is not supported; supported are {', '.join(ARCHITECTURES)}.")


def _architecture(family: str, head: str) -> str:
    return next(a for a, pair in ARCHITECTURES.items() if pair == (family, head))


def _rename(weights: dict[str, Any], family: str) -> dict[str, Any]:
    for old, new in (*ALIASES, *OLD_NAMES.get(family, ())):
        weights = {re.sub(old, new, k): v for k, v in weights.items()}
    return weights


def _trim(weights: dict[str, np.ndarray], spec: Spec, want: Mapping[str, Any]) -> dict[str, np.ndarray]:
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
        with safetensors.safe_open(target / WEIGHTS, framework="np") as file:
            ours = "jaxslim" in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
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
