"""The engine's smaller parts: programs read back, dry runs, equal layers in a loop, averages, precisions, errors."""
import dataclasses
import importlib.util
import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_step import CFG, MODEL, RAGGED, setup

from jaxslim import cli, config, cost
from jaxslim.config import ConfigError, Group, Train
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.linearize import Linearize
from jaxslim.slim import Method, Term
from jaxslim.train import dryrun, hlo, loop
from jaxslim.train import mesh as M
from jaxslim.train import step as S

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8,4]) -> f32[1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %slice.1 = f32[1,4]{1,0} slice(%p), slice={[0:1], [0:4]}
}

%body (t: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %t = (s32[], f32[4,4]{1,0}) parameter(0)
  %w = f32[4,4]{1,0} get-tuple-element(%t), index=1
  %dot.1 = f32[4,4]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %ar = f32[4,4]{1,0} all-reduce(%dot.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %ar)
}

%c (s: (s32[], f32[4,4])) -> pred[] {
  %s = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ten = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i, %ten), direction=LT
}

ENTRY %main (a: bf16[16,64], b: f32[8,4]) -> f32[1,4] {
  %a = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %ag = (bf16[16,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %agd = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%ag)
  %rs = f32[4,64]{1,0} reduce-scatter(%agd), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, to_apply=%add
  %conv = f32[2,96,8]{2,1,0} convolution(%x, %k), window={size=3 stride=2 lhs_dilate=2}, dim_labels=b0f_0io->b0f
  %x = f32[2,97,16]{2,1,0} constant(0)
  %k = f32[3,16,8]{2,1,0} constant(0)
  %loop = (s32[], f32[4,4]{1,0}) while(%b), condition=%c, body=%body
  ROOT %f = f32[1,4]{1,0} fusion(%b), kind=kLoop, calls=%fused
}
"""


def test_a_program_read_back():
    module = hlo.Module.parse(PROGRAM)
    found = {c.kind: c for c in hlo.collectives(module)}
    assert hlo.by_kind(list(found.values())) == {
        "all-reduce": {"count": 5, "bytes": 5 * 64}, "all-gather": {"count": 1, "bytes": 64 * 64 * 2},
        "reduce-scatter": {"count": 1, "bytes": 4 * 4 * 64 * 4}}
    assert [found[k].group for k in ("all-reduce", "all-gather", "reduce-scatter")] == [4, 4, 4]
    assert found["all-reduce"].moved == 5 * 64 * 2 * 3 / 4
    # five 4x4x4 products in the loop; of three taps, two meet a value and one the hole between them
    assert hlo.flops(module) == 5 * 2 * 64 + 2 * (2 * 96 * 8) * 16 * 2
    # the fusion reads one row of b, and what is in vector memory is free
    alone = hlo.Module.parse(PROGRAM[: PROGRAM.index("ENTRY")] + "ENTRY %main (b: f32[8,4]) -> f32[1,4] {\n"
                             "  %b = f32[8,4]{1,0} parameter(0)\n"
                             "  ROOT %f = f32[1,4]{1,0} fusion(%b), kind=kLoop, calls=%fused\n}\n")
    assert hlo.bytes_accessed(alone) == 16 + 16


def test_parts_of_one_collective_count_once():
    """As the TPU's compiler writes an all-gather that runs beside other work: parts in several fusions, one channel."""
    part = ("%part{0} (p: bf16[16,64]) -> bf16[64,64] {{\n  %p = bf16[16,64] parameter(0)\n  ROOT %ag{0} = bf16[64,64] "
            "all-gather(%p), channel_id={1}, replica_groups=[1,4]<=[4], dimensions={{0}}\n}}\n\n")
    text = "".join(part.format(i, channel) for i, channel in enumerate((7, 7, 8)))
    text += "ENTRY %main (a: bf16[16,64]) -> bf16[64,64] {\n  %a = bf16[16,64] parameter(0)\n" + "".join(
        f"  %f{i} = bf16[64,64] fusion(%a), kind=kCustom, calls=%part{i}\n" for i in range(3)) + "}\n"
    found = hlo.by_kind(hlo.collectives(hlo.Module.parse(text)))
    assert found == {"all-gather": {"count": 2, "bytes": 2 * 64 * 64 * 2}}


def test_a_fused_reduce_scatter():
    """As for a TPU v5p: fusions of an all-reduce and slices, all on one channel; groups as a part of the mesh."""
    groups = "mesh['axis_0'=16,'axis_1'=1,'axis_2'=4], device_ids=([4,16]T(1,0)) {'axis_0'}"
    part = ("%all-reduce-scatter.{0} (p: bf16[64,32]) -> bf16[4,32] {{\n  %p = bf16[64,32] parameter(0)\n"
            "  %ar{0} = bf16[64,32] all-reduce(%p), channel_id=1, replica_groups={1}, to_apply=%add\n"
            "  %at = u32[] constant(0)\n"
            "  ROOT %ds{0} = bf16[4,32] dynamic-slice(%ar{0}, %at, %at), dynamic_slice_sizes={{4,32}}\n}}\n\n")
    text = "".join(part.format(i, groups) for i in (1, 2))
    text += "ENTRY %main (a: bf16[64,32]) -> bf16[4,32] {\n  %a = bf16[64,32] parameter(0)\n" + "".join(
        f"  %f{i} = bf16[4,32] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.{i}\n" for i in (1, 2)) + "}\n"
    found = hlo.collectives(hlo.Module.parse(text))
    assert hlo.by_kind(found) == {"reduce-scatter": {"count": 2, "bytes": 2 * 64 * 32 * 2}}
    assert [c.group for c in found] == [16, 16]


def test_equal_layers_in_a_loop():
    """WavLM's first layer differs from the rest, and so does a pruned one."""
    spec = tiny.slim(tiny.config("wavlm", num_hidden_layers=4)).spec
    model = tiny.slim(spec.with_block("encoder.1.ffn", units=20))
    values, mask = tiny.waves(2000, 1500)
    taps = ("embedding", "encoder.0", "encoder.2.attention.out", "encoder.3")
    call = lambda **kw: model(input_values=values, attention_mask=mask, taps=taps, output_hidden_states=True, **kw)  # noqa: E731
    one, two = call(), call(layers="scan")
    assert one.taps.keys() == two.taps.keys()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        tiny.close(b, a, 1e-5)


def test_an_average_of_the_parameters_and_a_first_moment_in_bf16():
    cfg = dataclasses.replace(CFG, ema_decay=0.5, adam_mu_dtype="bfloat16")
    state, frozen, step = setup(Finetune(), cfg=cfg)
    kinds = [x.dtype for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert kinds.count(jnp.bfloat16) == kinds.count(jnp.float32) == len(state.params)
    average = {k: np.array(v) for k, v in state.params.items()}
    for i in range(3):
        before = jax.device_get(state.params)
        state, metrics = step(state, frozen, None, RAGGED)
        d = min(0.5, (1 + i) / (10 + i))
        average = {k: d * a + (1 - d) * np.asarray(state.params[k]) for k, a in average.items()}
        assert any(np.any(before[k] != v) for k, v in state.params.items()) and np.isfinite(metrics["loss"])
    for name, want in average.items():
        tiny.close(state.average[name], want, 1e-6)
        assert state.params[name].dtype == jnp.float32
    assert step._cache_size() == 1


def test_random_bits_by_a_hash():
    from jaxslim.train import random

    key = random.key(7, "hash")
    draw = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, 3), 0.9, (64, 1000)))
    assert draw.mean() == pytest.approx(0.9, abs=0.005)
    assert np.abs(np.corrcoef(draw)[~np.eye(64, dtype=bool)]).mean() < 0.04           # rows are independent
    assert abs(np.corrcoef(draw[:, 1:].ravel(), draw[:, :-1].ravel())[0, 1]) < 0.02   # and so are neighbours
    other = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, 4), 0.9, (64, 1000)))
    assert abs(np.corrcoef(draw.ravel(), other.ravel())[0, 1]) < 0.02
    bits = np.asarray(jax.random.bits(key, (2**16,), "uint32"))
    ones = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).mean(0)
    assert len(np.unique(bits)) == 2**16 and np.abs(ones - 0.5).max() < 0.01          # a bijection, every bit even
    values = np.asarray(jax.random.normal(key, (50_000,)))
    assert values.mean() == pytest.approx(0, abs=0.02) and values.std() == pytest.approx(1, abs=0.02)
    assert jax.random.bits(key, (3,), "uint8").dtype == np.uint8


def test_groups_that_no_parameter_is_in():
    idle = dataclasses.replace(CFG, groups={"main": Group(), "mixer": Group()})
    with pytest.raises(S.ConfigMismatch, match=r"train.groups has \['mixer'\], but no parameter is in it; Finetune"):
        S.groups(Finetune(), MODEL.params, idle)
    assert list(S.for_control(Finetune(), MODEL.params, idle).groups) == ["main"]


def test_a_batch_that_the_mesh_cannot_share():
    mesh = M.make("data=1", jax.devices()[:1])
    with pytest.raises(M.MeshError, match="batch of 8 rows cannot be split over .* 1 devices in 3 microbatches; give "
                                          "Batches multiple_of=3"):
        M.batch(RAGGED, mesh, 3)


@dataclasses.dataclass(frozen=True)
class Huge(Method):
    """Wants an array of a few hundred terabytes."""

    def loss(self, student, targets, batch, key, step):
        x = jax.random.normal(key, (2**23, 2**23))
        return {"x": Term((x @ x).sum() * student.params["lm_head.bias"].sum(), jnp.float32(1.0))}


def test_out_of_memory_names_the_batch(small, tmp_path):
    from test_loop import run

    cfg = Train(max_steps=2, per_device_train_batch_size=4)
    with pytest.raises(loop.OutOfMemory, match=r"batch of 4 rows x 0.12 s per device does not fit.*remat: full"):
        run(tmp_path, small, cfg=cfg, method=Huge(), model=tiny.slim(**conftest.SHAPE))
    assert "The run ended: train: the batch of 4 rows" in (tmp_path / "logs" / "process-0000.log").read_text()


@pytest.mark.slow
def test_a_profile_and_the_log_of_a_process(small, tmp_path):
    from test_loop import CFG as SHORT
    from test_loop import run

    run(tmp_path, small, cfg=dataclasses.replace(SHORT, max_steps=4, profile_steps=1))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    text = (tmp_path / "logs" / "process-0000.log").read_text()
    assert "profile of 1 steps" in text and "4 steps in" in text


def test_fewer_rows_than_a_batch(small):
    """Filler rows complete it; they weigh nothing."""
    from jaxslim import hub
    from jaxslim.data import Batches, CTCTask, load_rows

    task = CTCTask.from_pretrained(hub.folder(small["model"]))
    batch = next(Batches(load_rows(small["train"])[:3], task, batch_size=8, multiple_of=8))
    assert batch["input_values"].shape[0] == 8 and sorted(batch["row"]) == [-1] * 5 + [0, 1, 2]
    assert not batch["attention_mask"][batch["row"] < 0].any() and (batch["labels"][batch["row"] < 0] == -100).all()


# ---- dry runs ----


def test_what_a_dry_run_says(small, tmp_path, capsys):
    text = {"model": small["model"], "data": {"train": small["train"]}, "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4, "mesh": "data=1"}
    (tmp_path / "c.yaml").write_text(json.dumps(text))
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--dry-run", "--json", "buckets=[0.12]"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny.slim(**conftest.SHAPE)
    macs = cost.macs(model.spec, 0.12, 4)
    first = macs.blocks["frontend.0"]  # its input is the waveform, which has no gradient
    assert found["rows"] == 4 and found["model_flops"] == 6 * macs.total - 2 * first
    assert found["total_bytes"] > 3 * 4 * cost.params(model.spec) and found["collectives"] == {}
    assert 0.5 < found["flops_ratio"] < 4 and "predicted_seconds" not in found
    assert not (tmp_path / "run").exists()  # nothing was run
    said = dryrun.render(found)
    assert "1 device; step of 4 rows" not in said and "1 devices" in said and "memory per device" in said


def test_model_flops_of_frozen_parts():
    model, head = tiny.slim(), Finetune(freeze=("wav2vec2",))
    blocks = cost.macs(model.spec, 1.0, 2).blocks
    flops = lambda method, teacher=None: dryrun.model_flops(method, model, teacher, 1.0, 2)  # noqa: E731
    total = sum(blocks.values())
    assert flops(head) == 2 * total + 2 * blocks["head"]  # forward, and the weight's gradient: nothing before it learns
    below = Finetune(freeze=("encoder", "lm_head", "feature_projection"))
    front = sum(v for k, v in blocks.items() if k.startswith("frontend"))
    assert flops(below) == 2 * (2 * total + front - blocks["frontend.0"])
    assert flops(head, model) == flops(head) + 2 * total


def test_the_tpu_compiler_is_missing(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else real(name, *a))
    with pytest.raises(ConfigError, match=r"pip install 'jaxslim\[tpu\]'"):
        dryrun.topology("v5e:4x4")


@pytest.mark.slow
def test_compiled_for_a_pod_that_is_not_there():
    """Parameters are collected and gradients scattered, activations stay where they are."""
    pytest.importorskip("libtpu")
    mesh = M.make("fsdp=4", dryrun.topology("v5e:2x2"))
    model = dryrun.shapes_of(tiny.slim(num_hidden_layers=2, hidden_size=128, num_attention_heads=4,
                                       intermediate_size=512))
    cfg = Train(dtype="bfloat16", remat="full", layers="scan", prng="hash")
    for method, teacher in ((Finetune(), None), (Linearize(layers=()), model)):
        batch = dryrun.audio_batch(model.spec, 16, 4.0, 32)
        found = dryrun.report(method, model, teacher, cfg, batch, mesh, 4.0, "v5e")
        assert found["collective_bytes"] == pytest.approx(found["expected_bytes"], rel=0.3)
        assert found["flops_ratio"] < 1.6
        assert found["predicted_seconds"] > 0 and found["total_bytes"] < 2**30
        # gradients are scattered, as such or in a ring beside the product that makes them
        assert {"reduce-scatter", "collective-permute"} & set(found["collectives"])


@pytest.mark.parametrize("change, message", [
    (dict(remat="some"), "train.remat 'some': use none, dots or full"),
    (dict(adam_mu_dtype="float16"), "train.adam_mu_dtype 'float16': use float32 or bfloat16"),
    (dict(prng="rbg"), "train.prng 'rbg': use threefry2x32 or hash"),
    (dict(ema_decay=1.0), "train.ema_decay 1: use 0")])
def test_choices(change, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Train, change)
