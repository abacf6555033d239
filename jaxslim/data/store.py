"""Arrays that a frozen model makes of each clip, computed once: sharded safetensors files, fp16, resumable.

    FOLDER/meta.json                 whose they are: model, data, layers; another one is refused by name
    FOLDER/shard-00003.safetensors   arrays of some clips, named CLIP/NAME; written whole or not at all

Every host writes the shards whose number is its own modulo the number of hosts, so a shard has one writer; what is
there already is not made again. A value beyond the range of fp16 keeps its array in fp32.
"""
from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxslim.data.rows import DataError

META, OPEN = "meta.json", 64   # shards that a reader keeps open
ENDS = (1.0, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0)   # seconds of the shapes that are compiled
TOGETHER = 48.0   # seconds of audio in a shard
LARGEST = float(np.finfo(np.float16).max)


class StoreError(DataError):
    """A folder of features that is of something else, or broken."""


class Store:
    """Features of `clips` clips in `folder`.

    Args:
      meta: what they depend on, a flat dict of JSON values ("teacher": fingerprint, ...). A folder with other values
        is refused, naming the first that differs.
      shards: lists of clip numbers, the contents of each file.
    Raises:
      StoreError: the folder holds features of something else, or files that are none.
    """

    def __init__(self, folder: str | os.PathLike, meta: Mapping[str, Any], shards: Sequence[Sequence[int]]):
        self.folder, self.shards = epath.Path(folder), [list(map(int, s)) for s in shards]
        self.where = {clip: n for n, members in enumerate(self.shards) for clip in members}
        want = json.loads(json.dumps({"version": 1, **meta, "shards": len(self.shards)}))
        path = self.folder / META
        if path.exists():
            try:
                have = json.loads(path.read_text())
            except ValueError:
                raise StoreError(f"{path} is no JSON; remove {self.folder} and make the features again.") from None
            if differ := [k for k in dict.fromkeys([*want, *have]) if have.get(k) != want.get(k)]:
                k = differ[0]
                raise StoreError(f"{self.folder} holds features of another {k} ({_short(have.get(k))}; wanted is "
                                 f"{_short(want.get(k))}). Choose another folder, or remove this one.")
            return
        if self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise StoreError(f"{self.folder} is not empty and holds no features; choose another folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(want, indent=1).encode())

    def path(self, shard: int) -> epath.Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing(self, host: int = 0, hosts: int = 1) -> list[int]:
        """Shards that this host has to write."""
        return [n for n in range(len(self.shards)) if n % hosts == host and not self.path(n).exists()]

    def fill(self, make: Callable[[list[int]], Iterable[Mapping[str, np.ndarray]]], host: int = 0,
             hosts: int = 1) -> int:
        """Writes this host's missing shards; `make` gives the arrays of a shard's clips, in order. Returns how many."""
        todo = self.missing(host, hosts)
        for n in todo:
            self.write(n, list(make(self.shards[n])))
        return len(todo)

    def write(self, shard: int, arrays: Sequence[Mapping[str, np.ndarray]]) -> None:
        from safetensors.numpy import save

        members = self.shards[shard]
        if len(arrays) != len(members):
            raise ValueError(f"shard {shard}: {len(arrays)} clips for {len(members)}.")
        flat = {f"{clip}/{name}": narrow(x) for clip, row in zip(members, arrays) for name, x in row.items()}
        _write(self.path(shard), save(flat))

    def get(self, clip: int) -> dict[str, np.ndarray]:
        """The arrays of one clip by name, as stored. Raises StoreError for one that is not there."""
        shard = self.where[clip]
        names, read = _opened(os.fspath(self.path(shard)))
        found = {name: read(f"{clip}/{name}") for name in names.get(str(clip), ())}
        if not found:
            raise StoreError(f"{self.path(shard)} has no clip {clip}; remove that file and make it again.")
        return found


@functools.lru_cache(maxsize=OPEN)
def _opened(path: str):
    """(clip -> names, reader by key) of a shard; the file stays mapped."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load

    try:
        if "://" in path:
            arrays = load(epath.Path(path).read_bytes())
            keys, read = list(arrays), arrays.__getitem__
        else:
            file = safe_open(path, "np")
            keys, read = list(file.keys()), file.get_tensor
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read ({error}); remove that file and make it again.") from error
    names: dict[str, list[str]] = {}
    for key in keys:
        clip, _, name = key.partition("/")
        names.setdefault(clip, []).append(name)
    return names, read


def plan(seconds: Mapping[int, float], together: float = TOGETHER) -> list[tuple[list[int], int, float]]:
    """Clips of these lengths in shards of one shape: [(clips, rows, seconds)], `rows` at most of `seconds` each, of
    which there are few. A shard is a batch of about `together` seconds; the last of a length has fewer clips."""
    longest = max(seconds.values(), default=0.0)
    ends = [e for e in ENDS if e / 2 < longest]
    ends += [float(np.ceil(longest))] if not ends or ends[-1] < longest else []
    out = []
    for low, end in zip([0.0, *ends], ends):
        members, size = [i for i, s in seconds.items() if low < s <= end], max(1, int(together / end))
        out += [(members[k : k + size], size, end) for k in range(0, len(members), size)]
    return out


def narrow(x: np.ndarray) -> np.ndarray:
    """fp16 of floats whose values fit, else fp32."""
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        return x
    return x.astype(np.float16 if np.abs(x, dtype=np.float32).max(initial=0.0) <= LARGEST else np.float32)


def _write(path: epath.Path, data: bytes) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_bytes(data)
    temporary.replace(path)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:16] + "..."
