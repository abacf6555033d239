"""The command line: help, exit codes, spellings; and one or two sentences for every bad input, never a traceback."""
import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxslim import arguments, cli
from jaxslim.train import loop
from jaxslim.train.log import wav_bytes


def commands(parser, prefix=""):
    """'eval', 'data check', ...: every command that runs something."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [c for a in found for n, p in a.choices.items() for c in commands(p, f"{prefix} {n}")] or [prefix.strip()]


COMMANDS = commands(arguments.parser())


@pytest.fixture
def jaxslim(capsys):
    """(*words) -> (exit code, stdout, stderr)"""
    def call(*words):
        try:
            code = cli.main(list(map(str, words)))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def sentences(text: str) -> str:
    """What a user reads on stderr: short, no traceback, ends like a sentence."""
    lines = [line for line in text.splitlines() if line.startswith("jaxslim ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    assert len(lines[0]) < 700, lines[0]
    return lines[0]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(jaxslim, command):
    code, out, _ = jaxslim(*command.split(), "--help")
    assert code == 0 and f"usage: jaxslim {command}" in out and "--verbose" in out and "SUPPRESS" not in out


def test_all_commands_are_listed(jaxslim):
    code, out, _ = jaxslim("--help")
    assert code == 0 and all(re.search(rf"^ +{c.split()[0]}\b", out, re.M) for c in COMMANDS)
    assert {"demo", "info", "import", "train", "slim", "eval", "bench", "transcribe", "report"} <= set(COMMANDS)
    assert jaxslim()[0] == 2 and jaxslim("nothing")[0] == 2


@pytest.mark.multiprocess
def test_as_a_process(tmp_path):
    run = lambda *words: subprocess.run([sys.executable, "-m", "jaxslim.cli", *words], capture_output=True, text=True,  # noqa: E731
                                        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    done = run("info", "--json", "--devices", "3")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and {"jaxslim", "python", "versions", "devices", "flags"} <= set(found)
    assert len(found["devices"]) == 3 or found["flags"].get("JAX_PLATFORMS", "cpu") != "cpu"
    done = run("info", "nowhere")
    assert done.returncode == 2 and sentences(done.stderr) and not done.stdout


def test_info_of_a_model(jaxslim, small):
    code, out, _ = jaxslim("info", small["model"], "--json", "--seconds", "2")
    found = json.loads(out)
    assert code == 0 and found["family"] == "wav2vec2" and found["seconds"] == 2.0 and found["params"] > 0
    assert {"gmacs", "gmacs_as_run", "layers", "fingerprint", "changed_blocks"} <= set(found)
    code, out, _ = jaxslim("info", small["model"])
    assert code == 0 and f"{found['params']:,} parameters" in out


def test_underscores_and_dashes(jaxslim, small):
    results = [json.loads(jaxslim("eval", small["model"], "--data", small["test"], *words, "--json")[1])
               for words in (("--batch_size", "2", "--limit=3"), ("--batch-size=2", "--limit", "3"))]
    assert results[0]["wer"] == results[1]["wer"] and results[0]["n"] == results[1]["n"] == 3
    assert {"wer", "wer_low", "wer_high", "cer", "n", "rtfx", "seconds", "audio_seconds"} <= set(results[0])


def test_eval_writes_predictions(jaxslim, small, tmp_path):
    code, out, _ = jaxslim("eval", small["model"], "--data", small["test"], "--predictions", tmp_path / "p_x.jsonl")
    assert code == 0 and "WER" in out and len((tmp_path / "p_x.jsonl").read_text().splitlines()) == 8


def test_transcribe(jaxslim, small, tmp_path):
    wav = str(pathlib.Path(small["test"]).parent / "0.wav")
    code, out, _ = jaxslim("transcribe", small["model"], wav, wav, "--output_format", "json")
    rows = json.loads(out)
    assert code == 0 and [r["file"] for r in rows] == [wav, wav] and isinstance(rows[0]["text"], str)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "short.wav").write_bytes(wav_bytes(np.zeros(10)))
    (tmp_path / "text.wav").write_text("this is no audio")
    code, out, err = jaxslim("transcribe", small["model"], wav, *(tmp_path / f"{n}.wav" for n in
                                                                 ("empty", "short", "text", "none")))
    assert code == 3 and "Traceback" not in err and len(out.splitlines()) == 1  # the good one is there
    for name, said in (("empty", "empty"), ("short", "short"), ("text", ""), ("none", "exist|found|No such")):
        line, = (x for x in err.splitlines() if f"{name}.wav" in x)
        assert re.search(said, line), line


def test_import(jaxslim, small, tmp_path):
    code, out, _ = jaxslim("import", small["model"], tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "model.safetensors").exists()


def folder(tmp_path, **files):
    path = tmp_path / "model"
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_models_that_are_none(jaxslim, tmp_path):
    path = folder(tmp_path, readme__md="hello")
    cases = {"nowhere": "nowhere does not exist", str(path): "config.json", "bundled:wav2vec2-xx": "wav2vec2-ctc-en"}
    for name, message in cases.items():
        for command in (("info", name), ("eval", name, "--data", "bundled:prompts-en/test"), ("import", name, "x"),
                        ("transcribe", name, "x.wav")):
            code, out, err = jaxslim(*command)
            assert code == 2 and message in sentences(err) and not out, (command, err)
    (path / "config.json").write_text(json.dumps({"model_type": "bart", "architectures": ["BartModel"]}))
    code, _, err = jaxslim("info", path)
    assert code == 2 and "bart" in sentences(err).lower() and "wav2vec2-conformer" in err  # and what is supported
    (path / "config.json").write_text("{")
    assert "not valid JSON" in sentences(jaxslim("info", path)[2])


@pytest.mark.parametrize("data, message", [
    ("nowhere.jsonl", "nowhere.jsonl"), ("bundled:prompts-xx/test", "prompts-en"), ("bundled:prompts-en/tset", "test")])
def test_data_that_is_not_there(jaxslim, small, data, message):
    code, _, err = jaxslim("eval", small["model"], "--data", data)
    assert code == 3 and message in sentences(err)


def test_data_that_cannot_be_used(jaxslim, small, tmp_path):
    (tmp_path / "silence.wav").write_bytes(b"")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "audio": "silence.wav", "text": "ab"}))
    code, _, err = jaxslim("eval", small["model"], "--data", tmp_path / "rows.jsonl")
    assert code == 3 and "empty" in sentences(err) and "1 of 1 rows" in err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "txt": "ab"}))
    code, _, err = jaxslim("eval", small["model"], "--data", tmp_path / "rows.jsonl")
    assert code == 3 and sentences(err)
    (tmp_path / "rows.jsonl").write_text("")
    code, _, err = jaxslim("eval", small["model"], "--data", tmp_path / "rows.jsonl")
    assert code == 3 and "no rows" in sentences(err)


def recipe(tmp_path, small, **changes):
    stage = {"name": "one", "method": "linearize", "train": {
        "max_steps": 1, "per_device_train_batch_size": 4, "buckets": [0.12]}}
    tree = {"teacher": small["model"], "data": {k: small[k] for k in ("train", "validation")}, "stages": [stage],
            "bench_seconds": [], "control": False, **changes}
    (tmp_path / "r.yaml").write_text(json.dumps(tree))
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize("words, message", [
    (["sed=1"], "unknown key 'sed'. Did you mean 'seed'"), (["one.train.max_stepz=1"], "Did you mean 'max_steps'"),
    (["one.method=lineraize"], "Did you mean 'linearize'"), (["one.options.mixr=x"], "Did you mean 'mixer'"),
    (["one.options.mixer=mambo"], "unknown mixer 'mambo'"), (["one.options.layers=[7]"], "layers 0 to 0"),
    (["one.train.mesh=data=3,fsdp=9"], "takes 27 devices"), (["one.train.dtype=int8"], "use float32, bfloat16"),
    (["--seed", "3"], "unrecognized arguments"), (["teacher=nowhere"], "nowhere does not exist"),
])
def test_wrong_recipes(jaxslim, small, tmp_path, words, message):
    code, _, err = jaxslim("slim", recipe(tmp_path, small), "--output", tmp_path / "run", *words)
    assert code == 2 and message in err and "Traceback" not in err, err


def test_wrong_recipe_files(jaxslim, small, tmp_path):
    for path, message in ((tmp_path / "none.yaml", "none.yaml does not exist"), (tmp_path, "cannot be read")):
        code, _, err = jaxslim("slim", path, "--output", tmp_path / "run")
        assert code == 2 and message in sentences(err)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    code, _, err = jaxslim("slim", tmp_path / "bad.yaml", "--output", tmp_path / "run")
    assert code == 2 and "bad.yaml" in sentences(err)
    code, _, err = jaxslim("train", tmp_path / "bad.yaml")
    assert code == 2 and "bad.yaml" in sentences(err)


def test_wrong_outputs(jaxslim, small, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.doc").write_text("")
    for place, message in (("file/run", "Cannot write"), ("mine", "not of a run")):
        code, _, err = jaxslim("slim", recipe(tmp_path, small), "--output", tmp_path / place)
        assert code == 2 and message in sentences(err)
        code, _, err = jaxslim("import", small["model"], tmp_path / place)
        assert code == 2 and sentences(err)
    code, _, err = jaxslim("report", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in sentences(err)


def test_slim_runs_and_overrides_may_stand_behind_options(jaxslim, small, tmp_path):
    file = recipe(tmp_path, small)
    code, out, err = jaxslim("slim", file, "one.train=null", "--output", tmp_path / "run", "--json",
                             "--one.options.layers=[0]")
    assert code == 0, err
    assert json.loads(out)["stages"][0]["path"] == "01-one"
    config = json.loads((tmp_path / "run/final/config.json").read_text())
    assert list(config["jaxslim"]["blocks"]) == ["encoder.0.attention"]
    code, _, err = jaxslim("slim", file, "--output", tmp_path / "run", "one.train=null")
    assert code == 2 and "options.layers: [0] then, 'all' now" in sentences(err) and "--overwrite" in err


@pytest.mark.slow
def test_labels_longer_than_their_frames(jaxslim, small, tmp_path):
    """Such rows weigh nothing, and that is counted; training goes on."""
    rows = [json.loads(line) for line in pathlib.Path(small["train"]).read_text().splitlines()]
    for row in rows:
        row["audio"] = str(pathlib.Path(small["train"]).parent / row["audio"])
        row["text"] = "abcdef" * 10
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {"model": small["model"], "data": {"train": str(tmp_path / "long.jsonl")}, "max_steps": 1, "buckets": [0.12],
           "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "out")}
    (tmp_path / "train.yaml").write_text(json.dumps(run))
    code, _, err = jaxslim("train", tmp_path / "train.yaml")
    row = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert code == 0 and row["loss"] == 0 and row["loss/unfit"] == 1 and row["skipped"] == 0, err


@pytest.mark.parametrize("error, code, said", [
    (loop.Preempted("stopped and saved."), 75, "saved"), (loop.NumericalStop("no finite loss."), 5, "finite"),
    (KeyboardInterrupt(), 130, "run the same command again"), (OSError(28, "No space left"), 2, "No space left"),
    (ImportError("needs torch: pip install jaxslim[test]."), 2, "torch")])
def test_exit_codes(jaxslim, monkeypatch, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("jaxslim.recipe.train", fail)
    have, _, err = jaxslim("train", "x.yaml")
    assert have == code and said in err and "Traceback" not in err


def test_a_defect_keeps_its_traceback(jaxslim, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("jaxslim.recipe.train", fail)
    with pytest.raises(ZeroDivisionError):
        jaxslim("train", "x.yaml")
    monkeypatch.setattr("jaxslim.recipe.train", lambda *_: (_ for _ in ()).throw(ValueError("bad")))
    with pytest.raises(ValueError):
        jaxslim("train", "-v", "x.yaml")
