"""Frozen dataclasses <-> YAML, with `key=value` overrides. Strict: an unknown key is an error naming the nearest."""
from __future__ import annotations

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from jaxslim.errors import ClearError
from jaxslim.score import NORMALIZERS
from jaxslim.spec import nearest


class ConfigError(ClearError):
    """A key or value of a config that cannot be used; says where and what would be accepted."""


_SHORT = reprlib.Repr()   # aliases can make YAML's trees endless
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def _show(value: Any) -> str:
    return _SHORT.repr(value)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where speech (or text) comes from; see `jaxslim.data.rows.load_rows` for the kinds of DATA."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    language: str | None = None       # of the speech, for Whisper models: "en", "german", ...
    normalize: str = "none"           # of both texts before they are scored: a name of score.NORMALIZERS

    def __post_init__(self):
        if self.normalize not in NORMALIZERS:
            raise ConfigError(f"data.normalize {self.normalize!r}: use one of {', '.join(NORMALIZERS)}.")


@dataclasses.dataclass(frozen=True)
class Group:
    """The optimiser of one group of parameters."""

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "linear"          # linear | cosine | constant, after the warm-up, down to final_factor
    final_factor: float = 0.0         # last learning rate / peak
    weight_decay: float = 0.0         # never on vectors (norms, biases)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    every: int = 1                    # one update in so many steps; its schedule then counts updates
    optimizer: str = "adamw"          # adamw | muon: hidden matrices by Muon, steps as large as AdamW's; rest AdamW

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError(f"every {self.every}: an update comes every 1 or more steps.")
        if self.optimizer not in ("adamw", "muon"):
            raise ConfigError(f"optimizer {self.optimizer!r}: use adamw or muon.")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ConfigError(f"schedule {self.schedule!r}: use linear, cosine or constant.")


CHOICES = {"remat": ("none", "dots", "full"), "dtype": ("float32", "bfloat16", "float16"), "layers": ("loop", "scan"),
           "teacher_dtype": ("float32", "bfloat16"), "adam_mu_dtype": ("float32", "bfloat16"),
           "prng": ("threefry2x32", "hash")}


@dataclasses.dataclass(frozen=True)
class Train:
    """How a stage trains."""

    max_steps: int = 1000
    per_device_train_batch_size: int = 8       # rows a device takes in one microbatch
    per_device_batch_seconds: float = 0.0      # instead of rows: seconds of audio a device takes, padding included
    gradient_accumulation_steps: int = 1
    groups: dict[str, Group] = dataclasses.field(default_factory=lambda: {"main": Group()})
    max_grad_norm: float = 1.0                 # 0 = no clipping
    seed: int = 0
    dtype: str = "float32"                     # of the matrix products; parameters and losses are fp32
    remat: str = "none"                        # none | dots | full
    layers: str = "loop"                       # loop | scan: runs of equal layers compile as one
    teacher_dtype: str = "float32"             # of the teacher's stored parameters; bfloat16 halves their memory
    adam_mu_dtype: str = "float32"             # of Adam's first moment
    ema_decay: float = 0.0                     # e.g. 0.999: an average of the parameters is validated and returned
    prng: str = "threefry2x32"                 # of dropout; hash: fewer operations and faster to compile
    mesh: str = "data=-1"                      # e.g. data=4,fsdp=2; -1 = the rest of the devices
    logging_steps: int = 10
    save_steps: int = 500                      # 0 = only at the end
    save_total_limit: int = 2                  # latest checkpoints kept, beside the best
    snapshot_steps: int = 0                    # keep the model as a folder step-N every so often; 0 = never
    eval_steps: int = 0                        # validation WER every so often; 0 = never
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    buckets: tuple[float, ...] = ()            # in seconds (texts: tokens), one compiled step each; () = by data.
    #                                            Language models: one, the tokens of a row
    speed_perturb: tuple[float, ...] = ()      # e.g. [0.9, 1.0, 1.1]
    augment: dict[str, float] = dataclasses.field(default_factory=dict)   # noise | gain | room | telephone: chance
    join_seconds: float = 0.0                  # short clips also come joined, up to so long; 0 = never
    teacher_cache: str = ""                    # folder: the teacher's features, computed once, read instead of it
    profile_steps: int = 0                     # so many steps are traced into <run>/profile (xplane)
    max_nonfinite_steps: int = 20              # so many in a row stop the run

    def __post_init__(self):
        if self.max_steps < 1 or self.per_device_train_batch_size < 1 or self.gradient_accumulation_steps < 1:
            raise ConfigError("train: max_steps, per_device_train_batch_size and gradient_accumulation_steps must be "
                              "at least 1.")
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ConfigError(f"train.{key} {getattr(self, key)!r}: use {', '.join(known[:-1])} or {known[-1]}.")
        kinds = ("noise", "gain", "room", "telephone")
        for key, chance in self.augment.items():
            if key not in kinds or not 0 <= chance <= 1:
                raise ConfigError(f"train.augment {key}: {chance}: use {', '.join(kinds)}, with a chance from 0 to 1.")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay {self.ema_decay:g}: use 0 (none) or a number below 1, e.g. 0.999.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a recipe. Without `train` a stage is the method's start and finish."""

    name: str
    method: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)   # the method's dataclass, strict
    train: Train | None = None
    data: str | None = None                    # training DATA of this stage alone; None = the recipe's data.train

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w-]*", self.name):
            raise ConfigError(f"name {self.name!r} names a folder: use letters, digits, _ and -.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    teacher: str
    data: Data
    stages: tuple[Stage, ...]
    seed: int = 0
    control: bool = True                       # also train the untouched teacher on the same steps (DESIGN 6)
    bench_seconds: tuple[float, ...] = (1.0, 10.0, 60.0)   # audio lengths at which speed and memory are measured

    def __post_init__(self):
        names = [s.name for s in self.stages]
        if not names:
            raise ConfigError("The recipe has no stages.")
        if len(set(names)) != len(names):
            raise ConfigError(f"Stage names must differ; got {names}.")


@dataclasses.dataclass(frozen=True)
class Run(Train):
    """`jaxslim train CONFIG`: a model, its data, where to write, the keys of Train, and the options of the method."""

    model: str | dict[str, Any] = ""           # a name; or keys of a config.json: a new model with random weights
    # data: a new head for the characters of the training texts. Of a new language model: model or data: their
    # characters; bytes; or the name or folder of a model with a tokenizer.json
    vocabulary: str = "model"
    labels: str = "model"                      # data: a new classification head for the labels of the training data
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)  # changed keys: {hidden_dropout: 0.1}
    data: Data = Data()
    output_dir: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)   # of methods.finetune.Finetune


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number (PyYAML alone reads a string), and a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"the key {twice[0]!r} stands twice",
                                                    problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
                              list("-+0123456789"))


def parse_yaml(text: str, where: str = "YAML") -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # of 2020-13-45, lists as keys, depth
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def load(cls: type, path: str, overrides: Sequence[str] = ()) -> Any:
    """Reads a YAML file into dataclass `cls`; `overrides` are 'a.b=value', stages by name ('align.train.seed=1')."""
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError(f"Config {path} does not exist.")
    try:
        text = file.read_text()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}.") from None
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a YAML mapping.")
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep:
            raise ConfigError(f"Override {item!r} must look like key=value.")
        _override(tree, key.strip().lstrip("-"), parse_yaml(value, item))
    return build(cls, tree, path)


def _override(tree: dict, key: str, value: Any) -> None:
    *parents, last = key.replace("-", "_").split(".")
    node, listed = tree, tree.get("stages")
    for i, part in enumerate(parents):
        stages = {str(s.get("name")).replace("-", "_"): s for s in listed if isinstance(s, dict)} if (
            i == 0 and isinstance(listed, list)) else {}
        if part in stages:
            node = stages[part]
            continue
        if node.get(part) is None:
            if stages and part not in {f.name for f in dataclasses.fields(Recipe)}:
                raise ConfigError(f"Override {key}: no stage or key {part!r}.{nearest(part, stages)}")
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"Override {key}: {part!r} has no keys below it.")
    node[last] = value


def build(cls: type, tree: Any, where: str = "config") -> Any:
    """A dataclass from plain data, field types checked, unknown keys refused."""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected keys {sorted(fields)}, got {_show(tree)}.")
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {_show(key)}.{nearest(str(key), fields)} Known are "
                              f"{sorted(fields)}.")
    missing = [n for n, f in fields.items() if n not in tree and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}: missing {missing}.")
    try:
        return cls(**{k: _convert(hints[k], v, f"{where}: {k}") for k, v in tree.items()})
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(options[-1], value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: {_show(value)} is none of {list(args)}.")
        return value
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {_show(value)}.")
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {_show(value)}.")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is bool and not isinstance(value, bool) or not isinstance(value, kind) or (
            kind in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {_show(value)}.")
    return value


def to_dict(value: Any) -> Any:
    """Plain data of a config, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    return [to_dict(v) for v in value] if isinstance(value, list | tuple) else value


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """'a.b: 1 then, 2 now' for every leaf in which two trees of plain data differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*then, *now])
        return [d for k in keys for d in differences(then.get(k), now.get(k), f"{key}.{k}" if key else str(k))]
    show = lambda x: "set" if isinstance(x, Mapping) else repr(x)[:60]  # noqa: E731
    return [] if then == now else [f"{key}: {show(then)} then, {show(now)} now"]


def dump(value: Any) -> str:
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)
