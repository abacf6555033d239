"""AdaPTwin (arXiv 2406.08904): joint low rank of the products Q-K and V-O, data-aware, and of the FFN; then recovery on
a little speech, of one speaker if wanted.

The paper's text, tables and code are not public but for its abstract (pairs of attention matrices that meet in a
product are compressed together; light fine-tuning on eight hours of one speaker; models up to 45 % smaller). What
stands here is a reimplementation from that description: formulas, statistics, allocation and losses are ours
(factor.py, allocate.py).

`start` calibrates once and cuts `remove` of the cost; the stage's training recovers:

* `layers`: every cut block alone learns the output of the block it comes from, fed with the teacher's own inputs, all
  in one step; a block's loss is its squared error over the energy of the teacher's output.
* `task`: the task's loss plus `logit_weight` times the KL to the teacher's outputs, end to end.

`lora_rank` trains LoRA on the thin factors instead of the factors; it merges exactly and cannot raise a product's rank.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import adapter_merge
from jaxslim.config import ConfigError
from jaxslim.methods import allocate, factor
from jaxslim.methods.calibrate import Calibration, calibrate, place, require
from jaxslim.methods.finetune import Finetune, stored_statistic, task
from jaxslim.methods.recover import PARTS, add_lora, gap, layerwise, logit_kl, valid
from jaxslim.models import bind, roles
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import SpecError, kind
from jaxslim.train import losses
from jaxslim.train import mesh as M

log = logging.getLogger(__name__)
FACTORS = re.compile(r"(^|\.)(" + "|".join(sorted({  # parameters of the linears that are cut, in all families
    re.escape(name) for family in roles.FAMILIES.values() for part, names in family.parts.items() if part in PARTS
    for role, name in names.items() if role in ("q", "k", "v", "o", "up", "down", "pos", "bias_u", "bias_v")}))
    + r")(\.(weight|bias|(up|down|lora_A|lora_B)\.weight))?$")
PROBES = 2   # batches on which sensitivities are measured


@dataclasses.dataclass(frozen=True)
class LowRank(Method):
    remove: float = 0.0               # share of the cost to cut; 0 = nothing: a stage that only recovers
    rotate: bool = False              # without `remove`: only turn the heads, best dimensions first; same outputs
    cost: Literal["params", "macs", "latency"] = "params"   # latency: timed here, with all layers cut alike
    of: Literal["encoder", "model"] = "encoder"   # what `remove` is a share of; encoder: without head and embeddings
    seconds: float = 10.0             # audio length of MACs and latency
    sides: tuple[str, ...] = ("encoder",)          # Whisper: also decoder (self- and cross-attention, FFN)
    kinds: tuple[str, ...] = ("qk", "vo", "units", "up", "down")
    twin: Literal["whitened", "product", "separate"] = "whitened"   # product, separate: SVD without data, baselines
    centered: bool = True             # keys and contexts about their mean
    allocation: Literal["global", "uniform"] = "global"
    sensitivity: Literal["kl", "energy"] = "kl"    # measured on the outputs, or each group's own energy
    multiple_of: int = 8              # ranks and units that are kept
    minimum: int = 8                  # fewest that are kept
    frames: int = 50_000              # of calibration; 0 = one pass over all training data
    objective: Literal["layers", "task"] = "layers"
    trained: Literal["factors", "lora", "all"] = "factors"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    logit_weight: float = 1.0         # task: of the KL to the teacher
    temperature: float = 1.0
    freeze_frontend: bool = True      # trained "all": the conv front end stays fixed

    def __post_init__(self):
        if not 0 <= self.remove < 1 or min(self.multiple_of, self.minimum) < 1:
            raise ConfigError("lowrank: remove must be from 0 to below 1, multiple_of and minimum at least 1.")
        if self.trained == "lora" and self.lora_rank < 1:
            raise ConfigError("lowrank: trained: lora needs a lora_rank.")

    def start(self, teacher: Slim, batches, key) -> Slim:
        """Cuts, and adds LoRA where asked for.

        Raises:
          SpecError: a block that cannot be cut, or a budget below the floor. CalibrationError: statistics.
        """
        student = self.compress(teacher, batches, (self.remove,))[0] if self.remove else teacher
        if self.rotate and not self.remove:
            student = self.rotated(teacher, batches)
        return add_lora(student, self.lora_rank, self.lora_alpha, key) if self.lora_rank else student

    def compress(self, teacher: Slim, batches, removes: tuple[float, ...]) -> list[Slim]:
        """One model for every share in `removes`, from one calibration."""
        found, weights, seen = self.analyse(teacher, batches)
        spec, params = teacher.spec, teacher.params
        prices = allocate.prices(spec, params, found, self.cost, self.seconds, self.minimum)
        groups = allocate.group_points(found, weights, prices, self.multiple_of, self.minimum)
        whole = prices.whole or allocate.total(spec, self.cost, self.seconds, self.sides, self.of)
        rows = allocate.frontier(groups, whole)
        log.info("Frontier (share of %s removed: divergence expected): %s", self.cost,
                 ", ".join(f"{r['removed']:.0%}: {r['divergence']:.3g}" for r in rows))
        return [self.cut(teacher, groups, whole, remove, seen) for remove in removes]

    def rotated(self, teacher: Slim, batches) -> Slim:
        """The model with the dimensions of its heads rotated and none cut: what gates on ranks act on (`prune` with
        gates qk, vo). Stock shapes, the same outputs."""
        attention = dataclasses.replace(self, kinds=tuple(k for k in self.kinds if k in factor.KINDS["attention"]),
                                        sensitivity="energy")
        params = {k: np.asarray(v) for k, v in teacher.params.items()}
        for curve in attention.analyse(teacher, batches)[0]:
            params = curve.cut(teacher.spec, params, curve.full, dense=True)[1]
        return teacher.replace(params=params)

    def analyse(self, teacher: Slim, batches) -> tuple[list[factor.Curve], dict, Calibration]:
        """Curves of all blocks, the sensitivity of each, and what they were made from."""
        spec, wanted = teacher.spec, self.blocks(teacher.spec)
        for block, kinds in wanted.items():
            factor.check(spec, block, kinds)
        data = self.twin == "whitened"
        seen = calibrate(teacher, batches, wanted, frames=self.frames) if data else Calibration({}, {})
        params = {k: np.asarray(v) for k, v in teacher.params.items()}
        found = [c for block, kinds in wanted.items()
                 for c in factor.curves(spec, params, seen.moments.get(block), block, kinds, self.twin, self.centered)]
        if self.sensitivity == "kl":
            return found, sensitivities(teacher, found, batches), seen
        return found, {(c.block, c.kind): 1.0 / max(c.tail[0], 1e-30) for c in found}, seen

    def blocks(self, spec) -> dict[str, tuple[str, ...]]:
        """Block -> kinds of cuts, of the blocks on the chosen sides that have something to cut."""
        known = {k for kinds in factor.KINDS.values() for k in kinds}
        if unknown := sorted({*self.kinds} - known):
            raise SpecError(f"lowrank: unknown kinds {unknown}; known are {sorted(known)}.")
        if unknown := sorted({*self.sides} - {*roles.FAMILIES[spec.family].layer}):
            raise SpecError(f"lowrank: this {spec.family} model has no side {unknown}; it has "
                            f"{sorted(roles.FAMILIES[spec.family].layer)}.")
        out = {}
        for block in roles.blocks(spec):
            if block.split(".")[0] not in self.sides or kind(block) not in PARTS:
                continue
            attention = kind(block) in ("attention", "cross")
            alive = spec.attention(block).heads if attention else spec.ffn(block).units
            kinds = tuple(k for k in self.kinds if k in factor.KINDS["attention" if attention else "ffn"])
            if alive and kinds:
                out[block] = kinds
        if not out:
            raise SpecError(f"lowrank: no block of this {spec.family} model has anything to cut.")
        return out

    def cut(self, teacher: Slim, groups, whole: float, remove: float, seen: Calibration) -> Slim:
        target = remove * whole
        floor = sum(max((p.saved for p in g), default=0.0) for g in groups)
        if floor < target:
            raise SpecError(f"lowrank: {remove:.0%} of the {self.of}'s {self.cost} cannot be removed: with every rank "
                            f"at its floor ({self.minimum}) {floor / whole:.1%} is gone. Ask for less, lower "
                            "`minimum`, or prune heads and channels too.")
        choose = allocate.choose if self.allocation == "global" else allocate.uniform
        setting, saved, loss = choose(groups, target)
        spec, params = teacher.spec, dict(teacher.params)
        for curve, r in setting:
            if curve.block in seen.frames:
                require(curve.block, seen.frames[curve.block], r, "units" if curve.kind == "units" else "rank")
            spec, params = curve.cut(spec, params, r)
        log.info("lowrank: %.1f %% of the %s's %s removed, divergence expected %.3g: %s.", 100 * saved / whole, self.of,
                 self.cost, loss, "; ".join(f"{b} {f}" for b, f in summary(setting).items()))
        bind.check(spec, params, "The compressed model")
        return Slim(spec, params, teacher.defaults)

    # ---- recovery ----

    def targets(self, teacher: Slim, batch, key, step) -> dict[str, jax.Array]:
        if self.objective == "task":
            return {"logits": teacher(**inputs(batch)).logits} if self.logit_weight else {}
        names = [b for b in roles.blocks(teacher.spec) if kind(b) in PARTS]
        taps = tuple(f"{b}.{side}" for b in names for side in ("in", "out"))
        out = teacher(taps=taps, **inputs(batch))
        memory = out.encoder_last_hidden_state
        return out.taps | ({} if memory is None else {"memory": memory})

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        if self.objective == "layers":
            return layerwise(student, targets)
        out = student(key=key, **inputs(batch))
        terms = task(student, out, batch)
        if "logits" in targets:
            kl = logit_kl(out, targets["logits"], batch, self.temperature)
            terms["kl"] = kl._replace(weight=self.logit_weight)
        return terms

    def labelled(self) -> bool:
        return self.objective != "layers"

    def control(self) -> Method | None:
        return None if self.objective == "layers" else Finetune(freeze=self.fixed())

    def fixed(self) -> tuple[str, ...]:
        """Regular expressions of what is not trained; of `lora` those of the control."""
        if self.trained == "all":
            return (roles.FRONTEND,) if self.freeze_frontend else ()
        others = {"encoder", "decoder"} - {*self.sides}
        return (rf"^(?!.*{FACTORS.pattern})", *(rf"(^|\.){side}\.layers\." for side in sorted(others)))

    def group(self, name: str) -> str:
        if stored_statistic(name):
            return "frozen"
        if self.trained == "lora":
            return "main" if ".lora_" in name else "frozen"
        return "frozen" if any(re.search(p, name) for p in self.fixed()) else "main"

    def finish(self, student: Slim, batches) -> Slim:
        """Merges LoRA; how much that moves the outputs is said in fp32 and again in bfloat16."""
        student = super().finish(student, batches)
        if not any(".lora_" in name for name in student.params):
            return student
        merged = adapter_merge.merge(student, check=False)
        if batches is not None:
            batch = next(iter(batches()))
            log.info("LoRA merged: outputs moved by at most %.1e in float32, %.1e after a cast to bfloat16.",
                     gap(student, merged, batch), gap(student, merged, batch, "bfloat16"))
        return merged


def sensitivities(teacher: Slim, found: list[factor.Curve], batches) -> dict[tuple[str, str], float]:
    """Divergence of the outputs for a unit of each curve's own error: the block is cut to half its rank, alone, in the
    stock shape (one compiled program for all), and the KL of the outputs (relative squared error without logits) is
    divided by the error that the curve predicts."""
    spec, params = teacher.spec, {k: np.asarray(v) for k, v in teacher.params.items()}
    mesh = M.make()
    placed = M.place(params, mesh)
    probes = [place(b, mesh) for b in itertools.islice(batches(), PROBES)]
    wants = [reference(placed, batch, spec=spec) for batch in probes]
    out = {}
    for curve in found:
        r = int(np.flatnonzero(curve.tail >= 1e-3 * curve.tail[0])[-1])
        r = min(r, curve.full // 2)
        _, cut = curve.cut(spec, params, r, dense=True)
        cut = placed | M.place({k: v for k, v in cut.items() if v is not params[k]}, mesh)
        sums = np.sum([divergence(cut, batch, want, spec=spec) for batch, want in zip(probes, wants, strict=True)], 0)
        out[curve.block, curve.kind] = float(sums[0] / sums[1] / max(curve.tail[r], 1e-30))
    return out


def outputs(params, batch, spec):
    """(B, T, V) and which frames count (B, T); `batch` from calibrate.place."""
    out = Slim(spec, params)(**inputs(batch))
    values = out.last_hidden_state if out.logits is None else out.logits
    mask = valid(out, batch) & batch["real"][:, None]
    return (values[:, None] if values.ndim == 2 else values).astype(jnp.float32), mask


reference = functools.partial(jax.jit, static_argnames="spec")(outputs)


@functools.partial(jax.jit, static_argnames="spec")
def divergence(params, batch, want, *, spec) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of the divergence of a model's outputs from `want`, as `outputs` gave them."""
    values, mask = outputs(params, batch, spec)
    if spec.head == "none":
        frame = lambda x: jnp.where(mask, (x**2).sum(-1), 0.0).sum()  # noqa: E731
        return frame(values - want[0]), frame(want[0])
    term = losses.kl(values, want[0], mask)
    return term.sum, term.count


def summary(setting: allocate.Setting) -> dict[str, dict[str, int]]:
    """Block -> Spec fields that a setting changes."""
    out: dict[str, dict[str, int]] = {}
    for curve, r in setting:
        out.setdefault(curve.block, {}).update(allocate.fields(curve, r))
    return dict(sorted(out.items()))
