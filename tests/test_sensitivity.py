"""jaxslim slim --sensitivity: each number is the loss of the model that was really cut."""
import json

import numpy as np
import pytest
from test_prune import MODEL, RAGGED

from jaxslim import cost, sensitivity
from jaxslim.cli import main
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.prune import Prune
from jaxslim.models import gates
from jaxslim.slim import Slim


def loss(model):
    term = Finetune().loss(model, {}, RAGGED, None, 0)["ctc"]
    return float(term.sum / term.count)


def test_losses_are_those_of_cut_models():
    found = sensitivity.measure(MODEL, RAGGED)
    assert found["loss"] == pytest.approx(loss(MODEL), rel=1e-5)
    spec = Prune().gated(MODEL.spec)
    rows = {(r["block"], r["removed"]): r for r in found["rows"]}
    assert len(rows) == 5 + 4 + 2 * 4  # heads and all; units; two convolutions
    for at, kept in ((("encoder.0.attention", "head 1"), [0, 2, 3]), (("encoder.0.ffn", "100% of units"), [])):
        small = Slim(*gates.cut(spec, MODEL.params, gates.masked(spec, {at[0]: kept})))
        assert rows[at]["loss"] == pytest.approx(loss(small), rel=1e-4)
        assert rows[at]["params"] == cost.params(MODEL.spec) - cost.params(small.spec)
    assert rows["frontend.1", "100% of channels"]["share"] == pytest.approx(1 - 1 / 16)
    kept = dict(sensitivity.variants(gates.groups(spec)[-1], np.arange(48)))["75% of units"]
    assert kept == list(range(36, 48))  # the smallest go first


def test_the_command_is_cached_and_drawn(small, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"teacher": small["model"], "data": {k: small[k] for k in ("train", "validation")},
                                  "stages": [{"name": "p", "method": "prune", "options": {"target": {"macs": 0.5}}}]}))
    command = ["slim", str(recipe), "--sensitivity", "--output", str(tmp_path / "run"), "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What each part matters" in page and "encoder attention" in page
    stored = json.loads((tmp_path / "run" / "sensitivity.json").read_text())
    assert stored == first
    (tmp_path / "run" / "sensitivity.json").write_text(json.dumps(stored | {"loss": -1.0}))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == -1.0  # read, not measured again


def test_targets_of_the_command(small, tmp_path):
    from jaxslim import recipe
    from jaxslim.config import ConfigError

    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"teacher": small["model"], "data": {},
                                "stages": [{"name": "p", "method": "prune", "options": {"target": {"macs": 0.5}}}]}))
    assert recipe.retarget(str(path), [], []) == []
    assert recipe.retarget(str(path), [], ["macs=0.6", "params=5e6"]) == [
        'p.options.target={"macs": 0.6, "params": 5000000.0}']
    with pytest.raises(ConfigError, match="write COST=VALUE"):
        recipe.retarget(str(path), [], ["macs"])
    with pytest.raises(ConfigError, match="has 0 stages with a budget"):
        recipe.retarget(str(path), ["p.options.target={}"], ["macs=0.6"])
