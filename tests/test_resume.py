"""Runs that are killed, preempted, resumed on other devices or by another number of hosts, or out of disk.

`python tests/test_resume.py OPTIONS` is one host of such a run.
"""
import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import pytest
import tiny

from jaxslim import hub
from jaxslim.config import Group, Train
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.methods.finetune import Finetune
from jaxslim.train import log as L
from jaxslim.train import loop
from jaxslim.train.checkpoint import CheckpointError, Checkpoints

CFG = Train(max_steps=10, per_device_train_batch_size=2, save_steps=3, logging_steps=1, seed=3, mesh="fsdp=-1",
            groups={"main": Group(learning_rate=3e-3, warmup_steps=2, eps=1e-4)})


def work(small, folder, host=0, hosts=1, address=None, stop_at=None, kill_after=None, steps=10, pause=0.0):
    """One host of a run; stops itself at a step, or dies after some seconds."""
    if address:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, hosts, host)
    task = CTCTask.from_pretrained(hub.folder(small["model"]))
    batches = Batches(load_rows(small["train"]), task, batch_size=8, multiple_of=4, buckets=(0.12,), seed=3, host=host,
                      hosts=hosts)

    class Feed:
        rows, task, get_state, given = batches.rows, batches.task, batches.get_state, 0

        def set_state(self, state):
            batches.set_state(state)
            self.given = state["epoch"] * len(batches) + state["batch"]

        def __iter__(self):
            return self

        def __next__(self):
            self.given += 1
            if self.given == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            return next(batches)

    if kill_after is not None:
        import threading

        threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    cfg = dataclasses.replace(CFG, max_steps=steps, per_device_train_batch_size=8 // jax.device_count())
    try:
        model = loop.run(Finetune(), tiny.slim(**conftest.SHAPE), None, cfg, Feed(), folder)
    except loop.Preempted as stopped:
        print(stopped, flush=True)
        os._exit(75)  # what the command does; hosts that wait for each other at the end would not matter here
    if host == 0:
        np.savez(pathlib.Path(folder) / "end.npz", **model.params)


def start(devices, **options):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
           "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, __file__, json.dumps(options)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, err[-3000:])
    return out


def losses(folder):
    return [(r["step"], r["loss"]) for r in L.read(str(folder)) if "loss" in r]


def end(folder):
    with np.load(pathlib.Path(folder) / "end.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """An uninterrupted run on four devices."""
    folder = str(tmp_path_factory.mktemp("whole"))
    finish(start(4, small=small, folder=folder))
    return folder


def alike(folder, whole):
    assert [s for s, _ in losses(folder)] == [s for s, _ in losses(whole)]
    assert [v for _, v in losses(folder)] == pytest.approx([v for _, v in losses(whole)], rel=1e-5)
    ours, theirs = end(folder), end(whole)
    for name in theirs:
        tiny.close(ours[name], theirs[name], 1e-5)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_four_devices_then_two(whole, small, tmp_path):
    stopped = finish(start(4, small=small, folder=str(tmp_path), stop_at=6), 75)
    assert "stopped at step 6 of 10 and saved" in stopped
    finish(start(2, small=small, folder=str(tmp_path)))
    alike(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_of_two_hosts_is_preempted(whole, small, tmp_path):
    """Both save at the same step; one host of four devices goes on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    both = [start(2, small=small, folder=str(tmp_path), host=i, hosts=2, address=address, steps=200, pause=0.05,
                  stop_at=4 if i else None) for i in range(2)]
    said = {finish(p, 75).splitlines()[-1] for p in both}
    assert len(said) == 1  # the same sentence: the same step
    logs = sorted(p.name for p in (tmp_path / "logs").iterdir())
    assert logs == ["process-0000.log", "process-0001.log"]
    at = int(said.pop().split("step ")[1].split()[0])
    assert 4 <= at < 200 and (tmp_path / "checkpoints" / str(at)).is_dir()
    audio = [r["audio_seconds"] for r in L.read(str(tmp_path))]
    one = [r["audio_seconds"] for r in L.read(str(whole))]
    assert audio[:4] == pytest.approx(one[:4])  # the sum over both hosts
    assert losses(tmp_path)[0][1] == pytest.approx(losses(whole)[0][1], rel=1e-5)
    finish(start(4, small=small, folder=str(tmp_path), steps=200, stop_at=at + 2), 75)
    assert [s for s, _ in losses(tmp_path)] == list(range(1, at + 3))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_at_twenty_random_moments(small, tmp_path):
    """kill -9 wherever it hits: compiling, stepping, saving; and five SIGTERMs. Ends bit for bit the same."""
    finish(start(1, small=small, folder=str(tmp_path / "whole"), steps=60))
    want, rng = end(tmp_path / "whole"), random.Random(0)
    for trial in range(4):
        folder, deaths = tmp_path / str(trial), 0
        folder.mkdir()
        for _ in range(5):
            process = start(1, small=small, folder=str(folder), steps=60, pause=0.05,
                            kill_after=rng.uniform(3.0, 14.0))
            process.communicate(timeout=600)
            deaths += process.returncode == -signal.SIGKILL
        assert deaths
        finish(start(1, small=small, folder=str(folder), steps=60))
        for name, value in end(folder).items():
            np.testing.assert_array_equal(value, want[name])
    folder = tmp_path / "terminated"
    folder.mkdir()
    for i in range(5):
        finish(start(1, small=small, folder=str(folder), steps=60, stop_at=10 * (i + 1)), 75)
    finish(start(1, small=small, folder=str(folder), steps=60))
    for name, value in end(folder).items():
        np.testing.assert_array_equal(value, want[name])


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    state = {"w": jax.numpy.arange(2**16, dtype=jax.numpy.float32)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"n": 1})
    checkpoints.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as with a full disk, writing fails with an error
    checkpoints = Checkpoints(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
        with pytest.raises(CheckpointError, match="could not be written.*of step 1. Make room and run it again"):
            checkpoints.save(2, jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(0), x.shape), state), {})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    again = Checkpoints(tmp_path)
    found, meta = again.restore(state, lambda meta: None)
    again.close()
    assert meta == {"n": 1}
    np.testing.assert_array_equal(found["w"], state["w"])


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
