"""Files that one process of a pod downloads, and the others read from a shared disk or receive over the network."""
from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np

CHUNK = 64 * 2**20  # bytes sent at once

_received: list[tempfile.TemporaryDirectory] = []  # for the life of the process


_folders: dict[str, pathlib.Path] = {}  # what was fetched together: a process may ask for it again alone


def once(name: str, fetch: Callable[[], pathlib.Path], failure: type[Exception]) -> pathlib.Path:
    """The folder that `fetch` gives in process 0; elsewhere the same folder, or a copy where that disk is not shared.

    The first time every process must call it with that `name`. Without jax.distributed it is `fetch()`. What `fetch`
    raises in process 0, all raise: the others as `failure`.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return fetch()
    if name not in _folders:
        _folders[name] = _together(fetch, failure)
    return _folders[name]


def _together(fetch, failure) -> pathlib.Path:
    found, error, note = None, None, {}
    if jax.process_index() == 0:
        try:
            found = fetch()
            note = {"folder": str(found), "files": {p.relative_to(found).as_posix(): p.stat().st_size
                                                    for p in sorted(found.rglob("*")) if p.is_file()}}
        except Exception as raised:
            error, note = raised, {"error": str(raised)}
    note = json.loads(_broadcast(json.dumps(note).encode()))
    if "error" in note:
        raise error or failure(f"{note['error']} (in process 0)")
    here = found or pathlib.Path(note["folder"])
    missing = not _has(here, note["files"])
    from jax.experimental import multihost_utils

    if not np.asarray(multihost_utils.process_allgather(np.bool_(missing))).any():
        return here
    if missing:
        _received.append(tempfile.TemporaryDirectory(prefix="jaxslim-"))
        here = pathlib.Path(_received[-1].name)
    for name, size in note["files"].items():
        _send(found / name if found else None, here / name if missing else None, size)
    return here


def _has(folder: pathlib.Path, files: dict[str, int]) -> bool:
    """Whether this process sees the files: the name holds a commit's hash, so equal sizes are enough."""
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def _send(source: pathlib.Path | None, target: pathlib.Path | None, size: int) -> None:
    """One file from process 0 (the only one with `source`) to those with `target`, chunk by chunk."""
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
    for start in range(0, size, CHUNK):
        data = b""
        if source is not None:
            with source.open("rb") as file:
                file.seek(start)
                data = file.read(CHUNK)
        data = _broadcast(data, min(CHUNK, size - start))
        if target is not None:
            with target.open("ab") as file:
                file.write(data)


def _broadcast(data: bytes, size: int | None = None) -> bytes:
    """Bytes of process 0 in every process; `size` where all know it."""
    from jax.experimental import multihost_utils

    if size is None:
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
