"""Pruned models as PyTorch code: widths, empty blocks and Whisper's first convolution, in every family."""
import pruned
import pytest
from test_export import quiet  # noqa: F401  (a fixture for all tests here)

from jaxslim.dense import ExportError
from jaxslim.export import export
from jaxslim.models import gates
from jaxslim.slim import Slim

QUICK = {("wavlm", 0), ("w2v-bert", 0), ("whisper", 1)}
CASES = [pytest.param(name, seed, marks=[] if (name, seed) in QUICK else [pytest.mark.slow])
         for name in pruned.FAMILIES for seed in (0, 1, 3)]


def cut(name, seed, whole=()):
    gated = pruned.with_gates(pruned.model(name))
    keep = pruned.widths(gated.spec, seed)
    keep |= {g.block: g.size for g in gates.groups(gated.spec) if g.block in whole}
    return Slim(*gates.cut(gated.spec, gated.params, pruned.mask(gated.spec, keep, seed)))


@pytest.mark.parametrize("name, seed", CASES)
def test_every_family_opens_in_torch(name, seed, tmp_path):
    record = export(cut(name, seed), tmp_path / f"{name.replace('-', '_')}_{seed}")
    assert record["checked"] and record["trust_remote_code"] and record["relative_difference"] < 1e-4


@pytest.mark.parametrize("name", ["conformer", pytest.param("wav2vec2", marks=pytest.mark.slow)])
def test_empty_blocks_in_the_stock_shape(name, tmp_path):
    record = export(cut(name, 0, whole=("frontend.1",)), tmp_path / "m", format="hf-dense")
    assert record["checked"] and not record["trust_remote_code"] and record["relative_difference"] < 1e-4


def test_a_gated_model_has_no_stock_shape(tmp_path):
    with pytest.raises(ExportError, match="gate"):
        export(pruned.with_gates(pruned.model("bert")), tmp_path / "m", format="hf-dense")
    with pytest.raises(ExportError, match="gates, for which no PyTorch code"):
        export(pruned.with_gates(pruned.model("bert")), tmp_path / "m")
