"""Training from cached features of the teacher: as with the teacher itself, up to the rounding of fp16."""
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from conftest import SHAPE, write_data

from jaxslim import hub, recipe
from jaxslim.config import ConfigError, Group, Train
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.data.store import StoreError
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.generate import Generate
from jaxslim.train import cached, loop
from jaxslim.train import log as L

METHOD = Generate(student="previous", target_layers=(0, 1))
CFG = Train(max_steps=3, per_device_train_batch_size=4, logging_steps=1, buckets=(0.12,), save_steps=0,
            groups={"main": Group(1e-3)})


@pytest.fixture(scope="module")
def world(small, tmp_path_factory):
    """(teacher, task, rows, folder of a cache that is filled)."""
    teacher, task, rows = hub.load(small["model"]), CTCTask.from_pretrained(small["model"]), load_rows(small["train"])
    folder = tmp_path_factory.mktemp("cache") / "cache"
    cached.attach(folder, METHOD, teacher, batches(rows, task), CFG)
    return teacher, task, rows, folder


def batches(rows, task, **options):
    return Batches(rows, task, batch_size=4, buckets=[0.12], labels=False, **options)


def test_features_are_the_teachers(world):
    teacher, task, rows, folder = world
    stream = cached.attach(folder, METHOD, teacher, batches(rows, task), CFG)
    batch = next(stream)
    want = jax.device_get(METHOD.targets(teacher, batch, None, 0))
    have = {k: v for k, v in batch.items() if k.startswith(cached.CACHED)}
    assert have.keys() == {"cached/embedding", "cached/encoder.0"}
    for name, x in have.items():
        assert x.dtype == np.float16
        tiny.close(x, want[name.removeprefix(cached.CACHED)], 2e-3)
    state = stream.get_state()          # all else is the batches'
    again = stream(1)
    assert len(list(again)) == len(stream) and stream.get_state() == state and stream.rows is rows
    stream.close()


@pytest.mark.slow
def test_losses_equal_online(world, tmp_path):
    teacher, task, rows, folder = world
    method, found = dataclasses.replace(METHOD, target_layers=(1,), distance="mse", forcing="free"), []   # smooth
    for name, guide in (("online", teacher), ("cached", None)):
        data = batches(rows, task)
        data = data if guide else cached.attach(folder, method, teacher, data, CFG)
        loop.run(method, method.start(teacher, None, jax.random.key(0)), guide, CFG, data, tmp_path / name)
        found.append([row["loss/layer.1"] for row in L.read(str(tmp_path / name))])
    assert len(found[0]) == 3 and abs(found[0][0] / found[0][2] - 1) > 0.01
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)


def test_filled_once_and_shared(world, tmp_path):
    """What is there is not made again; other targets add their files; a part that is lost is made again."""
    teacher, task, rows, folder = world
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("shard-*")}
    other = dataclasses.replace(METHOD, target_layers=(1,), logit_weight=1.0)
    stream = cached.attach(folder, other, teacher, batches(rows, task), CFG)
    assert sorted(p.name for p in folder.iterdir()) == ["embedding", "encoder.0", "logits"]
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert {"cached/logits", "cached/encoder.0"} <= next(stream).keys()
    stream.close()
    next(iter(times)).unlink()
    cached.attach(folder, METHOD, teacher, batches(rows, task), CFG)
    assert all(p.exists() for p in times)


def test_refused(world, tmp_path, small):
    teacher, task, rows, folder = world
    of = lambda **more: cached.attach(folder, METHOD, **{"teacher": teacher, "batches": batches(rows, task),  # noqa: E731
                                                         "cfg": CFG, **more})
    with pytest.raises(StoreError, match="holds features of another teacher"):
        of(teacher=tiny.slim(**SHAPE, seed=9))
    with pytest.raises(StoreError, match="holds features of another data"):
        of(batches=batches(load_rows(small["test"]), task))
    with pytest.raises(StoreError, match=r"features of another seconds \(\[0.1, 30.0\]; wanted is \[0.1, 5.0\]"):
        of(cfg=dataclasses.replace(CFG, max_seconds=5.0))
    given = dataclasses.replace(CFG, teacher_cache="x")
    with pytest.raises(ConfigError, match="Finetune with these options does not train on hidden states"):
        cached.check(Finetune(), given)
    with pytest.raises(ConfigError, match="leave out speed_perturb"):
        cached.check(METHOD, dataclasses.replace(given, speed_perturb=(0.9, 1.1)))


@pytest.mark.slow
def test_in_a_recipe(small, tmp_path):
    """Two students share one pass of the teacher; a stage that cannot is refused before any work."""
    data = write_data(tmp_path / "data", rows=4)
    train = {"max_steps": 1, "per_device_train_batch_size": 2, "buckets": [0.12], "teacher_cache": str(tmp_path / "c")}
    tree = {"teacher": small["model"], "data": {"train": data}, "control": False, "bench_seconds": [], "stages": [
        {"name": "a", "method": "generate", "options": {"target_layers": [1]}, "train": train}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "run"))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("shard-*")}
    assert times
    recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "second"), ["seed=1"])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("shard-*")} == times
    tree["stages"].append({"name": "b", "method": "train", "train": train})
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="teacher_cache: Finetune"):
        recipe.run(str(tmp_path / "recipe.yaml"), str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()
