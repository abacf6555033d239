"""(Spec, flat params) <-> Flax NNX modules. The one file that knows NNX's internals.

`shapes(spec)` is the only authority on names and shapes: every parameter is checked against it here, because
`nnx.merge` accepts wrong shapes silently.
"""
from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping

import jax
from flax import nnx

from jaxslim.models import adapters, gates, mixers, roles
from jaxslim.slim import Slim
from jaxslim.spec import Spec, SpecError, nearest

# model_type -> module in jaxslim.models with build(spec)
FAMILIES = {"wav2vec2": "wav2vec2", "hubert": "wav2vec2", "wavlm": "wav2vec2", "wav2vec2-conformer": "conformer",
            "wav2vec2-bert": "w2v_bert", "parakeet_ctc": "parakeet", "parakeet_encoder": "parakeet"}
FAMILIES |= {"whisper": "whisper", "gemma3n_audio": "gemma3n"}
FAMILIES |= dict.fromkeys(("bert", "roberta", "distilbert"), "bert") | {"gpt_neox": "gpt_neox"}
AUXILIARY = ("aux.", "teacher/")                           # training-only names; not part of the model
OPEN = ".open"                                             # of a gated norm: made by gates.fold, not stored


@functools.lru_cache(maxsize=64)
def _skeleton(spec: Spec):
    if spec.family not in FAMILIES:
        raise SpecError(f"Model family {spec.family!r} is not supported; supported are {sorted(FAMILIES)}.")
    known = roles.blocks(spec)
    for block in spec.blocks:
        if block not in known:
            raise SpecError(f"Spec: this {spec.family} model has no block {block!r}.{nearest(block, known)}")
    module = importlib.import_module(f"jaxslim.models.{FAMILIES[spec.family]}").build(spec)
    mixers.tie(module)
    for block, fields in spec.blocks.items():
        for role in fields.get("int8", ()):
            submodule(module, roles.roles(spec, block)[role]).quantize(dynamic="activations" in fields)
        if "adapter" in fields:
            adapters.attach(submodule(module, roles.roles(spec, block.rpartition(".")[0])["owner"]), spec, block)
    graphdef, state = nnx.split(module)
    paths = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    return graphdef, paths


@functools.lru_cache(maxsize=64)
def shapes(spec: Spec) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of every parameter of a model with this Spec, in sorted order."""
    _, paths = _skeleton(spec)
    found = {name: leaf.get_value() for name, (_, leaf) in paths.items() if not name.endswith(OPEN)}
    return dict(sorted({**found, **gates.shapes(spec)}.items()))


def check(spec: Spec, params: Mapping[str, jax.Array], where: str = "params") -> None:
    """Raises SpecError that lists missing, unexpected and misshapen parameters."""
    want = shapes(spec)
    have = {k: v for k, v in params.items() if not k.startswith(AUXILIARY)}
    problems = [f"missing {k} {want[k].shape}" for k in want if k not in have]
    problems += [f"unexpected {k} {tuple(have[k].shape)}" for k in have if k not in want]
    problems += [f"misshapen {k}: {tuple(have[k].shape)}, expected {want[k].shape}"
                 for k in want if k in have and tuple(have[k].shape) != want[k].shape]
    if problems:
        more = f" ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise SpecError(f"{where} does not fit the {spec.family} model of its Spec: {'; '.join(problems[:8])}{more}.")


def bind(spec: Spec, params: Mapping[str, jax.Array], adapter_ids: jax.Array | None = None) -> nnx.Module:
    """The NNX module of `spec` holding `params`. Used inside a trace; do not keep it between training steps. Of a
    model with gates, the parameters that `gates.fold` gives.

    `adapter_ids` (), (B,) or (B, T): which of its slots every adapter and LoRA uses, -1 = none.
    """
    graphdef, paths = _skeleton(spec)
    if not gates.shapes(spec):
        check(spec, params)
    elif not paths.keys() <= params.keys() or gates.shapes(spec).keys() & params.keys():
        raise SpecError(f"This {spec.family} model has gates and is still being pruned; finish the stage first (the "
                        "method's `finish`).")
    module = nnx.merge(graphdef, nnx.from_flat_state(
        [(path, leaf.replace(params[name])) for name, (path, leaf) in paths.items()]))
    if adapter_ids is not None:
        for _, part in nnx.iter_modules(module):
            if getattr(part, "slots", 0):
                part.adapter_ids = nnx.data(adapter_ids)
    return module


def skeleton(spec: Spec) -> nnx.Module:
    """The NNX module of `spec` with shapes in the places of arrays."""
    graphdef, paths = _skeleton(spec)
    return nnx.merge(graphdef, nnx.from_flat_state(list(paths.values())))


def submodule(module: nnx.Module, name: str) -> nnx.Module:
    """The submodule with a Hugging Face name, e.g. 'wav2vec2.encoder.layers.3.attention'."""
    if not name:
        return module
    part, _, rest = name.partition(".")
    while rest and not part.isdigit() and not hasattr(module, part):  # names with dots: BERT's "intermediate.dense"
        more, _, rest = rest.partition(".")
        part = f"{part}.{more}"
    return submodule(module[int(part)] if part.isdigit() else getattr(module, part), rest)


def to_flax(model: Slim) -> nnx.Module:
    """A live NNX module with the model's parameters, for people with a training loop of their own."""
    module = bind(model.spec, model.params)
    module.spec = model.spec
    return module


def from_flax(module: nnx.Module) -> Slim:
    """The Slim of a module that came from `to_flax`, with the module's present parameters."""
    params = {".".join(map(str, path)): leaf.get_value()
              for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    check(module.spec, params, "The module")
    return Slim(module.spec, params)
