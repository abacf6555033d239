"""Exact parameter and MAC counts of a Spec, without building the model.

`macs` counts by formula what `traced_macs` counts in the program itself: every multiply-accumulate of a matrix product
(`dot_general`) or convolution. The two are equal for any Spec and any audio length; tests hold them to it. Elementwise
work (norms, softmax, activations, weight norm, sums over time) is not counted. A tap of a convolution that reads its
zero padding counts like any other, because the program computes it.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxslim.models import adapters, bind, heads, positions
from jaxslim.models.roles import FAMILIES, blocks, prefix, roles
from jaxslim.slim import Slim
from jaxslim.spec import Spec, SpecError, kind

SAMPLING_RATE = 16000  # of every model of this release
TEXT, TOKEN_RATE = ("bert", "roberta", "distilbert"), 4  # text has no seconds; read aloud it has about 4 tokens in one


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass."""

    total: int
    blocks: dict[str, int]  # block id, 'projection', 'positional' -> MACs; empty when counted `as_run`


def params(spec: Spec) -> int:
    """Number of floats in a model with this Spec; tied parameters count once."""
    return sum(params_by_block(spec).values())


def params_by_block(spec: Spec) -> dict[str, int]:
    """Block id -> parameters, front to back, with 'projection', 'positional' and 'other' (the encoder's own norm, the
    mask embedding). Norms inside a transformer layer count with the sub-layer that roles.py gives them to."""
    owners = {name: b for b in blocks(spec) for name in roles(spec, b).values()}
    inner = prefix(spec)
    owners |= {inner + name: part for part, name in FAMILIES[spec.family].rest.items()}
    table = dict.fromkeys(_parts(spec), 0)
    for name, leaf in bind.shapes(spec).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            ends = (i for i, c in enumerate(name) if c == ".")
            other = "other" if name.startswith(inner) else "head"
            part = next((owners[name[:i]] for i in ends if name[:i] in owners), other)
            table[part] = table.get(part, 0) + math.prod(leaf.shape)
    return table


def macs(spec: Spec, seconds: float = 10.0, batch: int = 1, *, as_run: bool = False) -> Macs:
    """MACs of one forward pass over `batch` clips of `seconds` s.

    Args:
      as_run: count the program that the CPU runs (blocked attention, convolutions as written for speed) by tracing it;
        then there is only a total. Otherwise the formula, which equals the plain program's count.
    Raises:
      ValueError: the audio is shorter than one frame. SpecError: the family has no formula.
    """
    frames = _lengths(spec, seconds)  # also the check of `seconds`
    if as_run:
        return Macs(traced_macs(spec, seconds, batch, attention="blocked"), {})
    if spec.family not in FORMULAS:
        raise SpecError(f"MACs: no formula for family {spec.family!r}; known are {sorted(FORMULAS)}.")
    table = {}
    for block, n, *once in FORMULAS[spec.family](spec, frames):  # `once`: MACs that do not grow with the batch
        table[block] = table.get(block, 0) + batch * n + sum(once)
    return Macs(sum(table.values()), table)


def per_layer_rows(spec: Spec, seconds: float = 10.0) -> list[dict[str, Any]]:
    """One row a block, front to back: {block, changes, params, macs}; `changes` is what differs from the config."""
    counts, sizes = macs(spec, seconds).blocks, params_by_block(spec)
    return [{"block": b, "changes": dict(spec.blocks.get(b, {})), "params": sizes.get(b, 0), "macs": counts.get(b, 0)}
            for b in dict.fromkeys([*_parts(spec), *sizes])]


def per_layer_table(spec: Spec, seconds: float = 10.0):
    """`per_layer_rows` as a rich.Table with shares of the total, for `jaxslim info MODEL`."""
    from rich.table import Table

    table = Table(title=f"{spec.family}, {seconds:g} s of audio, batch 1")
    for column in ("block", "params", "%", "MMACs", "%", "changes"):
        table.add_column(column, justify="left" if column in ("block", "changes") else "right")
    rows = per_layer_rows(spec, seconds)
    p, m = sum(r["params"] for r in rows), sum(r["macs"] for r in rows)
    for r in [*rows, {"block": "total", "params": p, "macs": m, "changes": {}}]:
        changes = ", ".join(f"{k}={v}" for k, v in r["changes"].items())
        table.add_row(r["block"], f"{r['params']:,}", f"{100 * r['params'] / p:.1f}", f"{r['macs'] / 1e6:,.1f}",
                      f"{100 * r['macs'] / m:.1f}", changes, end_section=r is rows[-1])
    return table


def traced_macs(spec: Spec, seconds: float = 10.0, batch: int = 1, *, attention: str = "dense") -> int:
    """MACs of the program that `Slim.__call__` runs, counted in its jaxpr; nothing is computed.

    Args:
      attention: "dense" is the plain program, "blocked" the one for long audio on CPU.
    """
    _lengths(spec, seconds)
    if spec.family in TEXT:
        name, x = "input_ids", jax.ShapeDtypeStruct((batch, _tokens(seconds)), jnp.int32)
    else:
        name, x = "input_values", jax.ShapeDtypeStruct((batch, _samples(seconds)), jnp.float32)
    forward = functools.partial(_forward, name=name, attention=attention)
    return jaxpr_macs(jax.make_jaxpr(forward)(Slim(spec, dict(bind.shapes(spec))), x))


def jaxpr_macs(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """MACs of all dot_general and conv_general_dilated in a jaxpr, inner programs included.

    Raises:
      ValueError: a matrix product under `while` (no known trip count), or branches of `cond` that differ.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = p["dimension_numbers"]
            total += eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        elif name == "conv_general_dilated":
            _, rhs, _ = p["dimension_numbers"]  # (out, in / groups, *window)
            total += eqn.outvars[0].aval.size * math.prod(eqn.invars[1].aval.shape[i] for i in rhs[1:])
        elif inner := [jaxpr_macs(j) for j in _inner(p)]:
            if name == "while" and any(inner) or name == "cond" and len(set(inner)) > 1:
                raise ValueError(f"MACs: the work of a `{name}` depends on data, so it cannot be counted.")
            total += p["length"] * inner[0] if name == "scan" else inner[0] if name == "cond" else sum(inner)
    return total


def _inner(parameters: dict[str, Any]) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    for value in parameters.values():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, (core.ClosedJaxpr, core.Jaxpr)):
                yield v


def _forward(model: Slim, x: jax.Array, name: str, attention: str):
    out = model(**{name: x}, attention=attention)
    return (out.last_hidden_state, out.pooler_output) if out.logits is None else out.logits


def _parts(spec: Spec) -> list[str]:
    """Blocks and the parts that are none, front to back."""
    ids = blocks(spec)
    front, head = ([b for b in ids if kind(b) == what] for what in ("frontend", "head"))
    rest = [part for part in FAMILIES[spec.family].rest if part != "adapter" or spec.get("add_adapter")]
    early, late = ([part for part in rest if (part == "adapter") == last] for last in (False, True))
    return [*front, *early, *ids[len(front) : len(ids) - len(head)], *late, *head]


def _tokens(seconds: float) -> int:
    return max(1, round(seconds * TOKEN_RATE))


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLING_RATE)


def _lengths(spec: Spec, seconds: float) -> list[int]:
    """Frames after each front-end convolution. Raises ValueError when none is left."""
    if spec.family in TEXT:
        if (tokens := _tokens(seconds)) > spec["max_position_embeddings"]:
            raise ValueError(f"{tokens} tokens are more than this model has positions for.")
        return [tokens]
    lengths, n = [], _samples(seconds)
    for kernel, stride in zip(spec["conv_kernel"], spec["conv_stride"], strict=True):
        n = (n - kernel) // stride + 1
        if n < 1:
            raise ValueError(f"{seconds:g} s of audio is shorter than one frame of this model.")
        lengths.append(n)
    return lengths


def _wav2vec2(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs) of a wav2vec2, HuBERT or WavLM model for one clip; `lengths` from `_lengths`."""
    width, last = spec["hidden_size"], len(lengths) - 1
    for i, n in enumerate(lengths):
        yield f"frontend.{i}", n * spec.channels(i) * spec.channels(i - 1) * spec["conv_kernel"][i]
    T = lengths[-1]
    yield "projection", T * spec.channels(last) * width
    group = width // spec["num_conv_pos_embedding_groups"]
    yield "positional", T * width * group * spec["num_conv_pos_embeddings"]
    for i in range(spec["num_hidden_layers"]):
        yield f"encoder.{i}.attention", _attention(spec, f"encoder.{i}.attention", T)
        if spec["do_stable_layer_norm"] and (inner := spec.get("adapter_attn_dim")):
            yield f"encoder.{i}.ffn", T * 2 * width * inner
        yield f"encoder.{i}.ffn", _ffn(spec, f"encoder.{i}.ffn", T)
    T = yield from _conv_adapter(spec, T)
    if spec.head != "none":
        yield "head", _head(spec, T)


def _ffn(spec: Spec, block: str, T: int) -> int:
    f, width = spec.ffn(block), spec.of(block, "hidden_size")
    return T * (_linear(width, f.units, f, "up") + _linear(f.units, width, f, "down"))


def _conv_adapter(spec: Spec, T: int) -> Iterator[tuple[str, int]]:
    """Conv adapters behind an encoder; returns the frames they leave."""
    if not spec.get("add_adapter"):
        return T
    width, kernel, stride = heads.width(spec), spec["adapter_kernel_size"], spec["adapter_stride"]
    total = T * spec["hidden_size"] * width if width != spec["hidden_size"] else 0
    for _ in range(spec["num_adapter_layers"]):
        T = (T + 2 * adapters.PADDING - kernel) // stride + 1
        total += T * 2 * width * width * kernel
    yield "adapter", total
    return T


def _head(spec: Spec, T: int) -> int:
    width = heads.width(spec)
    if spec.head == "ctc":
        return T * width * spec["vocab_size"]
    if spec.head == "frames":
        return T * width * heads.labels(spec)
    if spec.head == "classification":
        return spec["classifier_proj_size"] * (T * width + heads.labels(spec))
    dims, size = spec["tdnn_dim"], spec["xvector_output_dim"]
    total = T * width * dims[0] + 2 * dims[-1] * size + size * size
    for din, dout, kernel, dilation in zip([dims[0], *dims], dims, spec["tdnn_kernel"], spec["tdnn_dilation"]):
        T -= dilation * (kernel - 1)
        total += T * din * dout * kernel
    return total


def _attention(spec: Spec, block: str, T: int) -> int:
    a, width = spec.attention(block), spec.of(block, "hidden_size")
    count = len(a.heads)
    qk, v = count * a.qk_dim, count * a.v_dim
    projections = sum(_linear(*dims, a, role) for role, dims in
                      {"q": (width, qk), "k": (width, qk), "v": (width, v), "o": (v, width)}.items())
    if a.mixer == "softmax":
        gates = count * (width // spec["num_attention_heads"]) * positions.GATES if spec.family == "wavlm" else 0
        return T * (projections + gates) + T * T * (qk + v)          # scores, weighted sum
    if a.mixer == "hedgehog":
        features = a.options["features"]
        return T * (projections + 2 * features * (qk + 2 * v))       # phi(q) and phi(k); state and its read-out
    raise SpecError(f"MACs: no formula for mixer {a.mixer!r} of block {block}.")


def _linear(din: int, dout: int, block, role: str) -> int:
    """MACs a frame of the linear `role`; `block` is a resolved Attention or FFN."""
    if not din or not dout:  # a block without heads or units keeps only a bias
        return 0
    rank, lora = block.ranks.get(role), block.lora.get(role)
    return (din * dout if rank is None else rank * (din + dout)) + (lora["rank"] * (din + dout) if lora else 0)


def _bert(spec: Spec, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """(block, MACs) of a BERT, RoBERTa or DistilBERT model for one text of `lengths[-1]` tokens."""
    T, width = lengths[-1], spec.of("encoder", "hidden_size")
    pooled = spec.get("add_pooling_layer", True) if spec.head == "none" else spec.family == "bert"
    yield "embedding", 0
    if "pooler" in _parts(spec):
        yield "pooler", width * width if pooled else 0
    for i in range(spec.of("encoder", "num_hidden_layers")):
        yield f"encoder.{i}.attention", _attention(spec, f"encoder.{i}.attention", T)
        yield f"encoder.{i}.ffn", _ffn(spec, f"encoder.{i}.ffn", T)
    if spec.head != "none":
        yield "head", width * (heads.labels(spec) + (0 if spec.family == "bert" else width))


FORMULAS = {"wav2vec2": _wav2vec2, "hubert": _wav2vec2, "wavlm": _wav2vec2,
            **dict.fromkeys(("bert", "roberta", "distilbert"), _bert)}
