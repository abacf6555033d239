"""HJ-Pruning (Peng et al., arXiv 2302.14132) and DPHuBERT (Peng et al., arXiv 2305.17651): front end and transformer
pruned together under a budget, then cut for real.

While it trains, a model has gates (models/gates.py). L = task and/or distillation + sum over costs of
l1 (s - t) + l2 (s - t)^2, with s the expected share of the cost (budget.py) and t its target, which falls from 1 to the
wanted share in `ramp_steps`. The multipliers l1, l2 are maximised: their gradient is turned round, so they have an
ordinary optimiser group of their own. Costs: HJ-Size is {params: ...}, SepSize {params.frontend: ...,
params.encoder: ...}, HJ-MAC {macs: ...}; latency by a measured table is ours.

Of HJ-Pruning no code and no table is public: its objective (the task's loss) is from the abstract, all mechanics are
DPHuBERT's. Ours: gates that start open (DPHuBERT's start is an option), l2 that starts at `damping`, where theirs is 0
and needs tens of thousands of steps to settle, norms over open channels only, a rounding that keeps the expected total,
output biases of emptied blocks kept, a last common shift of all gates that meets the budget exactly, and the check
that cutting changed nothing.

Without a `target` a stage prunes nothing and only trains with the same objective: the recovery of the small model.
"""
from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim import budget
from jaxslim.dense import fold
from jaxslim.methods.finetune import Finetune, stored_statistic, task
from jaxslim.methods.recover import logit_kl
from jaxslim.models import gates, layers, roles
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import GATES, Spec, SpecError, kind
from jaxslim.train import losses

log = logging.getLogger(__name__)
OPEN = 5.0                       # log_alpha of a gate that starts open: P(open) = 0.9986, its median is 1
DROP = {"units": 0.5}            # DPHuBERT's initial drop rates; 0.01 for the others
TOLERANCE = 1e-4                 # of max(1, max abs): masked against cut, whole models in fp32


@dataclasses.dataclass(frozen=True)
class Prune(Method):
    target: dict[str, float] = dataclasses.field(default_factory=dict)  # cost -> share (up to 1), or absolute value
    gates: tuple[Literal["channels", "heads", "units", "qk", "vo", "block"], ...] = ("channels", "heads", "units")
    blocks: str = ""                      # regular expression on block ids; "" = all that can be pruned
    seconds: tuple[float, ...] = (10.0,)  # audio lengths whose mean MACs count
    table: str = ""                       # latency table, made by `jaxslim bench --table`
    ramp_steps: int = 100
    damping: float = 100.0                # l2 at the start; the papers' 0 swings past the target in short runs
    init: Literal["open", "dphubert"] = "open"
    select: Literal["learn", "magnitude", "random"] = "learn"  # the last two: one-shot baselines, cut before training
    shape: Literal["free", "tile", "uniform"] = "free"  # uniform: alike in all layers, so that a stock class opens it
    tile: int = 8                         # shape tile: units and channels come in multiples of it
    mask_norms: bool = True               # False: norms see closed channels too (an ablation; the cut model differs)
    objective: Literal["task", "distill", "both"] = "task"
    distill_layers: tuple[int, ...] = ()  # 0 = the projection, i = output of layer i; () = 0, L/3, 2L/3, L
    distill_weight: float = 1.0
    distance: Literal[losses.DISTANCES] = "l1_cosine"  # of these states; DPHuBERT's. channel_mse for Whisper's
    logit_weight: float = 0.0             # of the KL to the teacher's outputs, with any objective (ours)
    project: bool = True                  # DPHuBERT: a linear between student and teacher states, the identity at first
    freeze: tuple[str, ...] = ()          # regular expressions on parameter names

    def start(self, teacher: Slim, batches, key) -> Slim:
        """Gates, all open, and multipliers; or for a one-shot baseline the cut model."""
        spec, params = teacher.spec, dict(teacher.params)
        if self.objective != "task" and self.project:
            width = spec.of("encoder.0", "hidden_size")
            for name in {_projection(tap) for tap in self.taps(spec)}:
                params[f"{name}.weight"] = np.eye(width, dtype=np.float32)
                params[f"{name}.bias"] = np.zeros(width, np.float32)
        if not self.target:
            return Slim(spec, params)
        spec = self.gated(spec)
        self.shares(spec)
        if self.select != "learn":
            return self.one_shot(spec, params, key)
        for i, (name, leaf) in enumerate(gates.shapes(spec).items()):
            noise = 0.01 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
            p = DROP.get(name.rpartition("gate_")[2], 0.01)
            params[name] = np.asarray(noise + (OPEN if self.init == "open" else np.log(1 - p) - np.log(p)), np.float32)
        for cost in self.target:
            params[f"aux.multiplier.{cost}"] = np.array([0.0, self.damping], np.float32)
        return Slim(spec, params)

    def gated(self, spec: Spec) -> Spec:
        """The Spec with gates on every block that `gates` and `blocks` choose. Raises SpecError."""
        options = {"tile": self.tile} if self.shape == "tile" else {"uniform": True} if self.shape == "uniform" else {}
        options |= {} if self.mask_norms else {"norm": "all"}
        if spec.slots > 1:
            raise SpecError(f"prune: the model has {spec.slots} adapters; merge one, or delete all but one "
                            "(`Slim.merge`, `Slim.delete_adapter`).")
        out = spec
        for block in roles.blocks(spec):
            chosen = [what for what in GATES.get(kind(block), ()) if what in self.gates]
            if spec.family == "whisper" and block == "frontend.1" or not re.search(self.blocks, block):
                continue
            if chosen and gates.size(spec, block):
                out = out.with_block(block, gates={what: {} if what in ("heads", "block") else options
                                                   for what in chosen})
        if not gates.shapes(out):
            raise SpecError(f"prune: no block of this {spec.family} model has gates on {list(self.gates)} and fits "
                            f"{self.blocks!r}.")
        groups = gates.groups(out)  # also the check of mixers
        if self.shape == "uniform":
            for group in groups:  # halve all blocks of its kind: would a stock config describe that?
                trial = gates.plain(out)
                for other in groups:
                    if (kind(other.block), other.unit) == (kind(group.block), group.unit):
                        trial = gates.with_units(trial, other.key, range(max(1, other.size // 2)))
                if fold(trial) is None:
                    raise SpecError(f"prune: shape uniform: no stock {spec.family} config has another number of "
                                    f"{group.unit} in {group.block}; leave them out of `gates` or `blocks`, or use "
                                    "shape free.")
        return out

    def shares(self, spec: Spec) -> dict[str, float]:
        """Cost -> wanted share of its value with all gates open. Raises SpecError for a target out of reach."""
        found = {}
        if "latency" in self.target and any(g.unit in gates.DIMS for g in gates.groups(spec)):
            raise SpecError("prune: latency tables do not know ranks; with gates on qk or vo ask for macs or params.")
        for cost, target in self.target.items():
            budget.check(cost, spec)
            whole, least = self.value(cost, spec, budget.full(spec)), self.value(cost, spec, budget.floor(spec))
            share = target if target <= 1 else target / whole
            if not 0 < share <= 1:
                raise SpecError(f"prune: target {cost}={target:g}: the model has {whole:.6g}; ask for a share of it "
                                "(up to 1) or for less.")
            if share < least / whole:
                raise SpecError(f"prune: target {cost}={target:g} is out of reach: with all gates closed "
                                f"{least / whole:.4f} of it ({least:.6g} of {whole:.6g}) is left. Raise it, or gate "
                                "more.")
            found[cost] = share
        return found

    def cost(self, name: str, spec: Spec, counts: Mapping[str, Any]) -> jax.Array:
        table = None
        if name == "latency":
            from jaxslim import latency

            table = latency.load(self.table, spec)
        return budget.expected(name, spec, counts, self.seconds, table)

    def value(self, name: str, spec: Spec, counts: Mapping[str, float]) -> float:
        """`cost` of known counts, as a number also while a step is traced."""
        with jax.ensure_compile_time_eval():
            return float(self.cost(name, spec, counts))

    def one_shot(self, spec: Spec, params, key) -> Slim:
        """The same share of every block, as large as the targets allow; which units: by weight, or at random."""
        groups, shares = gates.groups(spec), self.shares(spec)
        whole = {cost: self.value(cost, spec, budget.full(spec)) for cost in shares}

        def counts(ratio):
            least = budget.floor(spec)
            return {g.key: max(least[g.key], float(round(ratio * g.size))) for g in groups}

        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            fits = all(self.value(c, spec, counts(middle)) <= share * whole[c] for c, share in shares.items())
            low, high = (middle, high) if fits else (low, middle)
        kept = {}
        for i, g in enumerate(groups):
            score = jax.random.uniform(jax.random.fold_in(key, i), (g.size,))
            if self.select == "magnitude":
                score = magnitude(g, params)
            kept[g.key] = np.sort(np.argsort(-np.asarray(score), kind="stable")[: int(counts(low)[g.key])])
        return self.cut(Slim(spec, params), gates.masked(spec, kept))

    # ---- training ----

    def teacher_at(self, teacher: Slim, step: int) -> Slim | None:
        return teacher if self.cacheable() else None

    def targets(self, teacher: Slim, batch, key, step) -> dict[str, jax.Array]:
        out = teacher(taps=self.taps(teacher.spec), **inputs(batch))
        return (out.taps or {}) | ({"logits": out.logits} if self.logit_weight else {})

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        taps = self.taps(student.spec)
        out = student.replace(params={k: v for k, v in student.params.items() if not k.startswith("aux.")})(
            key=key, taps=taps, **inputs(batch))
        terms = task(student, out, batch) if self.objective != "distill" else {}
        for tap in taps:
            x, name = out.taps[tap], _projection(tap)
            if self.project:
                x = layers.matmul(x.astype(jnp.float32), student.params[f"{name}.weight"])
                x = x + student.params[f"{name}.bias"]
            distance = losses.hidden(x, targets[tap], _valid(tap, x, out, batch), self.distance)
            terms[tap] = distance._replace(weight=self.distill_weight / len(taps))
        if "logits" in targets:
            terms["kl"] = logit_kl(out, targets["logits"], batch)._replace(weight=self.logit_weight)
        if gates.shapes(student.spec):
            terms |= self.lagrangian(student, step)
        return terms

    def lagrangian(self, student: Slim, step) -> dict[str, Term]:
        """For each cost its term of the objective, and its expected share (weight 0: for the log)."""
        spec, terms = student.spec, {}
        counts = gates.expected(spec, student.params)
        for cost, target in self.shares(spec).items():
            share = self.cost(cost, spec, counts) / self.value(cost, spec, budget.full(spec))
            gap = share - (1.0 + (target - 1.0) * jnp.minimum((step + 1) / max(self.ramp_steps, 1), 1.0))
            multiplier = student.params[f"aux.multiplier.{cost}"]
            multiplier = 2.0 * jax.lax.stop_gradient(multiplier) - multiplier      # same value, opposite gradient
            terms[cost] = Term(multiplier[0] * gap + multiplier[1] * gap**2, jnp.float32(1.0))
            terms[f"share.{cost}"] = Term(jax.lax.stop_gradient(share), jnp.float32(1.0), 0.0)
        return terms

    def taps(self, spec: Spec) -> tuple[str, ...]:
        """States that are distilled."""
        if self.objective == "task":
            return ()
        first, chosen = "projection" if "projection" in roles.FAMILIES[spec.family].rest else "embedding", []
        for side in roles.FAMILIES[spec.family].layer:
            count = spec.of(side, "num_hidden_layers")
            numbers = self.distill_layers or sorted({0, round(count / 3), round(2 * count / 3), count})
            if not all(0 <= n <= count for n in numbers):
                raise SpecError(f"prune: distill_layers {list(numbers)} of a model with {count} layers.")
            chosen += [first if n == 0 else f"{side}.{n - 1}" for n in numbers]
        return tuple(dict.fromkeys(chosen))

    def keeps_best(self) -> bool:
        return not self.target or self.select != "learn"  # the best while pruning is the one pruned least

    def cacheable(self) -> bool:
        return self.objective != "task" or self.logit_weight > 0  # it reads the teacher

    def labelled(self) -> bool:
        return self.objective != "distill"

    def control(self) -> Method | None:
        return None if self.objective == "distill" else Finetune(freeze=self.freeze)

    def group(self, name: str) -> str:
        if stored_statistic(name) or any(re.search(p, name) for p in self.freeze):
            return "frozen"
        if name.startswith("aux.multiplier."):
            return "multipliers"
        return "gates" if ".gate_" in name else "main"

    # ---- from gates to a small model ----

    def finish(self, student: Slim, batches) -> Slim:
        student = super().finish(student, batches)
        if not gates.shapes(student.spec):
            return student
        shift = self.shift(student)
        log.info("prune: all gates moved by %+.3f, so that the budget is met.", shift)
        params = {k: np.asarray(v, np.float32) + np.float32(shift) if ".gate_" in k else v
                  for k, v in student.params.items()}
        return self.cut(student.replace(params=params), gates.settle(student.spec, params), shift=round(shift, 4))

    def shift(self, student: Slim) -> float:
        """What to add to every log_alpha so that the expected costs meet all targets, and one of them exactly. Near 0
        when training has settled; where it has not, units are taken or given back in their order."""
        spec, shares = student.spec, self.shares(student.spec)
        whole = {cost: self.value(cost, spec, budget.full(spec)) for cost in shares}

        @jax.jit
        def excess(shift):
            params = {k: v + shift for k, v in student.params.items() if ".gate_" in k}
            counts = gates.expected(spec, params)
            return jnp.stack([self.cost(c, spec, counts) / whole[c] / share for c, share in shares.items()]).max() - 1

        low, high = -30.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if float(excess(middle)) < 0 else (low, middle)
        return low

    def cut(self, gated: Slim, state: Mapping[str, gates.Gate], **facts: Any) -> Slim:
        """The small model, checked against the masked one. Raises SpecError when they differ."""
        auxiliary = {k: v for k, v in gated.params.items() if k.startswith("aux.")}
        gated = gated.replace(params={k: v for k, v in gated.params.items() if k not in auxiliary})
        spec, params = gates.cut(gated.spec, gated.params, state)
        counts = {b: float(np.asarray(s.open).sum()) for b, s in state.items()}
        record = {"method": "prune", "select": self.select, "target": dict(self.target), "share": {}, **facts}
        for cost, target in self.shares(gated.spec).items():
            whole = self.value(cost, gated.spec, budget.full(gated.spec))
            record["share"][cost] = round(self.value(cost, gated.spec, counts) / whole, 6)
            log.info("prune: %s %.4f of the parent's (target %.4f).", cost, record["share"][cost], target)
        small = Slim(spec.replace(history=(*spec.history, record)), params)
        difference = compare(gated, state, small)
        log.info("prune: masked against cut: max relative difference %.1e.", difference)
        if difference > TOLERANCE and self.mask_norms:
            raise SpecError(f"prune: the cut model differs from the masked one by {difference:.1e} of its largest "
                            f"output, more than {TOLERANCE:g}; please report this with the model's config.")
        return small.replace(params={**params, **auxiliary})


def magnitude(group: gates.Group, params: Mapping[str, Any]) -> np.ndarray:
    """L2 norm of all weights of each unit, those that make it and those that read it: (units,)."""
    total = np.zeros(group.size)
    for place in {*group.rows, *group.reads}:
        x = np.moveaxis(np.asarray(params[place.name], np.float64), place.axis, 0)
        total += (x.reshape(place.lead, group.size, -1) ** 2).sum((0, 2))
    return np.sqrt(total)


def compare(gated: Slim, state: Mapping[str, gates.Gate], small: Slim) -> float:
    """Max |masked - cut| over max(1, max |cut|), on the fixed inputs of export.example, valid frames."""
    from jaxslim.export import _ours, example

    batch = example(gated.spec)
    if batch is None:
        return 0.0
    with jax.default_matmul_precision("highest"):
        masked, (cut, valid) = _masked(gated, dict(state), batch), _ours(small, batch)
    masked, cut = np.asarray(masked, np.float64)[valid], cut[valid].astype(np.float64)
    return float(np.abs(masked - cut).max() / max(1.0, np.abs(cut).max()))


@jax.jit
def _masked(gated: Slim, state, batch):
    from jaxslim.models import bind

    params = {k: jnp.asarray(v, jnp.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v
              for k, v in gated.params.items()}
    out = bind.bind(gated.spec, gates.fold(gated.spec, params, state))(layers.Call(), **batch)
    return out.last_hidden_state if out.logits is None else out.logits


def _projection(tap: str) -> str:
    """DPHuBERT's default: the projection's state has a linear of its own, the layers share one."""
    return f"aux.distill.{tap.split('.')[0]}"


def _valid(tap: str, x, out, batch) -> jax.Array:
    """(B, T), the frames of a tap that are no padding."""
    if tap.startswith("decoder.") and "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"] != 0
    return layers.valid_frames(None if tap.startswith("decoder.") else out.lengths, x)
