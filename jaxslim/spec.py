"""Spec: the shape of a model, as data.

A `Spec` is the Hugging Face config as read, the family and head it was read for, and `blocks`: only what differs
from that config, keyed by block id (`frontend.1`, `encoder.3.attention`, `encoder.3.ffn`). It is what `config.json`
stores under the key `jaxslim`, it hashes by its canonical JSON, and it is the only authority on shapes: parameters
are checked against it, never the other way round.
"""
from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxslim.errors import ClearError

VERSION = 1

# The fields a block of each kind may carry. A kind is the last word of the block id without its number.
LINEARS = {**dict.fromkeys(("attention", "cross"), ("q", "k", "v", "o")),
           **dict.fromkeys(("ffn", "ffn1", "ffn2"), ("up", "down"))}
FIELDS = {
    "frontend": {"channels"},
    "attention": {"mixer", "options", "heads", "qk_dim", "v_dim", "scale", "lora", "adapter", "int8", "activations",
                  *(f"{r}_rank" for r in "qkvo")},
    **dict.fromkeys(("ffn", "ffn1", "ffn2"), {"units", "up_rank", "down_rank", "lora", "adapter", "int8",
                                                     "activations"}),  # of the int8 linears
    "conv": {"channels"},
    "generator": {"attention", "targets", "layers", "steps", "inject", "skip", "embedding"},
}
FIELDS["cross"] = FIELDS["attention"] - {"mixer", "options"}
# Gates a block may carry while it is pruned, with options: {"tile": 8} rounds their number, {"uniform": True} makes
# it the same in all layers, {"norm": "all"} leaves norms over closed channels too.
GATES = {"frontend": ("channels",), **dict.fromkeys(("attention", "cross"), ("heads", "qk", "vo", "block")),
         **dict.fromkeys(("ffn", "ffn1", "ffn2"), ("units", "block")), "conv": ("channels", "block")}
for _kind in GATES:
    FIELDS[_kind] = FIELDS[_kind] | {"gates"}
# Config keys that a family calls otherwise; {side} is the side of a block (encoder, decoder).
NAMES = {
    "whisper": {"hidden_size": "d_model", "num_hidden_layers": "{side}_layers", "hidden_dropout": "dropout",
                "num_attention_heads": "{side}_attention_heads", "intermediate_size": "{side}_ffn_dim",
                "layerdrop": "{side}_layerdrop", "hidden_act": "activation_function"},
    "gemma3n_audio": {"num_hidden_layers": "conf_num_hidden_layers",
                      "num_attention_heads": "conf_num_attention_heads"},
    **dict.fromkeys(("bert", "roberta"), {"hidden_dropout": "hidden_dropout_prob",
                                          "attention_dropout": "attention_probs_dropout_prob"}),
    "distilbert": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                   "intermediate_size": "hidden_dim", "hidden_dropout": "dropout", "hidden_act": "activation"},
}
LINEAR = {"window": 0, "causal": False}
RECURRENT = {"direction": "sum", "inner": 0, "conv": 4, "bias": False}   # inner: channels, 0 = the model's width
MIXERS = {"softmax": {}, "linformer": {"length": 512, "features": 256, "sharing": "none"},
          "elu": LINEAR, "t2r": {"features": 64, **LINEAR}, "hedgehog": {"features": 64, **LINEAR},
          "mamba2": {**RECURRENT, "head_dim": 64, "state": 128, "groups": 1, "chunk": 64},
          "mamba": {**RECURRENT, "state": 16, "rank": 0, "chunk": 32},    # rank 0 = a sixteenth of the width
          "gated_deltanet": {**RECURRENT, "head_dim": 64, "chunk": 64},
          "gla": {"direction": "sum", "inner": 0, "bias": False, "head_dim": 64, "key_dim": 64, "rank": 16, "tau": 16,
                  "chunk": 64}}                                           # bias of the output alone


GENERATORS = ("previous", "full", "axial")   # what a row of a generative student sees
# kind of an adapter -> what it may read (models/adapters.py says what that is); the first is the default
ADAPTERS = {"parallel": ("normed", "raw"), "sequential": ("output", "layer"), "merged": ("normed",)}


class SpecError(ClearError):
    """A Spec that cannot be built; says which block and field and what would be accepted."""


def nearest(word: str, choices) -> str:
    """' Did you mean X?' or '' for error messages."""
    close = difflib.get_close_matches(word, [str(c) for c in choices], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Attention(NamedTuple):
    """Resolved fields of an attention block. `heads` index the heads of the original model."""

    mixer: str
    options: dict[str, Any]
    heads: tuple[int, ...]
    qk_dim: int     # one number a layer, shared by its heads
    v_dim: int
    scale: float    # stored, so that truncating qk_dim never changes it
    ranks: dict[str, int]
    lora: dict[str, dict]

    @property
    def count(self) -> int:
        return len(self.heads)


class Adapter(NamedTuple):
    """Resolved fields of a block's `adapter`."""

    kind: str
    width: int
    input: str
    slots: int = 1
    norm: bool = False      # a LayerNorm of its own
    act: str = "relu"
    scale: float = 1.0
    bias: bool = True


class Generator(NamedTuple):
    """Resolved fields of the block `generator` (models/generative.py)."""

    attention: str          # what a row sees: previous, full, axial
    targets: tuple[int, ...]  # hidden states of the teacher, ascending
    layers: int = 1         # transformer layers that every row runs through
    steps: int = 0          # how many targets are generated; 0 = all
    inject: str = "add"     # previous: add, concat, none
    skip: bool = True
    embedding: bool = False  # a vector for each target


class FFN(NamedTuple):
    units: int
    ranks: dict[str, int]
    lora: dict[str, dict]


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    config: Mapping[str, Any]                      # as read from config.json, without the key "jaxslim"
    family: str                                    # "wav2vec2", "hubert", ...
    head: str = "none"                             # "none", "ctc", ...
    blocks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()    # what was cut away, stage by stage; changes no shape

    def __post_init__(self):
        blocks = {name: dict(fields) for name, fields in sorted(self.blocks.items()) if fields}
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "history", tuple(self.history))
        text = canonical({"config": dict(self.config), "family": self.family, "head": self.head, "blocks": blocks,
                          **({"history": list(self.history)} if self.history else {})})
        object.__setattr__(self, "json", text)
        for name, fields in blocks.items():
            _check_block(name, fields)

    def __hash__(self):
        return hash(self.json)

    def __eq__(self, other):
        return isinstance(other, Spec) and self.json == other.json

    def __repr__(self):
        return f"Spec({self.family}, head={self.head}, {len(self.blocks)} changed blocks)"

    def __getitem__(self, key: str) -> Any:
        """Config value; keys that an older config.json lacks come from the family's default."""
        for config in (self.config, _defaults(self.family) if key not in _flat(self.config) else {}):
            if key in (flat := _flat(config)):
                return flat[key]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def of(self, block: str, key: str) -> Any:
        """Config value for the side that `block` is on, under the family's own name for `key`."""
        return self[NAMES.get(self.family, {}).get(key, key).format(side=block.split(".")[0])]

    def replace(self, **changes) -> Spec:
        return dataclasses.replace(self, **changes)

    def with_block(self, name: str, **fields) -> Spec:
        """A Spec in which `name` carries `fields` too; a field given as None is dropped."""
        merged = {k: v for k, v in {**self.blocks.get(name, {}), **fields}.items() if v is not None}
        return self.replace(blocks={**self.blocks, name: merged})

    def attention(self, name: str) -> Attention:
        """Resolved fields of attention block `name`."""
        b = self.blocks.get(name, {})
        total = self.of(name, "num_attention_heads")
        dim = self.of(name, "hidden_size") // total
        mixer = b.get("mixer", "softmax")
        heads = tuple(b.get("heads", range(total)))
        if heads and (min(heads) < 0 or max(heads) >= total or len(set(heads)) != len(heads)):
            raise SpecError(f"Block {name}: heads {list(heads)} must be different numbers from 0 to {total - 1}.")
        return Attention(mixer, {**MIXERS[mixer], **b.get("options", {})}, heads, b.get("qk_dim", dim),
                         b.get("v_dim", dim), b.get("scale", dim**-0.5), _ranks(b), dict(b.get("lora", {})))

    def ffn(self, name: str) -> FFN:
        b, gemma = self.blocks.get(name, {}), self.family == "gemma3n_audio"  # its config says 4 by saying nothing
        units = 4 * self["hidden_size"] if gemma else self.of(name, "intermediate_size")
        return FFN(b.get("units", units), _ranks(b), dict(b.get("lora", {})))

    def adapter(self, name: str) -> Adapter | None:
        """The adapter of block `name`, with its defaults."""
        a = self.blocks.get(name, {}).get("adapter")
        return None if a is None else Adapter(**{"input": ADAPTERS[a["kind"]][0], **a})

    @functools.cached_property
    def generator(self) -> Generator | None:
        """What makes this a generative student; None = it is none."""
        fields = self.blocks.get("generator")
        return None if fields is None else Generator(**{**fields, "targets": tuple(fields["targets"])})

    @property
    def generated(self) -> int:
        """How many hidden states a generative student generates."""
        return 0 if self.generator is None else self.generator.steps or len(self.generator.targets)

    @functools.cached_property
    def slots(self) -> int:
        """How many adapters every adapted block holds; 0 = no block is adapted."""
        fields = [f for b in self.blocks.values() for f in (b.get("adapter"), *b.get("lora", {}).values()) if f]
        counts = {f.get("slots", 1) for f in fields if f.get("kind") != "merged"}
        if len(counts) > 1:
            raise SpecError(f"Spec: blocks have adapters with {sorted(counts)} slots; all must have as many.")
        return max(counts, default=0)

    def conv(self, name: str) -> int:
        """Channels of the depthwise convolution of a Conformer's block `name`."""
        return self.blocks.get(name, {}).get("channels", self["hidden_size"])

    def channels(self, i: int) -> int:
        """Output channels of front-end convolution i; i = -1 is the waveform (or the log-mel frame)."""
        if i < 0:
            return self.get("num_mel_bins", 1) if self.family == "whisper" else 1
        own = self["d_model"] if self.family == "whisper" else self["conv_dim"][i]
        return self.blocks.get(f"frontend.{i}", {}).get("channels", own)

    def to_json(self) -> dict[str, Any]:
        """What config.json stores under the key `jaxslim` (DESIGN 3)."""
        ours = {"version": VERSION, "family": self.family, "head": self.head, "blocks": self.blocks}
        return {**ours, "history": list(self.history)} if self.history else ours

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Spec:
        """Spec of a config.json that carries the key `jaxslim`. Raises SpecError for an unknown version or key."""
        config = dict(config)
        ours = dict(config.pop("jaxslim"))
        version = ours.pop("version", None)
        if version != VERSION:
            raise SpecError(f"config.json: key 'jaxslim' has version {version}, this release reads {VERSION}. "
                            "Update jaxslim, or save the model again with the release that wrote it.")
        unknown = set(ours) - {"family", "head", "blocks", "history"}
        if unknown:
            raise SpecError(f"config.json: unknown keys {sorted(unknown)} under 'jaxslim'; "
                            "was it written by a newer jaxslim?")
        if "family" not in ours:
            raise SpecError("config.json: no 'family' under 'jaxslim'; the file is damaged.")
        return cls(config, **ours)


def _flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config whose encoder has a section of its own (Parakeet), as one level."""
    return {**inner, **config} if isinstance(inner := config.get("encoder_config"), Mapping) else config


def kind(block: str) -> str:
    """'encoder.3.attention' -> 'attention', 'frontend.1' -> 'frontend', 'encoder.3' -> 'encoder'."""
    return next((w for w in reversed(block.split(".")) if not w.isdigit()), "")


def _ranks(b: Mapping[str, Any]) -> dict[str, int]:
    return {key.removesuffix("_rank"): value for key, value in b.items() if key.endswith("_rank")}


def _check_block(name: str, fields: Mapping[str, Any]) -> None:
    known = FIELDS.get(kind(name))
    if known is None:
        raise SpecError(f"Spec: block {name!r} is none that can differ.{nearest(kind(name), FIELDS)}")
    for key in fields:
        if key not in known:
            raise SpecError(f"Spec: block {name} has no field {key!r}.{nearest(key, known)}")
    mixer = fields.get("mixer", "softmax")
    if mixer not in MIXERS:
        raise SpecError(f"Spec: block {name}: unknown mixer {mixer!r}; known are {sorted(MIXERS)}.")
    for key in fields.get("options", {}):
        if key not in MIXERS[mixer]:
            raise SpecError(f"Spec: block {name}: mixer {mixer} has no option {key!r}.{nearest(key, MIXERS[mixer])}")
    for key, options in fields.get("gates", {}).items():
        if key not in GATES[kind(name)]:
            raise SpecError(f"Spec: block {name} can have no gate on {key!r}; its gates are {GATES[kind(name)]}.")
        if set(options) - {"tile", "uniform", "norm"}:
            raise SpecError(f"Spec: block {name}: gate options {sorted(options)}; known are tile, uniform and norm.")
    for key in fields.get("lora", {}):
        if key not in LINEARS[kind(name)]:
            raise SpecError(f"Spec: block {name}: LoRA on {key!r}; its linears are {LINEARS[kind(name)]}.")
    for key in fields.get("int8", ()):
        if key not in LINEARS[kind(name)] or f"{key}_rank" in fields:
            raise SpecError(f"Spec: block {name}: int8 on {key!r}; it takes unfactored linears of "
                            f"{LINEARS[kind(name)]}.")
    if "activations" in fields and (fields["activations"] != "int8" or not fields.get("int8")):
        raise SpecError(f"Spec: block {name}: activations {fields['activations']!r}; only int8 is known, and only "
                        "beside int8 weights.")
    if "adapter" in fields:
        _check_adapter(name, fields["adapter"])
    if name == "generator":
        _check_generator(fields)


def _check_adapter(name: str, a: Mapping[str, Any]) -> None:
    for key in a:
        if key not in Adapter._fields:
            raise SpecError(f"Spec: block {name}: adapter has no field {key!r}.{nearest(key, Adapter._fields)}")
    what = a.get("kind")
    if what not in ADAPTERS or not isinstance(a.get("width"), int) or a["width"] < 1:
        raise SpecError(f"Spec: block {name}: an adapter needs a kind of {sorted(ADAPTERS)} and a positive width; "
                        f"it has {dict(a)}.")
    if a.get("input", ADAPTERS[what][0]) not in ADAPTERS[what]:
        raise SpecError(f"Spec: block {name}: a {what} adapter reads one of {ADAPTERS[what]}, not {a['input']!r}.")
    last = kind(name) in ("ffn", "ffn2")
    if kind(name) in ("attention", "cross") and (what, a.get("input", "output")) != ("sequential", "output"):
        raise SpecError(f"Spec: block {name}: attention takes a sequential adapter with input output only.")
    if a.get("input") == "layer" and not last:
        raise SpecError(f"Spec: block {name}: an adapter behind the layer belongs to its last block (ffn, ffn2).")


def _check_generator(g: Mapping[str, Any]) -> None:
    for key, known in {"attention": GENERATORS, "inject": ("add", "concat", "none")}.items():
        if g.get(key, "add") not in known:
            raise SpecError(f"Spec: block generator: {key} {g.get(key)!r}; known are {', '.join(known)}.")
    targets, steps = list(g.get("targets", ())), g.get("steps", 0)
    if "attention" not in g or not targets or targets != sorted(set(targets)) or min(targets) < 0:
        raise SpecError(f"Spec: block generator needs attention and ascending targets; it has {dict(g)}.")
    if not 0 <= steps <= len(targets) or g.get("layers", 1) < 1:
        raise SpecError(f"Spec: block generator: steps {steps} of {len(targets)} targets, layers {g.get('layers', 1)}; "
                        "steps go from 1 to the number of targets (0 = all), layers from 1.")


@functools.lru_cache
def _defaults(family: str) -> dict[str, Any]:
    """What transformers' config class of a family says by itself: kept as a file, since importing it takes seconds."""
    path = pathlib.Path(__file__).parent / "assets" / "defaults.json"
    return json.loads(path.read_text(encoding="utf-8")).get(family, {})
