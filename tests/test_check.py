"""Every planted fault is found and named, in the row where it was planted, and clean rows stay clean."""
import io
import json

import numpy as np
import pytest

from jaxslim import cli
from jaxslim.data import CTCTask, DataError, Rows, check, load_rows, tools

sf = pytest.importorskip("soundfile")
RATE = 16000
RNG = np.random.default_rng(0)
TASK = CTCTask({t: i for i, t in enumerate([*tools.SPECIAL, *"abcdefghijklmnopqrstuvwxyz'"])})


def encode(wave, rate=RATE, **kind) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, wave, rate, **{"format": "WAV", "subtype": "FLOAT", **kind})
    return buffer.getvalue()


def tone(seconds=2.0, rate=RATE):
    t = np.arange(round(seconds * rate)) / rate
    return (0.2 * np.sin(2 * np.pi * RNG.uniform(100, 400) * t) + 0.01 * RNG.standard_normal(len(t))).astype("float32")


def with_sample(value):
    wave = tone()
    wave[100] = value
    return encode(wave)


FAULTS = {  # name -> (kind that must be found, what is wrong with the row)
    "empty file": ("unreadable audio", {"audio": b""}),
    "text as audio": ("unreadable audio", {"audio": b"this is no sound at all " * 40}),
    "damaged header": ("unreadable audio", {"audio": b"RIFX" + encode(tone())[4:40]}),
    "lfs pointer": ("unreadable audio", {"audio": b"version https://git-lfs.github.com/spec/v1\noid sha256:0"}),
    "missing file": ("unreadable audio", {"audio": "/nowhere/clip.wav"}),
    "no audio": ("unreadable audio", {"audio": None}),
    "no samples": ("unreadable audio", {"audio": encode(np.zeros(0, "float32"))}),
    "nan": ("unreadable audio", {"audio": with_sample(np.nan)}),
    "infinite": ("unreadable audio", {"audio": with_sample(np.inf)}),
    "cut wav": ("truncated", {"audio": encode(tone())[:60000]}),
    "cut ogg": ("truncated", {"audio": encode(tone(4), format="OGG", subtype="VORBIS")[:-2000]}),
    "zeros": ("silent", {"audio": encode(np.zeros(RATE, "float32"))}),
    "faint": ("silent", {"audio": encode(1e-4 * tone())}),
    "clipped": ("clipped", {"audio": encode(np.clip(8 * tone(), -1, 1))}),
    "offset": ("offset", {"audio": encode(tone() + 0.3)}),
    "dead channel": ("dead channel", {"audio": encode(np.stack([tone(), np.zeros(2 * RATE)], 1))}),
    "short": ("too short", {"audio": encode(tone(0.01)), "text": "a"}),
    "long": ("too long", {"audio": encode(tone(31)), "text": "many words " * 8}),
    "telephone": ("low rate", {"audio": encode(tone(2, 8000), 8000)}),
    "wrong duration": ("duration", {"duration": 3.0}),
    "duration in words": ("duration", {"duration": "two"}),
    "repeated id": ("repeated id", {"id": "good 1"}),
    "no text": ("no text", {"text": None}),
    "blank text": ("empty text", {"text": "  "}),
    "dashes": ("empty text", {"text": "- ... -"}),
    "unknown letters": ("unknown characters", {"text": "caf\u00e9 au lait"}),
    "digits": ("digits", {"text": "dial 9 now"}),
    "control": ("control character", {"text": "hello\u200b there"}),
    "two forms": ("not normalised", {"text": "cafe\u0301 au lait"}),
    "tags": ("markup", {"text": "hello <unk> there"}),
    "too many labels": ("too few frames", {"text": "far too many letters " * 6}),
    "fast": ("fast", {"audio": encode(tone(0.6)), "text": "twenty seven letters of words"}),
    "slow": ("slow", {"audio": encode(tone(9)), "text": "a"}),
    "test text": ("text in both", {"text": "The secret, sentence."}),
}
SECRET = encode(tone())
FAULTS["test clip"] = ("clip in both", {"audio": SECRET})
FAULTS["same clip"] = ("repeated clip", {"audio": SECRET})


@pytest.fixture(scope="module")
def result():
    good = [{"id": f"good {i}", "audio": encode(tone()), "text": f"number {w} is fine", "duration": 2.0}
            for i, w in enumerate(("one", "two", "three", "four", "five"))]
    rows = [*good, *({"id": name, "audio": encode(tone()), "text": "a fine row"} | fault
                     for name, (_, fault) in FAULTS.items())]
    test = Rows([{"id": "test 1", "audio": SECRET, "text": "the secret sentence"}], "the test set")
    return check.check(Rows(rows, "planted"), task=TASK, against=[test])


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_found(result, name):
    row = 5 + list(FAULTS).index(name)
    assert FAULTS[name][0] in [f.kind for f in result["findings"] if f.row == row]


def test_clean_rows_are_clean_and_no_row_has_another_rows_fault(result):
    assert len(FAULTS) >= 30
    assert not [f for f in result["findings"] if f.row < 5]
    several = ("digits", "tags", "two forms", "control", "same clip", "test text")  # unknown to the vocabulary as well
    for name in (n for n in FAULTS if n not in several):
        found = {f.kind for f in result["findings"] if f.row == 5 + list(FAULTS).index(name)}
        assert found <= {FAULTS[name][0], "clip in both"}, (name, found)


def test_quarantine_holds_errors_only(result):
    listed = {row["row"]: row["reasons"] for row in check.quarantine(result)}
    assert len(listed) == result["rows"] - result["usable"]
    assert 5 + list(FAULTS).index("cut wav") in listed and 5 + list(FAULTS).index("clipped") not in listed
    assert all(reason.count(": ") >= 1 for reasons in listed.values() for reason in reasons)


def test_rows_taken_several_times_and_bundled_speech_are_clean():
    other = ["bundled:prompts-en/test", "bundled:prompts-en/train"]
    found = check.check("2*bundled:prompts-en/validation", against=other)
    assert not found["findings"] and found["usable"] == 70


def test_page_escapes_what_comes_from_data(result, tmp_path):
    evil = Rows([{"id": "<script>alert(1)</script>", "audio": encode(tone()), "text": "<b onload=x>"}], "<i>name</i>")
    tools.page(check.check(evil), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page and "<i>name" not in page and "&lt;script&gt;" in page and "<svg" in page


def test_stats_and_buckets():
    value = tools.stats("bundled:prompts-en/train")
    assert value["rows"] == 401 and abs(value["hours"] - 12.4 / 60) < 0.01 and value["padding"] < 0.10
    assert value["characters"]["e"] > value["characters"]["z"] and value["buckets"][-1] >= value["seconds"]["max"]
    assert value["columns"]["speaker"] and "words" in tools.render_stats(value)


def test_vocabulary_opens_as_a_task_and_in_transformers(tmp_path):
    found = tools.vocabulary("bundled:prompts-en/train", tmp_path / "v")
    assert found["<pad>"] == 0 and "z" in found and " " not in found
    from transformers import Wav2Vec2CTCTokenizer

    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "v")
    assert theirs("hello there").input_ids == CTCTask(found).encode("hello there").tolist()
    with pytest.raises(DataError, match="there already"):
        tools.vocabulary("bundled:prompts-en/train", tmp_path / "v")
    rare = tools.vocabulary(Rows([{"text": "aab"}]), tmp_path / "r", min_count=2)
    assert list(rare) == [*tools.SPECIAL, "a"]


def test_prepare_keeps_samples_and_drops_the_quarantined(tmp_path):
    clips = [encode(tone(1, 8000), 8000) for _ in range(5)]
    rows = Rows([{"id": f"a/{i}", "audio": clip, "text": "x y", "speaker": "s"} for i, clip in enumerate(clips)]
                + [{"id": "bad", "audio": b"", "text": "x"}])
    skip = tmp_path / "bad.jsonl"
    skip.write_text(json.dumps({"id": "a/3", "reasons": ["silent"]}) + "\n")
    done = tools.prepare(rows, tmp_path / "out", skip=skip, shards=2)
    assert done["rows"] == 4 and set(done["skipped"]) == {"a/3", "bad"} and len(done["files"]) == 2
    back = load_rows(tmp_path / "out")
    assert sorted(back.column("id")) == ["a/0", "a/1", "a/2", "a/4"] and set(back.column("speaker")) == {"s"}
    for i, name in enumerate(back.column("id")):
        wanted = rows.audio(rows.column("id").index(name))
        assert np.abs(back.audio(i) - wanted).max() < 2**-14 and back.duration(i) == len(wanted) / RATE
    with pytest.raises(DataError, match="Parquet files already"):
        tools.prepare(rows, tmp_path / "out")


def test_command(tmp_path, capsys):
    (tmp_path / "metadata.csv").write_text("file_name,transcription\na.wav,hello\nb.wav,there\n")
    (tmp_path / "a.wav").write_bytes(encode(tone()))
    (tmp_path / "b.wav").write_bytes(b"")
    files = ["--quarantine", str(tmp_path / "q.jsonl"), "--html", str(tmp_path / "p.html")]
    assert cli.main(["data", "check", str(tmp_path), "--model", "bundled:wav2vec2-ctc-en", *files]) == 3
    assert "unreadable audio" in capsys.readouterr().out
    assert json.loads((tmp_path / "q.jsonl").read_text())["id"] == "b" and (tmp_path / "p.html").stat().st_size > 5000
    assert cli.main(["data", "check", str(tmp_path), "--max-bad-fraction", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usable"] == 1
