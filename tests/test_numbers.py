"""The same 50 losses on every mesh and on two hosts; the collectives of a step; the sharding table of every family.

The runs happen in subprocesses with eight virtual CPU devices; `python tests/test_numbers.py` is one.
"""
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden" / "families.json"
MESHES = ("data=1", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
TABLE = MESHES[1:]
STEPS = 50
# one compiled shape, ragged rows; heads and units pruned to numbers that two devices cannot share
ROWS = [(2000, 700, 1900, 450, 1500, 600, 800, 1200), (2000, 2000, 500, 500, 900, 900, 900, 900)]
SHAPE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_prob=0.0,
             num_hidden_layers=1, num_conv_pos_embeddings=8, conv_dim=[16, 16], conv_kernel=[10, 8],
             conv_stride=[5, 8], num_feat_extract_layers=2)


def ragged():
    """(teacher, its pruned student)."""
    import tiny

    teacher = tiny.slim(**SHAPE)
    spec = teacher.spec.with_block("encoder.0.attention", heads=[0, 2, 3], qk_dim=6).with_block(
        "encoder.0.ffn", units=33).with_block("frontend.1", channels=13)
    return teacher, tiny.slim(spec, seed=1)


def run(meshes=MESHES) -> dict:
    """Losses of three methods on every mesh, how often the step compiled, its collectives, the table of shardings."""
    import jax
    from test_step import batch

    from jaxslim.config import Group, Train
    from jaxslim.methods.finetune import Finetune
    from jaxslim.methods.linearize import Linearize
    from jaxslim.methods.prune import Prune
    from jaxslim.train import hlo
    from jaxslim.train import mesh as M
    from jaxslim.train import step as S

    teacher, pruned = ragged()
    # eps: without it Adam divides gradients that are 0 but for rounding by their own size
    main = {"main": Group(learning_rate=1e-3, warmup_steps=5, weight_decay=0.01, eps=1e-3)}
    gates = {k: Group(learning_rate=0.2, schedule="constant") for k in ("gates", "multipliers")}
    batches = [batch(*lengths, seed=i) for i, lengths in enumerate(ROWS)]
    hosts, host = jax.process_count(), jax.process_index()
    result = {}
    for name, method in (("ctc", Finetune()), ("distill", Linearize(layers=(), freeze_frontend=False)),
                         ("prune", Prune(target={"macs": 0.7}, seconds=(0.1,), objective="both", ramp_steps=20))):
        student = method.start(pruned, None, jax.random.key(0)) if name == "prune" else pruned
        cfg = Train(groups=main | gates if name == "prune" else main, max_steps=STEPS)
        for text in meshes:
            mesh = M.make(text, jax.devices()[: 1 if text == "data=1" else 8])
            state, frozen, tx = S.init(method, student, cfg, mesh)
            step = S.make(method, student.spec, tx, cfg, state, mesh)
            guide = None if name == "ctc" else teacher.replace(params=M.place(teacher.params, mesh))
            losses, found = [], []
            for i in range(STEPS):
                size = len(ROWS[0]) // hosts
                mine = {k: v[host * size : (host + 1) * size] for k, v in batches[i % 2].items()}
                feed = M.batch(mine, mesh)
                if i == 0 and text in ("data=1", "data=8", "fsdp=8"):
                    program = step.lower(state, frozen, guide, feed).compile().as_text()
                    found = hlo.collectives(hlo.Module.parse(program))
                state, metrics = step(state, frozen, guide, feed)
                losses.append({k: float(v) for k, v in metrics.items()})
            where = M.sharding(state.params, mesh)
            result[f"{name} {text}"] = {
                "losses": losses, "compiled": step._cache_size(),
                "kept": all(v.sharding.is_equivalent_to(where[k], v.ndim) for k, v in state.params.items()),
                "split": sum(not v.sharding.is_fully_replicated for v in jax.tree.leaves(state.optimizer)),
                "collectives": hlo.by_kind(found),
                "split_bytes": sum(v.nbytes for tree in (state.params, guide.params if guide else {})
                                   for k, v in tree.items() if "fsdp" in M.sharding({k: v}, mesh)[k].spec),
                "param_bytes": sum(v.nbytes for v in state.params.values())}
    return result


def tables() -> dict:
    """Family -> name -> mesh -> axes, of every parameter of small models on meshes of eight devices."""
    import jax
    import tiny

    from jaxslim.methods.linearize import Linearize
    from jaxslim.train import mesh as M

    sizes = {text: M.make(text, jax.devices()[:8]) for text in TABLE}
    models = {family: tiny.slim(tiny.config(family)).spec for family in ("wav2vec2", "hubert", "wavlm",
              "wav2vec2-conformer", "wav2vec2-bert", "parakeet_ctc")}
    models["wav2vec2 with hedgehog"] = Linearize(features=6).start(tiny.slim(), None, None).spec
    out = {}
    for family, spec in models.items():
        shapes = tiny.bind.shapes(spec)
        out[family] = {k: " | ".join(",".join(a or "-" for a in M.spec_for(k, v.shape, mesh)) or "all"
                                     for mesh in sizes.values()) for k, v in shapes.items()}
    return out


def start(*arguments, **environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path),
           "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0", **environment}  # fast
    return subprocess.Popen([sys.executable, __file__, *arguments], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def runs():
    return finish(start(JAX_NUM_CPU_DEVICES="8"))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("method, text", [(m, t) for m in ("ctc", "distill", "prune") for t in MESHES[1:]])
def test_every_mesh_trains_alike(runs, method, text):
    one, many = runs[f"{method} data=1"], runs[f"{method} {text}"]
    last, first = one["losses"][-1], one["losses"][0]
    assert len(one["losses"]) == STEPS
    assert last["loss/share.macs"] < 0.9 if method == "prune" else last["loss"] < 0.8 * first["loss"]
    for a, b in zip(one["losses"], many["losses"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert {k: v for k, v in b.items() if "loss" in k} == pytest.approx(
            {k: v for k, v in a.items() if "loss" in k}, rel=1e-5, abs=1e-5 * a["loss"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_alike(runs):
    """Two JAX hosts of four devices each, connected by gloo."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    both = [start(address, str(i), JAX_NUM_CPU_DEVICES="4") for i in range(2)]
    for found in map(finish, both):
        for name, run in found.items():
            assert run["compiled"] == 1
            for a, b in zip(runs[f"{name.split()[0]} data=1"]["losses"], run["losses"], strict=True):
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_step_compiles_once_and_stays_where_it_is(runs):
    for name, found in runs.items():
        assert found["compiled"] == 1 and found["kept"], name
        assert (found["split"] > 0) == ("fsdp" in name), name  # the moments follow their parameters


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["ctc", "distill", "prune"])
def test_only_the_collectives_that_are_expected(runs, method):
    assert not runs[f"{method} data=1"]["collectives"]
    data = runs[f"{method} data=8"]
    assert set(data["collectives"]) == {"all-reduce"}  # no activation is collected
    # every gradient once; that of the positional convolution while it is still in frequencies (on CPU)
    assert data["param_bytes"] <= data["collectives"]["all-reduce"]["bytes"] < 2 * data["param_bytes"] + 1000
    fsdp = runs[f"{method} fsdp=8"]
    # every split weight once whole (of the teacher as well; those with gates and weight norm as they are used), no
    # activation; the CPU's compiler writes the reduce-scatter of a gradient as all-reduce and slice or as all-to-all
    # and sum, the TPU's as such
    assert set(fsdp["collectives"]) <= {"all-gather", "all-reduce", "all-to-all", "reduce-scatter"}
    assert abs(fsdp["collectives"]["all-gather"]["bytes"] - fsdp["split_bytes"]) < 2000  # the teacher's head is unused


@pytest.mark.multiprocess
def test_table_of_every_family():
    table = finish(start("tables", JAX_NUM_CPU_DEVICES="8"))
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    assert table == json.loads(GOLDEN.read_text())  # remove the file to write it anew


if __name__ == "__main__":
    if sys.argv[1:] == ["tables"]:
        print(json.dumps(tables()))
    elif sys.argv[1:]:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
        print(json.dumps(run(MESHES[3:])))
    else:
        print(json.dumps(run()))
