"""WebDataset tar files: the same batches as from loose files, whatever host reads them; bad archives."""
import io
import json
import tarfile

import numpy as np
import pytest
import remote

from jaxslim.data import Batches, DataError, load_rows
from jaxslim.data.tar import expand
from jaxslim.train.log import wav_bytes


def write(path, samples, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def clip(i):
    return wav_bytes(0.3 * np.sin(np.arange(1600 + 100 * i) / (3 + i)))


def test_rows_of_tar_files(tmp_path):
    for part in range(2):
        write(tmp_path / f"p-{part:02}.tar", [
            entry for i in range(3) for entry in (
                (f"d/s{part}{i}.wav", clip(i)),
                (f"d/s{part}{i}.json", json.dumps({"text": f"text {i}", "speaker": "x", "audio": 1}).encode())
                if i else (f"d/s{part}{i}.txt", "Grüße\n".encode()))] + [("d/notes", b"no dot"), ("d/odd.cls", b"3")])
    rows = load_rows(str(tmp_path / "p-{00..01}.tar"))
    assert rows.column("id") == [f"d/s{p}{i}" for p in range(2) for i in range(3)]
    assert rows.column("text") == ["Grüße", "text 1", "text 2"] * 2 and rows.column("speaker")[1] == "x"
    assert rows.duration(2) == pytest.approx(0.1125)
    for i in (5, 0, 3):  # any order
        assert rows[i]["audio"]["bytes"] == clip(i % 3)
        assert rows.audio(i).shape == (1600 + 100 * (i % 3),)
    assert rows.fingerprint == load_rows(str(tmp_path / "p-{00..01}.tar")).fingerprint


def test_braces():
    assert expand("a-{08..10}/b-{0..1}.tar") == [f"a-{a}/b-{b}.tar" for a in ("08", "09", "10") for b in (0, 1)]
    assert expand("a.tar") == ["a.tar"]


def test_hosts_read_their_own_clips(small, tmp_path, monkeypatch):
    """The same global batches as from loose files; no host reads another's clip."""
    from jaxslim import hub
    from jaxslim.data import CTCTask, tar

    loose = load_rows(small["train"])
    write(tmp_path / "a.tar", [entry for i in range(len(loose)) for entry in (
        (f"{loose.column('id')[i]}.wav", loose[i]["audio"]["bytes"] or open(loose[i]["audio"]["path"], "rb").read()),
        (f"{loose.column('id')[i]}.txt", loose.column("text")[i].encode()))])
    packed, task = load_rows(str(tmp_path / "a.tar")), CTCTask.from_pretrained(hub.folder(small["model"]))
    options = dict(batch_size=4, seed=1, epochs=1, prefetch=0, workers=0)
    want = list(Batches(loose, task, **options))
    hosts = [Batches(packed, task, host=h, hosts=2, cache_bytes=0, **options) for h in range(2)]
    read, real = [], tar.Range.to_pybytes
    monkeypatch.setattr(tar.Range, "to_pybytes", lambda self: read.append(self.offset) or real(self))
    for batch in want:
        halves = []
        for host in hosts:
            read.clear()
            halves.append(next(host))
            assert len(set(read)) == int((halves[-1]["row"] >= 0).sum())
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), value)


def test_bad_archives(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="a.tar is not an uncompressed tar file"):
        load_rows(str(tmp_path / "a.tar"))
    write(tmp_path / "b.tar.gz", [("a.wav", clip(0))], "w:gz")
    with pytest.raises(DataError, match="b.tar.gz is not an uncompressed tar.*without compression"):
        load_rows(str(tmp_path / "b.tar.gz"))
    with pytest.raises(DataError, match="none.tar does not exist"):
        load_rows(str(tmp_path / "none.tar"))
    write(tmp_path / "c.tar", [("a.txt", b"text")])
    with pytest.raises(DataError, match="c.tar holds no audio"):
        load_rows(str(tmp_path / "c.tar"))
    write(tmp_path / "d.tar", [("a.wav", clip(0)), ("a.txt", b"a")])
    rows = load_rows(str(tmp_path / "d.tar"))
    (tmp_path / "d.tar").write_bytes((tmp_path / "d.tar").read_bytes()[:1000])
    with pytest.raises(DataError, match="ends before byte"):
        rows.audio(0)


def test_in_a_bucket(tmp_path):
    write(tmp_path / "a.tar", [("a.wav", clip(1)), ("a.txt", b"hello")])
    with remote.bucket():
        from etils import epath

        epath.Path("gs://b").mkdir()
        epath.Path("gs://b/a.tar").write_bytes((tmp_path / "a.tar").read_bytes())
        rows = load_rows("gs://b/a.tar")
        assert rows.column("text") == ["hello"] and rows.audio(0).shape == (1700,)
