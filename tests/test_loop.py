"""The loop: what a run leaves, and that a stopped one goes on as if nothing had happened.

`python tests/test_loop.py FOLDER SMALL` is a run that is killed; see `test_kill_and_resume`.
"""
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import conftest
import numpy as np
import pytest
import tiny

from jaxslim import hub
from jaxslim.config import Group, Train
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.methods.finetune import Finetune
from jaxslim.train import log as L
from jaxslim.train import loop
from jaxslim.train.checkpoint import CheckpointError

CFG = Train(max_steps=10, per_device_train_batch_size=4, save_steps=4, logging_steps=1, seed=3,
            groups={"main": Group(learning_rate=3e-3, warmup_steps=2)})
SHAPE = {**conftest.SHAPE, "hidden_dropout": 0.1}
MODEL = tiny.slim(**SHAPE)


class Feed:
    """Batches of the small data that do something before the batch of step `at`."""

    def __init__(self, small, action=None, at=None):
        task = CTCTask.from_pretrained(hub.folder(small["model"]))
        self.inner = Batches(load_rows(small["train"]), task, batch_size=4, buckets=(0.12,), seed=3)
        self.task, self.rows, self.action, self.at, self.given = task, self.inner.rows, action, at, 0
        self.get_state = self.inner.get_state
        self.close = self.inner.close

    def set_state(self, state):
        self.inner.set_state(state)
        self.given = state["epoch"] * len(self.inner) + state["batch"]

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        batch = next(self.inner)
        if self.given == self.at:
            batch = self.action(batch) or batch
        return batch


def run(folder, small, action=None, at=None, cfg=CFG, method=None, model=MODEL, **more):
    feed = Feed(small, action, at)
    try:
        return loop.run(method or Finetune(), model, None, cfg, feed, str(folder), **more)
    finally:
        feed.close()


def steps(folder, key="loss"):
    return [(r["step"], r[key]) for r in L.read(str(folder)) if key in r]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """An uninterrupted run: (its model, its folder)."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, small), folder


def test_what_a_run_leaves(whole):
    model, folder = whole
    rows = L.read(str(folder))
    assert [r["step"] for r in rows] == list(range(1, 11))
    assert set(rows[0]) == {"step", "loss", "loss/ctc", "loss/unfit", "grad_norm", "lr/main", "skipped",
                            "audio_seconds", "seconds"}
    assert [r["lr/main"] for r in rows][:4] == pytest.approx([0, 1.5e-3, 3e-3, 3e-3 * 7 / 8])
    assert all(isinstance(v, np.ndarray) for v in model.params.values()) and model.spec == MODEL.spec
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()) == [8, 10]
    assert list((folder / "tensorboard").glob("events*"))
    assert MODEL(input_values=np.zeros((1, 2000), np.float32)).logits is not None  # its arrays were not given away


@pytest.mark.slow
def test_a_relative_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("here", small, cfg=dataclasses.replace(CFG, max_steps=2))
    assert (tmp_path / "here" / "checkpoints" / "2").is_dir()


def test_a_finished_run_is_not_run_again(whole, small):
    def refuse(batch):
        raise AssertionError("no batch is needed")

    model = run(whole[1], small, refuse, 1)
    assert model.fingerprint == whole[0].fingerprint


def test_sigterm_saves_and_the_rerun_goes_on(whole, small, tmp_path):
    with pytest.raises(loop.Preempted, match="stopped at step 6 of 10 and saved; run it again"):
        run(tmp_path, small, lambda b: os.kill(os.getpid(), signal.SIGTERM), 6)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was
    model = run(tmp_path, small)
    assert model.fingerprint == whole[0].fingerprint
    assert steps(tmp_path) == steps(whole[1])  # metrics.jsonl is continuous and equal
    audio = [v for _, v in steps(tmp_path, "audio_seconds")]
    assert audio == sorted(audio) and audio == [v for _, v in steps(whole[1], "audio_seconds")]


def test_a_signal_in_the_last_step_is_not_lost(whole, small, tmp_path):
    with pytest.raises(loop.Preempted, match="step 10 of 10"):
        run(tmp_path, small, lambda b: os.kill(os.getpid(), signal.SIGINT), 10)
    assert run(tmp_path, small).fingerprint == whole[0].fingerprint


@pytest.mark.multiprocess
def test_kill_and_resume(whole, small, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__, str(tmp_path), json.dumps(small)], env=env, capture_output=True,
                          text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert steps(tmp_path)[-1][0] >= 8
    model = run(tmp_path, small)
    assert model.fingerprint == whole[0].fingerprint
    assert steps(tmp_path) == steps(whole[1])


def test_the_newest_checkpoint_is_damaged(whole, small, tmp_path, caplog):
    with pytest.raises(loop.Preempted):
        run(tmp_path, small, lambda b: os.kill(os.getpid(), signal.SIGTERM), 9)
    damaged = tmp_path / "checkpoints" / "9"
    for file in damaged.rglob("*"):
        if file.is_file() and file.stat().st_size > 300:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with caplog.at_level(logging.INFO, "jaxslim"):
        model = run(tmp_path, small)
    text = caplog.text
    assert "checkpoints/9 cannot be read" in text and "trying the one before" in text and "resumed at step 8" in text
    assert model.fingerprint == whole[0].fingerprint and steps(tmp_path) == steps(whole[1])
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [8, 10]


def test_a_damaged_checkpoint_is_written_again(small, tmp_path, caplog):
    """Otherwise the step it stands for would never be saved."""
    with pytest.raises(loop.Preempted):
        run(tmp_path, small, lambda b: os.kill(os.getpid(), signal.SIGTERM), 8)
    for file in (tmp_path / "checkpoints" / "8").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    with pytest.raises(loop.Preempted):
        run(tmp_path, small, lambda b: os.kill(os.getpid(), signal.SIGTERM), 9)
    with caplog.at_level(logging.INFO, "jaxslim"):
        for folder in (tmp_path / "checkpoints").glob("9*"):
            for file in folder.rglob("*"):
                if file.is_file():
                    file.write_bytes(b"x")
        run(tmp_path, small)
    assert "resumed at step 8" in caplog.text


@pytest.mark.parametrize("change, message", [
    (dict(cfg=dataclasses.replace(CFG, seed=4, max_steps=12)), "max_steps: 10 then, 12 now; seed: 3 then, 4 now"),
    (dict(cfg=dataclasses.replace(CFG, groups={"main": Group(1e-4, 2)})), "learning_rate: 0.003 then, 0.0001 now"),
    (dict(method=Finetune(freeze=("lm_head",))), r"another method \(freeze: \[\] then, \['lm_head'\] now\)"),
    (dict(model=tiny.slim(**{**SHAPE, "layer_norm_eps": 1e-4})), "model .config.layer_norm_eps: 1e-05 then, 0.0001"),
])
def test_a_checkpoint_of_another_run(whole, small, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        run(whole[1], small, **change)
    assert "another folder" in str(error.value) and len(str(error.value)) < 600


def test_what_may_change_between_runs(whole, small):
    cfg = dataclasses.replace(CFG, save_steps=3, logging_steps=5, eval_steps=0, mesh="data=1", save_total_limit=1)
    assert run(whole[1], small, cfg=cfg).fingerprint == whole[0].fingerprint


def test_the_best_parameters_are_kept(small, tmp_path):
    seen = []

    def validate(model):
        seen.append({k: np.asarray(v) for k, v in model.params.items()})
        return {"wer": abs(len(seen) - 2) + 0.5, "cer": 0.1, "kind": "text"}

    cfg = dataclasses.replace(CFG, eval_steps=4, save_steps=5)  # validates at 4, 8 and 10
    best = run(tmp_path / "a", small, cfg=cfg, validate=validate)
    assert len(seen) == 3 and [v for _, v in steps(tmp_path / "a", "validation/wer")] == [1.5, 0.5, 1.5]
    for name, value in best.params.items():
        np.testing.assert_array_equal(value, seen[1][name])
    assert any(np.any(seen[1][k] != seen[2][k]) for k in best.params)
    # stopped after the best and resumed: the best is still known
    seen.clear()
    with pytest.raises(loop.Preempted):
        run(tmp_path / "b", small, lambda b: os.kill(os.getpid(), signal.SIGTERM), 9, cfg=cfg, validate=validate)
    again = run(tmp_path / "b", small, cfg=cfg, validate=validate)
    assert len(seen) == 3 and again.fingerprint == best.fingerprint


def test_a_numerical_stop_names_the_rows(small, tmp_path):
    def poison(batch):
        return {**batch, "input_values": np.full_like(batch["input_values"], np.nan)}

    cfg = dataclasses.replace(CFG, max_nonfinite_steps=1)
    with pytest.raises(loop.NumericalStop, match="1 steps in a row.*nonfinite.json.*Lower the learning rate"):
        run(tmp_path, small, poison, 3, cfg=cfg)
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert found["step"] == 3 and all(i.startswith("clip-") for i in found["rows"]) and found["rows"]
    assert L.read(str(tmp_path))[-1]["loss"] is None and L.read(str(tmp_path))[-1]["skipped"] == 1
    tolerant = dataclasses.replace(cfg, max_nonfinite_steps=20)
    model = run(tmp_path / "on", small, poison, 3, cfg=tolerant)
    assert all(np.isfinite(v).all() for v in model.params.values())
    assert [v for _, v in steps(tmp_path / "on", "skipped")] == [0, 0] + [1] * 8


def test_batch_size():
    from jaxslim.train import mesh as M

    assert loop.batch_size(dataclasses.replace(CFG, gradient_accumulation_steps=3), M.make("data=-1")) % 12 == 0


if __name__ == "__main__":
    def kill(batch):
        for _ in range(600):  # until the checkpoint of step 8 is there
            if (pathlib.Path(sys.argv[1]) / "checkpoints" / "8").exists():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    run(sys.argv[1], json.loads(sys.argv[2]), kill, 10)
