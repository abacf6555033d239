"""Device mesh, regex sharding rules, and global batches.

Axes: `data` (batch), `fsdp` (batch and parameters), `tensor` (inside a layer). Parameters follow an ordered list of
(regex, PartitionSpec); the first match wins, an axis that does not divide its dimension is dropped and logged once.
"""
from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

log = logging.getLogger(__name__)
AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (out, in) weights: outputs of q, k, v, up are split over `tensor`, inputs of o, down; the other side over `fsdp`.
RULES: tuple[tuple[str, P], ...] = (
    (r"\.adapter\.(down|up)\.weight$|lora_A\.weight$", P(None, "fsdp")),   # with slots (S, ., .)
    (r"lora_B\.weight$", P("fsdp")),
    (r"ffw_layer_1\.weight$|relative_position_embedding\.pos_proj\.weight$", P("tensor", "fsdp")),
    (r"ffw_layer_2\.weight$|attention\.post\.weight$", P("fsdp", "tensor")),
    (r"lconv1d\.linear_(start|end)\.weight$|conv_projection\.conv_\d\.conv\.weight$", P("fsdp")),
    (r"input_proj_linear\.weight$", P(None, "fsdp")),
    (r"gk_proj\.weight$", P("fsdp")),
    (r"gk_proj\.bias$", P()),
    (r"(q_proj|k_proj|v_proj|intermediate_dense|fc1)(\.up)?\.weight$", P("tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|intermediate_dense|fc1)\.bias$", P("tensor")),
    (r"(out_proj|output_dense|fc2)(\.down)?\.weight$", P("fsdp", "tensor")),
    (r"(linear_[qkv]|linear_pos|relative_k_proj|linear1|adapter_layer\.linear_1)(\.up)?\.weight$", P("tensor", "fsdp")),
    (r"(linear_[qkv]|linear1|adapter_layer\.linear_1)\.bias$", P("tensor")),
    (r"(linear_out|o_proj|linear2|adapter_layer\.linear_2)(\.down)?\.weight$", P("fsdp", "tensor")),
    (r"pos_bias_[uv]$|self_attn\.bias_[uv]$", P("tensor")),                   # (H, K)
    (r"pointwise_conv[12]\.weight$|adapter\.layers\.\d+\..*conv\.weight$", P("fsdp")),
    (r"projector\.weight$|classifier\.weight$|tdnn\.\d+\.kernel\.weight$|ctc_head\.weight$", P(None, "fsdp")),
    (r"^feature_extractor\.weight$|adapter\.proj\.weight$|subsampling\.linear\.weight$", P(None, "fsdp")),
    (r"subsampling\.layers\.\d+\.weight$", P("fsdp")),
    (r"(self\.(query|key|value)|[qkv]_lin|intermediate\.dense|lin1)(\.up)?\.weight$", P("tensor", "fsdp")),
    (r"(self\.(query|key|value)|[qkv]_lin|intermediate\.dense|lin1)\.bias$", P("tensor")),
    (r"(output\.dense|out_lin|lin2)(\.down)?\.weight$", P("fsdp", "tensor")),
    (r"(query_key_value|dense_h_to_4h)(\.up)?\.weight$", P("tensor", "fsdp")),  # heads lie one after another
    (r"(query_key_value|dense_h_to_4h)\.bias$", P("tensor")),
    (r"(attention\.dense|dense_4h_to_h)(\.down)?\.weight$", P("fsdp", "tensor")),
    (r"embed_in\.weight$", P(None, "fsdp")),
    (r"(word_embeddings|pooler\.dense|pre_classifier|classifier\.dense)\.weight$", P(None, "fsdp")),
    (r"feature_[qk]\.(weight|bias)$", P("tensor")),                           # (H, F, K), (H, F)
    (r"(in_proj|x_proj|fc_D)\.weight$", P(None, "fsdp")),                     # rows of several parts stay together
    (r"dt_proj\.weight$", P("fsdp")),
    (r"projection\.weight$|lm_head\.weight$|proj_out\.weight$|embed_tokens\.weight$", P(None, "fsdp")),
    (r"generator\.(output|inject)\.weight$", P(None, "fsdp")),
    (r"conv_layers\.\d+\.conv\.weight$|encoder\.conv[12]\.weight$", P("fsdp")),
    (r"original1$|pos_conv_embed\.conv\.weight$", P("fsdp")),
)


class MeshError(ValueError):
    """A mesh that the devices or the batch cannot fill."""


def parse(text: str, devices: int) -> dict[str, int]:
    """'data=4,fsdp=2' -> sizes of all axes; -1 takes the devices that are left."""
    sizes, seen = dict.fromkeys(AXES, 1), set()
    for item in filter(None, text.replace(" ", "").split(",")):
        name, _, value = item.partition("=")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", value):
            raise MeshError(f"Mesh {text!r}: {item!r} is none of data=N, fsdp=N, tensor=N (N positive, or -1 once).")
        if name in seen:
            raise MeshError(f"Mesh {text!r}: {name} stands twice.")
        seen.add(name)
        sizes[name] = int(value)
    fixed = int(np.prod([s for s in sizes.values() if s > 0]))
    rest = [n for n, s in sizes.items() if s == -1]
    if len(rest) > 1 or devices % fixed or (not rest and fixed != devices):
        raise MeshError(f"Mesh {text!r} takes {fixed} devices{' times the rest' if rest else ''}, but there are "
                        f"{devices}; make the product of the axes equal to it (-1 = the rest, once).")
    return {n: devices // fixed if s == -1 else s for n, s in sizes.items()}


def make(text: str = "data=-1", devices=None) -> Mesh:
    """The mesh over all devices (of all processes)."""
    devices = jax.devices() if devices is None else devices
    sizes = parse(text, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.lru_cache(maxsize=4096)
def _once(message: str) -> None:
    log.info(message)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of the parameter `name`, by the first rule that matches; replicated without one."""
    rule = next((p for pattern, p in RULES if re.search(pattern, name)), P())
    axes = []
    for i, axis in enumerate(rule[: len(shape)]):
        if axis is not None and shape[i] % mesh.shape[axis]:
            _once(f"{name} {shape}: dimension {i} is not divisible by {axis}={mesh.shape[axis]}; replicated there.")
            axis = None
        axes.append(axis if axis and mesh.shape[axis] > 1 else None)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def sharding(params: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, NamedSharding]:
    return {k: NamedSharding(mesh, spec_for(k.removeprefix("teacher/"), np.shape(v), mesh)) for k, v in params.items()}


def like_params(tree, params: Mapping[str, NamedSharding], mesh: Mesh):
    """Shardings of an optimiser state: a leaf follows the parameter in its path, the rest is replicated."""
    replicated = NamedSharding(mesh, P())

    def pick(path, leaf):
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in params]
        return params[names[-1]] if names and np.ndim(leaf) else replicated

    return jax.tree_util.tree_map_with_path(pick, tree)


def place(params: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Parameters on the mesh by the rules; every process holds the same host values."""
    where = sharding(params, mesh)
    return {k: put(v, where[k]) for k, v in params.items()}


def gather(params: Mapping[str, jax.Array], mesh: Mesh, dtype: str, later=()) -> dict[str, jax.Array]:
    """Parameters as a forward pass reads them, inside a trace: matrices in `dtype`, whole along fsdp.

    Left to itself the partitioner collects the activations of all devices wherever they are smaller than a weight.
    Here a weight is collected once a step, in `dtype`, and its gradient comes back split (a reduce-scatter).
    Those in `later`, and what weight norm scales, stay split: the pass makes other weights of them, which `Collect`
    collects.
    """
    if mesh.shape["fsdp"] == 1:
        return dict(params)
    out = dict(params)
    for name, split in sharding(params, mesh).items():
        if "fsdp" in split.spec and name not in later and not name.endswith("original1"):
            out[name] = _collected(out[name], split, dtype)
    return out


class Collect(NamedTuple):
    """`gather` of a weight that a forward pass makes from others, by gates or weight norm."""

    mesh: Mesh
    dtype: str

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        return _collected(x, sharding({name: x}, self.mesh)[name], self.dtype)


def _collected(x: jax.Array, split: NamedSharding, dtype: str) -> jax.Array:
    x = x.astype(dtype) if x.ndim > 1 and jax.numpy.issubdtype(x.dtype, np.floating) else x
    whole = NamedSharding(split.mesh, P(*(None if axis == "fsdp" else axis for axis in split.spec)))
    return _whole(x, whole, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(x, whole: NamedSharding, split: NamedSharding):
    return jax.lax.with_sharding_constraint(x, whole)


_whole.defvjp(lambda x, whole, split: (jax.lax.with_sharding_constraint(x, whole), None),
              lambda whole, split, _, g: (jax.lax.with_sharding_constraint(g, split),))


def put(x, where: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == where:
        return x
    if jax.process_count() == 1:
        return jax.device_put(x, where)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def batch(rows: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, split over data and fsdp. Raises MeshError if they cannot be."""
    where, parts = NamedSharding(mesh, BATCH), shards(mesh) * microbatches
    count = len(next(iter(rows.values()))) * jax.process_count()
    if count % parts:
        raise MeshError(f"A batch of {count} rows cannot be split over data x fsdp = {shards(mesh)} devices in "
                        f"{microbatches} microbatches; give Batches multiple_of={parts}.")
    return {k: jax.make_array_from_process_local_data(where, v) for k, v in rows.items()}
