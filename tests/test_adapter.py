"""adapter: what each kind trains, slots and ids, merging; on every family, exactly."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_families import BERT, CONFORMER, HEADS, STABLE, batch

from jaxslim import adapter_merge, adapters, config, cost
from jaxslim.adapters import AdapterError
from jaxslim.methods import METHODS
from jaxslim.methods.adapter import Adapter
from jaxslim.methods.quantize import quantize
from jaxslim.models import bind
from jaxslim.slim import Slim, _forward
from jaxslim.spec import SpecError

FAMILIES = {"wav2vec2-conformer": CONFORMER, "wav2vec2-bert": BERT, "parakeet_ctc": {}, "wav2vec2": {},
            "wavlm": dict(STABLE, num_buckets=20, max_bucket_distance=30)}
KINDS = ("tpa", "parallel", "houlsby", "bapna", "lora", "bitfit", "head", "full")
KEY = jax.random.key(0)


FAST = dict(num_hidden_layers=1, conv_dim=[16, 16], conv_kernel=[10, 8], conv_stride=[5, 8], num_feat_extract_layers=2,
            num_conv_pos_embeddings=8, hidden_size=16, intermediate_size=24, mask_time_prob=0.0)


def model(family="wav2vec2-conformer", head="ctc", **changes):
    return tiny.slim(tiny.config(family, **{**HEADS, **FAST, **FAMILIES.get(family, {}), **changes}), head)


BASE = model()
DEEP = model(num_hidden_layers=2)
LENGTHS = (600, 330, 600)
X = batch("wav2vec2", lengths=LENGTHS)


def noisy(student: Slim, seed=1) -> Slim:
    """The model with random numbers in its adapters."""
    rng = np.random.default_rng(seed)
    return student.replace(params={k: jnp.asarray(0.3 * rng.standard_normal(v.shape), jnp.float32)
                                   if adapters.LEAF.search(k) else v for k, v in student.params.items()})


def logits(m, x=X, **options):
    return np.asarray(m(**x, **options).logits)


# ---- the form ----


def test_a_parallel_adapter_is_its_definition():
    """x + 0.5 (FFN(LN x) + A(.)) at both half steps, in NumPy from the taps of the base; raw and normed input."""
    p = BASE.params
    x = np.asarray(BASE(**X, taps=("embedding",)).taps["embedding"], np.float64)
    owner = "wav2vec2_conformer.encoder.layers.0."
    norm = lambda h, n: ((h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)  # noqa: E731
                         * np.float64(p[n + ".weight"]) + np.float64(p[n + ".bias"]))
    taps = ("encoder.0.ffn1.in", "encoder.0.ffn1.out")
    base = BASE(**X, taps=taps).taps
    for kind in ("normed", "raw"):
        m = noisy(Adapter(input=kind, width=5, act="silu").start(BASE, None, KEY))
        q = {k.removeprefix(f"{owner}ffn1.adapter."): np.float64(v) for k, v in m.params.items()
             if k.startswith(f"{owner}ffn1.adapter.")}
        assert set(q) == {"down.weight", "down.bias", "up.weight", "up.bias"}
        source = norm(x, f"{owner}ffn1_layer_norm") if kind == "normed" else x
        h = source @ q["down.weight"].T + q["down.bias"]
        want = base["encoder.0.ffn1.out"] + (h / (1 + np.exp(-h))) @ q["up.weight"].T + q["up.bias"]
        have = np.asarray(m(**X, taps=taps).taps["encoder.0.ffn1.out"])
        valid = np.abs(have).sum(-1) > 0
        tiny.close(have[valid], np.asarray(want)[valid], 1e-5)
        assert "wav2vec2_conformer.encoder.layers.0.ffn2.adapter.up.weight" in m.params  # two in a block


def test_what_the_other_kinds_compute():
    """Houlsby: behind the sub-layer, before its residual; Bapna: behind the layer, with a norm."""
    taps = ("encoder.0.attention.out", "encoder.0")
    base = BASE(**X, taps=taps).taps
    for kind, tap, part in (("houlsby", taps[0], "self_attn"), ("bapna", taps[1], "ffn2")):
        m = noisy(Adapter(kind=kind, width=4).start(BASE, None, KEY))
        q = {k.partition(f"layers.0.{part}.adapter.")[2]: np.float64(v) for k, v in m.params.items()
             if f"layers.0.{part}.adapter." in k}
        x = np.float64(base[tap])
        h = x
        if kind == "bapna":
            h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            h = h * q["norm.weight"] + q["norm.bias"]
        assert ("norm.weight" in q) == (kind == "bapna")
        y = x + np.maximum(h @ q["down.weight"].T + q["down.bias"], 0) @ q["up.weight"].T + q["up.bias"]
        have = np.asarray(m(**X, taps=taps).taps[tap])
        if kind == "bapna":  # the layer's input changed by nothing before
            valid = np.abs(have).sum(-1) > 0
            tiny.close(have[valid], y[valid], 1e-5)
        else:
            valid = np.abs(have).sum(-1) > 0
            tiny.close(have[valid], y[valid], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_train_what_they_should(family, kind):
    base = model(family)
    student = Adapter(kind=kind, width=6, rank=2).start(base, None, KEY)
    x = batch(family, lengths=LENGTHS)
    if kind == "tpa":
        want = logits(base, x)
        tiny.close(logits(student, x), want, 1e-6)   # XLA may round sums of another program otherwise
        np.testing.assert_array_equal(logits(noisy(student).disable_adapter(), x), want)   # bit for bit
    group = Adapter(kind=kind).group
    trained = {k for k in student.params if group(k) == "main"}
    new = student.params.keys() - base.params.keys()
    assert all(student.params[k] is base.params[k] for k in base.params)
    if kind in ("tpa", "parallel", "houlsby", "bapna", "lora"):
        assert trained == new and new
        one = "ffn" in "".join(bind_parts(base)) and not any(p.endswith("1") for p in bind_parts(base))
        count = {"tpa": 1 if one else 2, "parallel": 1, "houlsby": 2, "bapna": 1, "lora": 4}[kind]
        leaves = ("lora_A.weight", "lora_B.weight") if kind == "lora" else ("up.weight",)
        assert sum(k.endswith(leaves) for k in new) == count
    elif kind == "bitfit":
        assert trained and all(k.endswith(".bias") and ".layers." in k and "conv_layers" not in k for k in trained)
    elif kind == "head":
        assert {k.split(".")[0] for k in trained} == {"ctc_head" if "parakeet" in family else "lm_head"}
    else:
        assert {k for k in base.params if "running_" not in k and "num_batches" not in k} == trained


def bind_parts(m):
    from jaxslim.models.roles import FAMILIES as every

    return every[m.spec.family].parts


def test_praxis_start_and_mms():
    praxis = Adapter(init="praxis", width=6).start(BASE, None, KEY)
    assert np.abs(logits(praxis) - logits(BASE)).max() > 1e-4   # the up bias leaks
    base = model("wav2vec2", **STABLE)
    mms = Adapter(kind="mms", width=6).start(base, None, KEY)
    np.testing.assert_array_equal(logits(mms), logits(base))
    assert mms.spec["adapter_attn_dim"] == 6 and Adapter(kind="mms").group(
        "wav2vec2.encoder.layers.0.adapter_layer.linear_1.weight") == "main"
    assert Adapter().group("wav2vec2.adapter.layers.0.conv.weight") == "frozen"   # a conv adapter of the base
    with pytest.raises(SpecError, match="do_stable_layer_norm"):
        Adapter(kind="mms").start(BASE, None, KEY)


@pytest.mark.parametrize("family, head", [("distilbert", "none"), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("whisper", "seq2seq"), ("bert", "classification"), ("hubert", "ctc")))])
def test_other_encoders(family, head):
    if family == "whisper":
        from tiny_whisper import config as whisper
        base = tiny.slim(whisper(), head)
    elif family == "hubert":
        base = model(family)
    else:
        from transformers import CONFIG_MAPPING
        small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
                     max_position_embeddings=40, dim=16, n_layers=1, n_heads=2, hidden_dim=20)
        base = tiny.slim(CONFIG_MAPPING[family](**small).to_dict(), head)
    from jaxslim.export import example
    x = example(base.spec)
    out = lambda m, **o: np.asarray((lambda y: y.last_hidden_state if y.logits is None else y.logits)(m(**x, **o)))  # noqa
    for kind in ("tpa", "bapna") if family != "bert" else ("houlsby",):
        student = Adapter(kind=kind, width=4).start(base, None, KEY)
        tiny.close(out(student), out(base), 1e-6)
        changed = noisy(student)
        assert np.abs(out(changed) - out(base)).max() > 1e-3
        assert cost.macs(student.spec, 1.0).total == cost.traced_macs(student.spec, 1.0)
    fused = adapter_merge.merge(noisy(Adapter(width=4).start(base, None, KEY)), check=False)
    tiny.close(out(fused), out(noisy(Adapter(width=4).start(base, None, KEY))), 1e-5)
    if family == "whisper":   # also beside the decoder's blocks
        both = Adapter(blocks=(r"^(en|de)coder\.\d+\.ffn",), width=4).start(base, None, KEY)
        assert {b.split(".")[0] for b in both.spec.blocks} == {"encoder", "decoder"}


# ---- placement ----


def test_placement():
    spec = DEEP.spec
    place = lambda **o: Adapter(**o).placement(spec)  # noqa: E731
    assert set(place(layers="1")) == {"encoder.1.ffn1", "encoder.1.ffn2"} == set(place(layers=(1,)))
    assert set(place(layers="0-1")) == set(place())
    assert set(place(blocks=(r"0\.ffn2",))) == {"encoder.0.ffn2"}
    widths = [f["adapter"]["width"] for f in place(width=8, widths={r"encoder\.0": 3, "ffn2": 5}).values()]
    assert widths == [3, 3, 8, 5]
    assert place(kind="lora", linears=("up", "o"), rank=3)["encoder.0.ffn1"] == {
        "lora": {"up": {"rank": 3, "alpha": 16.0}}}
    for options, words in [(dict(layers=(2,)), "layers 0 to 1"), (dict(layers="1-x"), "write all"),
                           (dict(blocks=("ffn3",)), "'ffn3' matches no block"), (dict(widths={"ffn9": 2}), "'ffn9'"),
                           (dict(kind="bapna", blocks=("ffn1",)), "takes bapna"),
                           (dict(kind="lora", linears=("x",)), "takes lora|linears")]:
        with pytest.raises(SpecError, match=words):
            place(**options)
    with pytest.raises(SpecError, match="has adapter already"):
        adapters.insert(Adapter(width=2).start(DEEP, None, KEY), place())
    with pytest.raises(SpecError, match="no head"):
        Adapter(train_head=True).start(model(head="none"), None, KEY)
    with pytest.raises(SpecError, match="one of"):
        bind.shapes(spec.with_block("encoder.0.ffn1", adapter={"kind": "parallel", "width": 3, "input": "output"}))
    with pytest.raises(SpecError, match="attention takes a sequential"):
        spec.with_block("encoder.0.attention", adapter={"kind": "parallel", "width": 3})
    with pytest.raises(SpecError, match="positive width"):
        spec.with_block("encoder.0.ffn1", adapter={"kind": "parallel", "width": 0})
    options = config.build(METHODS["adapter"], {"kind": "tpa", "layers": "1", "widths": {"ffn1": 3}})
    assert options.placement(spec)["encoder.1.ffn1"]["adapter"]["width"] == 3


@pytest.mark.parametrize("kind, family", [("tpa", "parakeet_ctc"), ("houlsby", "wav2vec2-conformer"),
                                          ("bapna", "wavlm"), ("lora", "wav2vec2-bert")])
def test_costs_are_exact(kind, family):
    spec = Adapter(kind=kind, width=5, rank=3, norm=True, linears=("q", "up")).start(model(family), None, KEY).spec
    several = adapters.insert(model(family), Adapter(kind=kind, width=5, slots=3).placement(model(family).spec)).spec
    for s in (spec, several):
        assert cost.macs(s, 0.3, 2).total == cost.traced_macs(s, 0.3, 2) > cost.macs(model(family).spec, 0.3, 2).total
        assert cost.params(s) == sum(v.size for v in bind.shapes(s).values() if v.dtype == np.float32)
    int8 = quantize(model(family))
    assert cost.macs(int8.spec, 0.3).total == cost.macs(model(family).spec, 0.3).total


# ---- several in one batch ----


@pytest.mark.parametrize("kind", ["tpa", pytest.param("bapna", marks=pytest.mark.slow), "lora"])
def test_a_mixed_batch_equals_single_runs(kind):
    many = BASE
    for i, name in enumerate("abc"):   # of different widths: the narrower are filled up
        one = noisy(Adapter(kind=kind, width=3 + i, rank=2 + i).start(BASE, None, KEY), seed=i)
        many = adapters.put(many, name, adapters.extract(one))
    tiny.close(logits(many.set_adapter("c")), logits(one), 1e-6)
    assert many.adapters == ("a", "b", "c") and many.spec.slots == 3
    ids = adapters.ids(many, ["b", None, "c"])
    mixed = logits(many, adapter_ids=ids)
    base = logits(BASE)
    for row, i in enumerate(ids):
        tiny.close(mixed[row], logits(many, adapter_ids=i)[row], 1e-6)
    assert all(np.abs(mixed[r] - base[r]).max() > 1e-3 for r in (0, 2))
    frames = np.tile(ids[:, None], (1, mixed.shape[1]))
    tiny.close(logits(many, adapter_ids=frames), mixed, 1e-6)
    frames[0, mixed.shape[1] // 2:] = -1   # by frame: half a clip with the base
    if kind == "tpa":
        tap, cut = "encoder.0.ffn1.out", mixed.shape[1] // 2
        half, plain, whole = (many(**X, adapter_ids=i, taps=(tap,)).taps[tap][0] for i in (frames, -1, ids[0]))
        tiny.close(half[:cut], whole[:cut], 1e-6)
        tiny.close(half[cut:], plain[cut:], 1e-6)
    left = adapters.delete(many, "a")
    assert left.adapters == ("b", "c")
    only = left.delete_adapter("b")
    tiny.close(logits(only), logits(many.set_adapter("c")), 1e-6)
    assert only.delete_adapter("c").spec == BASE.spec


def test_swapping_and_choosing_compile_nothing():
    many = BASE
    for name in "ab":
        many = adapters.put(many, name, adapters.extract(noisy(Adapter(width=4).start(BASE, None, KEY), ord(name))))
    traced = []

    @jax.jit
    def mine(m, x):
        traced.append(1)
        return m(**x).logits

    logits(many), mine(many, X)
    before = _forward._cache_size()
    for name in "abab":
        new = adapters.extract(noisy(Adapter(width=4).start(BASE, None, KEY), 7))
        swapped = adapters.put(many, name, new).set_adapter(name)
        assert np.abs(logits(swapped) - logits(many)).max() > 1e-3
        mine(swapped, X), logits(swapped.disable_adapter())
    narrow = adapters.put(many, "a", adapters.extract(noisy(Adapter(width=2).start(BASE, None, KEY), 7)))
    logits(narrow)
    mine(narrow.replace(adapters=("other", "b")), X)   # a name is no reason either
    assert _forward._cache_size() == before and len(traced) == 1


def test_training_several_at_once():
    """Rows train their own slot only; the base has no gradient path into the state."""
    student = Adapter(width=4, slots=3, init="praxis").start(BASE, None, KEY)
    leaf = "wav2vec2_conformer.encoder.layers.0.ffn2.adapter.up.weight"

    def loss(params, ids):
        return (student.replace(params={**student.params, **params})(**X, adapter_ids=ids).logits ** 2).mean()

    trained = {k: v for k, v in student.params.items() if adapters.LEAF.search(k)}
    grad = jax.jit(jax.grad(loss))
    for ids in (np.array([0, 2, -1]), np.array([2, 2, 2])):
        g = grad(trained, ids)[leaf]
        assert [bool(np.abs(g[s]).max() > 0) for s in range(3)] == [s in ids for s in range(3)]
    frames = np.tile(np.array([0, 2, -1])[:, None], (1, logits(BASE).shape[1]))
    tiny.close(grad(trained, frames)[leaf], grad(trained, frames[:, 0])[leaf], 1e-5)


def test_wrong_ids():
    one = Adapter(width=4).start(BASE, None, KEY)
    many = adapters.put(one, "b", adapters.extract(one))
    with pytest.raises(ValueError, match="2 adapters.*set_adapter"):
        many.replace(active=None)(**X)
    for ids in ([0, 1, 2], [-2, 0, 0], [0.5, 0, 0]):
        with pytest.raises(ValueError, match="integers from -1"):
            many(**X, adapter_ids=np.array(ids))
    with pytest.raises(ValueError, match="no adapters"):
        BASE(**X, adapter_ids=np.zeros(3, int))
    with pytest.raises(AdapterError, match="No adapter 'c'"):
        many.set_adapter("c")
    with pytest.raises(AdapterError, match="act 'relu' and 'gelu'"):
        many.add_adapter("g", act="gelu", width=4)


# ---- merging ----


@pytest.mark.parametrize("family", ["wav2vec2-conformer", pytest.param("parakeet_ctc", marks=pytest.mark.slow)])
def test_merge_and_unmerge(family):
    base, x = model(family), batch(family, lengths=LENGTHS)
    one = noisy(Adapter(width=6, scale=2.0).start(base, None, KEY))
    fused = one.merge()
    assert not fused.spec.slots and fused.spec.ffn(next(iter(one.spec.blocks))).units == 24 + 6
    tiny.close(logits(fused, x), logits(one, x), 1e-5)
    again = adapter_merge.unmerge(fused)
    assert again.spec == one.spec
    for k, v in one.params.items():
        np.testing.assert_array_equal(again.params[k], v, err_msg=k)
    assert cost.macs(fused.spec, 0.3).total == cost.traced_macs(fused.spec, 0.3) == cost.macs(one.spec, 0.3).total


def test_merge_lora(caplog):
    one = noisy(Adapter(kind="lora", linears=("q", "v", "up"), rank=3).start(BASE, None, KEY))
    with caplog.at_level("INFO", "jaxslim"):
        fused = one.merge()
    assert fused.spec == BASE.spec and "largest change of the logits" in caplog.text
    tiny.close(logits(fused), logits(one), 1e-5)
    half = one.replace(params={k: v.astype(jnp.bfloat16) if not adapters.LEAF.search(k) else v
                               for k, v in one.params.items()})
    assert adapter_merge.merge(half, check=False).params[
        "wav2vec2_conformer.encoder.layers.0.self_attn.linear_q.weight"].dtype == jnp.float32
    with pytest.raises(AdapterError, match="cannot be taken out"):
        adapter_merge.unmerge(fused)


def test_what_cannot_be_merged_says_why():
    for options, words in [(dict(kind="houlsby"), "sequential"), (dict(input="raw"), "before its norm"),
                           (dict(norm=True), "norm of its own"), (dict(base="int8"), "int8")]:
        with pytest.raises(AdapterError, match=words):
            adapter_merge.merge(Adapter(width=2, **options).start(BASE, None, KEY), check=False)


def test_an_empty_ffn_takes_an_adapter():
    spec = BASE.spec.with_block("encoder.0.ffn1", units=0)
    base = tiny.slim(spec)
    one = noisy(Adapter(width=6).start(base, None, KEY))
    fused = adapter_merge.merge(one, check=False)
    tiny.close(logits(fused), logits(one), 1e-5)
    again = adapter_merge.unmerge(fused)
    assert again.spec == one.spec and again.params.keys() == one.params.keys()


# ---- the base ----


def test_int8_and_bfloat16_bases():
    small = quantize(BASE)
    weights = [k for k, v in small.params.items() if v.dtype == jnp.int8]
    assert len(weights) == 4 + 4 and all(f"{k}_scale" in small.params for k in weights)
    tiny.close(logits(small), logits(BASE), 0.05)
    for k in weights:
        back = np.float32(small.params[k]) * np.asarray(small.params[f"{k}_scale"])[:, None]
        assert np.abs(back - BASE.params[k]).max() <= np.asarray(small.params[f"{k}_scale"]).max() / 2 * 1.01
    for kind in ("bfloat16", "int8"):
        student = Adapter(width=4, base=kind).start(BASE, None, KEY)
        kinds = {str(v.dtype) for k, v in student.params.items() if adapters.LEAF.search(k)}
        assert kinds == {"float32"}
        want = {"bfloat16": "bfloat16", "int8": "int8"}[kind]
        assert str(student.params["wav2vec2_conformer.encoder.layers.0.ffn1.output_dense.weight"].dtype) == want
        assert np.isfinite(logits(student)).all()
    whole = Adapter(width=4, base="bfloat16")
    assert all(v.dtype == np.float32 for k, v in whole.finish(whole.start(BASE, None, KEY), None).params.items()
               if v.dtype != np.int32)
    assert dataclasses.replace(whole, width=4) == whole
