"""lowrank as a method: budgets, allocation, recovery, LoRA, exports, meshes, what is refused."""
import functools
import json
import logging

import eight_devices
import jax
import numpy as np
import pytest
import tiny
from test_lowrank import PLAIN, answer, batch, bundled, model, stream
from test_step import setup

from jaxslim import config, cost, dense, hub, recipe
from jaxslim.config import Group, Train
from jaxslim.methods import METHODS, allocate, calibrate
from jaxslim.methods.calibrate import CalibrationError
from jaxslim.methods.lowrank import LowRank
from jaxslim.models import bind, roles
from jaxslim.slim import Slim, inputs
from jaxslim.spec import SpecError
from jaxslim.train import mesh as M

WANTED = {"encoder.0.attention": ("qk", "vo"), "encoder.0.ffn": ("units", "up", "down")}
SMALL = dict(multiple_of=2, minimum=2, sensitivity="energy")


# ---- calibration ----


@functools.cache
def moments():
    return calibrate.calibrate(PLAIN, stream(), WANTED)


def test_moments_are_those_of_numpy():
    """Every sum against float64, from taps and weights; padding holds noise."""
    from jaxslim.models.roles import roles

    given = [batch("wav2vec2", seed) for seed in range(2)]
    for b in given:
        b["input_values"] = np.where(b["attention_mask"] == 1, b["input_values"], 9.0).astype(np.float32)
    seen = calibrate.calibrate(PLAIN, lambda: iter(given), WANTED)
    p = {k: np.asarray(v, np.float64) for k, v in PLAIN.params.items()}
    names, ffn = roles(PLAIN.spec, "encoder.0.attention"), roles(PLAIN.spec, "encoder.0.ffn")
    rows = {k: [] for k in ("q", "k", "mean", "x", "y", "h")}
    for b in given:
        out = PLAIN(taps=("encoder.0.attention.in", "encoder.0.ffn.in", "encoder.0.ffn.out"), **b)
        for i, n in enumerate(np.asarray(out.lengths)):
            a, x, y = (np.asarray(out.taps[f"encoder.0.{t}"], np.float64)[i, :n] for t in (
                "attention.in", "ffn.in", "ffn.out"))
            q, k = ((a @ p[names[r] + ".weight"].T + p[names[r] + ".bias"]).reshape(n, 4, 8) for r in "qk")
            u = x @ p[ffn["up"] + ".weight"].T + p[ffn["up"] + ".bias"]
            rows["q"].append(q), rows["k"].append(k - k.mean(0)), rows["mean"].append(np.tile(k.mean(0), (n, 1, 1)))
            rows["x"].append(x), rows["y"].append(y)
            rows["h"].append(np.asarray(jax.nn.gelu(u, approximate=False)))
    rows = {k: np.concatenate(v) for k, v in rows.items()}
    second = lambda x: np.einsum("n...k,n...l->...kl", x, x) / len(x)  # noqa: E731
    m, f = seen.moments["encoder.0.attention"], seen.moments["encoder.0.ffn"]
    for have, want in ((m["q"], second(rows["q"])), (m["q_mean"], rows["q"].mean(0)), (m["k"], second(rows["k"])),
                       (m["k_means"], second(rows["mean"])), (f["x"], second(rows["x"])), (f["y"], second(rows["y"])),
                       (f["h"], second(rows["h"])), (f["h_mean"], rows["h"].mean(0))):
        tiny.close(have, want, 1e-5)
    assert seen.frames == dict.fromkeys(WANTED, len(rows["q"]))


def test_order_groups_and_a_cap_change_nothing_they_should_not():
    """Batches in another order, and blocks in several passes for want of memory: the same moments to rounding."""
    other = calibrate.calibrate(PLAIN, lambda: iter([batch("wav2vec2", s) for s in (1, 0)]), WANTED, memory=1.0)
    for block, want in moments().moments.items():
        for name, x in want.items():
            np.testing.assert_allclose(other.moments[block][name], x, rtol=1e-5, atol=1e-6 * np.abs(x).max())
    assert calibrate.calibrate(PLAIN, stream(), {"encoder.0.ffn": ("down",)}, frames=10).frames == {
        "encoder.0.ffn": moments().frames["encoder.0.ffn"] // 2}


class Named:
    """Batches of data with a name."""

    def __init__(self, name, batches=None):
        self.rows, self.batches = type("Rows", (), {"name": name})(), batches

    def __call__(self):
        return iter(self.batches or [batch("wav2vec2")])


@pytest.mark.parametrize("name", ["bundled:prompts-en/test", "a/train.parquet+b/heldout-2.jsonl", "hf:x/y/validation"])
def test_held_back_data_is_refused(name):
    with pytest.raises(CalibrationError, match="is refused: its name says"):
        LowRank(remove=0.1).start(PLAIN, Named(name), None)


@pytest.mark.parametrize("name", ["bundled:prompts-en/train", "contest/latest.parquet", "dev/speaker.jsonl"])
def test_other_names_are_not(name):
    calibrate.refuse_held_back(Named(name))


def test_statistics_that_cannot_be_used():
    broken = batch("wav2vec2")
    params = dict(PLAIN.params)
    params["wav2vec2.encoder.layers.0.attention.k_proj.bias"] = np.full(32, np.nan, np.float32)
    with pytest.raises(CalibrationError, match="the keys of encoder.0.attention are not finite"):
        calibrate.calibrate(Slim(PLAIN.spec, params), stream(), {"encoder.0.attention": ("qk",)})
    broken["attention_mask"] = np.zeros_like(broken["attention_mask"])
    with pytest.raises(CalibrationError, match="the data has no frame"):
        calibrate.calibrate(PLAIN, lambda: iter([broken]), WANTED)
    short = {k: v[:1, :300] for k, v in batch("wav2vec2").items()}
    with pytest.raises(CalibrationError, match=r"saw 7 frames, but rank \d+ of encoder.\d.* needs \d+ \(4 for each\)"):
        LowRank(remove=0.05, kinds=("qk",), **SMALL).start(PLAIN, lambda: iter([short]), None)


# ---- budgets ----


def curve(block, tail, full=None):
    from jaxslim.methods.factor import Curve

    return Curve(block, "qk", np.asarray(tail, float), None)


def test_greedy_is_optimal_on_small_problems():
    """Against all combinations, for convex losses and equal steps; a last step may save more than asked for."""
    import itertools

    rng = np.random.default_rng(0)
    for _ in range(20):
        groups = []
        for g in range(3):
            falls = np.sort(rng.uniform(0, 1, 4))[::-1]
            c = curve(f"encoder.{g}.attention", np.append(np.cumsum(falls[::-1])[::-1], 0))
            groups.append(allocate.points(c, np.array([[0, 4], [0.0, 4.0]]), 1.0, [3, 2, 1]))
        target = float(rng.integers(1, 9))
        _, saved, loss = allocate.choose(groups, target)
        options = [[(0.0, 0.0), *((p.saved, p.loss) for p in g)] for g in groups]
        best = min(sum(p[1] for p in some) for some in itertools.product(*options)
                   if sum(p[0] for p in some) >= target)
        assert saved >= target and loss == pytest.approx(best)


def test_budgets_are_met_and_several_sizes_come_from_one_calibration(caplog):
    for what in ("params", "macs"):
        method = LowRank(cost=what, **SMALL)
        with caplog.at_level(logging.INFO, "jaxslim.methods"):
            models = method.compress(PLAIN, stream(), (0.1, 0.3))
        assert "Frontier (share of" in caplog.text and caplog.text.count("Calibration:") == 1
        caplog.clear()
        inner = lambda spec: sum(v for b, v in cost.params_by_block(spec).items() if b != "head")  # noqa: E731
        count = inner if what == "params" else lambda s: sum(
            v for b, v in cost.macs(s).blocks.items() if b != "head")
        for share, student in zip((0.1, 0.3), models, strict=True):
            gone = 1 - count(student.spec) / count(PLAIN.spec)
            assert share <= gone < share + 0.03, (what, share, gone)
            bind.check(student.spec, student.params)
            ranks = {f[k] for f in student.spec.blocks.values() for k in ("qk_dim", "v_dim") if k in f}
            assert all(r % 2 == 0 for r in ranks)


def test_rotation_changes_no_output_and_orders_the_dimensions():
    turned = LowRank(rotate=True, **SMALL).start(PLAIN, stream(), None)
    assert turned.spec == PLAIN.spec and turned.fingerprint != PLAIN.fingerprint
    rows = inputs(next(iter(stream()())))
    tiny.close(turned(**rows).logits, PLAIN(**rows).logits, 1e-5)
    again = LowRank(**SMALL).analyse(turned, stream())[0]
    before = {(c.block, c.kind): c.tail for c in LowRank(**SMALL).analyse(PLAIN, stream())[0]}
    for c in again:  # the first dimensions of every head are the best: cutting them unrotated loses no less
        if c.kind == "qk":
            q, k = (turned.params[f"{roles.roles(turned.spec, c.block)[r]}.weight"] for r in "qk")
            heads = len(turned.spec.attention(c.block).heads)
            sizes = [np.linalg.norm(np.asarray(w).reshape(heads, c.full, -1), axis=-1) for w in (q, k)]
            product = (sizes[0] * sizes[1]).sum(0)
            assert product[: c.full // 2].sum() > product[c.full // 2:].sum()
            np.testing.assert_allclose(c.tail, before[c.block, c.kind], rtol=2e-2, atol=1e-6 * c.tail[0])


def test_uniform_is_worse_and_floors_are_named():
    found, weights, _ = LowRank(**SMALL).analyse(PLAIN, stream())
    prices = allocate.prices(PLAIN.spec, PLAIN.params, found, "params", 10.0, 2)
    groups = allocate.group_points(found, weights, prices, 2, 2)
    whole = allocate.total(PLAIN.spec, "params", 10.0, ("encoder",), "encoder")
    best, even = (f(groups, 0.2 * whole) for f in (allocate.choose, allocate.uniform))
    assert best[1] >= 0.2 * whole <= even[1] and best[2] < even[2]
    rows = allocate.frontier(groups, whole)
    assert [r["removed"] for r in rows] == sorted(r["removed"] for r in rows) and rows[-1]["removed"] > 0.3
    with pytest.raises(SpecError, match=r"99% of the encoder's params cannot be removed: with every rank at its floor "
                                        r"\(2\) [\d.]+% is gone"):
        LowRank(remove=0.99, **SMALL).start(PLAIN, stream(), None)


@pytest.mark.slow
def test_latency_is_timed():
    found, weights, _ = LowRank(kinds=("units",), **SMALL).analyse(PLAIN, stream())
    prices = allocate.prices(PLAIN.spec, PLAIN.params, found, "latency", 0.2, 4)
    assert prices.whole > 0 and set(prices.of) == {(f"encoder.{i}.ffn", "units") for i in (0, 1)}
    for (ranks, seconds) in prices.of.values():
        assert (np.diff(ranks) > 0).all() and (np.diff(seconds) >= 0).all() and seconds[-1] == prices.whole
        assert ranks[0] == 4 and ranks[-1] == 48


@pytest.mark.slow
def test_sensitivities_predict_the_divergence():
    """Of a cut that was not probed: one block, another rank. Half to double is what a straight line promises here."""
    from jaxslim.methods import lowrank

    teacher, _, given = bundled()
    method = LowRank(kinds=("vo", "down"))
    found, weights, _ = method.analyse(teacher, lambda: iter(given))
    assert all(w > 0 for w in weights.values())
    probes = [calibrate.place(b, M.make()) for b in given[:2]]
    wants = [lowrank.reference(teacher.params, b, spec=teacher.spec) for b in probes]
    for c in found:
        r = int(0.75 * c.full)
        _, cut = c.cut(teacher.spec, {k: np.asarray(v) for k, v in teacher.params.items()}, r, dense=True)
        sums = np.sum([lowrank.divergence(cut, b, w, spec=teacher.spec) for b, w in zip(probes, wants)], 0)
        assert 0.4 < sums[0] / sums[1] / (weights[c.block, c.kind] * c.tail[r]) < 2.5, (c.block, c.kind)


@pytest.mark.parametrize("options, message", [
    (dict(kinds=("qkv",)), "unknown kinds"), (dict(sides=("decoder",)), "has no side"),
    (dict(kinds=()), "no block of this wav2vec2 model has anything to cut")])
def test_options_that_fit_no_model(options, message):
    with pytest.raises(SpecError, match=message):
        LowRank(remove=0.1, **options).start(PLAIN, stream(), None)


def test_blocks_that_cannot_be_cut():
    w2v = model("w2v-bert")
    with pytest.raises(SpecError, match="encoder.0.attention has relative_key positions, whose embeddings all heads"):
        LowRank(remove=0.1, **SMALL).start(w2v, stream("w2v-bert"), None)
    factored = tiny.slim(PLAIN.spec.with_block("encoder.1.ffn", up_rank=4))
    with pytest.raises(SpecError, match="encoder.1.ffn has up_rank already"):
        LowRank(remove=0.1, **SMALL).start(factored, stream(), None)
    for options, message in (({"twin": "svd"}, "'svd' is none of"), ({"remove": 45.0}, "remove must be from 0 to"),
                             ({"trained": "lora"}, "needs a lora_rank")):
        with pytest.raises(config.ConfigError, match=message):
            config.build(METHODS["lowrank"], options)


# ---- recovery ----


@functools.cache
def student():
    return LowRank(remove=0.3, **SMALL).start(PLAIN, stream(), None)


@pytest.mark.parametrize("name", ["wav2vec2", "whisper", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "wavlm", "conformer-rotary", "bert"))])
def test_layerwise_loss(name):
    """Nothing lost without a cut, in every block; with a cut every changed block loses something."""
    from test_linearize import value
    from test_lowrank import method

    teacher, given = model(name), batch(name)
    m = method(name, multiple_of=2, minimum=2)
    found, *_ = m.analyse(teacher, stream(name, 1))
    spec, params = teacher.spec, {k: np.asarray(v) for k, v in teacher.params.items()}
    for c in found:
        if c.kind in ("qk", "vo"):
            spec, params = c.cut(spec, params, c.full)
        elif c.kind == "up":
            spec, params = c.cut(spec, params, 2)
    terms = value(m, Slim(spec, params), teacher, given)
    assert set(terms) == set(spec.blocks)
    for block, (error, weight) in terms.items():
        assert weight == pytest.approx(1 / len(terms))
        assert error < 1e-9 if block.endswith(("attention", "cross")) else error > 1e-4, (block, error)


def test_training_recovers_and_only_what_is_cut_moves():
    cfg = Train(groups={"main": Group(1e-3, schedule="constant")}, max_steps=20)
    method, given = LowRank(), batch("wav2vec2")
    plain = LowRank(remove=0.3, twin="product", **SMALL).start(PLAIN, stream(), None)
    state, frozen, step = setup(method, plain, cfg)
    assert all(".attention." in k or ".feed_forward." in k for k in state.params)
    assert any(k.endswith("intermediate_dense.bias") for k in state.params)
    first = None
    for _ in range(15):
        state, metrics = step(state, frozen, PLAIN, {k: np.asarray(v) for k, v in given.items()})
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.5 * first


def test_lora_on_the_factors_merges(caplog):
    start = LowRank(lora_rank=3, trained="lora")
    with_lora = start.start(student(), None, jax.random.key(1))
    assert {k for k in with_lora.params if start.group(k) == "main"} == {k for k in with_lora.params if ".lora_" in k}
    loras = {b: set(f["lora"]) for b, f in with_lora.spec.blocks.items()}
    for block, names in loras.items():
        assert not any(f"{r}_rank" in with_lora.spec.blocks[block] for r in names) and names
    rng = np.random.default_rng(0)
    with_lora = with_lora.replace(params={
        k: 0.2 * rng.standard_normal(v.shape).astype(np.float32) if ".lora_B" in k else v
        for k, v in with_lora.params.items()})
    with caplog.at_level(logging.INFO, "jaxslim.methods"):
        merged = start.finish(with_lora, stream())
    assert not any(".lora_" in k for k in merged.params) and merged.spec == student().spec
    given = batch("wav2vec2", 5)
    tiny.close(answer(merged, given), answer(with_lora, given), 1e-5)
    assert np.abs(answer(merged, given) - answer(student(), given)).max() > 1e-2
    assert "in float32" in caplog.text and "after a cast to bfloat16" in caplog.text


def test_task_objective_and_control():
    from test_linearize import value
    from test_step import RAGGED

    terms = value(LowRank(objective="task", logit_weight=2.0), PLAIN, PLAIN, RAGGED)
    assert terms["kl"] == (pytest.approx(0.0, abs=1e-6), 2.0) and terms["ctc"][0] > 0
    assert set(value(LowRank(objective="task", logit_weight=0.0), PLAIN, PLAIN, RAGGED)) == {"ctc", "unfit"}
    assert LowRank().control() is None
    control = LowRank(objective="task").control()
    names = ("lm_head.bias", "a.feature_extractor.conv_layers.0.conv.weight", "model.encoder.conv1.weight",
             "model.encoder.layers.0.fc1.bias", "model.decoder.layers.0.encoder_attn.q_proj.weight")
    moving = {"factors": names[3:4], "all": (names[0], *names[3:])}
    for trained, wanted in moving.items():
        recover = LowRank(objective="task", trained=trained)
        for method in (recover, recover.control()):
            assert tuple(n for n in names if method.group(n) == "main") == wanted
    assert LowRank(sides=("encoder", "decoder")).group(names[4]) == "main"
    assert control == LowRank(objective="task", trained="lora", lora_rank=2).control()


# ---- results ----


def test_a_thinner_whisper_still_decodes():
    """Greedy search with its cache of thinner keys and values says what the uncached forward pass says."""
    from jaxslim import search

    teacher, given = model("whisper"), batch("whisper")
    thin = LowRank(remove=0.2, sides=("encoder", "decoder"), kinds=("qk", "vo"), **SMALL).start(
        teacher, stream("whisper"), None)
    cut = [f for b, f in thin.spec.blocks.items() if b.startswith("decoder.")]
    assert {k for f in cut for k in f} >= {"qk_dim", "v_dim"}
    states = search.encode(thin.params, given["input_features"], spec=thin.spec)
    prompt, steps = np.full((2, 1), 3, np.int32), 5
    found = search.greedy(thin.params, states, prompt, np.ones((2, 1), bool), np.full(2, steps), jax.random.key(0), 1.0,
                          spec=thin.spec, rules=search.Rules(eos=-1, pad=0, begin=40), steps=steps, start=1,
                          sample=False)
    said = np.concatenate([prompt, np.asarray(found.tokens)], 1)
    logits = thin(input_features=given["input_features"], decoder_input_ids=said).logits
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, :-1], said[:, 1:])


def test_saved_exported_and_in_the_stock_shape(tmp_path):
    pytest.importorskip("torch")
    from jaxslim import export

    hub.save(student(), tmp_path / "student")
    again = hub.load(tmp_path / "student")
    assert again.spec.blocks == student().spec.blocks
    assert all(np.array_equal(again.params[k], v) for k, v in student().params.items())
    given = batch("wav2vec2", 3)
    tiny.close(answer(dense.expand(student()), given), answer(student(), given), 1e-5)
    export.export(student(), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "parity.json").read_text())["max_difference"] < 1e-4
    assert cost.traced_macs(student().spec, 0.5) == cost.macs(student().spec, 0.5).total


def test_a_recipe(small, tmp_path):
    stage = {"name": "twins", "method": "lowrank", "options": dict(SMALL, remove=0.15, sensitivity="kl", kinds=["vo"]),
             "train": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}}
    stage["options"]["kinds"] = ["qk", "vo", "units"]
    tree = {"teacher": small["model"], "data": {k: small[k] for k in ("train", "validation")}, "stages": [stage],
            "bench_seconds": []}
    (tmp_path / "r.yaml").write_text(json.dumps(tree))
    done = recipe.run(str(tmp_path / "r.yaml"), str(tmp_path / "run"))
    assert done["student"]["params"] < 0.9 * done["teacher"]["params"]
    assert hub.load(tmp_path / "run" / "final").fingerprint == done["student"]["fingerprint"]


def mesh_sums() -> dict:
    """Moments on one device and on eight, with rows that do not divide; as JSON."""
    found = []
    for text, devices in (("data=1", 1), ("data=4,fsdp=2", 8)):
        mesh = M.make(text, jax.devices()[:devices])
        seen = calibrate.calibrate(PLAIN, stream(count=1), WANTED, mesh=mesh)
        found.append({f"{b}/{k}": v for b, m in seen.moments.items() for k, v in m.items()})
    return {k: float(np.abs(found[1][k] - v).max() / max(np.abs(v).max(), 1e-9)) for k, v in found[0].items()}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_mesh_measures_the_same():
    gaps = eight_devices.run(__file__)
    assert len(gaps) == 13 and max(gaps.values()) < 1e-4, gaps


if __name__ == "__main__":
    print(json.dumps(mesh_sums()))
