"""Recipes: stages that are finished, stopped, changed, overwritten; and what a run leaves."""
import json
import os
import pathlib
import shutil
import signal

import pytest
import yaml

from jaxslim import hub, recipe
from jaxslim.config import ConfigError
from jaxslim.data import DataError
from jaxslim.methods.linearize import Linearize
from jaxslim.train import log as L
from jaxslim.train import loop

TEXT = """
teacher: {model}
data: {{train: {train}, validation: {validation}, test: {test}}}
bench_seconds: []
stages:
- name: align
  method: linearize
  options: {{objective: align}}
  train: {{max_steps: 2, per_device_train_batch_size: 4, buckets: [0.12], logging_steps: 1}}
- name: joint
  method: linearize
  train: {{max_steps: 3, per_device_train_batch_size: 4, buckets: [0.12], logging_steps: 1}}
"""
FOLDERS = ("01-align", "02-joint", "control-joint", "final")
MODEL = {"path", "fingerprint", "wer", "wer_low", "wer_high", "cer", "n", "params", "trained_params", "gmacs", "rtfx"}


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.yaml").write_text(TEXT.format(**small))
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """A finished run: (its summary, its folder)."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return recipe.run(file, str(folder)), folder


def read(path) -> dict:
    return json.loads(pathlib.Path(path).read_text())


def prints(folder) -> dict:
    return {name: hub.load(str(pathlib.Path(folder) / name)).fingerprint for name in FOLDERS}


def times(folder) -> dict:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in pathlib.Path(folder).rglob("model.safetensors")}


def test_what_a_run_leaves(done):
    summary, folder = done
    names = {p.name for p in folder.iterdir()}
    assert {*FOLDERS, "recipe.yaml", "summary.json", "report.html"} <= names
    assert not [n for n in names if n.endswith(".partial") or n.startswith(".")]
    assert read(folder / "summary.json") == json.loads(json.dumps(summary))
    assert {"version", "recipe", "teacher", "control", "student", "stages"} <= set(summary)
    for role in ("teacher", "control", "student"):
        assert MODEL <= set(summary[role]), role
    assert [s["path"] for s in summary["stages"]] == ["01-align", "02-joint"]
    assert all(set(s) == {"name", "path", "seconds"} for s in summary["stages"])
    student, teacher = summary["student"], summary["teacher"]
    assert student["fingerprint"] == hub.load(str(folder / "final")).fingerprint == prints(folder)["02-joint"]
    assert student["params"] == teacher["params"] + 2 * 4 * 8 * 8 and teacher["trained_params"] == 0
    assert summary["control"]["path"] == "control-joint"
    assert set(summary["student_minus_control"]) == {"n", "delta", "low", "high", "upper"}
    assert hub.load(str(folder / "control-joint")).spec.blocks == {}
    for name, steps in (("01-align", 2), ("02-joint", 3), ("control-joint", 3)):
        assert [r["step"] for r in L.read(str(folder / name))] == list(range(1, steps + 1))
        assert list((folder / name / "tensorboard").iterdir())
    assert (folder / "final" / "vocab.json").exists()


def test_scores_of_normalised_texts(file, done, tmp_path):
    """Another normaliser scores again, with the models that are there."""
    folder = tmp_path / "run"
    shutil.copytree(done[1], folder)
    found = recipe.run(file, str(folder), ["data.normalize=letters"])
    assert found["student"]["normalize"] == "letters" and done[0]["student"]["normalize"] == "none"
    kept = [{k: v for k, v in times(f).items() if not k.startswith("final")} for f in (folder, done[1])]
    assert found["student"]["fingerprint"] == done[0]["student"]["fingerprint"] and kept[0] == kept[1]
    assert found["student"]["normalize_hash"] != done[0]["student"]["normalize_hash"]


def test_model_card(done):
    summary, folder = done
    text = (folder / "final" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "automatic-speech-recognition" and front["library_name"] == "jaxslim"
    assert summary["student"]["fingerprint"] in text and f"{100 * summary['student']['wer']:.1f}" in text
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert [s["name"] for s in recipe["stages"]] == ["align", "joint"]
    assert "| | teacher | control | student |" in text and "names no licence" in text


def test_stage_json(done):
    _, folder = done
    one, two = (read(folder / name / "stage.json") for name in ("01-align", "02-joint"))
    assert {"name", "path", "config", "fingerprint", "params", "gmacs", "trained_params", "scores",
            "seconds"} <= set(one)
    assert one["config"]["method"] == "linearize" and one["config"]["options"]["objective"] == "align"
    assert one["config"]["train"]["max_steps"] == 2
    assert two["config"]["parent"] == one["fingerprint"] and one["config"]["parent"] == one["config"]["teacher"]
    assert one["params"][1] > one["params"][0] and two["params"][0] == two["params"][1]
    assert set(one["scores"]) == {"wer", "cer"}
    control = read(folder / "control-joint" / "stage.json")
    assert control["config"]["method"] == "finetune" and control["config"]["train"] == two["config"]["train"]


def test_a_rerun_skips_what_is_finished(done, file, caplog):
    summary, folder = done
    before = times(folder)
    before.pop("final/model.safetensors")
    with caplog.at_level("INFO", "jaxslim"):
        again = recipe.run(file, str(folder))
    after = times(folder)
    assert again == summary and {k: after[k] for k in before} == before
    assert caplog.text.count("finished before") == 3 and "Evaluating" not in caplog.text
    recipe.run(file, str(folder), ["align.train.logging_steps=7", "joint.train.save_steps=1"])  # changes no result
    after = times(folder)
    assert {k: after[k] for k in before} == before


@pytest.mark.parametrize("override, message", [
    ("align.train.max_steps=4", "01-align was made with another config .train.max_steps: 2 then, 4 now"),
    ("joint.options.layer_weight=1", "02-joint was made with another config .options.layer_weight: 15.0 then, 1.0 now"),
    ("joint.train=null", "02-joint was made with another config .train: set then, None now"),
    ("seed=5", "01-align was made with another config .seed: 0 then, 5 now"),
])
def test_another_config_is_refused(done, file, override, message):
    _, folder = done
    before, kept = times(folder), (folder / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match=message) as error:
        recipe.run(file, str(folder), [override])
    assert "--overwrite" in str(error.value)
    assert times(folder) == before and (folder / "recipe.yaml").read_text() == kept




def stop_at(monkeypatch, objective, step):
    """SIGINT while `objective` asks for the teacher of `step`."""
    plain = Linearize.teacher_at

    def teacher_at(self, teacher, at):
        if self.objective == objective and at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, teacher, at)

    monkeypatch.setattr(Linearize, "teacher_at", teacher_at)


def test_ctrl_c_and_overwrite(done, file, tmp_path, monkeypatch, caplog):
    """Stopped in the second stage, the rerun goes on there and ends where the whole run ended."""
    with monkeypatch.context() as m:
        stop_at(m, "cald", 1)
        with pytest.raises(loop.Preempted, match="02-joint: stopped at step 2 of 3 and saved"):
            recipe.run(file, str(tmp_path / "run"))
    assert (tmp_path / "run/01-align/stage.json").exists() and not (tmp_path / "run/02-joint").exists()
    with pytest.raises(ConfigError, match="02-joint.partial was made with another config .*layer_weight: 15.0 then"):
        recipe.run(file, str(tmp_path / "run"), ["joint.options.layer_weight=3"])
    with caplog.at_level("INFO", "jaxslim"):
        summary = recipe.run(file, str(tmp_path / "run"))
    assert "01-align: finished before" in caplog.text and "02-joint: resumed at step 2 of 3" in caplog.text
    assert prints(tmp_path / "run") == prints(done[1])
    assert [r["step"] for r in L.read(str(tmp_path / "run/02-joint"))] == [1, 2, 3]
    assert [summary["student"][k] for k in ("wer", "cer", "n")] == [done[0]["student"][k] for k in ("wer", "cer", "n")]

    # another first stage, stopped in the second: --overwrite runs both again, and nothing of the old parent is used
    again = ["align.train.max_steps=3"]
    with monkeypatch.context() as m:
        stop_at(m, "cald", 1)
        with pytest.raises(loop.Preempted):
            recipe.run(file, str(tmp_path / "run"), again, overwrite=True)
    stopped = read(tmp_path / "run/02-joint.partial/stage.json")
    assert stopped["parent"] == read(tmp_path / "run/01-align/stage.json")["fingerprint"]
    with monkeypatch.context() as m:
        stop_at(m, "cald", 0)
        with pytest.raises(loop.Preempted, match="step 1 of 3"):  # again another parent: from the start
            recipe.run(file, str(tmp_path / "run"), ["align.train.max_steps=1"], overwrite=True)
    recipe.run(file, str(tmp_path / "run"), overwrite=True)
    assert prints(tmp_path / "run") == prints(done[1]) and not list((tmp_path / "run").glob("*.partial"))


def test_a_stage_without_train(file, tmp_path):
    summary = recipe.run(file, str(tmp_path / "run"), ["align.train=null", "joint.train=null", "data.test=null"])
    assert "control" not in summary and "wer" not in summary["student"]
    assert summary["student"]["trained_params"] == 0 and not (tmp_path / "run/01-align/metrics.jsonl").exists()


def test_no_control(file, tmp_path):
    off = ["control=false", "data.test=null", "data.validation=null", "align.train=null"]
    summary = recipe.run(file, str(tmp_path / "run"), off)
    assert "control" not in summary and not (tmp_path / "run/control-joint").exists()
    assert read(tmp_path / "run/02-joint/stage.json")["scores"] == {}


@pytest.mark.parametrize("override, kind, message", [
    ("align.method=lineraize", ConfigError, "Stage align: unknown method 'lineraize'. Did you mean 'linearize'"),
    ("joint.options.mixr=hedgehog", ConfigError, "Stage joint: options: unknown key 'mixr'. Did you mean 'mixer'"),
    ("data.train=null", ConfigError, "data.train must be set"),
    ("data.test=nowhere.parquet", DataError, "nowhere.parquet"),
    ("data.validation=bundled:prompts-xx/test", DataError, "prompts-xx"),
    ("data.normalize=letter", ConfigError, "use one of none, letters"),
    ("teacher=nowhere", hub.HubError, "nowhere does not exist"),
    ("joint.train.mesh=data=77", ValueError, "takes 77 devices"),
    ("align.train.groups={mian: {}}", ValueError, r"train.groups has no \['main'\]"),
])
def test_what_is_wrong_shows_before_any_work(file, tmp_path, override, kind, message):
    with pytest.raises(kind, match=message) as error:
        recipe.run(file, str(tmp_path / "run"), [override])
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("0*"))


def test_output_folders_that_cannot_be(file, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"Cannot write the output folder .*{name}"):
            recipe.run(file, str(tmp_path / name))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are not of a run .thesis.tex.; choose another"):
        recipe.run(file, str(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_train(small, tmp_path):
    """`jaxslim train`: a run folder with config.yaml, metrics.jsonl, checkpoints/ and final/."""
    (tmp_path / "train.yaml").write_text(json.dumps({
        "model": small["model"], "data": {"train": small["train"], "validation": small["validation"]}, "max_steps": 3,
        "per_device_train_batch_size": 4, "buckets": [0.12], "logging_steps": 1, "eval_steps": 2,
        "output_dir": str(tmp_path / "out"), "options": {"freeze": ["feature_extractor"]}}))
    trained = recipe.train(str(tmp_path / "train.yaml"))
    out = tmp_path / "out"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "final"} <= {p.name for p in out.iterdir()}
    assert hub.load(str(out / "final")).fingerprint == trained.fingerprint
    assert [r["step"] for r in L.read(str(out)) if "validation/wer" in r] == [2, 3]
    assert recipe.train(str(tmp_path / "train.yaml")).fingerprint == trained.fingerprint  # finished before
    with pytest.raises(ValueError, match="another config .max_steps: 3 then, 4 now"):
        recipe.train(str(tmp_path / "train.yaml"), ["max_steps=4"])
    with pytest.raises(ConfigError, match="model, data.train and output_dir must be set"):
        recipe.train(str(tmp_path / "train.yaml"), ["model=''"])
    with pytest.raises(ConfigError, match="options: unknown key 'freez'"):
        recipe.train(str(tmp_path / "train.yaml"), ["options.freez=1", f"output_dir={tmp_path}/other"])


def test_clips_without_text(small, tmp_path):
    """A stage that reads no labels takes them; one that does says what is missing, or has data of its own."""
    silent = pathlib.Path(small["train"]).with_name("silent.jsonl")
    lines = [json.loads(line) for line in pathlib.Path(small["train"]).read_text().splitlines()]
    silent.write_text("\n".join(json.dumps({k: v for k, v in line.items() if k != "text"}) for line in lines))
    tree = {"teacher": small["model"], "data": {"train": str(silent)}, "bench_seconds": [], "control": False,
            "stages": [
        {"name": "heads", "method": "generate", "options": {"student": "heads", "initial_layers": 1},
         "train": {"max_steps": 2, "per_device_train_batch_size": 4, "buckets": [0.12], "logging_steps": 1}},
        {"name": "recover", "method": "train", "data": small["train"],
         "train": {"max_steps": 1, "per_device_train_batch_size": 4, "buckets": [0.12]}}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    summary = recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "run"))
    used = [read(tmp_path / "run" / s["path"] / "stage.json")["config"]["data"] for s in summary["stages"]]
    assert used == [str(silent), small["train"]]
    rows = L.read(str(tmp_path / "run" / "01-heads"))
    assert [r["step"] for r in rows] == [1, 2] and all(r["loss/layer.1"] > 0 for r in rows)
    del tree["stages"][1]["data"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(DataError, match="of .*silent.jsonl are unusable.*no text"):
        recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "again"))
    with pytest.raises(DataError, match="nothing.parquet does not exist"):
        recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "third"), ["recover.data=nothing.parquet"])
    assert not (tmp_path / "third" / "01-heads").exists()
