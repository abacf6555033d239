"""Features on disk: shards by host, resumed, refused when of something else, fp16 with a way out."""
import json

import numpy as np
import pytest

from jaxslim.data.store import Store, StoreError, narrow

META, SHARDS = {"teacher": "a" * 64, "data": "b"}, [[0, 2], [1], [3]]


def arrays(members):
    return [{"x": np.full((2, 3), clip + 0.125, np.float32), "y": np.arange(clip + 1)} for clip in members]


def test_filled_resumed_and_read(tmp_path):
    made = []

    def make(members):
        made.append(members)
        return arrays(members)

    first = Store(tmp_path / "f", META, SHARDS)
    assert first.fill(make, host=1, hosts=2) == 1 and made == [[1]] and first.missing() == [0, 2]
    again = Store(tmp_path / "f", META, SHARDS)
    assert again.fill(make) == 2 and made == [[1], [0, 2], [3]] and again.fill(make) == 0
    for clip in range(4):
        got = again.get(clip)
        assert got["x"].dtype == np.float16 and (got["x"] == clip + 0.125).all()
        assert got["y"].tolist() == list(range(clip + 1))
    assert not [p for p in (tmp_path / "f").iterdir() if p.name.endswith(".tmp")]


def test_a_failure_leaves_what_was_done(tmp_path):
    store = Store(tmp_path / "f", META, SHARDS)

    def broken(members):
        if members == [1]:
            raise RuntimeError("stopped")
        return arrays(members)

    with pytest.raises(RuntimeError, match="stopped"):
        store.fill(broken)
    assert store.missing() == [1, 2] and store.get(2)["x"][0, 0] == 2.125
    with pytest.raises(StoreError, match="shard-00001.safetensors cannot be read"):
        store.get(1)


@pytest.mark.parametrize("meta, shards, message", [
    ({**META, "teacher": "c" * 64}, SHARDS, r"another teacher \(aaaaaaaaaaaaaaaa\.\.\.; wanted is cccccccccccccccc"),
    ({**META, "data": "d"}, SHARDS, r"another data \(b; wanted is d\)"),
    ({**META, "taps": ["x"]}, SHARDS, "another taps"), (META, SHARDS[:2], "another shards .3; wanted is 2")])
def test_of_something_else(tmp_path, meta, shards, message):
    Store(tmp_path / "f", META, SHARDS).fill(arrays)
    with pytest.raises(StoreError, match=message):
        Store(tmp_path / "f", meta, shards)
    assert Store(tmp_path / "f", META, SHARDS).missing() == []


def test_folders_that_are_none(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no features"):
        Store(tmp_path, META, SHARDS)
    store = Store(tmp_path / "f", META, SHARDS)
    store.path(1).write_bytes(b"no safetensors")
    with pytest.raises(StoreError, match="shard-00001.*remove that file"):
        store.get(1)
    (tmp_path / "f" / "meta.json").write_text("{")
    with pytest.raises(StoreError, match="is no JSON"):
        Store(tmp_path / "f", META, SHARDS)
    assert json.dumps(META)


def test_values_beyond_half_precision():
    assert narrow(np.array([1e5], np.float32)).dtype == np.float32
    assert narrow(np.array([6e4], np.float32)).dtype == np.float16
    assert narrow(np.array([70000])).dtype == np.int64
