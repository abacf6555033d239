"""A few hundred damaged inputs of every kind (scripts/fuzz.py has them by the thousand), and the worst known ones."""
import importlib.util
import io
import json
import pathlib

import numpy as np
import pytest
import soundfile

from jaxslim import config, hub
from jaxslim.data import DataError, audio, load_rows, tools

PATH = pathlib.Path(__file__).parents[1] / "scripts/fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", PATH)
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)
COUNTS = {"manifest": 60, "yaml": 40, "audio": 100, "safetensors": 40, "config": 20, "index": 40, "bin": 60}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_input_ends_well(kind):
    if kind == "bin":
        pytest.importorskip("torch")
    found = [fuzz.attempt(kind, 100_000 + i) for i in range(COUNTS[kind])]   # not those of the recorded run
    assert [r for r in found if r["outcome"] == "failure"] == []
    assert {"success", "error"} == {r["outcome"] for r in found} or kind == "safetensors"


def test_good_inputs_succeed(tmp_path, monkeypatch):
    for change in ("change_bytes", "change_text", "change_tree"):
        monkeypatch.setattr(fuzz, change, lambda rng, data: data)
    for kind in fuzz.KINDS:
        if kind == "bin":
            pytest.importorskip("torch")
        assert fuzz.attempt(kind, 0)["outcome"] == "success", kind


def test_what_the_runner_calls_a_failure(monkeypatch):
    def hostile(rng, folder):
        def run():
            what = hostile.what
            if what == "partial":
                (folder / "out").mkdir()
                (folder / "out" / "half").write_text("")
                raise DataError("a fine message of ours")
            if what == "raw":
                raise ValueError("not of ours")
            if what == "short":
                raise DataError("bad")
            if what == "slow":
                sum(range(10**5))
        return run

    monkeypatch.setitem(fuzz.KINDS, "hostile", hostile)
    for what, error in (("partial", "left behind out"), ("raw", "ValueError"), ("short", "message of 3 characters")):
        hostile.what = what
        assert fuzz.attempt("hostile", 0)["error"] == error
    monkeypatch.setattr(fuzz, "LIMIT", 0.0)
    hostile.what = "slow"
    assert fuzz.attempt("hostile", 0)["outcome"] == "failure"


def write(path, text):
    path.write_text(text)
    return str(path)


def test_bombs(tmp_path):
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(8 * ['*' + a])}]\n" for a, b in zip(
        "abcdefghijklmnopqrst", "bcdefghijklmnopqrstu"))
    for text in (laughs, "[" * 1500, "seed: 2020-13-45", "? [a]\n: b", "teacher: " + "x" * 10**4 + "\ndata: 1"):
        with pytest.raises(config.ConfigError) as error:
            config.load(config.Recipe, write(tmp_path / "a.yaml", text))
        assert len(str(error.value)) < 1500
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        load_rows(write(tmp_path / "a.jsonl", "[" * 50_000))


def test_headers_that_ask_for_much(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(1600, np.float32), 16000, format="WAV")
    data = bytearray(buffer.getvalue())
    data[24:28] = (1).to_bytes(4, "little")                              # 1 Hz: at 16 kHz 16,000 times as many samples
    with pytest.raises(audio.AudioError, match="1 samples a second; its header is damaged"):
        audio.load(bytes(data), name="slow.wav")
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in fuzz.folders()["safetensors"].items():
        (folder / name).write_bytes(content)
    good = json.loads((folder / "config.json").read_text())
    for change, match in (({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, and the weights are"),
                          ({"num_attention_heads": 2**31}, "num_attention_heads is 2147483648"),
                          ({"note": "\ud800"}, "half of a surrogate pair")):
        (folder / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(hub.HubError, match=match):
            hub.load(folder)


def test_rows_of_the_wrong_kind(tmp_path):
    (tmp_path / "a.wav").write_bytes(fuzz.sounds()["pcm.wav"])
    rows = [{"audio": 5, "text": "a"}, {"audio": {"bytes": [1], "path": None}}, {"audio": "a.wav", "offset": "soon"},
            {"audio": "a.wav", "offset": -1}, {"audio": "gs://nowhere/a.wav"}]
    table = load_rows(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))
    for i, match in enumerate(("5 cannot be read", r"\[1\] cannot be read", "offset 'soon' is no number of seconds",
                               "offset '-1' is no number", "cannot be read")):
        with pytest.raises(audio.AudioError, match=match):
            table.audio(i)
    mixed = [{"audio": "a.wav", "speaker": 1}, {"audio": "a.wav", "speaker": {"name": "b"}}]
    with pytest.raises(DataError, match="give every column values of one kind"):
        tools.prepare(write(tmp_path / "mixed.jsonl", "\n".join(map(json.dumps, mixed))), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))
