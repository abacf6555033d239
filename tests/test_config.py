"""Config: strict YAML into frozen dataclasses, overrides by name."""
import dataclasses
import pathlib
import re
from typing import Any, Literal

import pytest

from jaxslim import config, recipe
from jaxslim.config import ConfigError, Group, Recipe, Run, Train

RECIPE = """
teacher: bundled:wav2vec2-ctc-en
data: {train: a, validation: b}
stages:
- name: align-it
  method: linearize
  options: {objective: align}
  train: {max_steps: 300, groups: {main: {learning_rate: 1e-3, warmup_steps: 20}}}
- {name: joint, method: linearize, train: {max_steps: 5}}
- {name: fold, method: linearize}
"""


@pytest.fixture
def load(tmp_path):
    """(text, *overrides) -> the config of a file with this text."""
    def read(text, *overrides, cls=Recipe):
        (tmp_path / "r.yaml").write_text(text)
        return config.load(cls, str(tmp_path / "r.yaml"), overrides)

    return read


def test_a_recipe(load):
    r = load(RECIPE)
    assert [s.name for s in r.stages] == ["align-it", "joint", "fold"] and r.seed == 0 and r.data.test is None
    assert r.stages[0].train.groups == {"main": Group(1e-3, warmup_steps=20)} and r.stages[2].train is None
    assert isinstance(r.stages[0].train.groups["main"].learning_rate, float)
    assert load(config.dump(r)) == r  # what a run folder keeps reads back as the same
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.seed = 1


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("3", 3), ("1_000", 1000),
                                         ("1.5", 1.5), ("e-3", "e-3"), ("1e-3x", "1e-3x"), ("'1e-3'", "1e-3"),
                                         ("[1e-3, a]", [1e-3, "a"]), ("", None), ("true", True)])
def test_numbers_as_people_write_them(text, value):
    got = config.parse_yaml(text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text, message", [
    (RECIPE + "sed: 1", r"unknown key 'sed'. Did you mean 'seed'\?"),
    (RECIPE.replace("max_steps: 300", "max_step: 300"), r"stages\[0\]: train.*'max_step'. Did you mean 'max_steps'"),
    (RECIPE.replace("warmup_steps", "warm_up"), r"groups.main: unknown key 'warm_up'. Did you mean 'warmup_steps'"),
    (RECIPE.replace("name: joint", "name: fold"), "Stage names must differ"),
    (RECIPE.replace("teacher", "#"), r"missing \['teacher'\]"),
    (RECIPE.replace("300", "many"), "max_steps: expected int, got 'many'"),
    (RECIPE.replace("300", "1.5"), "max_steps: expected int, got 1.5"),
    (RECIPE.replace("300", "true"), "max_steps: expected int, got True"),
    (RECIPE.replace("300", "0"), "must be at least 1"),
    (RECIPE.replace("1e-3", "fast"), "learning_rate: expected float, got 'fast'"),
    (RECIPE.replace("{train: a, validation: b}", "a"), "data: expected keys .*'validation'.*, got 'a'"),
    (RECIPE.replace("{main: {", "{main: {schedule: sine, "), "schedule 'sine': use linear, cosine or constant"),
    (RECIPE.replace("max_steps: 300", "remat: all"), "remat 'all': use none, dots or full"),
    (RECIPE.replace("max_steps: 300", "dtype: float33"), "dtype 'float33': use float32, bfloat16 or float16"),
    (RECIPE.replace("name: joint", "name: a/b"), "'a/b' names a folder"),
    (RECIPE + "seed: 1\nseed: 2", "'seed' stands twice"),
    ("teacher: x\ndata: {}\nstages: []", "no stages"),
    ("teacher: x\ndata: {}\nstages: align", "stages: expected a list, got 'align'"),
    ("teacher: x\ndata: {}\nstages: [align]", r"stages\[0\]: expected keys"),
    ("- a\n- b", "must be a YAML mapping"),
    ("a: [1", "not valid YAML"),
])
def test_what_is_wrong_is_named(load, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(text)
    assert "\n" not in str(error.value) and str(error.value).count("r.yaml") <= 1


def test_a_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        config.load(Recipe, "nowhere.yaml")


def test_overrides(load):
    r = load(RECIPE, "align-it.train.max_steps=10", "joint.train.groups.main.learning_rate=1e-4", "seed=3",
             "data.test=c", "fold.train.max-steps=7", "--joint.train.save_steps=0", "align-it.options.mixer=hedgehog")
    a, b, c = r.stages
    assert (a.train.max_steps, b.train.groups["main"].learning_rate, r.seed, r.data.test) == (10, 1e-4, 3, "c")
    assert c.train == Train(max_steps=7) and b.train.save_steps == 0 and b.train.max_steps == 5
    assert a.options == {"objective": "align", "mixer": "hedgehog"}
    assert load(RECIPE, "align_it.train.max_steps=10") == load(RECIPE, "align-it.train.max_steps=10")
    assert load(RECIPE, "joint.train=null").stages[1].train is None


@pytest.mark.parametrize("override, message", [
    ("seed", "must look like key=value"), ("sed=1", "Did you mean 'seed'"),
    ("jiont.train.max_steps=1", "no stage or key 'jiont'. Did you mean 'joint'"),
    ("seed.x=1", "seed: expected int, got"),
    ("teacher.x=1", "'teacher' has no keys below it"), ("joint.train.max_steps=[1", "not valid YAML"),
    ("joint.train.max_steps=x", "expected int, got 'x'"), ("stages.0.name=x", "'stages' has no keys below it"),
])
def test_wrong_overrides(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(RECIPE, override)


def test_overrides_of_a_recipe_that_is_none(load):
    with pytest.raises(ConfigError, match="stages"):
        load("stages: [align]", "align.train.max_steps=1")


def test_run(load):
    run = load("model: m\ndata: {train: x}\noutput_dir: o\nbuckets: [1, 2.5]", "max_steps=9", cls=Run)
    assert run.max_steps == 9 and run.buckets == (1.0, 2.5) and run.data.train == "x"


@dataclasses.dataclass(frozen=True)
class Options:
    kind: Literal["a", "b"] = "a"
    layers: Literal["all"] | tuple[int, ...] = "all"
    rate: float | None = None
    flag: bool = False
    anything: Any = None


@pytest.mark.parametrize("tree, want", [
    ({}, Options()), ({"layers": [1, 2]}, Options(layers=(1, 2))), ({"layers": "all", "rate": 2}, Options(rate=2.0)),
    ({"rate": None, "flag": True, "anything": {"x": [1]}}, Options(flag=True, anything={"x": [1]}))])
def test_field_types(tree, want):
    assert config.build(Options, tree) == want


@pytest.mark.parametrize("tree, message", [
    ({"kind": "c"}, r"'c' is none of \['a', 'b'\]"), ({"layers": "some"}, "layers"), (3, "expected keys"),
    ({"layers": [1.5]}, r"layers\[0\]: expected int"), ({"flag": 1}, "expected bool"),
    ({"rate": "x"}, "expected float")])
def test_wrong_field_types(tree, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Options, tree, "here")


@pytest.mark.parametrize("path", sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.yaml")),
                         ids=lambda path: path.stem)
def test_the_projects_own_files_are_valid(path):
    values = config.parse_yaml(path.read_text())
    cfg = config.load(Recipe if "stages" in values else Run, str(path))
    for stage in cfg.stages if "stages" in values else ():
        recipe.method_of(stage)
        assert not stage.train or stage.train.groups
    command = "jaxslim slim" if "stages" in values else r"(jaxslim train|python scripts/\w+\.py)"
    assert re.search(f"{command} configs/{path.name}", path.read_text())
