"""All methods one after another, each on what the one before left: real speech, few steps."""
import json

import numpy as np
import pytest

from jaxslim import cost, hub, recipe

pytestmark = pytest.mark.slow

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "combined"
    few = [f"{name}.train.max_steps=2" for name in ("prune", "align", "cald", "adapter")]
    few += [f"{name}.train.per_device_batch_seconds=6" for name in ("prune", "align", "cald", "adapter")]
    few += [f"{name}.train.buckets=[3.0]" for name in ("prune", "align", "cald", "adapter")]
    few += [f"{name}.train.max_seconds=3.0" for name in ("prune", "align", "cald", "adapter")]
    summary = recipe.run("configs/smallest.yaml", folder, [*few, "lowrank.options.frames=2000", "bench_seconds=[]",
                                                           "data.test=bundled:prompts-en/validation"])
    return folder, summary


def test_every_stage_is_there_and_the_model_is_smaller_and_linear(run):
    folder, summary = run
    assert [s["name"] for s in summary["stages"]] == ["prune", "lowrank", "align", "cald", "adapter", "int8"]
    stages = [json.loads((folder / s["path"] / "stage.json").read_text()) for s in summary["stages"]]
    assert [b["config"]["parent"] for b in stages[1:]] == [a["fingerprint"] for a in stages[:-1]]
    final = hub.load(folder / "final")
    assert final.fingerprint == summary["student"]["fingerprint"] == stages[-1]["fingerprint"]
    assert cost.macs(final.spec, 10.0).total < 0.8 * cost.macs(hub.load(summary["teacher"]["path"]).spec, 10.0).total
    attention = final.spec.attention("encoder.3.attention")
    assert attention.mixer == "hedgehog" and "int8" in final.spec.blocks["encoder.3.attention"]
    assert any(final.spec.attention(f"encoder.{i}.attention").qk_dim < 64 for i in range(4))
    assert {f["adapter"]["kind"] for f in final.spec.blocks.values() if "adapter" in f} == {"merged"}
    assert final.params["wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight"].dtype == np.int8


def test_the_card_tells_all_stages_and_there_is_a_control(run):
    folder, summary = run
    text = (folder / "final" / "README.md").read_text()
    assert "by prune, lowrank, align, cald, adapter, int8" in text and "quantize" in text
    assert summary["control"]["params"] == summary["teacher"]["params"]
