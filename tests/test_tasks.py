"""Models that take features, and Whisper: evaluated, transcribed and trained as transformers would with their files."""
import json
import pathlib

import numpy as np
import pytest
import test_text
import tiny
import tiny_tasks
import tiny_whisper as tw
from conftest import write_data

from jaxslim import cli, hub
from jaxslim.data import AudioTask, Batches, DataError, load_rows, task_of
from jaxslim.evaluate import evaluate
from jaxslim.train.log import wav_bytes
from jaxslim.transcription import transcribe

FAMILIES = ("wav2vec2-bert", "parakeet_ctc", "whisper")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("torch")  # Parakeet's extractor needs it
    base = tmp_path_factory.mktemp("tasks")
    return {f: tiny_tasks.folder(f, base / f, seed=2) for f in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("speech"), seconds=(0.3, 0.9), rows=5)


def reference(family, folder, wave):
    """What transformers makes of one clip with the files of the folder."""
    import torch
    import transformers

    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    x = extractor(wave, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    with torch.no_grad():
        if family == "whisper":
            model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
            ids = model.generate(x["input_features"], language="en", attention_mask=x["attention_mask"])
            return tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        architecture = hub.read_config(folder)["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(folder).eval()
        logits = model(input_features=x["input_features"], attention_mask=x["attention_mask"]).logits
    frames = int(x["attention_mask"].sum())  # the last one may be masked, and is then no frame of the audio
    for _ in range(3 * (family == "parakeet_ctc")):
        frames = (frames - 1) // 2 + 1
    return tokenizer.decode(logits[0, :frames].argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_transcripts_equal_those_of_transformers(family, folders, data):
    rows = load_rows(data)
    result = evaluate(folders[family], data, batch_size=2, language="en" if family == "whisper" else None,
                      progress=False)
    assert result["n"] == 5 and result["padding"] == "masked" and result["skipped"] == 0
    assert [u["pred_text"] for u in result.utterances] == [
        reference(family, folders[family], rows.audio(i)) for i in range(5)]
    assert len({u["pred_text"] for u in result.utterances}) > 1  # they differ by what is heard
    assert result["audio_seconds"] == pytest.approx(sum(rows.duration(i) for i in range(5)))


def test_whisper_labels_are_those_of_fine_tuning(folders):
    import transformers

    tokenizer = transformers.WhisperTokenizer.from_pretrained(folders["whisper"], language="en", task="transcribe")
    spec = hub.load(folders["whisper"]).spec
    task = task_of(spec, folders["whisper"], "en")
    assert task.encode("a cab").tolist() == tokenizer("a cab").input_ids == [
        tw.SOT, tw.EN, tw.TRANSCRIBE, tw.NOTIMESTAMPS, 4, 0, 6, 4, 5, tw.EOS]
    made = task.targets([task.encode("a cab"), ()], 16)
    assert made["decoder_input_ids"][0, :9].tolist() == [tw.SOT, *made["labels"][0, :8]]
    assert made["labels"][0, 8] == tw.EOS
    assert (made["labels"][0, 9:] == -100).all() and (made["labels"][1] == -100).all()
    assert (made["decoder_input_ids"][0, 9:] == tw.EOS).all()
    assert task.transcript(task.encode("a cab")) == "a cab"
    with pytest.raises(DataError, match="Unsupported language: klingon"):
        task_of(spec, folders["whisper"], "klingon")


def test_pieces_of_parakeet(folders):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["parakeet_ctc"])
    task = task_of(hub.load(folders["parakeet_ctc"]).spec, folders["parakeet_ctc"])
    for text in ("a bad cafe", "dead", "feed a cab"):
        ids = task.encode(text)
        assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        assert task.decode(ids, collapse=False) == text
        frames = np.repeat(np.stack([ids, np.zeros_like(ids)], 1).reshape(-1), 2)  # piece piece blank blank ...
        assert task.transcript(frames) == task.decode(frames) == text == tokenizer.decode(frames)
    with pytest.raises(DataError, match="no pieces for 'x7'"):
        task.encode("x7")


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_hold_what_one_clip_alone_gives(family, folders, data):
    rows, task = load_rows(data), task_of(hub.load(folders[family]).spec, folders[family])
    batches = Batches(rows, task, batch_size=4, buckets=(1.0,), shuffle=False, epochs=1, prefetch=0)
    shapes = set()
    for batch in batches:
        shapes.add(batch["input_features"].shape)
        for b, i in enumerate(batch["row"]):
            mask = batch["attention_mask"][b]
            if i < 0:
                assert not mask.any() and not batch["samples"][b] and (batch["labels"][b] == -100).all()
                continue
            wave = rows.audio(int(i))
            alone = task.extractor([wave], len(wave))
            frames = int(mask.sum())
            assert frames == alone["attention_mask"].sum() and batch["samples"][b] == len(wave)
            axis = 1 if family == "whisper" else 0
            have, want = (np.take(x, range(frames), axis) for x in (batch["input_features"][b],
                                                                  alone["input_features"][0]))
            np.testing.assert_array_equal(have, want)
    assert len(shapes) == 1


def test_long_audio_has_segments(folders, tmp_path, capsys):
    wave = 0.3 * np.random.default_rng(0).standard_normal(16000 * 5 // 2)
    (tmp_path / "long.wav").write_bytes(wav_bytes(wave))
    row, = transcribe(folders["whisper"], [tmp_path / "long.wav"], language="en", progress=False)
    assert row["duration"] == 2.5 and row["segments"] and row["segments"][-1]["end"] > 1.0
    assert "".join(s["text"] for s in row["segments"]).replace(" ", "") == row["text"].replace(" ", "")
    assert cli.main(["transcribe", folders["whisper"], str(tmp_path / "long.wav"), "--language", "en"]) == 0
    assert capsys.readouterr().out.strip() == row["text"]


@pytest.mark.parametrize("family", ["wav2vec2-bert", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
def test_training_and_its_folder(family, folders, data, tmp_path):
    """Two steps by the command; the result has all files, and evaluates."""
    config = {"model": folders[family], "data": {"train": data, "language": "en"}, "output_dir": str(tmp_path / "run"),
              "max_steps": 2, "per_device_train_batch_size": 2, "buckets": [1.0], "logging_steps": 1,
              "groups": {"main": {"learning_rate": 1e-2}}}
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if "loss" in x]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
    final = tmp_path / "run" / "final"
    files = {f.name for f in pathlib.Path(folders[family]).iterdir()}
    assert {f.name for f in final.iterdir()} == files and lines[-1]["audio_seconds"] > 0
    assert hub.load(final).fingerprint != hub.load(folders[family]).fingerprint
    assert evaluate(str(final), data, limit=2, progress=False)["n"] == 2


def test_wrong_files_are_named(folders, tmp_path):
    def broken(family, name, text=None):
        target = tmp_path / f"{family}-{name}-{bool(text)}"
        target.mkdir()
        for file in pathlib.Path(folders[family]).iterdir():
            if file.name != name:
                (target / file.name).write_bytes(file.read_bytes())
        if text:
            (target / name).write_text(text)
        return hub.load(target).spec, target

    cases = {("whisper", "preprocessor_config.json"): "neither preprocessor_config.json nor",
             ("parakeet_ctc", "tokenizer.json"): "has no tokenizer.json; a parakeet_ctc model",
             ("wav2vec2-bert", "vocab.json"): "has no vocab.json"}
    for (family, name), message in cases.items():
        with pytest.raises(DataError, match=message):
            task_of(*broken(family, name))
    with pytest.raises(DataError, match="makes 128 features a frame, the model takes 80"):
        task_of(*broken("parakeet_ctc", "preprocessor_config.json", '{"feature_size": 128}'))
    with pytest.raises(DataError, match="at 8000 Hz"):
        task_of(*broken("whisper", "preprocessor_config.json", '{"sampling_rate": 8000}'))
    spec = tiny.slim(tiny.config("wav2vec2"), "none").spec
    with pytest.raises(DataError, match="has the head 'none'; needed is"):
        task_of(spec, folders["whisper"])


def test_labels_that_are_numbers():
    task = AudioTask({"0": 0, "2": 1, "10": 2})
    assert [task.label(x) for x in (0, "0", 2, 10, "10", 1)] == [0, 0, 1, 2, 2, 1]  # 1 is no name, so a class
    assert task.targets([task.encode(10), ()], 1)["labels"].tolist() == [2, -100]
    with pytest.raises(DataError, match="label 7 is none of 0, 2, 10"):
        task.label(7)


def test_text_classifiers(tmp_path):
    folder = test_text.write_model(tmp_path / "model")
    assert len(test_text.table(tmp_path, 60)) == 60
    config = {"model": str(folder), "data": {"train": str(tmp_path / "data.csv"),
                                             "validation": str(tmp_path / "data.csv")},
              "output_dir": str(tmp_path / "run"), "max_steps": 60, "eval_steps": 60, "per_device_train_batch_size": 16,
              "groups": {"main": {"learning_rate": 3e-3}}}
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    before = evaluate(str(folder), str(tmp_path / "data.csv"), progress=False)
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 0
    out = tmp_path / "said.jsonl"
    after = evaluate(str(tmp_path / "run" / "final"), str(tmp_path / "data.csv"), predictions=out, progress=False)
    assert after["accuracy"] > 0.9 > before["accuracy"] and after["n"] == 60
    assert after["accuracy_low"] <= after["accuracy"] <= after["accuracy_high"]
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(r["text"] == r["pred_text"] for r in said) == 60 - after["errors"]
    assert cli.main(["eval", str(folder), "--data", str(tmp_path / "data.csv"), "--json"]) == 0


@pytest.mark.parametrize("kind", ["text", pytest.param("whisper", marks=pytest.mark.slow)])
def test_recipes(kind, tmp_path, request):
    """A stage, its control, test scores and the page, of a model that is no CTC model."""
    if kind == "text":
        model, data = str(test_text.write_model(tmp_path / "model")), str(tmp_path / "data.csv")
        test_text.table(tmp_path, 24)
    else:
        model, data = request.getfixturevalue("folders")[kind], request.getfixturevalue("data")
    train = {"max_steps": 1, "per_device_train_batch_size": 4, "buckets": [] if kind == "text" else [1.0]}
    recipe = {"teacher": model, "data": {"train": data, "validation": data, "test": data, "language": "en"},
              "bench_seconds": [], "stages": [{"name": "tune", "method": "train", "train": train}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert cli.main(["slim", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for role in ("teacher", "control", "student"):
        assert ("accuracy" if kind == "text" else "wer") in summary[role] and summary[role]["n"] > 4
    assert ("Accuracy" if kind == "text" else "Word error rate") in (tmp_path / "run" / "report.html").read_text()
