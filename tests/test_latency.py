"""Latency tables: what they hold, interpolation, and tables that do not belong here."""
import json
import time

import jax
import numpy as np
import pruned
import pytest

from jaxslim import budget, latency
from jaxslim.cli import main
from jaxslim.methods.prune import Prune
from jaxslim.spec import Spec, SpecError

SPEC = pruned.model("wav2vec2").spec


def table(**changes):
    """A table of the small wav2vec2 with round numbers."""
    blocks = {"encoder.attention": {"widths": [0, 2, 4], "seconds": [0.0, 0.3, 0.4]},
              "encoder.ffn": {"widths": [0, 12, 48], "seconds": [0.0, 0.1, 0.2]},
              "frontend.0": {"widths": [[1], [2, 12]], "seconds": [[0.1, 0.3]]},
              "frontend.1": {"widths": [[2, 12], [2, 12]], "seconds": [[0.1, 0.2], [0.3, 0.6]]}}
    return {"version": 1, **latency.device(), "shape": latency.shape(SPEC), "blocks": blocks, "rest": 1.0, **changes}


def test_interpolation():
    spec = pruned.with_gates(pruned.model("wav2vec2"), pruned.NO_RANKS).spec
    whole = float(latency.expected(table(), spec, budget.full(spec)))
    assert whole == pytest.approx(1.0 + 2 * 0.4 + 2 * 0.2 + 0.3 + 0.6)
    counts = {"encoder.0.attention": 1.0, "encoder.1.attention": 0.0, "encoder.0.ffn": 6.0, "encoder.1.ffn": 30.0,
              "frontend.0": 7.0, "frontend.1": 2.0}
    assert float(latency.expected(table(), spec, counts)) == pytest.approx(1.0 + 0.15 + 0.05 + 0.15 + 0.2 + 0.2)
    assert float(latency.expected(table(), spec, {})) == pytest.approx(whole)  # a block without gates is as it is
    slope = jax.grad(lambda n: latency.expected(table(), spec, {**counts, "encoder.0.attention": n}))(1.0)
    assert float(slope) == pytest.approx(0.15)


def test_a_table_of_a_real_model_is_made_and_used(tmp_path, monkeypatch):
    """By the command; time stands in for the clock, so that a busy machine cannot fail it."""
    ticks = iter(np.cumsum(np.random.default_rng(0).uniform(0.01, 0.02, 100000)))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    pruned.model("bert").save_pretrained(tmp_path / "m")
    path = tmp_path / "tables" / "here.json"
    assert main(["bench", str(tmp_path / "m"), "--table", str(path), "--seconds", "2", "--repeats", "2"]) == 0
    found = json.loads(path.read_text())
    assert found["blocks"]["encoder.attention"]["widths"] == [0, 1, 2, 3, 4]
    assert found["blocks"]["encoder.ffn"]["widths"] == [0, 6, 12, 24, 36, 48]
    assert all(np.all(np.diff(b["seconds"]) >= 0) for b in found["blocks"].values())
    assert found["seconds"] == 2.0 and found["versions"]["jax"] and {"predicted", "measured"} <= found["check"].keys()
    found["blocks"]["encoder.ffn"]["seconds"] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    latency.save(found, path)
    method = Prune(target={"latency": 0.999}, table=str(path), gates=("units",))
    student = method.start(pruned.model("bert"), None, jax.random.key(0))
    terms = method.lagrangian(student, 0)
    assert float(terms["share.latency"].sum) == pytest.approx(1.0, abs=0.01)


def test_tables_that_do_not_belong_here(tmp_path):
    spec, path = pruned.with_gates(pruned.model("wav2vec2"), pruned.NO_RANKS).spec, str(tmp_path / "t.json")

    def load(value):
        (tmp_path / "t.json").write_text(value if isinstance(value, str) else json.dumps(value))
        latency.load.cache_clear()
        return latency.load(path, spec)

    assert load(table())["rest"] == 1.0
    with pytest.raises(SpecError, match="measured on .*'NVIDIA H100'.* this is .*bench"):
        load(table(platform="gpu", device="NVIDIA H100"))
    with pytest.raises(SpecError, match="'threads': 640"):
        load(table(threads=640))
    with pytest.raises(SpecError, match="another shape of model than this wav2vec2"):
        load(table(shape="0"))
    with pytest.raises(SpecError, match="another shape"):
        load(table(blocks={"encoder.attention": table()["blocks"]["encoder.attention"]}))
    for damaged in ("{", "[]", '{"version": 1}'):
        with pytest.raises(SpecError, match="is no latency table"):
            load(damaged)
    with pytest.raises(SpecError, match="`table` must name a file made by"):
        latency.load("", Spec(SPEC.config, "wav2vec2", "ctc"))
