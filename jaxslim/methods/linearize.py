"""CALD (He & Garner, arXiv 2410.06846): self-attention replaced by a linear-time mixer, recovered by layerwise
distillation while fine-tuning on the task.

Two objectives, run as two stages of a recipe:

* `align`: every mixer alone learns the output of the attention it replaces, fed with the teacher's own inputs, all
  layers in one step (LoLCATs' attention transfer, MOHAWK's stage 2). The loss of a layer is the squared error
  relative to the energy of the teacher's output; that normalisation is ours.
* `cald`: L = task + layer_weight * mean over layers of distance(block outputs) + logit_weight * KL, section 3 of the
  paper. `guidance` says who teaches at a step:
    target      the recipe's teacher (the paper's fine-tuned "target teacher"), all the time
    unguided    nobody
    hybrid      the teacher until step `until`, then nobody
    waypoint    models saved along the teacher's own fine-tuning, `waypoints`, each for `waypoint_every` steps
    trajectory  a teacher fine-tuned beside the student, from `source`, on the same batches: its states before the
                update guide. Its parameters are trained as group "teacher", every so many steps by that group's `every`

Waypoints swap arrays under one compiled step; the end of `hybrid` and a schedule's end cost one more compilation.
"""
from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import logging
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.methods.attention_stats import leave_one_in, near_shares
from jaxslim.methods.finetune import Finetune, stored_statistic, task
from jaxslim.models import bind, convert, layers, positions, roles
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import SpecError
from jaxslim.train import losses

log = logging.getLogger(__name__)
LIVE = "teacher/"                                 # prefix of a trajectory teacher's parameters
NEW = re.compile(r"\.(feature_[qk]\.(weight|bias)|window_factor|E|F|(fwd|bwd|shared)\..+)$")
Weight = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Linearize(Method):
    objective: Literal["align", "cald"] = "cald"
    mixer: str = "hedgehog"
    layers: Literal["all"] | tuple[int, ...] = "all"
    keep: str | tuple[int, ...] = ()  # of these layers, those that stay softmax: numbers, uniform:N or ranked:N
    rank_batches: int = 4             # training batches on which `ranked` and the shares of a window are measured
    options: dict[str, Any] = dataclasses.field(default_factory=dict)   # of the mixer (spec.MIXERS)
    features: int = 0                 # rows of each feature map, 0 = the head size; hedgehog's output is twice as wide
    init: Literal["attention", "random"] = "attention"   # recurrent mixers: parts of q, k, v, o, or new
    student_init: Literal["target", "source"] = "target"  # all other weights: the parent's, or those of `source`
    source: str = ""                  # the pretrained model before fine-tuning
    guidance: Literal["target", "unguided", "hybrid", "waypoint", "trajectory"] = "target"
    until: int = 0                    # hybrid: steps with the teacher; schedules: the step at which a weight is zero
    waypoints: tuple[str, ...] = ()
    waypoint_every: int = 0           # steps that each guides; the last one to the end
    task_weight: float = 1.0
    layer_weight: float = 15.0        # a_LD of the paper
    layer_schedule: Weight = "constant"   # from its weight at step 0 down to zero at `until`
    logit_weight: float = 0.0         # a_OD
    logit_schedule: Weight = "constant"
    distance: Literal["ln_mse", "channel_mse", "mse", "cosine"] = "ln_mse"
    embedding: bool = False           # also the states before the first layer, as in the paper's text setting
    layer_map: Literal["identity", "proportional"] | tuple[int, ...] = "identity"   # student layer -> teacher layer
    temperature: float = 2.0
    noise: Literal["off", "independent", "shared"] = "off"   # dropout and masks of the teacher (paper: independent)
    align_projections: bool = True    # align: train q, k, v, o too, not only what is new
    freeze_frontend: bool = True      # cald: the conv front end stays fixed, as in the paper

    def __post_init__(self):
        if self.objective == "align":
            return
        if self.guidance == "waypoint" and not (self.waypoints and self.waypoint_every > 0):
            raise SpecError("linearize: guidance waypoint needs `waypoints`, the folders of models saved along the "
                            "teacher's fine-tuning (snapshot_steps of jaxslim train), and `waypoint_every`.")
        if (self.guidance == "trajectory" or self.student_init == "source") and not self.source:
            which = "guidance trajectory" if self.guidance == "trajectory" else "student_init source"
            raise SpecError(f"linearize: {which} needs `source`, the pretrained model before its fine-tuning.")
        fading = "constant" != self.layer_schedule or "constant" != self.logit_schedule
        if (self.guidance == "hybrid" or fading) and self.until < 1:
            which = "guidance hybrid" if self.guidance == "hybrid" else "a weight's schedule"
            raise SpecError(f"linearize: {which} needs `until`, the step at which it ends.")

    # ---- surgery ----

    def start(self, teacher: Slim, batches, key) -> Slim:
        """Swaps the mixers of `layers`; logs which parameters were copied, mapped (made of old ones) or are new."""
        rng = np.random.default_rng(0 if key is None else np.asarray(jax.random.key_data(key)).tolist())
        base, chosen = teacher, list(self.chosen(teacher.spec))
        if self.objective == "cald" and self.student_init == "source":
            base = teacher.replace(params=self.sourced(teacher.spec, teacher.params, rng))
        if self.layers == "all" and any(base.spec.attention(f"encoder.{i}.attention").mixer != "softmax"
                                        for i in chosen):
            chosen = []  # an earlier stage has converted what was to be converted
        elif isinstance(self.keep, str) and self.counted()[0] == "ranked":
            kept = self.ranked(base, batches, rng)
            chosen = [i for i in chosen if i not in kept]
        else:
            kept = self.kept(base.spec)
            chosen = [i for i in chosen if i not in kept]
        student, origins = self.swap(base, chosen, rng)
        if chosen and self.options.get("window"):
            student = self.with_shares(student, base, chosen, batches)
        count = [sum(o == what for o in origins.values()) for what in ("copied", "mapped", "new")]
        log.info("linearize: %d parameters copied, %d mapped, %d new.", *count)
        changed = collections.Counter((what, re.sub(r"\.\d+\.", ".N.", name)) for name, what in origins.items())
        for (what, name), times in changed.items():
            if what != "copied":
                log.info("  %s: %s (%d)", what, name, times)
        if self.objective == "cald" and self.guidance == "trajectory":
            plain = teacher.spec
            for i in self.chosen(plain):
                plain = plain.with_block(f"encoder.{i}.attention", mixer=None, options=None)
            live = base.params if plain == base.spec and base is not teacher else self.sourced(plain, {}, rng)
            student = student.replace(params={**student.params, **{LIVE + k: v for k, v in live.items()}})
        return student

    def swap(self, base: Slim, chosen: list[int], rng: np.random.Generator) -> tuple[Slim, dict[str, str]]:
        """`base` with these layers converted, and the origin of every parameter: copied, mapped or new."""
        spec, params, origins = base.spec, dict(base.params), dict.fromkeys(base.params, "copied")
        given = {**({"features": self.features} if self.features else {}), **self.options}
        for i in chosen:
            block = f"encoder.{i}.attention"
            a = spec.attention(block)
            if a.mixer == self.mixer or not a.heads:
                continue
            if a.mixer != "softmax":
                raise SpecError(f"linearize: {block} is {a.mixer}, not softmax; leave layer {i} out of `layers`.")
            spec, new, how = convert.convert(spec, block, self.mixer, given, params, self.init, rng)
            params, origins = {**params, **new}, {**origins, **how}
        want = bind.shapes(spec)
        return Slim(spec, {k: v for k, v in params.items() if k in want}), {k: origins[k] for k in want}

    def with_shares(self, student: Slim, base: Slim, chosen: list[int], batches) -> Slim:
        """`student` whose windows have the share of each head that its softmax attention gives to near frames."""
        data = [inputs(batch) for batch in itertools.islice(batches or (), self.rank_batches)]
        blocks = {f"encoder.{i}.attention": base.spec.attention(f"encoder.{i}.attention") for i in chosen}
        blocks = [b for b, was in blocks.items() if was.heads and was.mixer == "softmax"]
        if not data or not blocks:
            return student
        options, params = student.spec.attention(blocks[0]).options, dict(student.params)
        for block, share in near_shares(base, blocks, options["window"], options["causal"], data).items():
            log.info("%s: %.2f to %.2f of a head's attention within the window.", block, share.min(), share.max())
            share = np.clip(share, 0.02, 0.98)
            owner = roles.roles(student.spec, block)["owner"]
            params[f"{owner}.window_factor"] = np.log(share / (1 - share)).astype(np.float32)
        return student.replace(params=params)

    def sourced(self, spec, own, rng: np.random.Generator) -> dict[str, Any]:
        """Parameters of `spec` from `source`. What a mixer added stays as in `own`; what only a head has is drawn as
        transformers does: normal of deviation 0.02, biases zero."""
        source, inner, params, lacking = _load(self.source).params, roles.prefix(spec), {}, []
        for name, want in bind.shapes(spec).items():
            found = source.get(name, source.get(name.removeprefix(inner)))
            if found is not None and found.shape == want.shape:
                params[name] = found
            elif name in own and NEW.search(name):
                params[name] = own[name]
            elif name.startswith(inner):
                lacking.append(name)
            else:
                scale = 0.02 if len(want.shape) > 1 else 0.0
                params[name] = (scale * rng.standard_normal(want.shape)).astype(np.float32)
        if lacking:
            raise SpecError(f"linearize: source {self.source} is not the same model before fine-tuning; it lacks "
                            f"{', '.join(lacking[:4])}.")
        return params

    def chosen(self, spec) -> tuple[int, ...]:
        count = spec.of("encoder", "num_hidden_layers")
        chosen = tuple(range(count)) if self.layers == "all" else self.layers
        if any(not 0 <= i < count for i in chosen):
            raise SpecError(f"linearize: layers {list(chosen)} of a model with layers 0 to {count - 1}.")
        return chosen

    def kept(self, spec) -> tuple[int, ...]:
        """Layers that stay softmax, by hand or spread evenly from the last one down."""
        if not isinstance(self.keep, str):
            return self.keep
        chosen, (_, number) = self.chosen(spec), self.counted()
        return tuple(chosen[len(chosen) - 1 - i * len(chosen) // number] for i in range(min(number, len(chosen))))

    def counted(self) -> tuple[str, int]:
        match = re.fullmatch(r"(uniform|ranked):([1-9]\d*)", self.keep)
        if not match:
            raise SpecError(f"linearize: keep {self.keep!r}; give layer numbers, uniform:N or ranked:N.")
        return match[1], int(match[2])

    def ranked(self, base: Slim, batches, rng: np.random.Generator) -> tuple[int, ...]:
        """The N layers whose attention is worth most: each in turn kept alone, by the error of the last states."""
        chosen, (_, number) = self.chosen(base.spec), self.counted()
        stream = iter(batches)
        data = [inputs(next(stream)) for _ in range(self.rank_batches)]
        seed = int(rng.integers(2**31))
        table = leave_one_in(base, lambda i: self.swap(base, [j for j in chosen if j != i],
                                                       np.random.default_rng(seed))[0], chosen, data)
        best = sorted(sorted(chosen, key=lambda i: table[i]["error"])[:number])
        for i in chosen:
            log.info("keep layer %d alone: error %.4f, %.2f GMACs at 10 s%s.", i, table[i]["error"], table[i]["gmacs"],
                     " (kept)" if i in best else "")
        return tuple(best)

    # ---- the teacher ----

    def teacher_at(self, teacher: Slim, step: int) -> Slim | None:
        if self.objective == "align":
            return teacher
        if self.guidance == "waypoint":
            at = min(step // self.waypoint_every, len(self.waypoints) - 1)
            return _waypoint(self.waypoints[at], teacher.spec)
        if self.guidance == "trajectory":  # its parameters are among the trained ones
            return teacher.replace(params={})
        return None if self.guidance == "unguided" or self.guidance == "hybrid" and step >= self.until else teacher

    def targets(self, teacher: Slim, batch, key, step) -> dict[str, Any]:
        if self.objective == "align":
            blocks = [f"encoder.{i}.attention" for i in self.chosen(teacher.spec)]
            out = teacher(taps=tuple(f"{b}.{side}" for b in blocks for side in ("in", "out")), **inputs(batch))
            return {**out.taps, "lengths": out.lengths}
        live = self.guidance == "trajectory"
        noise = {"off": None, "independent": jax.random.fold_in(key, 1) if key is not None else None, "shared": key}
        taps = encoder_layers(teacher.spec) + (("embedding",) if self.embedding else ())
        out = teacher(taps=taps, key=noise["independent" if live and self.noise == "off" else self.noise],
                      **inputs(batch))
        found = {**out.taps, "logits": out.logits}
        if live:  # its own fine-tuning goes on, with noise
            found["task"] = task(teacher, out, batch)
        return found

    # ---- losses ----

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        if self.objective == "align":
            return self.align(student, targets)
        return self.cald(student, targets, batch, key, step)

    def align(self, student: Slim, targets) -> dict[str, Term]:
        blocks = [f"encoder.{i}.attention" for i in self.chosen(student.spec)]
        blocks = [b for b in blocks if positions.kind(student.spec) is None
                  or student.spec.attention(b).mixer != "softmax"]  # attention with positions needs more than its input
        mask = layers.frame_mask(targets["lengths"], targets[f"{blocks[0]}.in"].shape[1])            # (B, T) or None
        valid = jnp.ones((), bool) if mask is None else mask
        module = bind.bind(student.spec, student.params)
        terms = {}
        for block in blocks:
            got = bind.submodule(module, roles.roles(student.spec, block)["owner"])(
                targets[f"{block}.in"], mask, layers.Call())
            want = targets[f"{block}.out"].astype(jnp.float32)
            error = jnp.where(valid, ((got.astype(jnp.float32) - want) ** 2).mean(-1), 0.0).sum()
            energy = jnp.where(valid, (want**2).mean(-1), 0.0).sum()
            terms[block] = Term(error, energy, 1.0 / len(blocks))
        return terms

    def cald(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        guided = bool(targets)
        names = encoder_layers(student.spec) if guided and self.layer_weight else ()
        pairs = self.pairs(names, targets)
        out = student(key=key, taps=tuple(pairs), **inputs(batch))
        terms = {k: t._replace(weight=t.weight * self.task_weight) for k, t in task(student, out, batch).items()}
        if not guided:
            return terms
        terms |= {f"{LIVE}{k}": t for k, t in targets.get("task", {}).items()}
        for name, other in pairs.items():
            if out.taps[name].shape != targets[other].shape:
                raise SpecError(f"linearize: {name} has states {out.taps[name].shape[1:]}, the teacher's {other} "
                                f"{targets[other].shape[1:]}; layer distances need equal frames and width "
                                "(layer_weight: 0 leaves only the logits).")
            mask = layers.valid_frames(out.lengths, out.taps[name])
            distance = losses.hidden(out.taps[name], targets[other], mask, self.distance)
            weight = self.layer_weight / len(pairs) * self.fade(self.layer_schedule, step)
            terms[name] = distance._replace(weight=weight)
        if self.logit_weight:
            mask = jnp.ones(out.logits.shape[:-1], bool)
            if mask.ndim == 2 and out.lengths is not None:
                mask = layers.frame_mask(out.lengths, mask.shape[1])
            elif mask.ndim == 1:  # one label a row; filler rows have none
                mask = batch["labels"] >= 0
            kl = losses.kl(out.logits, targets["logits"], mask, self.temperature)
            terms["kl"] = kl._replace(weight=self.logit_weight * self.fade(self.logit_schedule, step))
        return terms

    def pairs(self, names: tuple[str, ...], targets) -> dict[str, str]:
        """Student layer -> the teacher layer it follows. Raises SpecError when the depths differ without a map."""
        if not names:
            return {}
        count = sum(bool(re.fullmatch(r"encoder\.\d+", k)) for k in targets)
        if isinstance(self.layer_map, tuple):
            where = self.layer_map
        elif self.layer_map == "proportional":  # the last layers meet, the others lie evenly between
            where = tuple(-(-(i + 1) * count // len(names)) - 1 for i in range(len(names)))
        else:
            where = tuple(range(len(names)))
            if count != len(names):
                raise SpecError(f"linearize: the student has {len(names)} layers, the teacher {count}; set layer_map "
                                "to proportional or to one teacher layer for each of the student's.")
        if len(where) != len(names) or any(not 0 <= i < count for i in where):
            raise SpecError(f"linearize: layer_map {list(where)} must give one of the teacher's layers 0 to "
                            f"{count - 1} for each of the student's {len(names)}.")
        first = {"embedding": "embedding"} if self.embedding else {}
        return first | {name: f"encoder.{i}" for name, i in zip(names, where, strict=True)}

    def fade(self, schedule: str, step):
        """1 at step 0, 0 from `until` on."""
        if schedule == "constant":
            return 1.0
        left = 1.0 - jnp.minimum(step / self.until, 1.0)
        return left if schedule == "linear" else 0.5 - 0.5 * jnp.cos(jnp.pi * left)

    def labelled(self) -> bool:
        return self.objective != "align"

    def control(self) -> Method | None:
        if self.objective == "align":
            return None
        return Finetune(freeze=(roles.FRONTEND,) if self.freeze_frontend else ())

    def group(self, name: str) -> str:
        live, name = name.startswith(LIVE), name.removeprefix(LIVE)
        if stored_statistic(name):
            return "frozen"
        if self.objective == "align":
            inside = re.search(r"\.(self_attn|attention)\.", name)
            return "main" if inside and (self.align_projections or NEW.search(name)) else "frozen"
        if self.freeze_frontend and re.search(roles.FRONTEND, name):
            return "frozen"
        return "teacher" if live else "main"


def encoder_layers(spec) -> tuple[str, ...]:
    return tuple(name for name in roles.layers(spec) if name.startswith("encoder."))


@functools.lru_cache(maxsize=4)
def _load(name: str) -> Slim:
    from jaxslim import hub

    return hub.load(name)


@functools.lru_cache(maxsize=2)
def _waypoint(name: str, spec) -> Slim:
    """A waypoint as arrays under the teacher's Spec: the compiled step stays. Raises SpecError when it does not fit."""
    params = _load.__wrapped__(name).params
    bind.check(spec, params, f"waypoint {name}")
    return Slim(spec, {k: params[k] for k in bind.shapes(spec)})
