"""Meshes: the rules as a table, errors, and the same training on one device and on eight.

The runs happen in a subprocess with eight virtual CPU devices; `python tests/test_mesh.py` is that subprocess.
"""
import dataclasses
import json
import pathlib

import eight_devices
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden" / "sharding.json"
MESHES = ("data=1", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
FEWER = (MESHES[0], MESHES[3])  # for the slowest to compile


def run() -> dict:
    """Losses of both methods on every mesh, how often the step compiled, and the table of shardings."""
    import jax
    import tiny
    from test_step import batch

    from jaxslim.config import Group, Train
    from jaxslim.methods import linearize
    from jaxslim.methods.finetune import Finetune
    from jaxslim.methods.generate import Generate
    from jaxslim.methods.linearize import Linearize
    from jaxslim.train import mesh as M
    from jaxslim.train import step as S

    model = tiny.slim(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0,
                      num_hidden_layers=1, num_conv_pos_embeddings=8, conv_dim=[16, 16], conv_kernel=[10, 8],
                      conv_stride=[5, 8], num_feat_extract_layers=2)
    group = Group(learning_rate=3e-3, weight_decay=0.01)
    cfg = Train(groups={"main": group, "teacher": dataclasses.replace(group, every=2)}, max_steps=3)
    linearize._load = lambda name: model
    trajectory = Linearize(mixer="mamba2", options={"chunk": 16}, guidance="trajectory", source="pretrained")
    rollout = Generate(student="full", target_layers=(0, 1), forcing="free", skip=False, distance="mse")
    batches = [batch(*lengths, seed=i) for i, lengths in enumerate(
        [(2000, 700, 1900, 450, 1500, 600, 800, 1200), (2000, 2000, 500, 500, 900, 900, 900, 900)])]
    result = {}
    for name, method in (("ctc", Finetune()), ("cald", Linearize(features=6)), ("trajectory", trajectory),
                         ("generate", rollout)):
        student = method.start(model, None, None)
        for text in FEWER if name in ("trajectory", "generate") else MESHES:
            mesh = M.make(text, jax.devices()[: 1 if text == "data=1" else 8])
            fit = S.for_control(method, student.params, cfg)  # only the trajectory has a teacher to train
            state, frozen, tx = S.init(method, student, fit, mesh)
            step = S.make(method, student.spec, tx, fit, state, mesh)
            teacher = None if name == "ctc" else method.teacher_at(model, 0)
            teacher = teacher and teacher.replace(params=M.place(teacher.params, mesh))
            losses = []
            for i in range(3):
                state, metrics = step(state, frozen, teacher, M.batch(batches[i % 2], mesh))
                losses.append({k: float(v) for k, v in metrics.items()})
            where = M.sharding(state.params, mesh)
            result[f"{name} {text}"] = {
                "losses": losses, "compiled": step._cache_size(),
                "kept": all(v.sharding.is_equivalent_to(where[k], v.ndim) for k, v in state.params.items()),
                "split": sum(not v.sharding.is_fully_replicated for v in jax.tree.leaves(state.optimizer))}
        if name == "cald":
            full = tiny.slim(Linearize(features=6).start(tiny.slim(), None, None).spec)
            sizes = {text: M.make(text, jax.devices()[:8]) for text in MESHES[1:]}
            result["table"] = {k: {t: [a or "" for a in M.spec_for(k, v.shape, mesh)] for t, mesh in sizes.items()}
                               for k, v in full.params.items()}
    return result


@pytest.fixture(scope="module")
def runs():
    return eight_devices.run(__file__)


@pytest.mark.multiprocess
@pytest.mark.parametrize("method, text", [*((m, t) for m in ("ctc", "cald") for t in MESHES[1:]),
                                          ("trajectory", FEWER[1]), ("generate", FEWER[1])])
def test_every_mesh_trains_alike(runs, method, text):
    one, many = runs[f"{method} data=1"], runs[f"{method} {text}"]
    for a, b in zip(one["losses"], many["losses"], strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)
    assert one["losses"][0]["loss"] != one["losses"][2]["loss"]


@pytest.mark.multiprocess
def test_a_step_compiles_once_and_stays_where_it_is(runs):
    for name, found in runs.items():
        if name != "table":
            assert found["compiled"] == 1 and found["kept"], name
            assert (found["split"] > 0) == ("fsdp" in name), name  # the moments follow their parameters


@pytest.mark.multiprocess
def test_table_of_shardings(runs):
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(runs["table"], indent=1, sort_keys=True) + "\n")
    assert runs["table"] == json.loads(GOLDEN.read_text())  # remove the file to write it anew


@pytest.mark.parametrize("text, devices, want", [
    ("data=-1", 8, (8, 1, 1)), ("", 1, (1, 1, 1)), ("data=2, fsdp=-1", 8, (2, 4, 1)), ("tensor=2,data=4", 8, (4, 1, 2)),
    ("fsdp=8", 8, (1, 8, 1))])
def test_sizes(text, devices, want):
    from jaxslim.train import mesh as M

    assert tuple(M.parse(text, devices).values()) == want


@pytest.mark.parametrize("text, devices, message", [
    ("data=3", 8, "takes 3 devices, but there are 8"), ("data=2,fsdp=3,tensor=-1", 8, "takes 6 devices times the rest"),
    ("data=-1,fsdp=-1", 8, "-1 = the rest, once"), ("", 8, "takes 1 devices, but there are 8"),
    ("model=2", 8, "'model=2' is none of data=N, fsdp=N, tensor=N"), ("data=0", 8, "'data=0' is none of"),
    ("data", 8, "'data' is none of"), ("data=two", 8, "'data=two' is none of"),
    ("data=2,data=4", 4, "data stands twice")])
def test_meshes_that_cannot_be(text, devices, message):
    from jaxslim.train import mesh as M

    with pytest.raises(M.MeshError, match=message):
        M.parse(text, devices)


def test_what_does_not_divide_is_replicated_and_said_once(caplog):
    import logging

    import jax
    from jax.sharding import AbstractMesh
    from jax.sharding import PartitionSpec as P

    from jaxslim.train import mesh as M

    mesh = AbstractMesh((1, 3, 2), M.AXES)
    with caplog.at_level(logging.INFO, "jaxslim.train.mesh"):
        for _ in range(2):
            assert M.spec_for("x.attention.q_proj.weight", (32, 40), mesh) == P("tensor")
    assert [r.getMessage() for r in caplog.records] == [
        "x.attention.q_proj.weight (32, 40): dimension 1 is not divisible by fsdp=3; replicated there."]
    assert M.spec_for("x.layer_norm.weight", (32,), mesh) == P()
    assert M.spec_for("x.attention.q_proj.weight", (32, 42), mesh) == P("tensor", "fsdp")
    one = M.make("data=1", jax.devices()[:1])
    assert M.shards(one) == 1 and M.spec_for("x.q_proj.weight", (32, 42), one) == P()
    placed = M.place({"teacher/x.q_proj.weight": np.ones((2, 2))}, one)
    assert isinstance(placed["teacher/x.q_proj.weight"], jax.Array)


if __name__ == "__main__":
    print(json.dumps(run()))
