"""Adapters in the PyTorch code that is written beside a model: opened by transformers alone, the same outputs."""
import copy

import numpy as np
import pytest
import tiny
from test_adapter import BASE, KEY, STABLE, model, noisy

from jaxslim import adapter_merge, adapters, dense, hub
from jaxslim.export import example, export
from jaxslim.methods.adapter import Adapter

torch = pytest.importorskip("torch")
from test_export import quiet  # noqa: E402, F401  (a fixture for all tests here)

WAVLM = dict(STABLE, num_buckets=20, max_bucket_distance=30)
CASES = [("wav2vec2-conformer", "raw"), ("wav2vec2-conformer", "houlsby"), ("wav2vec2-conformer", "merged"),
         ("wav2vec2", "bapna"), ("wav2vec2", "merged"), ("wavlm", "houlsby"), ("parakeet_ctc", "merged"),
         ("wav2vec2-bert", "tpa"), ("whisper", "merged"), ("whisper", "raw"), ("bert", "houlsby"), ("bert", "merged"),
         ("distilbert", "tpa")]
SLOW = {("wav2vec2", "merged"), ("parakeet_ctc", "merged"), ("wav2vec2-bert", "tpa"), ("whisper", "raw"),
        ("bert", "merged"), ("distilbert", "tpa"), ("wav2vec2-conformer", "houlsby"), ("wavlm", "houlsby"),
        ("wav2vec2", "bapna")}


def base(family):
    if family == "whisper":
        from tiny_whisper import config as whisper

        return tiny.slim(whisper(), "seq2seq")
    if "distil" in family or family == "bert":
        from transformers import CONFIG_MAPPING

        small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
                     max_position_embeddings=40, dim=16, n_layers=1, n_heads=2, hidden_dim=20)
        return tiny.slim(CONFIG_MAPPING[family](**small).to_dict(), "none")
    return model(family, **(WAVLM if family == "wavlm" else {}))


@pytest.mark.parametrize("family, form", [
    pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_torch_code(family, form, tmp_path):
    kind = {"raw": "tpa", "merged": "tpa"}.get(form, form)
    one = noisy(Adapter(kind=kind, width=4, act="gelu" if form == "merged" else "relu", scale=2.0,
                        input="raw" if form == "raw" else "normed", norm=True if form == "raw" else None)
                .start(base(family), None, KEY))
    one = adapter_merge.merge(one, check=False) if form == "merged" else one
    record = export(one, tmp_path / "out")
    assert record["checked"] and record["relative_difference"] < 1e-4 and record["trust_remote_code"]
    again = hub.load(tmp_path / "out")
    assert again.fingerprint == one.fingerprint or again.spec.blocks == one.spec.blocks


def test_a_copy_uses_its_own_adapter(tmp_path):
    """Hooks must not tie a deep copy to the original, and training it in PyTorch reaches the adapter."""
    import transformers

    one = noisy(Adapter(width=4).start(BASE, None, KEY))
    hub.save(one, tmp_path / "m")
    first = transformers.AutoModelForCTC.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    second = copy.deepcopy(first)
    x = {k: torch.from_numpy(v) for k, v in example(one.spec).items()}
    with torch.no_grad():
        want = first(**x).logits
        for name, p in second.named_parameters():
            if ".adapter.up." in name:
                p.zero_()
        assert torch.equal(first(**x).logits, want)
        base_ = np.asarray(BASE(**example(one.spec)).logits)
        tiny.close(second(**x).logits.numpy(), base_, 1e-4)
    second(**x).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in second.named_parameters() if ".adapter." in n)


def test_what_has_no_other_form_says_so(tmp_path):
    one = Adapter(width=4).start(BASE, None, KEY)
    with pytest.raises(dense.ExportError, match="merge it first"):
        export(one, tmp_path / "a", format="hf-dense", check=False)
    with pytest.raises(dense.ExportError, match="2 adapters"):
        export(adapters.put(one, "b", adapters.extract(one)), tmp_path / "a", check=False)
