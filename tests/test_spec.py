"""Spec: equality, JSON, and every field that is checked."""
import json

import pytest
import tiny

from jaxslim.models import bind, roles
from jaxslim.spec import Spec, SpecError, canonical, kind, nearest

CONFIG = tiny.config()


def spec(**blocks):
    return Spec(CONFIG, "wav2vec2", "ctc", {name.replace("__", "."): fields for name, fields in blocks.items()})


def test_equal_specs_hash_alike_whatever_the_order():
    a = Spec(CONFIG, "wav2vec2", "ctc", {"encoder.0.ffn": {"units": 7}, "encoder.0.attention": {"heads": (0, 2)}})
    b = Spec(dict(reversed(CONFIG.items())), "wav2vec2", "ctc",
             {"encoder.0.attention": {"heads": [0, 2]}, "encoder.0.ffn": {"units": 7}})
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != spec() and a != spec().replace(head="none") and a != "text"
    assert bind.shapes(a) is bind.shapes(b)  # the caches behind it find it


def test_json_round_trip():
    a = spec(frontend__1={"channels": 9}, encoder__0__attention={"heads": [1], "qk_dim": 6, "scale": 0.5, "v_dim": 3},
             encoder__1__attention={"mixer": "hedgehog", "options": {"features": 5, "window": 0}},
             encoder__1__ffn={"units": 4, "down_rank": 2, "lora": {"up": {"rank": 2, "alpha": 4}}})
    stored = json.loads(json.dumps({**CONFIG, "jaxslim": a.to_json()}))
    assert Spec.from_json(stored) == a
    assert "jaxslim" in stored  # what is passed in stays as it is


def test_a_block_equal_to_the_config_is_no_block():
    assert spec(encoder__0__ffn={}) == spec() and not spec(encoder__0__ffn={}).blocks
    changed = spec().with_block("encoder.0.ffn", units=7)
    assert changed.ffn("encoder.0.ffn").units == 7 and spec().ffn("encoder.0.ffn").units == 48
    assert changed.with_block("encoder.0.ffn", units=None) == spec()


def test_resolved_fields():
    a = spec(encoder__0__attention={"heads": [0, 3], "qk_dim": 4}).attention("encoder.0.attention")
    assert a[:6] == ("softmax", {}, (0, 3), 4, 8, 8**-0.5)  # truncation leaves the scale
    b = spec(encoder__0__attention={"mixer": "hedgehog"}).attention("encoder.0.attention")
    assert b.options["features"] == 64 and b.heads == (0, 1, 2, 3)
    assert spec(frontend__1={"channels": 9}).channels(1) == 9 and spec().channels(-1) == 1


def test_config_values_of_older_files_come_from_the_family():
    old = Spec({k: v for k, v in CONFIG.items() if k != "layerdrop"}, "wav2vec2", "ctc")
    assert old["layerdrop"] == 0.1 and old.get("nothing", 5) == 5  # transformers' default
    with pytest.raises(KeyError):
        old["nothing"]


@pytest.mark.parametrize("blocks, message", [
    ({"encoder.0.atention": {"heads": []}}, "Did you mean 'attention'"),
    ({"encoder.0": {"heads": []}}, "none that can differ"),
    ({"0": {"heads": []}}, "none that can differ"),
    ({"encoder.0.attention": {"head": []}}, "no field 'head'. Did you mean 'heads'"),
    ({"encoder.0.ffn": {"mixer": "softmax"}}, "encoder.0.ffn has no field 'mixer'"),
    ({"encoder.0.attention": {"mixer": "hedghog"}}, "unknown mixer 'hedghog'; known are"),
    ({"encoder.0.attention": {"mixer": "hedgehog", "options": {"feature": 1}}}, "Did you mean 'features'"),
    ({"encoder.0.attention": {"lora": {"x": {"rank": 1, "alpha": 1}}}}, "LoRA on 'x'"),
])
def test_unknown_fields_are_named(blocks, message):
    with pytest.raises(SpecError, match=message):
        Spec(CONFIG, "wav2vec2", "ctc", blocks)


@pytest.mark.parametrize("heads", [[4], [-1, 0], [1, 1]])
def test_heads_are_those_of_the_original(heads):
    with pytest.raises(SpecError, match="encoder.0.attention.*different numbers from 0 to 3"):
        spec(encoder__0__attention={"heads": heads}).attention("encoder.0.attention")


@pytest.mark.parametrize("block", ["encoder.2.attention", "frontend.3", "decoder.0.ffn", "encoder.ffn"])
def test_a_block_that_the_model_has_not(block):
    field = {"attention": {"heads": []}, "ffn": {"units": 1}, "frontend": {"channels": 1}}[kind(block)]
    with pytest.raises(SpecError, match=f"no block '{block}'"):
        bind.shapes(Spec(CONFIG, "wav2vec2", "ctc", {block: field}))


@pytest.mark.parametrize("ours, message", [
    ({"version": 9, "family": "wav2vec2"}, "version 9, this release reads 1"),
    ({"family": "wav2vec2"}, "version None"),
    ({"version": 1, "family": "wav2vec2", "gates": {}}, r"unknown keys \['gates'\]"),
    ({"version": 1, "head": "ctc"}, "no 'family'"),
])
def test_foreign_json_is_refused(ours, message):
    with pytest.raises(SpecError, match=message):
        Spec.from_json({**CONFIG, "jaxslim": ours})


def test_unknown_family_lists_the_known():
    with pytest.raises(SpecError, match="'bart' is not supported; supported are .*hubert"):
        bind.shapes(Spec(CONFIG, "bart"))


def test_small_helpers():
    assert [kind(b) for b in ("encoder.3.attention", "frontend.1", "encoder.3", "head")] == [
        "attention", "frontend", "encoder", "head"]
    assert nearest("atention", ["attention", "ffn"]) == " Did you mean 'attention'?" and nearest("zzz", ["a"]) == ""
    assert canonical({"b": 1, "a": "ä"}) == '{"a":"ä","b":1}'


def test_blocks_and_roles_name_parameters_that_exist():
    for head in ("ctc", "none"):
        s = Spec(CONFIG, "wav2vec2", head)
        names = bind.shapes(s)
        blocks = roles.blocks(s)
        assert blocks[:3] == ("frontend.0", "frontend.1", "frontend.2") and ("head" in blocks) == (head == "ctc")
        for block in (*blocks, *roles.layers(s)):
            for role, name in roles.roles(s, block).items():
                if (block, role) in {("frontend.1", "norm"), ("frontend.2", "norm")} or role == "bottleneck":
                    continue  # group norm: the first convolution only; bottlenecks: models that have them
                assert any(n.startswith(name + ".") for n in names), (block, role, name)


def test_defaults_are_those_of_transformers():
    """After another transformers release changes one: write jaxslim/assets/defaults.json anew from CONFIG_MAPPING."""
    import json

    from transformers import CONFIG_MAPPING

    from jaxslim import spec
    from jaxslim.models.bind import FAMILIES

    for family in FAMILIES:
        theirs = json.loads(json.dumps(CONFIG_MAPPING[family]().to_dict()))
        theirs.pop("transformers_version", None)
        assert spec._defaults(family) == theirs, family
