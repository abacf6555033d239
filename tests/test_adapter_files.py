"""Adapters in files: round trip, PEFT, AdapterHub, MMS, the command, and what is refused."""
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_adapter import BASE, KEY, X, logits, model, noisy

from jaxslim import adapter_files, adapter_merge, adapters, cli, hub
from jaxslim.adapter_files import CONFIG, WEIGHTS
from jaxslim.adapters import AdapterError
from jaxslim.methods.adapter import Adapter

TPA = noisy(Adapter(width=4, layers="0").start(BASE, None, KEY))
LORA = noisy(Adapter(kind="lora", linears=("q", "o", "up"), rank=3, alpha=5.0).start(BASE, None, KEY))


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def test_round_trip(tmp_path):
    config = TPA.save_adapter(tmp_path / "a", base_name="some/base")
    assert config["parameters"] == 2 * (2 * 4 * 16 + 4 + 16) and config["bytes"] == 4 * config["parameters"]
    arrays = load_file(tmp_path / "a" / WEIGHTS)
    assert arrays.keys() == TPA.params.keys() - BASE.params.keys()      # no base weight in the file
    again = BASE.load_adapter(tmp_path / "a", "fr")
    assert again.adapters == ("fr",) and again.spec == TPA.spec
    assert all(np.array_equal(again.params[k], v) for k, v in TPA.params.items())
    half = BASE.replace(params={k: v.astype(jnp.bfloat16) if v.ndim > 1 else v for k, v in BASE.params.items()})
    assert half.load_adapter(tmp_path / "a").spec == TPA.spec           # the same base, stored in bfloat16

    head = {"lm_head.weight": BASE.params["lm_head.weight"] + 1}
    trained = TPA.replace(params={**TPA.params, **head})
    trained.save_adapter(tmp_path / "b", head=True)
    both = BASE.load_adapter(tmp_path / "b")
    np.testing.assert_array_equal(both.params["lm_head.weight"], head["lm_head.weight"])
    rows = adapter_files.found(tmp_path)
    assert [(r["kind"], r["blocks"]) for r in rows] == [("parallel", 2)] * 2
    hub.save(again, tmp_path / "model")                                  # a model keeps its adapters
    kept = hub.load(tmp_path / "model")
    assert kept.spec.blocks == TPA.spec.blocks and kept.adapters == ("fr",)


def test_what_is_refused(tmp_path):
    TPA.save_adapter(tmp_path / "a")
    other = BASE.replace(params={k: v + 0.1 for k, v in BASE.params.items()})
    with pytest.raises(AdapterError, match="another base"):
        other.load_adapter(tmp_path / "a")
    assert other.load_adapter(tmp_path / "a", force=True).spec == TPA.spec
    with pytest.raises(AdapterError, match="does not fit|another base"):
        model("wav2vec2").load_adapter(tmp_path / "a")
    arrays = load_file(tmp_path / "a" / WEIGHTS)
    name = sorted(arrays)[0]
    for change, words in [({name: None}, f"missing {name}"), ({"x.adapter.up.weight": arrays[name]}, "unexpected x"),
                          ({name: np.zeros((7, 3), np.float32)}, "misshapen .*expected")]:
        save_file({k: v for k, v in {**arrays, **change}.items() if v is not None}, tmp_path / "a" / WEIGHTS)
        with pytest.raises(AdapterError, match=words):
            BASE.load_adapter(tmp_path / "a")
    save_file(arrays, tmp_path / "a" / WEIGHTS)
    blocks = json.loads((tmp_path / "a" / CONFIG).read_text())["blocks"]
    edit(tmp_path / "a", blocks={b: {"adapter": {**f["adapter"], "width": 9}} for b, f in blocks.items()})
    with pytest.raises(AdapterError, match="misshapen"):
        BASE.load_adapter(tmp_path / "a")
    edit(tmp_path / "a", blocks={"encoder.7.ffn1": blocks["encoder.0.ffn1"]})
    with pytest.raises(AdapterError, match="no block 'encoder.7.ffn1'"):
        BASE.load_adapter(tmp_path / "a")
    edit(tmp_path / "a", schema=2, gate="learned")
    with pytest.raises(AdapterError, match="schema 2.*unknown keys gate"):
        BASE.load_adapter(tmp_path / "a")
    edit(tmp_path / "a", schema=1)
    with pytest.raises(AdapterError, match="unknown keys gate"):
        BASE.load_adapter(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="copy the adapter again"):
        BASE.load_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match="no adapter_config.json"):
        BASE.load_adapter(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("")
    with pytest.raises(AdapterError, match="other.txt"):
        TPA.save_adapter(tmp_path / "full")


def test_peft_opens_our_lora(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    LORA.save_adapter(tmp_path / "lora", head=True)
    hub.save(BASE, tmp_path / "base")
    import transformers

    base = transformers.Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        want = theirs(**{k: torch.from_numpy(v) for k, v in X.items()}).logits.numpy()
    assert np.abs(want - logits(BASE)).max() > 1e-2
    tiny.close(logits(LORA), want, 2e-5)

    # and back: what PEFT writes, with patterns, rsLoRA and a saved head
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["linear_q", "output_dense"], use_rslora=True,
                             alpha_pattern={"output_dense": 3}, modules_to_save=["lm_head"], init_lora_weights=False)
    base = transformers.Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "base")
    made = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        made.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.5)
        want = made(**{k: torch.from_numpy(v) for k, v in X.items()}).logits.numpy()
    made.save_pretrained(tmp_path / "theirs")
    ours = BASE.load_adapter(tmp_path / "theirs")
    assert ours.adapters == ("theirs",) and len(ours.spec.blocks) == 3
    tiny.close(logits(ours), want, 2e-5)
    edit(tmp_path / "theirs", use_dora=True)
    with pytest.raises(AdapterError, match="use_dora"):
        BASE.load_adapter(tmp_path / "theirs")
    edit(tmp_path / "theirs", use_dora=False, peft_type="VERA")
    with pytest.raises(AdapterError, match="VERA"):
        BASE.load_adapter(tmp_path / "theirs")


def test_adapterhub_par_bn(tmp_path):
    """Their files, as modeling.py of adapters 1.3.0 names them, against its ParallelAdapter in hooks on a torch model:
    up(relu(down(residual))) * 4 is added to the FFN's output, the residual being the un-normalised input."""
    torch = pytest.importorskip("torch")
    from tiny_whisper import config as whisper

    from jaxslim.export import example

    theirs = tiny.torch_model(whisper(), "seq2seq")
    ours = hub.load(tiny.save(theirs, tmp_path / "base"))
    inner = theirs.model
    width, rng, arrays = inner.config.d_model, torch.Generator().manual_seed(0), {}
    for side in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(inner, side).layers):
            down, up = torch.nn.Linear(width, 5), torch.nn.Linear(5, width)
            for p in (*down.parameters(), *up.parameters()):
                p.data = 0.2 * torch.randn(p.shape, generator=rng)
            name = f"model.{side}.layers.{i}.output_adapters.adapters.fr"
            arrays |= {f"{name}.adapter_{k}.{n}": p.detach().numpy() for k, m in (("down.0", down), ("up", up))
                       for n, p in m.named_parameters()}
            layer.final_layer_norm.register_forward_hook(
                lambda m, a, out, layer=layer: setattr(layer, "residual", a[0]))
            layer.fc2.register_forward_hook(lambda m, a, out, layer=layer, down=down, up=up:
                                            out + 4.0 * up(torch.relu(down(layer.residual))))
    (tmp_path / "fr").mkdir()
    save_file(arrays, tmp_path / "fr" / "adapter.safetensors")
    own = dict(mh_adapter=False, output_adapter=True, original_ln_after=True, is_parallel=True, non_linearity="relu",
               reduction_factor=2, scaling=4.0, ln_before=False, ln_after=False, use_gating=False, phm_layer=False)
    (tmp_path / "fr" / CONFIG).write_text(json.dumps({"config": own, "name": "fr", "model_type": "whisper",
                                                      "hidden_size": width}))
    x = example(ours.spec)
    with torch.no_grad():
        want = theirs(**{k: torch.from_numpy(v.astype(np.int64) if v.dtype == np.int32 else v)
                         for k, v in x.items()}).logits.numpy()
    got = ours.load_adapter(tmp_path / "fr")
    assert got.adapters == ("fr",)
    tiny.close(np.asarray(got(**x).logits), want, 2e-5)
    edit(tmp_path / "fr", config={**own, "use_gating": True})
    with pytest.raises(AdapterError, match="use_gating"):
        ours.load_adapter(tmp_path / "fr")


def test_mms_files(tmp_path):
    base = model("wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True, adapter_attn_dim=6)
    other = tiny.slim(base.spec.replace(config={**base.spec.config, "vocab_size": 17}), seed=4)
    arrays = {k: np.asarray(v) for k, v in other.params.items() if ".adapter_layer." in k or k.startswith("lm_head")}
    save_file(arrays, tmp_path / "adapter.fra.safetensors")
    french = base.load_adapter(tmp_path / "adapter.fra.safetensors")
    assert french.spec["vocab_size"] == 17
    assert all(np.array_equal(french.params[k], v) for k, v in arrays.items())
    arrays.pop("lm_head.bias")
    save_file(arrays, tmp_path / "adapter.deu.safetensors")
    with pytest.raises(AdapterError, match="lacks lm_head.bias"):
        base.load_adapter(tmp_path / "adapter.deu.safetensors")
    with pytest.raises(AdapterError, match="no MMS adapters"):
        BASE.load_adapter(tmp_path / "adapter.fra.safetensors")


def test_the_command(tmp_path, capsys):
    hub.save(BASE, tmp_path / "base")
    hub.save(TPA, tmp_path / "adapted")
    run = lambda *a: (cli.main(["adapter", *map(str, a)]), capsys.readouterr())  # noqa: E731
    assert run("extract", tmp_path / "adapted", tmp_path / "a")[0] == 0
    code, out = run("ls", tmp_path, "--json")
    assert code == 0 and json.loads(out.out)[0]["parameters"] == adapters.extract(TPA).size
    assert "schema" in run("info", tmp_path / "a")[1].out
    code, out = run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "merged", "--json")
    assert code == 0 and float(json.loads(out.out)["logit_change"].split()[0]) < 1e-5
    assert hub.load(tmp_path / "merged").spec.blocks == adapter_merge.merge(TPA, check=False).spec.blocks
    assert run("merge", tmp_path / "base")[0] == 2 == run("curve", tmp_path / "base")[0]
    assert "MODEL DST" in run("extract", tmp_path / "base")[1].err
    assert run("info", tmp_path)[0] == 2


def test_curve(small, tmp_path, capsys):
    """The command on a data set: as many rows as adapters and one; the last is the base."""
    from jaxslim.evaluate import evaluate

    one = noisy(Adapter(width=4).start(hub.load(small["model"]), None, KEY))
    hub.save(one, tmp_path / "adapted", source=small["model"])
    assert cli.main(["adapter", "curve", str(tmp_path / "adapted"), small["test"], "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["kept"], r["dropped"]) for r in rows] == [(1, None), (0, "encoder.0.ffn")]
    assert rows[1]["score"] == evaluate(small["model"], small["test"], progress=False)["wer"]
