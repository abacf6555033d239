"""Reads the tensors of a PyTorch `.bin` or `.pt` file without PyTorch, and without ever running what is in it.

A pickle is a program for a small stack machine, and Python's unpickler calls whatever the program names. This one knows
only the opcodes that a state dict needs, and globals stay names in it: REDUCE looks its name up in a table of four
harmless rebuilders, everything else is refused. So there is nothing to escape from: no `getattr`, no import, no call of
an object from the file. Storages stay in the file (memory-mapped) and tensors are views of them, checked against their
bounds.

Formats (torch/serialization.py): zip, since 1.6: `data.pkl` beside uncompressed `data/<key>`; legacy: three header
pickles (magic number, version, system), the object, the list of storage keys, then each storage (count, raw elements).
"""
from __future__ import annotations

import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
LONGEST_LINE, MOST_DIMENSIONS = 4096, 32
STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
            "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_}


class PickleError(ValueError):
    """A file that is damaged, of another kind, or that asks for more than tensors."""


class Name(NamedTuple):
    """A global, never resolved to anything."""

    module: str
    name: str


class Storage(NamedTuple):
    key: str
    dtype: Any
    start: int      # in elements; not 0 only for a legacy view into another storage
    count: int


class Tensor(NamedTuple):
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Mark:
    """Where a run of stack items starts."""


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Name -> array (a read-only view of the mapped file) of a state dict.

    Raises:
      PickleError: damaged, no state dict, or a pickle that wants anything but tensors; nothing of it has run.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise PickleError(f"{path} is empty; copy or download it again.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        value, place = (_zip if data[:4] == b"PK\3\4" else _legacy)(data, path)
        return {name: _array(tensor, name, data, place) for name, tensor in _items(value)}
    except PickleError as error:
        raise PickleError(f"{path} {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError,
            NotImplementedError, struct.error, zipfile.BadZipFile) as error:
        raise PickleError(f"{path} ({len(data)} bytes) is truncated or not a PyTorch weights file ({error}); copy or "
                          "download it again.") from error


def _zip(data: mmap.mmap, path) -> tuple[Any, Any]:
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
    entries = {e.filename: e for e in listed}
    tops = [name.removesuffix("/data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(tops) != 1 or len(entries) != len(listed):
        raise PickleError("is a zip file, but not one that torch.save writes; copy or download it again.")

    def span(name: str) -> tuple[int, int]:
        entry = entries.get(f"{tops[0]}/{name}")
        if entry is None:
            raise PickleError(f"has no part {name}; it is incomplete, download it again.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise PickleError(f"has a compressed or encrypted part ({name}), which torch.save never writes.")
        signature, lengths = data[entry.header_offset : entry.header_offset + 4], entry.header_offset + 26
        start = lengths + 4 + sum(struct.unpack("<HH", data[lengths : lengths + 4]))
        if signature != b"PK\3\4" or start + entry.file_size > len(data):
            raise PickleError(f"has a part ({name}) that lies outside the file; download it again.")
        return start, entry.file_size

    if f"{tops[0]}/byteorder" in entries:
        start, size = span("byteorder")
        if data[start : start + size] != b"little":
            raise PickleError("was written on a big-endian machine; save it again with PyTorch on a common one.")
    start, size = span("data.pkl")
    value = _load(Stream(data, start, start + size), {})

    def place(storage: Storage) -> int:
        start, size = span(f"data/{storage.key}")
        if size != storage.count * np.dtype(storage.dtype).itemsize:
            raise PickleError(f"stores {size} bytes under key {storage.key[:40]!r} where {storage.count} elements of "
                              f"{np.dtype(storage.dtype)} are announced; it is damaged or made up.")
        return start

    return value, place


def _legacy(data: mmap.mmap, path) -> tuple[Any, Any]:
    stream, storages = Stream(data, 0, len(data)), {}
    if _load(stream, {}) != MAGIC or _load(stream, {}) != LEGACY_VERSION:
        raise PickleError("is a pickle, but no PyTorch weights file; save the state dict with torch.save.")
    _load(stream, {})  # sizes of C types
    value = _load(stream, storages)
    starts, keys = {}, _load(stream, {})
    position = stream.position
    for key in map(_key, keys):
        (count,), dtype = struct.unpack("<q", data[position : position + 8]), storages[key][0]
        starts[key] = (position + 8, count)
        position += 8 + count * np.dtype(dtype).itemsize
        if count < 0 or position > len(data):
            raise PickleError(f"ends in the middle of a tensor's values ({len(data)} bytes); finish the download.")

    def place(storage: Storage) -> int:
        start, count = starts[storage.key]
        if storage.start + storage.count > count:
            raise PickleError(f"announces more elements under key {storage.key[:40]!r} than it stores.")
        return start + storage.start * np.dtype(storage.dtype).itemsize

    return value, place


def _items(value: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(value, dict):
        raise PickleError(f"holds a {type(value).__name__}, not a state dict (name -> tensor).")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise PickleError(f"holds {str(name)[:60]!r}, which is no tensor; it is a training checkpoint rather "
                              "than a state dict. Save model.state_dict() alone.")
        yield name, tensor


def _array(tensor: Tensor, name: str, data: mmap.mmap, place) -> np.ndarray:
    storage, offset, size, stride = tensor
    numbers = (offset, *size, *stride)
    if any(not _natural(n) for n in numbers) or len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
        raise PickleError(f"describes {name[:60]!r} with an impossible shape.")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else 0
    if count > storage.count or count and last >= storage.count:
        raise PickleError(f"describes {name[:60]!r} of {count} elements beyond its storage of {storage.count}; it is "
                          "damaged or made up.")
    dtype = np.dtype(storage.dtype)
    if not count:
        return np.zeros(size, dtype)
    return np.ndarray(size, dtype, data, place(storage) + offset * dtype.itemsize, [s * dtype.itemsize for s in stride])


def _natural(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**63


# The stack machine


class Stream:
    """The part of a file that pickletools may read; never allocates more than is there."""

    def __init__(self, data: mmap.mmap, start: int, end: int):
        self.data, self.position, self.end = data, start, end

    def read(self, count: int) -> bytes:
        start, self.position = self.position, min(self.position + max(count, 0), self.end)
        return self.data[start : self.position]

    def readline(self) -> bytes:
        limit = min(self.position + LONGEST_LINE, self.end)
        newline = self.data.find(b"\n", self.position, limit)
        return self.read((limit if newline < 0 else newline + 1) - self.position)


def _storage(identity: Any, seen: dict[str, tuple]) -> Storage:
    """A persistent id: ("storage", type, key, device, count[, legacy view (key, start, count)])."""
    kind, type_, key, _, count, *view = identity
    if kind != "storage" or not isinstance(type_, Name) or type_.name not in STORAGES or not isinstance(key, str):
        raise PickleError("refers to a storage of a kind that is not known.")
    dtype, start = STORAGES[type_.name], 0
    if view and view[0] is not None:
        _, start, count = view[0]
    if not _natural(count) or not _natural(start) or seen.setdefault(key, (dtype,))[0] is not dtype:
        raise PickleError(f"describes storage {key[:40]!r} in two ways or impossibly; it is damaged or made up.")
    return Storage(key, dtype, start, count)


def _tensor(storage, offset, size, stride, *_) -> Tensor:  # then requires_grad, hooks, metadata
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleError("builds a tensor from something else than a storage; it is damaged or made up.")
    return Tensor(storage, offset, size, stride)


def _parameter(data, *_) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleError("builds a parameter from something else than a tensor; it is damaged or made up.")
    return data


def _dictionary(items=()) -> dict:
    return {_key(k): v for k, v in items}


def _key(key: Any) -> Any:
    if type(key) not in (str, int):  # hashing anything else could recurse or run long
        raise PickleError("has dictionary keys that are neither text nor numbers; no state dict has them.")
    return key


REBUILD = {Name("torch._utils", "_rebuild_tensor_v2"): _tensor, Name("torch._utils", "_rebuild_tensor"): _tensor,
           Name("torch._utils", "_rebuild_parameter"): _parameter, Name("collections", "OrderedDict"): _dictionary}
KNOWN = {*REBUILD, *(Name("torch", name) for name in STORAGES)}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT", "UNICODE", "BINUNICODE",
          "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _name(module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str:  # such a thing is not even printed: that could run forever
        raise PickleError("is refused: it asks for a global that has no name; nothing in it was run.")
    if (module, name) not in KNOWN:
        raise PickleError(f"is refused: it asks for {module[:60]}.{name[:60]}, which no weights need, and may be "
                          "malicious; nothing in it was run. Use a safetensors file of the model instead.")
    return Name(module, name)


def _load(stream: Stream, storages: dict[str, tuple]) -> Any:
    """The value of one pickle. `storages` collects key -> (dtype,) of the storages it names."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = _last_mark(stack)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, arg, _ in pickletools.genops(stream):
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            continue
        elif op == "STOP":
            (value,) = stack
            return value
        elif op == "MARK":
            stack.append(Mark)
        elif op in VALUES:
            stack.append(arg)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op == "EMPTY_TUPLE":
            stack.append(())
        elif op in TUPLES:
            stack[-TUPLES[op] :] = [tuple(stack[-TUPLES[op] :])]
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            one = 2 if op == "SETITEM" else 1
            items = since_mark() if op.endswith("S") else [stack.pop() for _ in range(one)][::-1]
            if type(stack[-1]) is not (dict if op.startswith("SET") else list):
                raise PickleError("fills something that is no dictionary or list; it is damaged or made up.")
            if op.startswith("SET"):
                stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
            else:
                stack[-1].extend(items)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            names = arg.split(" ", 1) if op == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            stack.append(_name(*names))
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif op == "REDUCE":
            args, what = stack.pop(), stack.pop()
            if type(what) is not Name or what not in REBUILD or type(args) is not tuple:
                raise PickleError("is refused: it calls something that rebuilds no tensor; nothing in it was run.")
            stack.append(REBUILD[what](*args))
        elif op == "BUILD":
            stack.pop()  # a state dict's _metadata: versions of its modules
            if type(stack[-1]) is not dict:
                raise PickleError("is refused: it sets the state of something that is no state dict; nothing in it was "
                                  "run.")
        else:
            raise PickleError(f"is refused: it uses the pickle operation {op}, which no weights need; nothing in it "
                              "was run. Use a safetensors file of the model instead.")
    raise PickleError("ends before its pickle does; finish the download.")


def _last_mark(stack: list[Any]) -> int:
    for i in range(len(stack) - 1, -1, -1):
        if stack[i] is Mark:
            return i
    raise PickleError("is damaged: a pickle operation finds no start mark.")
