"""Every array of a model folder under its PyTorch name, read one at a time: safetensors, PyTorch `.bin`, Flax msgpack.

A folder's names and shapes are known at once; an array is read when it is asked for (`np.asarray(stored)`), and a shard
is closed when the last of its arrays is dropped. So a model can go to devices with no more than one shard in memory.
Nothing of a file is ever run: `.bin` goes through `pickle_reader`, msgpack holds data only.

Flax checkpoints (transformers before 5, modeling_flax_pytorch_utils.py) name and lay out leaves by rule: `kernel` is
`weight` with its axes reversed (a convolution over two axes: HWIO), `scale` and `embedding` are `weight`.
"""
from __future__ import annotations

import errno
import json
import math
import mmap
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from jaxslim import pickle_reader
from jaxslim.errors import ClearError

ALIGNMENT = 64
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
          "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
          "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


class HubError(ClearError):
    """A model that cannot be found, read or written; says what, where, and what to do."""


class Stored:
    """An array that is still in its file: a view of the mapped file, copied (the file may change later) when asked for.

    The copy is of the wanted dtype and aligned as XLA wants it, so that JAX on CPU takes it without another one.
    """

    def __init__(self, view: np.ndarray):
        self.view, self.shape = view, view.shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        dtype = self.view.dtype if dtype is None else np.dtype(dtype)
        memory = np.empty(self.view.size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        array = memory[start : start + self.view.size * dtype.itemsize].view(dtype).reshape(self.shape)
        np.copyto(array, self.view, casting="unsafe")
        return array


def read(path: pathlib.Path, name: str) -> dict[str, Any]:
    """Name -> array (`Stored`) of a folder, single file or shards; the first kind of KINDS that is there.

    Raises:
      HubError: no weights, parts that are missing or damaged, or a file that asks to run code.
    """
    for kind in KINDS:
        if (path / kind.file).is_file():
            return kind.read(path / kind.file)
        if (path / kind.index).is_file():
            return _shards(path, name, kind)
    for kind in KINDS:
        if stray := sorted(f.name for f in path.iterdir() if re.fullmatch(kind.shard, f.name)):
            raise HubError(f"{name} has {stray[0]} but no {kind.index}; download the folder again, completely.")
    raise HubError(f"{name} has no {WEIGHTS} (nor {', '.join(k.file for k in KINDS[1:])}); download the folder again, "
                   "or save the model with transformers' save_pretrained.")


def best(names: Iterable[str]) -> list[str]:
    """Those of a folder's file names that `read` would read."""
    names = list(names)
    kind = next((k for k in KINDS if {k.file, k.index} & set(names)), KINDS[0])
    return [n for n in names if n in (kind.file, kind.index) or re.fullmatch(kind.shard, n)]


def _shards(path: pathlib.Path, name: str, kind: Kind) -> dict[str, Any]:
    where = read_json(path / kind.index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise HubError(f"{path / kind.index} has no weight_map; download it again.")
    shards = sorted(set(map(str, where.values())))
    if odd := [s for s in shards if pathlib.PurePath(s).name != s or len(s) > 255]:
        raise HubError(f"{path / kind.index} lists {odd[0]!r}, which is no file of this folder; download it again.")
    if absent := [s for s in shards if not (path / s).is_file()]:
        raise HubError(f"{name} is incomplete: {len(absent)} of {len(shards)} weight files are missing "
                       f"({', '.join(absent[:3])}); finish the download.")
    weights = {k: v for shard in shards for k, v in kind.read(path / shard).items()}
    listed = {_flax_name(k.split("/"))[0]: s for k, s in where.items()} if kind.read is _msgpack else where
    if absent := sorted(set(listed) - set(weights)):
        raise HubError(f"{name}: {kind.index} lists {absent[0]} in {listed[absent[0]]}, which does not hold it; "
                       "download both again.")
    return weights


def _safetensors(path: pathlib.Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(64), path)
        safetensors.safe_open(path, framework="np")  # the checks of header, names and bounds
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        header = {k: v for k, v in json.loads(data[8:start]).items() if k != "__metadata__"}
        if odd := [k for k, v in header.items() if v["dtype"] not in DTYPES]:
            raise HubError(f"{path}: {odd[0]} is stored as {header[odd[0]]['dtype']}, which is not supported.")
        return {k: Stored(np.ndarray(v["shape"], DTYPES[v["dtype"]], data, start + v["data_offsets"][0])
                          if math.prod(v["shape"]) else np.zeros(v["shape"], DTYPES[v["dtype"]]))
                for k, v in header.items()}
    except safetensors.SafetensorError as error:
        raise HubError(f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
                       "copy or download it again.") from error
    except OSError as error:
        raise HubError(f"Cannot read {path}: {reason(error)}.") from error


def _bin(path: pathlib.Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(64), path)
        views = pickle_reader.read(path)
    except pickle_reader.PickleError as error:
        raise HubError(str(error)) from error
    except OSError as error:
        raise HubError(f"Cannot read {path}: {reason(error)}.") from error
    return {k: Stored(v) for k, v in views.items()}


def _bytes(path: pathlib.Path) -> bytes:
    """A whole file that is no pointer to one. Raises HubError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HubError(f"Cannot read {path}: {reason(error)}.") from error
    refuse_pointer(data[:64], path)
    return data


def _msgpack(path: pathlib.Path) -> dict[str, np.ndarray]:
    from flax import serialization, traverse_util

    data = _bytes(path)
    try:
        leaves = traverse_util.flatten_dict(serialization.msgpack_restore(data))
        leaves = {tuple("/".join(k).split("/")): np.asarray(v) for k, v in leaves.items()}
    except Exception as error:  # msgpack has many kinds; none of them is ours to tell apart
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise HubError(f"{path} ({len(data)} bytes) is truncated or not a Flax msgpack file ({what[0][:80].rstrip('.')}"
                       "); copy or download it again.") from error
    weights = {}
    for key, array in leaves.items():
        name, kernel = _flax_name(key)
        if kernel:
            array = array.transpose((3, 2, 0, 1)) if array.ndim == 4 else array.T
        weights[name] = array
    return weights


def _flax_name(key: Iterable[str]) -> tuple[str, bool]:
    """('encoder', 'dense', 'kernel') -> 'encoder.dense.weight' and whether it is a kernel."""
    *owner, leaf = key
    return ".".join([*owner, "weight" if leaf in ("kernel", "scale", "embedding") else leaf]), leaf == "kernel"


class Kind(NamedTuple):
    """One way in which a folder holds weights."""

    file: str
    index: str
    shard: str
    patterns: tuple[str, ...]    # for a download
    read: Callable[[pathlib.Path], dict[str, Any]]


WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", r"model-\d+-of-\d+\.safetensors"
KINDS = (
    Kind(WEIGHTS, INDEX, SHARD, (WEIGHTS, "model-*-of-*.safetensors"), _safetensors),
    Kind("pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model-\d+-of-\d+\.bin",
         ("pytorch_model.bin", "pytorch_model-*-of-*.bin"), _bin),
    Kind("flax_model.msgpack", "flax_model.msgpack.index.json", r"flax_model-\d+-of-\d+\.msgpack",
         ("flax_model.msgpack", "flax_model-*-of-*.msgpack"), _msgpack),
)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises HubError."""
    data = _bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets, thousands deep
        raise HubError(f"{path} is not valid JSON ({error}); copy or download it again.") from error
    if b"\\ud" in data.lower():  # an escaped surrogate: half of a pair is no character, and cannot be written again
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise HubError(f"{path} holds half of a surrogate pair, which is no character; repair it.") from error
    if not isinstance(value, Mapping):
        raise HubError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def refuse_pointer(start: bytes, path: pathlib.Path) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise HubError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository.")


def reason(error: Exception) -> str:
    """A short cause, without the full stop."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the device"
    text = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.rstrip(".")
