"""GenDistiller (Gao et al., arXiv 2310.13418; 2406.09444) and the students it is compared with: a small model learns
hidden layers of the teacher, without labels.

| student    | what it is                                                                                            |
|------------|-------------------------------------------------------------------------------------------------------|
| `previous` | generates the layers one after another, each from the one before (GenDistiller's second paper)        |
| `full`     | the same from all earlier ones, in one attention over time and layers (its first paper)               |
| `axial`    | the same in two attentions, one over layers, one over time                                            |
| `heads`    | the teacher's first layers, with a linear for each target on the last (DistilHuBERT, arXiv 2110.01900) |
| `layers`   | thin layers, each with a linear for its own target (layer to layer, as FitHuBERT, arXiv 2207.00555)   |

`heads` and `layers` leave a stock model; their linears are dropped. models/generative.py has the first three.

The texts of the GenDistiller papers could not be read, so loss, targets, learning rates and forcing are ours: the loss
is DistilHuBERT's, which has the same teacher and baseline, over valid frames only; a third, two thirds and the last of
the teacher's layers are generated, each generated layer begins as the history it reads, and blocks begin as the
teacher's next layers. DistilHuBERT's hidden layer in front of its linears and FitHuBERT's thin convolutions and time
reduction are left out.
"""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.methods.finetune import stored_statistic, task
from jaxslim.models import bind, layers, roles
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import GENERATORS, Spec, SpecError
from jaxslim.train import losses

LINEAR = "aux.distill."   # + number of the target: a linear that only training has


@dataclasses.dataclass(frozen=True)
class Generate(Method):
    student: Literal["previous", "full", "axial", "heads", "layers"] = "previous"
    target_layers: tuple[int, ...] = ()   # hidden states of the teacher, 0 = embedding; () = L/3, 2L/3, L
    initial_layers: int = 0               # of the teacher, in front of the generator or the heads; layers: how many
    layers: int = 1                       # transformer layers that every generated layer runs through
    inject: Literal["add", "concat", "none"] = "add"   # previous: how the features join the layer before
    skip: bool = True                     # a prediction is added to the layer before
    embedding: bool = False               # a learned vector for each target
    width: int = 0                        # layers: hidden size, 0 = the teacher's; heads keep their number
    ffn: int = 0                          # layers: units of the feed-forward blocks, 0 = 4 width
    forcing: Literal["teacher", "mixed", "free"] = "teacher"   # what a generated layer reads in training
    ramp_steps: int = 100                 # mixed: steps until all layers read what was generated
    distance: Literal[losses.DISTANCES + ("gram", "cka")] = "l1_log_sigmoid"   # channel_mse for Whisper's states
    normalize: bool = False               # targets without mean and scale of their channels
    target_weights: tuple[float, ...] = ()   # of each target; () = equal
    gram_weight: float = 0.0              # STaR's term beside the distance
    task_weight: float = 0.0              # the task's loss on the head's output
    logit_weight: float = 0.0             # KL to the teacher's output
    temperature: float = 2.0
    freeze: tuple[str, ...] = ("feature_extractor",)   # regular expressions on parameter names

    def start(self, teacher: Slim, batches, key) -> Slim:
        """The student: front end and first layers of the teacher, the rest as `fresh` makes it. A generative student
        with the same targets is trained on as it is."""
        if teacher.spec.generator and self.student in GENERATORS:
            if self.target_layers and self.target_layers != teacher.spec.generator.targets:
                raise SpecError(f"generate: the model generates {list(teacher.spec.generator.targets)}, and "
                                f"target_layers are {list(self.target_layers)}; leave them out to train it on.")
            return teacher
        spec, key = self.spec(teacher.spec), jax.random.key(0) if key is None else key
        params, blocks = {}, roles.prefix(spec) + roles.GENERATOR + ".layers."
        first = roles.prefix(spec) + "encoder.layers."
        for i, (name, want) in enumerate(bind.shapes(spec).items()):
            source = name
            if name.startswith(blocks):   # as the layers that follow the initial ones
                number, _, rest = name.removeprefix(blocks).partition(".")
                source = f"{first}{self.front(teacher.spec) + int(number)}.{rest}"
            if (found := teacher.params.get(source)) is not None and found.shape == want.shape:
                params[name] = found
            else:
                params[name] = fresh(name, want, jax.random.fold_in(key, i), spec)
        if self.student not in GENERATORS:
            din, dout = spec["hidden_size"], teacher.spec["hidden_size"]
            for t in self.numbers(teacher.spec):
                linear = np.eye(dout, din, dtype=np.float32) if din == dout else jax.random.normal(
                    jax.random.fold_in(key, 10_000 + t), (dout, din), jnp.float32) * din**-0.5
                params |= {f"{LINEAR}{t}.weight": linear, f"{LINEAR}{t}.bias": np.zeros(dout, np.float32)}
        return Slim(spec, params)

    def spec(self, teacher: Spec) -> Spec:
        """Spec of the student. Raises SpecError for what cannot be."""
        if teacher.family not in roles.GENERATING or teacher.generator:
            raise SpecError(f"generate: the teacher is a {'generative ' if teacher.generator else ''}{teacher.family} "
                            f"model; it must be one of {', '.join(roles.GENERATING)}, with its own layers.")
        targets, count, front = self.numbers(teacher), teacher["num_hidden_layers"], self.front(teacher)
        if self.target_weights and len(self.target_weights) != len(targets):
            raise SpecError(f"generate: {len(self.target_weights)} target_weights for {len(targets)} targets.")
        extra = self.layers if self.student in GENERATORS else 0
        if not (extra > 0 or front > 0 and self.student not in GENERATORS) or front + extra > count:
            raise SpecError(f"generate: {front} initial_layers and {extra} layers of the generator; together they "
                            f"start from 1 to {count} layers of the teacher.")
        config = {**teacher.config, "num_hidden_layers": front, "layerdrop": 0.0, "mask_time_prob": 0.0,
                  "mask_feature_prob": 0.0}
        known = {f"encoder.{i}" for i in range(front)}
        blocks = {b: f for b, f in teacher.blocks.items() if b.startswith("frontend.") or
                  ".".join(b.split(".")[:2]) in known}
        if self.student == "layers" and (self.width or self.ffn):
            width, heads = self.width or teacher["hidden_size"], teacher["num_attention_heads"]
            groups = teacher["num_conv_pos_embedding_groups"]
            if width % heads or width % groups:
                raise SpecError(f"generate: width {width} is no multiple of the {heads} heads and {groups} groups of "
                                "the positional convolution.")
            config |= {"hidden_size": width, "intermediate_size": self.ffn or 4 * width}
            blocks = {b: f for b, f in blocks.items() if b.startswith("frontend.")}
        if self.student in GENERATORS:
            g = {"attention": self.student, "targets": list(targets)}
            g |= {"layers": self.layers} if self.layers > 1 else {}
            g |= {"inject": self.inject} if self.student == "previous" and self.inject != "add" else {}
            g |= {} if self.skip else {"skip": False}
            g |= {"embedding": True} if self.embedding else {}
            blocks["generator"] = g
        return teacher.replace(config=config, blocks=blocks)

    def front(self, teacher: Spec) -> int:
        """How many transformer layers the student has beside its generator."""
        default = {"heads": 2, "layers": teacher["num_hidden_layers"]}.get(self.student, 0)
        return self.initial_layers or default

    def numbers(self, teacher: Spec) -> tuple[int, ...]:
        """The target layers."""
        count = teacher["num_hidden_layers"]
        targets = self.target_layers or tuple(sorted({max(1, round(count * k / 3)) for k in (1, 2, 3)}))
        if list(targets) != sorted(set(targets)) or not (targets[0] >= 0 and targets[-1] <= count):
            raise SpecError(f"generate: target_layers {list(targets)} of a teacher with {count} layers; they are "
                            f"ascending numbers from 0 (the embedding) to {count}.")
        return targets

    # ---- training ----

    def targets(self, teacher: Slim, batch, key, step) -> dict[str, jax.Array]:
        taps = tuple(tap(t) for t in self.numbers(teacher.spec)) + (("logits",) if self.logit_weight else ())
        return teacher(taps=taps, **inputs(batch)).taps

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        numbers = generated(student)
        if missing := [t for t in numbers if tap(t) not in targets]:
            raise SpecError(f"generate: the student gives the teacher's layers {list(numbers)}, but layers {missing} "
                            "are none of this stage's target_layers.")
        want = [targets[tap(t)].astype(jnp.float32) for t in numbers]                                # (B, T, D) each
        want = [losses.standardize(x) for x in want] if self.normalize else want
        given = self.history(jnp.stack(want, 1), key, step) if student.spec.generator else {}
        out, have = self.predict(student, key=key, **given, **inputs(batch))
        if have[0].shape[1] != want[0].shape[1]:
            raise SpecError(f"generate: the student makes {have[0].shape[1]} frames of this audio, the teacher "
                            f"{want[0].shape[1]}; they need one frame rate (conv_kernel and conv_stride).")
        mask = layers.valid_frames(out.lengths, have[0])
        weights = self.target_weights or (1.0,) * len(numbers)
        terms = {}
        for t, weight, x, y in zip(numbers, weights, have, want, strict=True):
            share = weight / sum(weights)
            terms[f"layer.{t}"] = distance(x, y, mask, self.distance)._replace(weight=share)
            if self.gram_weight:
                terms[f"gram.{t}"] = losses.gram(x, y, mask)._replace(weight=self.gram_weight * share)
        if self.task_weight:
            terms |= {k: v._replace(weight=self.task_weight * v.weight) for k, v in task(student, out, batch).items()}
        if self.logit_weight:
            kl = losses.kl(out.logits, targets["logits"], mask, self.temperature)
            terms["kl"] = kl._replace(weight=self.logit_weight)
        return terms

    def predict(self, student: Slim, **inputs: Any) -> tuple[Any, list[jax.Array]]:
        """Outputs, and the student's version of each target (B, T, D), fp32."""
        numbers, params, spec = generated(student), student.params, student.spec
        model = student.replace(params={k: v for k, v in params.items() if not k.startswith("aux.")})
        if spec.generator:
            out = model(output_hidden_states=True, **inputs)
            return out, [x.astype(jnp.float32) for x in out.hidden_states[-len(numbers):]]
        count = spec["num_hidden_layers"]
        read = [tap(count)] * len(numbers)
        if self.student == "layers":      # evenly spread: as many targets as layers are one to one
            rest = [t for t in numbers if t]
            read = [tap(0)] * (len(numbers) - len(rest)) + [
                tap(max(1, round(count * (j + 1) / len(rest)))) for j in range(len(rest))]
        out = model(taps=tuple(dict.fromkeys(read)), **inputs)
        linear = lambda x, t: layers.matmul(x.astype(jnp.float32), params[f"{LINEAR}{t}.weight"])  # noqa: E731
        return out, [linear(out.taps[name], t) + params[f"{LINEAR}{t}.bias"]
                     for t, name in zip(numbers, read, strict=True)]

    def history(self, want: jax.Array, key, step) -> dict[str, jax.Array]:
        """What the student's forward pass is given of the targets (B, K, T, D)."""
        if self.forcing == "free":
            return {}
        history = {"history": want[:, :-1]}
        if self.forcing == "mixed":
            share = jnp.minimum(step / max(self.ramp_steps, 1), 1.0)
            key = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
            history["feed"] = jax.random.bernoulli(key, share, (want.shape[1] - 1,))
        return history

    def group(self, name: str) -> str:
        read = self.task_weight or self.logit_weight
        frozen = stored_statistic(name) or any(re.search(p, name) for p in self.freeze)
        return "frozen" if frozen or roles.HEAD.match(name) and not read else "main"

    def cacheable(self) -> bool:
        return True

    def labelled(self) -> bool:
        return bool(self.task_weight)

    def keeps_best(self) -> bool:
        return bool(self.task_weight or self.logit_weight)


def tap(target: int) -> str:
    """The teacher's tap with a hidden state."""
    return f"encoder.{target - 1}" if target else "embedding"


def generated(student: Slim) -> tuple[int, ...]:
    """Numbers of the teacher's hidden states that a student gives."""
    if student.spec.generator:
        return student.spec.generator.targets[: student.spec.generated]
    return tuple(sorted(int(k.split(".")[2]) for k in student.params if k.startswith(LINEAR) and k.endswith("weight")))


def distance(x: jax.Array, y: jax.Array, mask: jax.Array, name: str) -> Term:
    return getattr(losses, name)(x, y, mask) if name in ("gram", "cka") else losses.hidden(x, y, mask, name)


def fresh(name: str, want: jax.ShapeDtypeStruct, key: jax.Array, spec: Spec) -> np.ndarray:
    """A parameter that the teacher has none for. The generator's output begins as zero where it is added to the
    history, else as the identity; attention over layers begins as zero; the rest is as transformers draws it."""
    shape, owner = want.shape, name.rpartition(".")[0]
    if owner.endswith("generator.output") and len(shape) == 2:
        return np.zeros(shape, np.float32) if spec.generator.skip else np.eye(shape[0], dtype=np.float32)
    if owner.endswith("across.out_proj"):
        return np.zeros(shape, np.float32)
    if owner.endswith("generator.inject") and len(shape) == 2:           # begins as "add"
        return np.concatenate([np.eye(shape[0], dtype=np.float32)] * 2, 1)
    if len(shape) < 2:
        return np.full(shape, float(owner.endswith("norm") and name.endswith(".weight")), want.dtype)
    scale = spec.get("initializer_range", 0.02)
    if name.endswith("original1"):
        scale = 2 / math.sqrt(shape[1] * shape[2])
    elif name.endswith("original0"):      # per kernel tap, the norm that original1 is expected to have
        group = spec["hidden_size"] // spec["num_conv_pos_embedding_groups"]
        return np.full(shape, 2 * math.sqrt(spec["hidden_size"] * group / (group * shape[2])), np.float32)
    return np.asarray(scale * jax.random.normal(key, shape), np.float32)


def stop_at(student: Slim, steps: int) -> Slim:
    """A generative student that stops after `steps` generated layers, with the same weights."""
    whole = len(student.spec.generator.targets) if student.spec.generator else 0
    if not 1 <= steps <= whole:
        raise SpecError(f"stop_at: {steps} of {whole} generated layers.")
    spec, params = student.spec.with_block("generator", steps=steps), dict(student.params)
    if "layer_weights" in params:         # of a head that mixes hidden states
        params["layer_weights"] = params["layer_weights"][: spec["num_hidden_layers"] + 1 + steps]
    return student.replace(spec=spec, params=params)


def fidelity(student: Slim, teacher: Slim, batches: Iterable[dict], method: Generate | None = None) -> list[dict]:
    """How near each generated layer is to the teacher's, over valid frames of all batches.

    Returns:
      A row a layer: {layer, l1, cosine, cka}: mean absolute difference, cosine similarity and linear CKA (mean over
      clips) of what the student generates by itself, and {forced_l1, forced_cosine, forced_cka} when it reads the
      teacher's layers instead. The difference is what its own errors cost.
    """
    numbers = generated(student)
    if not student.spec.generator:
        raise SpecError("fidelity: this is no generative student.")
    method = method or Generate()
    names = tuple(map(tap, numbers))

    @jax.jit
    def terms(student, teacher, batch):
        want = teacher(taps=names, **batch).taps
        want = [losses.standardize(want[k]) if method.normalize else want[k] for k in names]
        found = {}
        for prefix, given in (("", {}), ("forced_", {"history": jnp.stack(want, 1)[:, :-1]})):
            out, have = method.predict(student, **given, **batch)
            mask = layers.valid_frames(out.lengths, have[0])
            for t, x, y in zip(numbers, have, want, strict=True):
                found |= {(t, prefix + name): tuple(distance(x, y, mask, name)[:2]) for name in ("l1", "cosine", "cka")}
        return list(found.values())                                      # in the order of `keys`

    keys = [(t, prefix + name) for prefix in ("", "forced_") for t in numbers for name in ("l1", "cosine", "cka")]
    totals = np.zeros((len(keys), 2))
    for batch in batches:
        totals += np.asarray(terms(student, teacher, inputs(batch)), np.float64)
    rows = {t: {"layer": t} for t in numbers}
    for (t, name), (total, count) in zip(keys, totals, strict=True):
        mean = float(total / max(count, 1.0))
        rows[t][name] = mean if name.endswith("l1") else 1.0 - mean
    return list(rows.values())
