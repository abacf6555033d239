"""Adapters on a frozen model: TPA (Two Parallel Adapter, arXiv 2306.08131) and what it is compared with.

| kind       | what is trained beside (or in) the frozen model                                                     |
|------------|-----------------------------------------------------------------------------------------------------|
| `tpa`      | a parallel adapter beside every feed-forward block: two in a Conformer layer, one elsewhere         |
| `parallel` | one parallel adapter a layer, beside its last feed-forward block (He et al., arXiv 2110.04366)      |
| `houlsby`  | a sequential adapter behind attention and one behind the last feed-forward block (arXiv 1902.00751) |
| `bapna`    | one adapter with a LayerNorm behind every layer (arXiv 1909.08478)                                  |
| `lora`     | low-rank deltas of `linears` (arXiv 2106.09685)                                         |
| `bitfit`   | the biases of the layers (arXiv 2106.10199)                                                         |
| `mms`      | the attention adapters of MMS checkpoints (arXiv 2305.13516), on pre-norm wav2vec2-like models      |
| `head`     | the output layer, or the decoder                                                                    |
| `full`     | everything                                                                                          |

The text of the TPA paper could not be read; the block form is that of its first author's Praxis code (2022), the two
slots that of USM (arXiv 2303.01037, section 2.6). Width, activation, learning rate and the gates of the learned drop
(hard concrete, arXiv 1712.01312) are our choices.
"""
from __future__ import annotations

import dataclasses
import logging
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import adapter_merge, adapters
from jaxslim.methods.finetune import Finetune, stored_statistic, task
from jaxslim.methods.quantize import quantize
from jaxslim.models import bind, gates, roles
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import LINEARS, SpecError, kind, nearest

log = logging.getLogger(__name__)
LAYER = re.compile(r"\blayers?\.(\d+)\.")            # of the names of parameters inside transformer layers
GATE = "aux.adapter_gate."                           # + block id: the logit of a hard-concrete gate
FORM = {"tpa": {"kind": "parallel"}, "parallel": {"kind": "parallel"},
        "houlsby": {"kind": "sequential", "input": "output"},
        "bapna": {"kind": "sequential", "input": "layer", "norm": True}}


@dataclasses.dataclass(frozen=True)
class Adapter(Method):
    kind: Literal["tpa", "parallel", "houlsby", "bapna", "lora", "bitfit", "mms", "head", "full"] = "tpa"
    layers: Literal["all"] | tuple[int, ...] | str = "all"   # all, [6, 7], or ranges as in "0-3,8"
    blocks: tuple[str, ...] = ()          # regular expressions on block ids, in place of the kind's own blocks
    width: int = 64                       # of the bottleneck
    widths: dict[str, int] = dataclasses.field(default_factory=dict)   # regular expression on block ids -> width
    input: Literal["normed", "raw"] = "normed"   # of parallel adapters: as the FFN reads it, or before its norm
    norm: bool | None = None              # a LayerNorm in the adapter; None = as the kind has it
    act: str = "relu"
    scale: float = 1.0                    # of the adapter's output (He et al. take 4)
    init: Literal["identity", "praxis"] = "identity"   # praxis: random biases, so not the base at the start
    linears: tuple[str, ...] = ("q", "v")  # lora: of q, k, v, o, up, down
    rank: int = 8
    alpha: float = 16.0
    slots: int = 1                        # how many adapters are trained at once; the batch's adapter_ids choose
    train_head: bool = False              # the output layer (or decoder) too
    base: Literal["float32", "bfloat16", "int8"] = "float32"   # how the frozen model is stored while training
    drop_weight: float = 0.0              # learned drop: weight of the share of adapters that are kept; 0 = none
    keep: int = 0                         # learned drop: how many adapters stay; 0 = as many as the gates leave
    merge: bool = False                   # at the end: into the base

    def start(self, teacher: Slim, batches, key) -> Slim:
        """The model with zero-initialised adapters on the chosen blocks.

        Raises:
          SpecError: a layer, block or target that the model does not have, or that takes no adapter of this kind.
        """
        spec, head = teacher.spec, teacher.spec.head
        if (self.train_head or self.kind == "head") and head == "none":
            raise SpecError(f"adapter: the {spec.family} model has no head that could be trained.")
        if self.drop_weight and self.kind not in FORM:
            raise SpecError(f"adapter: the learned drop is of bottlenecks ({', '.join(FORM)}), not of {self.kind}.")
        base = quantize(teacher) if self.base == "int8" else teacher
        if self.kind == "mms":
            student = self.mms(base)
        elif self.kind in FORM or self.kind == "lora":
            student = adapters.insert(base, self.placement(spec), key, self.init)
        else:
            self.placement(spec)
            student = base
        if self.drop_weight:
            student = student.replace(params=student.params | {
                GATE + b: jnp.full((), 2.0) for b, f in student.spec.blocks.items() if "adapter" in f})
        if self.base == "bfloat16":
            half = lambda k, v: self.group(k) == "frozen" and np.ndim(v) > 1 and v.dtype == jnp.float32  # noqa: E731
            student = student.replace(params={k: jnp.asarray(v, jnp.bfloat16) if half(k, v) else v
                                              for k, v in student.params.items()})
        trained = sum(np.size(v) for k, v in student.params.items() if self.group(k) != "frozen")
        if not trained:
            raise SpecError(f"adapter: {self.kind} finds nothing to train in this {spec.family} model.")
        total = sum(np.size(v) for v in student.params.values())
        log.info("adapter: %s trains %s of %s parameters (%.2f %%).", self.kind, f"{trained:,}", f"{total:,}",
                 100 * trained / total)
        return student

    # ---- where ----

    def numbers(self, spec) -> set[int]:
        """Layer numbers of `layers`."""
        count = max(spec.of(side, "num_hidden_layers") for side in roles.FAMILIES[spec.family].layer)
        if self.layers == "all":
            return set(range(count))
        chosen = ranges(self.layers)
        if not chosen or min(chosen) < 0 or max(chosen) >= count:
            raise SpecError(f"adapter: layers {self.layers!r} of a model with layers 0 to {count - 1}.")
        return set(chosen)

    def placement(self, spec) -> dict[str, dict]:
        """Block id -> what its Spec gets: {"adapter": {...}} or {"lora": {...}}."""
        numbers = self.numbers(spec)
        if self.kind not in FORM and self.kind != "lora":
            return {}
        takes = [b for b in roles.blocks(spec) if kind(b) in LINEARS and self.accepts(spec, b)]
        own = [b for b in takes if b.startswith("encoder.") and self.belongs(spec, b)]
        for pattern in self.blocks:
            if not any(re.search(pattern, b) for b in takes):
                near = nearest(pattern, takes)
                raise SpecError(f"adapter: blocks {pattern!r} matches no block of this {spec.family} model that takes "
                                f"{self.kind}.{near} They are {', '.join(takes[:3])}, ...")
        chosen = [b for b in takes if any(re.search(p, b) for p in self.blocks)] if self.blocks else own
        chosen = [b for b in chosen if int(b.split(".")[1]) in numbers]
        if not chosen:
            raise SpecError(f"adapter: no block of this {spec.family} model takes {self.kind} in layers "
                            f"{self.layers!r}.")
        for pattern in self.widths:
            if not any(re.search(pattern, b) for b in chosen):
                raise SpecError(f"adapter: widths {pattern!r} matches no chosen block; they are "
                                f"{', '.join(chosen[:3])}, ...")
        return {b: self.fields(spec, b) for b in chosen}

    def accepts(self, spec, block: str) -> bool:
        """Whether an adapter of this kind can be put on the block."""
        if self.kind == "lora":
            whole = spec.attention(block).heads if kind(block) in ("attention", "cross") else spec.ffn(block).units
            return bool(whole) and bool(set(self.linears) & set(LINEARS[kind(block)]))
        if "adapter" in spec.blocks.get(block, {}):
            return False
        if self.kind == "bapna":
            return kind(block) in ("ffn", "ffn2")
        return self.kind == "houlsby" or kind(block).startswith("ffn")

    def belongs(self, spec, block: str) -> bool:
        """Whether the kind's own placement has the block."""
        return self.kind in ("tpa", "lora") or kind(block) in ("attention", "ffn", "ffn2")

    def fields(self, spec, block: str) -> dict:
        if self.kind == "lora":
            known = {r for roles_ in LINEARS.values() for r in roles_}
            if odd := set(self.linears) - known:
                raise SpecError(f"adapter: linears {sorted(odd)}; linears are {sorted(known)}.")
            slots = {"slots": self.slots} if self.slots > 1 else {}
            return {"lora": {r: {"rank": self.rank, "alpha": self.alpha, **slots}
                             for r in LINEARS[kind(block)] if r in self.linears}}
        width = next((w for p, w in self.widths.items() if re.search(p, block)), self.width)
        form = FORM[self.kind] | {"width": width}
        if form["kind"] == "parallel":
            form["input"] = "normed" if post_norm(spec) else self.input
        extra = {"norm": form.get("norm", False) if self.norm is None else self.norm, "act": self.act,
                 "scale": self.scale, "slots": self.slots, "bias": adapters.has_bias(spec, block)}
        plain = {"norm": False, "act": "relu", "scale": 1.0, "slots": 1, "bias": True}
        return {"adapter": {k: v for k, v in (form | extra).items() if k not in plain or v != plain[k]}}

    def mms(self, base: Slim) -> Slim:
        spec = base.spec
        if not (roles.FAMILIES[spec.family].parts.get("ffn", {}).get("bottleneck") and spec["do_stable_layer_norm"]):
            raise SpecError("adapter: mms adapters belong to wav2vec2-like models with do_stable_layer_norm.")
        if self.layers != "all" or self.blocks or self.slots > 1:
            raise SpecError("adapter: mms adapters stand in every layer, once; leave layers, blocks and slots out.")
        if not spec.get("adapter_attn_dim"):
            spec = spec.replace(config={**spec.config, "adapter_attn_dim": self.width})
        new = {k: x.shape for k, x in bind.shapes(spec).items() if k not in base.params}
        values = {k: np.zeros(shape, np.float32) for k, shape in new.items()}   # linear_2 zero: the base at the start
        for i, (k, v) in enumerate(values.items()):
            if k.endswith("linear_1.weight"):
                values[k] = adapters.xavier(np.random.default_rng(i), v.shape)
            elif k.endswith("norm.weight"):
                values[k] = np.ones_like(v)
        return Slim(spec, {**base.params, **values})

    # ---- training ----

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        gated, kept = self.gate(student, key)
        terms = task(gated, gated(key=key, **inputs(batch, gated)), batch)
        return terms | ({"kept": Term(kept, jnp.ones(()), self.drop_weight)} if self.drop_weight else {})

    def gate(self, student: Slim, key) -> tuple[Slim, jax.Array]:
        """The model with every adapter's output times a sample of its gate, and the expected share of open gates."""
        logits = {k: v for k, v in student.params.items() if k.startswith(GATE)}
        params, open_ = {k: v for k, v in student.params.items() if k not in logits}, []
        for i, (name, logit) in enumerate(sorted(logits.items())):
            z = hard_concrete(logit, jax.random.fold_in(jax.random.fold_in(key, 77), i))
            for leaf in adapters.up_leaves(student.spec, name.removeprefix(GATE)):
                params[leaf] = params[leaf] * z
            open_.append(gates.probability(logit))
        return student.replace(params=params), sum(open_) / max(len(open_), 1)

    def control(self) -> Method:
        return Finetune(freeze=(roles.FRONTEND,))

    def group(self, name: str) -> str:
        if stored_statistic(name):
            return "frozen"
        layer = LAYER.search(name)
        mine = {"full": True, "head": False, "bitfit": name.endswith(".bias") and layer is not None and (
            self.layers == "all" or int(layer[1]) in ranges(self.layers))}.get(
            self.kind, bool(adapters.LEAF.search(name)) or name.startswith(GATE))
        return "main" if mine or (self.train_head or self.kind == "head") and is_head(name) else "frozen"

    def finish(self, student: Slim, batches) -> Slim:
        if self.drop_weight:
            logits = {k.removeprefix(GATE): np.asarray(v) for k, v in student.params.items() if k.startswith(GATE)}
            values = {b: float(hard_concrete(v, None)) for b, v in logits.items()}
            order = sorted(logits, key=lambda b: -logits[b])
            kept = order[: self.keep] if self.keep else [b for b in order if values[b] > 0] or order[:1]
            student = adapters.drop(student, [b for b in order if b not in kept])
            scaled = {leaf: student.params[leaf] * np.float32(max(values[b], 1e-3)) for b in kept
                      for leaf in adapters.up_leaves(student.spec, b)}
            student = student.replace(params={**student.params, **scaled})
            log.info("adapter: %d of %d adapters stay.", len(kept), len(order))
        params = {k: np.asarray(v, np.float32) if v.dtype == jnp.bfloat16 else v
                  for k, v in super().finish(student, batches).params.items()}
        student = student.replace(params=params)
        return adapter_merge.merge(student) if self.merge and student.spec.slots else student


def post_norm(spec) -> bool:
    """Whether layers norm behind their residuals: then what a sub-layer reads is its un-normalised input."""
    return "ffn" in roles.FAMILIES[spec.family].parts and not spec.get("do_stable_layer_norm", spec.family == "whisper")


def ranges(layers: tuple[int, ...] | str) -> tuple[int, ...]:
    """'0-3,8' -> (0, 1, 2, 3, 8)."""
    if not isinstance(layers, str):
        return tuple(layers)
    text = layers.replace(" ", "")
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise SpecError(f"adapter: layers {layers!r}; write all, a list, or ranges such as 0-3,8.")
    ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
    return tuple(i for low, *high in ends for i in range(low, (high or [low])[0] + 1))


def hard_concrete(logit, key) -> jax.Array:
    """A sample of a gate in [0, 1], or without a key its value in evaluation (arXiv 1712.01312, equations 10 to 13)."""
    noise = 0.0
    if key is not None:
        u = jax.random.uniform(key, jnp.shape(logit), minval=1e-6, maxval=1 - 1e-6)
        noise = jnp.log(u) - jnp.log1p(-u)
    return gates.stretch(logit if key is None else (logit + noise) / gates.TEMPERATURE)


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the output layer of a model with a head, or to its decoder."""
    inner = {f.prefix + "." for f in roles.FAMILIES.values()}
    return name.startswith("model.decoder.") or not name.startswith((*inner, "aux.", "teacher/"))
