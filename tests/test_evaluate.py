"""Scores, intervals, evaluation, agreement and transcription, on a tiny random model and synthetic sound."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxslim import hub, versus
from jaxslim.data import CTCTask, DataError, Extractor, Rows, load_rows
from jaxslim.data.audio import load
from jaxslim.evaluate import bootstrap, evaluate, frame_agreement, paired_bootstrap, render, score
from jaxslim.models import bind
from jaxslim.slim import Slim
from jaxslim.spec import Spec
from jaxslim.train.log import wav_bytes
from jaxslim.transcription import transcribe

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
CONFIG = dict(
    model_type="wav2vec2", hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24,
    conv_dim=[8], conv_kernel=[400], conv_stride=[320], conv_bias=True, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, vocab_size=len(LETTERS), do_stable_layer_norm=True)  # fmt: skip


def model_of(seed=0, norm="layer") -> Slim:
    spec = Spec(CONFIG | {"feat_extract_norm": norm}, "wav2vec2", "ctc")
    rng, params = np.random.default_rng(seed), {}
    for name, shape in bind.shapes(spec).items():
        value = rng.normal(size=shape.shape) * (0.0 if name.endswith("bias") else 0.3)
        params[name] = (value + ("norm.weight" in name)).astype(np.float32)
    return Slim(spec, params)


def task_of(mask=True) -> CTCTask:
    return CTCTask({t: i for i, t in enumerate(LETTERS)}, extractor=Extractor(return_attention_mask=mask))


def sound(seconds, seed=0, rate=16000) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    hiss = 0.02 * np.random.default_rng(seed).normal(size=t.size)
    return (0.3 * np.sin(2 * np.pi * 300 * (1 + seed + t) * t) + hiss).clip(-1, 1)


def rows_of(n=6) -> Rows:
    lengths = [0.5, 0.83, 0.5, 0.5, 0.83, 0.5][:n]
    audio = [{"bytes": wav_bytes(sound(s, i)), "path": f"clips/{i}.wav"} for i, s in enumerate(lengths)]
    records = [{"id": f"clip-{i}", "audio": a, "text": "a bad cafe"} for i, a in enumerate(audio)]
    return Rows(records, "sounds")


def alone(model, task, wave) -> str:
    logits = model(input_values=task.inputs(wave)[None]).logits
    return task.decode(np.asarray(logits[0].argmax(-1)))


# ---- scoring ----


def test_score_counts_every_kind_of_error():
    result = score(["the cat sat", "on the mat", ""], ["the bat sat down", "on mat", "oh"])
    assert (result["substitutions"], result["deletions"], result["insertions"], result["words"]) == (1, 1, 2, 6)
    assert result["wer"] == pytest.approx(4 / 6) and result["n"] == 3
    assert [u["errors"] for u in result.utterances] == [2, 1, 1]
    assert sum(u["character_errors"] for u in result.utterances) == result["character_errors"] == 1 + 5 + 4 + 2
    assert result["cer"] == result["character_errors"] / (11 + 10)
    assert result["wer_low"] <= result["wer"] <= result["wer_high"]


def test_score_of_nothing_is_none_not_a_crash():
    assert score([], [])["wer"] is None
    silent = score(["", " "], ["", "noise"])
    assert (silent["wer"], silent["cer"], silent["insertions"], silent["wer_low"]) == (None, None, 1, None)
    assert json.loads(json.dumps(silent)) == silent


def test_normalisation_is_named_and_minimal():
    assert score(["Don’t  stop, NOW!"], ["don't stop now"])["substitutions"] == 3
    result = score(["Don’t  stop, 'NOW'!"], ["don't stop now"], normalize="letters")
    assert (result["wer"], result["normalize"]) == (0.0, "letters")
    with pytest.raises(ValueError, match="none, letters"):
        score(["a"], ["a"], normalize="wisper")
    with pytest.raises(ValueError, match="1 references but 2"):
        score(["a"], ["a", "b"])


def test_bootstrap_is_seeded_and_shrinks_with_the_test_set():
    rng = np.random.default_rng(0)
    words = rng.integers(5, 15, 400)
    errors = rng.binomial(words, 0.2)
    low, high = bootstrap(errors, words)
    assert (low, high) == bootstrap(errors, words) != bootstrap(errors, words, seed=1)
    assert low < errors.sum() / words.sum() < high
    rate, spread = errors.sum() / words.sum(), (high - low) / 3.92
    by_formula = np.sqrt(((errors - rate * words) ** 2).sum()) / words.sum()  # delta method
    assert spread == pytest.approx(by_formula, rel=0.05)
    wide = bootstrap(errors[:40], words[:40])
    assert wide[1] - wide[0] > 2 * (high - low)


def test_paired_bootstrap_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(1)
    words = rng.integers(5, 15, 200)
    b = rng.binomial(words, rng.beta(1, 4, 200))
    a = np.minimum(b + (rng.random(200) < 0.2), words)
    delta, low, high = paired_bootstrap(a, b, words)
    assert delta == pytest.approx((a.sum() - b.sum()) / words.sum()) and 0 < low < delta < high
    assert bootstrap(a, words)[0] < bootstrap(b, words)[1]  # the single intervals overlap
    narrow = paired_bootstrap(a, b, words, level=0.90)
    assert low < narrow[1] and narrow[2] < high
    assert paired_bootstrap(b, b, words) == (0, 0, 0)
    with pytest.raises(ValueError, match="same utterances"):
        paired_bootstrap(a[:3], b, words)


# ---- evaluation ----


def test_batches_give_the_transcripts_of_clips_alone(tmp_path):
    model, task, rows = model_of(), task_of(), rows_of()
    path = tmp_path / "out" / "predictions.jsonl"
    result = evaluate(model, rows, task=task, batch_size=3, predictions=path, progress=False)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == result.utterances
    assert [row["pred_text"] for row in written] == [alone(model, task, rows.audio(i)) for i in range(len(rows))]
    assert len({row["pred_text"] for row in written}) > 3  # the sounds differ to the model
    wanted = {"audio_filepath": "clips/0.wav", "id": "clip-0", "text": "a bad cafe", "duration": 0.5}
    assert wanted.items() <= written[0].items()
    assert result["n"] == 6 and result["skipped"] == 0 and result["padding"] == "masked"
    assert result["audio_seconds"] == pytest.approx(sum(rows.duration(i) for i in range(6)))
    assert result["rtfx"] == pytest.approx(result["audio_seconds"] / result["seconds"])
    assert result["seconds"] == pytest.approx(sum(row["time"] for row in written), abs=1e-4)
    again = evaluate(model, rows, task=task, batch_size=3, progress=False)
    assert again["compile_seconds"] == 0 and again["wer"] == result["wer"]
    assert evaluate(model, rows, task=task, limit=1, dtype="bfloat16", progress=False)["n"] == 1


def test_unusable_rows_are_counted_and_named():
    bad = [{"id": "broken", "audio": b"junk", "text": "a"}, {"id": "mute", "audio": None, "text": "a"},
           {"id": "untold", "audio": wav_bytes(sound(0.5)), "text": None}]  # fmt: skip
    rows = Rows([*bad, *rows_of()], "sounds")
    result = evaluate(model_of(), rows, task=task_of(), max_skipped=0.5, progress=False)
    assert result["n"] == 6 and result["skipped"] == 3
    assert dict(result.skipped_rows).keys() == {"broken", "mute", "untold"}
    text = render(result)
    assert f"WER {100 * result['wer']:.1f} %" in text and "6 clips, 18 words" in text
    assert "Skipped 3 rows: broken: " in text
    with pytest.raises(DataError, match="2 of 9 rows"):
        evaluate(model_of(), rows, task=task_of(), progress=False)
    with pytest.raises(DataError, match="1 of 9 rows.*broken"):
        evaluate(model_of(norm="group"), rows, task=task_of(mask=False), progress=False)


def test_models_without_mask_get_exact_lengths_or_zeros():
    model, task, rows = model_of(norm="group"), task_of(mask=False), rows_of(4)
    exact = evaluate(model, rows, task=task, progress=False)
    assert exact["padding"] == "exact"
    assert [row["pred_text"] for row in exact.utterances] == [alone(model, task, rows.audio(i)) for i in range(4)]
    zeros = evaluate(model, rows, task=task, buckets=[0.9], progress=False)
    assert zeros["padding"] == "zeros" and zeros["n"] == 4
    wave = np.pad(task.inputs(rows.audio(0)), (0, 14400 - len(rows.audio(0))))
    text = task.decode(np.asarray(model(input_values=wave[None]).logits[0].argmax(-1)))
    assert zeros.utterances[0]["pred_text"] == text


def test_frame_agreement():
    a, b, task, rows = model_of(0), model_of(1), task_of(), rows_of(4)
    assert frame_agreement(a, a, rows, task=task) == 1.0
    same = total = 0
    for i in range(len(rows)):
        x, y = (np.asarray(m(input_values=task.inputs(rows.audio(i))[None]).logits[0].argmax(-1)) for m in (a, b))
        same, total = same + (x == y).sum(), total + len(x)
    assert frame_agreement(a, b, rows, task=task, batch_size=3) == pytest.approx(same / total)


def test_wrong_use_is_explained():
    with pytest.raises(ValueError, match="task= or source="):
        evaluate(model_of(), rows_of())
    headless = Slim(Spec(CONFIG, "wav2vec2", "none"), {})
    with pytest.raises(ValueError, match="head 'none'"):
        evaluate(headless, rows_of(), task=task_of())


@pytest.mark.multiprocess
def test_a_mesh_of_four_devices_gives_the_same(tmp_path):
    code = (
        "import sys, json; sys.path.insert(0, 'tests'); from test_evaluate import *; from jaxslim.train import mesh\n"
        "a = evaluate(model_of(), rows_of(), task=task_of(), mesh=mesh.make('data=2,tensor=2'))\n"
        "b = evaluate(model_of(norm='group'), rows_of(), task=task_of(mask=False), mesh=mesh.make('data=4'))\n"
        "print(json.dumps([[u['pred_text'] for u in o.utterances] for o in (a, b)]))")  # fmt: skip
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a = evaluate(model_of(), rows_of(), task=task_of())
    b = evaluate(model_of(norm="group"), rows_of(), task=task_of(mask=False))
    assert json.loads(done.stdout.splitlines()[-1]) == [[u["pred_text"] for u in o.utterances] for o in (a, b)]


# ---- transcription ----


def test_transcribe_any_rate_and_length_and_goes_on_after_bad_files(tmp_path):
    model, task = model_of(), task_of()
    files = {"a.wav": wav_bytes(sound(0.5)), "low.wav": wav_bytes(sound(0.5, 1, 8000), 8000), "empty.wav": b"",
             "junk.mp3": b"junk", "tiny.wav": wav_bytes(sound(0.01)), "long.wav": wav_bytes(sound(2.2, 2))}
    errors = {"empty.wav": "0 bytes", "junk.mp3": "not readable", "tiny.wav": "10 ms", "missing.wav": "No such file"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = transcribe(model, [tmp_path / name for name in (*files, "missing.wav")], task=task, progress=False)
    by_name = {row["file"].rsplit("/", 1)[-1]: row for row in found}
    assert list(by_name) == [*files, "missing.wav"]
    for name in ("a.wav", "low.wav", "long.wav"):
        assert by_name[name]["text"] == alone(model, task, load(tmp_path / name)) and "error" not in by_name[name]
    assert by_name["low.wav"]["duration"] == pytest.approx(0.5, abs=0.001) and by_name["long.wav"]["seconds"] > 0
    for name, why in errors.items():
        assert why in by_name[name]["error"] and by_name[name]["text"] is None


def test_a_model_by_name_brings_its_vocabulary(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(LETTERS)}))
    features = {"sampling_rate": 16000, "do_normalize": True, "return_attention_mask": True}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(features))
    (tmp_path / "a.wav").write_bytes(wav_bytes(sound(0.5)))
    manifest = tmp_path / "data.jsonl"
    manifest.write_text('{"audio": "a.wav", "text": "a"}')
    named = evaluate(str(tmp_path / "m"), str(manifest), progress=False).utterances
    given = evaluate(hub.load(tmp_path / "m"), load_rows(manifest), task=task_of(), progress=False).utterances
    assert [u["pred_text"] for u in named] == [u["pred_text"] for u in given]


def test_compare_pairs_predictions_files_by_id():
    texts = ["a b c d", "e f", "g h i"]
    a = [{"id": i, "text": t, "pred_text": "a x c d" if i == 0 else t} for i, t in enumerate(texts)]
    b = [{"id": i, "text": t, "pred_text": t, "words": len(t.split()), "errors": 0} for i, t in enumerate(texts)]
    found = versus.paired(a, [*reversed(b), {"id": 9, "text": "z", "pred_text": ""}])  # a has no counts: scored here
    assert found["n"] == 3 and found["delta"] == pytest.approx(1 / 9)
    assert found["low"] == 0 < found["upper"] <= found["high"]
    assert versus.paired(a, []) is None
