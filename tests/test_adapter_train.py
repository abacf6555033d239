"""Training adapters: only they are trained, on one device as on eight; data that names adapters; the learned drop.

The runs on meshes happen in a subprocess with eight virtual CPU devices; `python tests/test_adapter_train.py` is it.
"""
import json
import os
import re

import eight_devices
import jax
import numpy as np
import pytest
import tiny
from test_adapter import BASE, DEEP, KEY, X, logits, noisy
from test_gemma3n import BASE as GEMMA

from jaxslim import adapters
from jaxslim.config import Group, Train
from jaxslim.methods.adapter import GATE, Adapter, hard_concrete
from jaxslim.slim import Slim
from jaxslim.train import mesh as M
from jaxslim.train import step as S

MESHES = ("data=1", "data=2,fsdp=2,tensor=2")


def run() -> dict:
    from test_step import batch

    rows = batch(*(600, 330) * 4, seed=0) | {"adapter_ids": np.array([0, 1, -1, 0] * 2, np.int32)}
    rows["attention_mask"] = np.asarray(rows["attention_mask"])
    result = {}
    for name, options in (("slots", dict(slots=2, init="praxis")), ("int8", dict(base="int8", kind="tpa"))):
        method = Adapter(width=8, train_head=True, **options)
        student = method.start(BASE, None, KEY)
        cfg = Train(groups={"main": Group(learning_rate=3e-3)}, max_steps=3)
        for text in MESHES:
            mesh = M.make(text, jax.devices()[: 1 if text == "data=1" else 8])
            state, frozen, tx = S.init(method, student, cfg, mesh)
            step = S.make(method, student.spec, tx, cfg, state, mesh)
            before = {k: np.asarray(v) for k, v in frozen.items()}
            losses = []
            for _ in range(3):
                state, metrics = step(state, frozen, None, M.batch(rows, mesh))
                losses.append(float(metrics["loss"]))
            moments = [x for x in jax.tree.leaves(state.optimizer) if np.ndim(x)]
            result[f"{name} {text}"] = {
                "losses": losses, "trained": sorted(state.params), "compiled": step._cache_size(),
                "moments": sum(x.size for x in moments), "size": sum(x.size for x in state.params.values()),
                "dtypes": sorted({str(v.dtype) for v in frozen.values()}),
                "still": all(np.array_equal(before[k], v) for k, v in frozen.items()),
                "split": sorted(k for k, v in state.params.items() if not v.sharding.is_fully_replicated)}
    return result


@pytest.mark.multiprocess
@pytest.mark.slow
def test_only_adapters_train_on_every_mesh():
    runs = eight_devices.run(__file__)
    for name in ("slots", "int8"):
        one, many = (runs[f"{name} {text}"] for text in MESHES)
        assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert one["losses"][2] < one["losses"][0]
        for r in (one, many):
            assert all(adapters.LEAF.search(k) or k.startswith("lm_head.") for k in r["trained"])
            assert r["moments"] == 2 * r["size"] and r["compiled"] == 1 and r["still"]
        assert ("int8" in many["dtypes"]) == (name == "int8")
        assert any(".adapter.down.weight" in k for k in many["split"]) and not one["split"]


def test_every_large_matrix_has_a_sharding_rule():
    lora = Adapter(kind="lora").start(GEMMA, None, KEY)
    for m in (lora, Adapter(width=4).start(GEMMA, None, KEY), Adapter(kind="lora").start(BASE, None, KEY)):
        without = [k for k, v in m.params.items() if v.ndim > 1 and not any(re.search(p, k) for p, _ in M.RULES)]
        assert [k for k in without if "depthwise_conv" not in k and "original0" not in k] == []


def test_data_says_which_adapter_a_row_trains(small, tmp_path):
    from jaxslim import hub
    from jaxslim.data import Batches, CTCTask, load_rows
    from jaxslim.slim import inputs

    lines = [json.loads(line) for line in open(small["train"])]
    root = os.path.dirname(small["train"])
    for i, line in enumerate(lines):
        line |= {"audio": os.path.join(root, line["audio"])} | ({"adapter_id": i % 2} if i < 4 else {})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = CTCTask.from_pretrained(small["model"])
    with_ids = Batches(load_rows(str(tmp_path / "rows.jsonl")), task, batch_size=8, shuffle=False, epochs=1)
    batch = next(iter(with_ids))
    want = {i: i % 2 if i < 4 else -1 for i in range(8)} | {-1: -1}
    assert batch["adapter_ids"].tolist() == [want[int(r)] for r in batch["row"]]
    model = hub.load(small["model"])
    assert "adapter_ids" not in inputs(batch, model) and "adapter_ids" not in inputs(batch)
    two = adapters.insert(model, Adapter(slots=2, width=4).placement(model.spec))
    assert two(**inputs(batch, two)).logits.shape[0] == 8
    assert "adapter_ids" not in next(iter(Batches(load_rows(small["train"]), task, batch_size=8)))


# ---- the learned drop ----


def test_hard_concrete():
    """The share of open gates is what the penalty says, and evaluation clips the stretched sigmoid (1712.01312)."""
    for logit in (-2.0, 0.0, 2.0):
        z = np.array(hard_concrete(np.full(20000, logit, np.float32), jax.random.key(1)))
        want = 1 / (1 + np.exp(-(logit - 2 / 3 * np.log(0.1 / 1.1))))
        assert (z > 0).mean() == pytest.approx(want, abs=0.01) and z.min() >= 0 and z.max() <= 1
    assert float(hard_concrete(-3.0, None)) == 0.0 and float(hard_concrete(3.0, None)) == 1.0
    assert float(hard_concrete(0.0, None)) == pytest.approx(0.5)


def test_gates_learn_and_the_closed_ones_go():
    method = Adapter(width=4, drop_weight=0.1)
    student = noisy(method.start(DEEP, None, KEY))
    gates = {k: v for k, v in student.params.items() if k.startswith(GATE)}
    assert len(gates) == 4 and all(method.group(k) == "main" for k in gates)

    @jax.jit
    def loss(gates):
        gated, kept = method.gate(student.replace(params={**student.params, **gates}), jax.random.key(3))
        return (gated(**X).logits ** 2).mean() + 0.1 * kept

    grads = jax.grad(loss)(gates)
    assert all(np.isfinite(g) and g != 0 for g in grads.values())
    values = dict(zip(gates, (-4.0, 4.0, 0.0, -4.0)))
    learnt = student.replace(params={**student.params, **values})
    done = method.finish(learnt, None)
    assert sorted(adapters.blocks(done.spec)) == ["encoder.0.ffn2", "encoder.1.ffn1"]
    assert not any(k.startswith("aux.") for k in done.params)
    whole, half = "0.ffn2.adapter.up.weight", "1.ffn1.adapter.up.weight"
    name = "wav2vec2_conformer.encoder.layers."
    np.testing.assert_array_equal(done.params[name + whole], student.params[name + whole])
    np.testing.assert_allclose(done.params[name + half], 0.5 * student.params[name + half], rtol=1e-6)
    kept = Adapter(width=4, drop_weight=0.1, keep=1).finish(learnt, None)
    assert adapters.blocks(kept.spec) == ["encoder.0.ffn2"]
    assert np.isfinite(logits(done)).all()


def test_curve_of_score_against_adapters_kept():
    one = noisy(Adapter(width=4).start(BASE, None, KEY))
    rows = adapters.curve(one, lambda m: logits(m))
    assert [(r["kept"], r["dropped"]) for r in rows] == [
        (2, None), (1, "encoder.0.ffn1"), (0, "encoder.0.ffn2")]
    assert rows[0]["parameters"] == adapters.extract(one).size and rows[2]["parameters"] == 0
    tiny.close(rows[1]["score"], logits(adapters.drop(one, ["encoder.0.ffn1"])), 1e-6)
    tiny.close(rows[2]["score"], logits(BASE), 1e-6)
    back = adapters.curve(one, lambda m: 0.0, ["encoder.0.ffn2"])
    assert [r["dropped"] for r in back] == [None, "encoder.0.ffn2"]
    assert isinstance(one, Slim)


if __name__ == "__main__":
    print(json.dumps(run()))
