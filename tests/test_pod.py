"""A hub model is downloaded by one process of a pod; the other reads it, or receives it where the disk is its own."""
import json
import pathlib
import sys

import hosts
import pytest

from jaxslim.places import folder
from jaxslim.weights import HubError


def test_alone_it_is_a_plain_download(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxslim.places._download", lambda *a: tmp_path)
    assert folder("org/name") == tmp_path


@pytest.mark.multiprocess
@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_processes(tmp_path, shared):
    outs = hosts.two(__file__, str(tmp_path), str(int(shared)))
    first, second = outs
    assert [o["downloads"] for o in outs] == [1, 0] and first["files"] == second["files"]
    assert (first["folder"] == second["folder"]) == shared and "no such repository" in second["error"]


def child(address, process, tmp, shared):
    import jax

    from jaxslim import places, pod

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(process))
    downloads, where = [], pathlib.Path(tmp) / "model"

    def download(repo, revision, more):
        if repo == "org/none":
            raise HubError("org/none: no such repository.")
        downloads.append(repo)
        (where / "sub").mkdir(parents=True)
        (where / "config.json").write_text("{}")
        (where / "empty").write_bytes(b"")
        (where / "sub" / "model.safetensors").write_bytes(bytes(range(256)) * 10)
        return where

    places._download, pod.CHUNK = download, 1000
    if shared == "0" and process == "1":
        pod._has = lambda *_: False
    path = folder("org/name")
    assert folder("org/name") == path  # known by now: no process waits for the other
    try:
        folder("org/none")
        error = ""
    except HubError as raised:
        error = str(raised)
    files = {str(p.relative_to(path)): list(p.read_bytes()) for p in sorted(path.rglob("*")) if p.is_file()}
    print(json.dumps({"downloads": len(downloads), "folder": str(path), "files": files, "error": error}))


if __name__ == "__main__":
    child(*sys.argv[1:])
