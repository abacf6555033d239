"""What a compiled program does, read from its text: collectives, FLOPs of matrix products, bytes of main memory.

XLA's own `cost_analysis` counts the body of a loop once; here every instruction counts as often as it runs. All sizes
are those of one device's program.
"""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
         "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
        "after-all", "partition-id", "replica-id")   # move no data by themselves
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_OPENING = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{\s*$")
_CALLS = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")


class Shape(NamedTuple):
    kind: str                # bf16, ...
    dims: tuple[int, ...]
    fast: bool               # in a TPU's vector memory, not in main memory

    @property
    def bytes(self) -> int:
        return BYTES[self.kind] * math.prod(self.dims)


class Instruction(NamedTuple):
    name: str
    kind: str
    shapes: tuple[Shape, ...]              # of the result; several for a tuple
    operands: tuple[str, ...]
    rest: str                              # operands and attributes as written


@dataclasses.dataclass(frozen=True)
class Module:
    """An optimised HLO module: computations, and how often a step runs each."""

    bodies: dict[str, dict[str, Instruction]]
    times: dict[str, int]
    fused: frozenset[str]                  # computations inside a fusion or a reduction: they move no data

    @classmethod
    def parse(cls, text: str) -> Module:
        bodies: dict[str, dict[str, Instruction]] = {}
        entry = inside = None
        for line in text.splitlines():
            if not line.startswith(" "):
                if (start := _OPENING.match(line)) and not line.startswith("HloModule"):
                    inside = start[2]
                    bodies[inside] = {}
                    entry = inside if start[1] else entry
            elif inside is not None and (found := _LINE.match(line)):
                name, result, kind, rest = found.groups()
                operands = tuple(re.findall(r"%([\w.-]+)", re.split(r"\)(?:,|$)", rest)[0]))
                bodies[inside][name] = Instruction(name, kind, _shapes(result), operands, rest)
        times, fused = dict.fromkeys(bodies, 0), set()

        def visit(computation: str, count: int, inner: bool) -> None:
            times[computation] += count
            if inner:
                fused.add(computation)
            for i in bodies[computation].values():
                trips = _trips(i, bodies) if i.kind == "while" else 1
                called = _CALLS.findall(i.rest)
                if branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
                    called += [("branch", name) for name in re.findall(r"[\w.-]+", branches[1])]
                for how, name in called:
                    if name in bodies:
                        visit(name, count * trips,
                              inner or i.kind == "fusion" or how == "to_apply" and i.kind != "call")

        if entry:
            visit(entry, 1, False)
        return cls(bodies, times, frozenset(fused))

    def running(self, fused: bool = True) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """(instruction, its computation, how often it runs); without `fused` only those that touch memory."""
        for name, body in self.bodies.items():
            if self.times[name] and (fused or name not in self.fused):
                for i in body.values():
                    yield i, body, self.times[name]


class Collective(NamedTuple):
    """One collective of a step."""

    kind: str
    name: str
    bytes: int    # the larger of what goes into and what comes out of one device
    group: int    # devices that take part together
    times: int

    @property
    def moved(self) -> float:
        """Bytes that a device sends in a step by the ring algorithm."""
        if self.kind == "collective-permute":
            return self.times * self.bytes
        return self.times * self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def collectives(module: Module) -> list[Collective]:
    """The collectives of a step, asynchronous ones once: the TPU's compiler writes parts of one, with one channel, into
    several fusions that it runs meanwhile. Its reduce-scatter of several arrays is a fusion of an all-reduce and
    slices, every such fusion with the same channel."""
    out, seen = [], set()
    slicing = {id(body) for name, body in module.bodies.items() if name.startswith("all-reduce-scatter")}
    for i, body, times in module.running():
        kind, channel = i.kind.removesuffix("-start"), re.search(r"channel_id=(\d+)", i.rest)
        scatters = kind == "all-reduce" and id(body) in slicing
        which = kind, channel[1] if channel and not scatters else i.name
        if kind in COLLECTIVES and which not in seen:
            seen.add(which)
            group, sizes = _group(i.rest), [s.bytes for s in i.shapes]
            if scatters:
                kind = "reduce-scatter"
            elif i.kind.endswith("-start") and kind != "all-reduce":  # (operands, results, ...)
                sizes = [max(sizes)]
            elif kind == "reduce-scatter":
                sizes = [s * group for s in sizes]
            if group > 1 or kind == "collective-permute":
                out.append(Collective(kind, i.name, sum(sizes), group, times))
    return out


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Kind -> {count, bytes} of a step."""
    table: dict[str, dict[str, int]] = {}
    for c in found:
        row = table.setdefault(c.kind, {"count": 0, "bytes": 0})
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
    return table


def flops(module: Module) -> int:
    """FLOPs (2 a multiply-accumulate) of all matrix products and convolutions of a step, without what reads padding."""
    total = 0
    for i, body, times in module.running():
        if i.kind not in ("dot", "convolution"):
            continue
        left, right = (body[name].shapes[0].dims for name in i.operands[:2])
        work = math.prod(i.shapes[0].dims)
        if i.kind == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
            work *= math.prod(left[d] for d in _numbers(contracted))
        else:
            labels = re.search(r"dim_labels=\w+_(\w+)->", i.rest)[1]
            work *= right[labels.index("i")]
            work *= _taps(i, left)
        total += 2 * round(work) * times
    return total


def _taps(i: Instruction, left: tuple[int, ...]) -> float:
    """Products per output position of a convolution that read a value, not padding and not a hole between values; the
    TPU's compiler writes batched matrix products as convolutions that are mostly padding."""
    if not (window := re.search(r"window=\{([^}]*)\}", i.rest)):
        return 1.0
    size = [int(n) for n in re.search(r"\bsize=([\dx]+)", window[1])[1].split("x")]
    field = lambda key, default: [tuple(map(int, re.findall(r"-?\d+", n))) for n in found[1].split("x")] if (  # noqa: E731
        found := re.search(rf"\b{key}=([\dx_-]+)", window[1])) else [default] * len(size)
    pads, strides, holes, steps = (field(*k) for k in (("pad", (0, 0)), ("stride", (1,)), ("lhs_dilate", (1,)),
                                                       ("rhs_dilate", (1,))))
    where, _, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    taps = 1.0
    for d, width in enumerate(size):
        length, frames = left[where.index(str(d))], i.shapes[0].dims[out.index(str(d))]
        outer, inner = sorted((np.arange(frames) * strides[d][0], np.arange(width) * steps[d][0]), key=len)
        last, hole = (length - 1) * holes[d][0], holes[d][0]
        places = (inner + start - pads[d][0] for start in outer)
        taps *= sum(int(((p >= 0) & (p <= last) & (p % hole == 0)).sum()) for p in places) / frames
    return taps


def bytes_accessed(module: Module) -> int:
    """Bytes of main memory that the instructions of a step read and write; of an array from which a fusion takes a
    slice only the slice, and nothing of what lies in a TPU's vector memory."""
    total = 0
    for i, body, times in module.running(fused=False):
        if i.kind in FREE or i.kind.endswith("-done"):
            continue
        called = re.search(r"calls=%?([\w.-]+)", i.rest) if i.kind == "fusion" else None
        inner = module.bodies.get(called[1], {}) if called else {}
        total += times * (_written(i, body, inner) + sum(
            _read(i, k, body[name], inner) for k, name in enumerate(i.operands) if name in body))
    return total


def _trips(loop: Instruction, bodies) -> int:
    """How often a loop runs: as XLA says, else the limit of its counter over the counter's step (the TPU's compiler
    unrolls the loops that it makes of collectives)."""
    if known := re.search(r"known_trip_count[^0-9]*(\d+)", loop.rest):
        return int(known[1])
    condition, body = (bodies.get(re.search(rf"{key}=%?([\w.-]+)", loop.rest)[1], {}) for key in ("condition", "body"))
    limit = max([_constant(i) for i in condition.values()] or [0]) or max(
        [_constant(j) for i in condition.values() for _, name in _CALLS.findall(i.rest)
         for j in bodies.get(name, {}).values()] or [1])
    if not (index := next((re.search(r"index=(\d+)", i.rest) for i in condition.values()
                           if i.kind == "get-tuple-element"), None)) or not body:
        return max(limit, 1)
    root = list(body.values())[-1]
    counter = body.get(root.operands[int(index[1])]) if int(index[1]) < len(root.operands) else None
    inside = bodies.get(m[1], {}) if counter and (m := re.search(r"calls=%?([\w.-]+)", counter.rest)) else {}
    around = [body[n] for n in counter.operands if n in body] if counter else []
    step = max([_constant(i) for i in (*around, *inside.values())] or [1])
    return max(limit // max(step, 1), 1)


def _constant(i: Instruction) -> int:
    """The value of a scalar whole constant, else 0."""
    found = re.match(r"(\d+)\)", i.rest) if i.kind == "constant" and i.shapes and not i.shapes[0].dims else None
    return int(found[1]) if found else 0


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(s.bytes for s in shapes if not s.fast)


def _written(i: Instruction, body, inner) -> int:
    if i.kind == "dynamic-update-slice":
        return _main(body[i.operands[1]].shapes)
    updates = [x for x in inner.values() if x.kind == "dynamic-update-slice" and x.shapes[0].dims == i.shapes[0].dims]
    if len(i.shapes) == 1 and updates and not i.shapes[0].fast:
        return sum(inner[x.operands[1]].shapes[0].bytes for x in updates)
    return _main(i.shapes)


def _read(i: Instruction, k: int, operand: Instruction, inner) -> int:
    size = _main(operand.shapes)
    if i.kind in ("dynamic-slice", "gather", "slice"):
        return _main(i.shapes) if k == 0 else 0
    if i.kind == "dynamic-update-slice":
        return size if k == 1 else 0
    parameter = next((x.name for x in inner.values() if x.kind == "parameter" and x.rest.startswith(f"{k})")), None)
    if parameter is None:
        return size
    uses = [x for x in inner.values() if parameter in x.operands]
    if uses and all(x.kind in ("dynamic-slice", "slice", "gather") or
                    x.kind == "dynamic-update-slice" and x.operands[0] == parameter for x in uses):
        return min(size, sum(x.shapes[0].bytes for x in uses if x.kind != "dynamic-update-slice"))
    return size


def _shapes(result: str) -> tuple[Shape, ...]:
    return tuple(Shape(kind, _numbers(dims), "S(1)" in (layout or "")) for kind, dims, layout in _SHAPE.findall(result)
                 if kind in BYTES)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _group(rest: str) -> int:
    """Devices in a replica group, in each of the ways it is written."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'axis', or 'axis':(before)part
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 1
