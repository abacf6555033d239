"""Where a model's files are: bundled with the package, a local folder, a remote one, or a hub repository."""
from __future__ import annotations

import os
import pathlib
import re
import tempfile

from jaxslim import language as languages
from jaxslim import pod, torch_code
from jaxslim import weights as stored
from jaxslim.spec import nearest
from jaxslim.weights import WEIGHTS, HubError, reason

CONFIG = "config.json"
CARRIED = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
           "special_tokens_map.json", "added_tokens.json", "normalizer.json", "preprocessor_config.json",
           "processor_config.json", "generation_config.json", "LICENSE", "NOTICE")  # go from a source folder along
EXPORTED = ("parity.json", "tokens.txt", "model.stablehlo", "model.onnx", "model.onnx.data", "model.int8.onnx",
            "model.int8.onnx.data")
OURS = (*CARRIED, CONFIG, WEIGHTS, "stage.json", *EXPORTED, *torch_code.FILES)  # what a new save replaces


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
    more = () if language is None else languages.files(language)
    repo, revision = match[1], revision or match[2]
    return pod.once(f"{repo} {revision} {more}", lambda: _download(repo, revision, tuple(more)), HubError)


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
        raise HubError(hub_reason(error, repo, revision)) from error


def hub_reason(error: Exception, repo: str, revision: str | None) -> str:
    """A sentence on why the hub did not give (or take) a repository."""
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
    return f"Hub access to {at} failed: {reason(error)}."


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
