"""CALD (He & Garner, arXiv 2410.06846): self-attention replaced by a linear-time mixer, recovered by layerwise
distillation while fine-tuning on the task.

Two objectives, run as two stages of a recipe:

* `align`: every mixer alone learns the output of the attention it replaces, fed with the teacher's own inputs, all
  layers in one step (LoLCATs' attention transfer, MOHAWK's stage 2). The loss of a layer is the squared error
  relative to the energy of the teacher's output; that normalisation is ours.
* `cald`: L = CTC + layer_weight * mean over layers of LN-MSE(block outputs) + logit_weight * KL, section 3 of the paper
  in its speech setting. Guidance `target` (fixed teacher), `unguided` (no teacher), `hybrid` (teacher until `until`).
"""
from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.methods.finetune import Finetune, ctc, stored_statistic
from jaxslim.models import bind, layers, roles
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import SpecError
from jaxslim.train import losses


@dataclasses.dataclass(frozen=True)
class Linearize(Method):
    objective: Literal["align", "cald"] = "cald"
    mixer: str = "hedgehog"
    layers: Literal["all"] | tuple[int, ...] = "all"
    features: int = 0                 # rows of each feature map, 0 = the head size; its output is twice as wide
    guidance: Literal["target", "unguided", "hybrid"] = "target"
    until: int = 0                    # hybrid: steps with the teacher
    layer_weight: float = 15.0        # a_LD of the paper
    logit_weight: float = 0.0         # a_OD
    distance: Literal["ln_mse", "mse", "cosine"] = "ln_mse"
    temperature: float = 2.0
    align_projections: bool = True    # align: train q, k, v, o too, not only the feature maps
    freeze_frontend: bool = True      # cald: the conv front end stays fixed, as in the paper

    def start(self, teacher: Slim, batches, key) -> Slim:
        """Swaps the mixers of `layers`; q, k, v, o are copied, feature maps start as the identity."""
        spec, params = teacher.spec, dict(teacher.params)
        for i in self.chosen(spec):
            block = f"encoder.{i}.attention"
            a = spec.attention(block)
            if a.mixer == self.mixer or not a.heads:
                continue
            if a.mixer != "softmax":
                raise SpecError(f"linearize: {block} is {a.mixer}, not softmax; leave layer {i} out of `layers`.")
            features = self.features or a.qk_dim
            spec = spec.with_block(block, mixer=self.mixer, options={"features": features, "window": 0})
            owner = roles.roles(spec, block)["owner"]
            identity = np.broadcast_to(np.eye(features, a.qk_dim, dtype=np.float32), (len(a.heads), features, a.qk_dim))
            for name in ("feature_q", "feature_k"):
                params[f"{owner}.{name}.weight"] = identity.copy()
        return Slim(spec, params)

    def chosen(self, spec) -> tuple[int, ...]:
        count = spec["num_hidden_layers"]
        chosen = tuple(range(count)) if self.layers == "all" else self.layers
        if any(not 0 <= i < count for i in chosen):
            raise SpecError(f"linearize: layers {list(chosen)} of a model with layers 0 to {count - 1}.")
        return chosen

    def teacher_at(self, teacher: Slim, step: int) -> Slim | None:
        if self.objective == "align":
            return teacher
        return None if self.guidance == "unguided" or self.guidance == "hybrid" and step >= self.until else teacher

    def targets(self, teacher: Slim, batch, key, step) -> dict[str, jax.Array]:
        if self.objective == "align":
            blocks = [f"encoder.{i}.attention" for i in self.chosen(teacher.spec)]
            return teacher(taps=tuple(f"{b}.{side}" for b in blocks for side in ("in", "out")), **inputs(batch)).taps
        taps = roles.layers(teacher.spec) + (("logits",) if self.logit_weight else ())
        return teacher(taps=taps, **inputs(batch)).taps

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        return (self.align if self.objective == "align" else self.cald)(student, targets, batch, key)

    def align(self, student: Slim, targets, batch, key) -> dict[str, Term]:
        from jaxslim.models.wav2vec2 import frames

        blocks = [f"encoder.{i}.attention" for i in self.chosen(student.spec)]
        lengths = frames(student.spec, batch["attention_mask"].sum(-1))
        mask = layers.frame_mask(lengths, targets[f"{blocks[0]}.in"].shape[1])                       # (B, T)
        module = bind.bind(student.spec, student.params)
        terms = {}
        for block in blocks:
            got = bind.submodule(module, roles.roles(student.spec, block)["owner"])(
                targets[f"{block}.in"], mask, layers.Call())
            want = targets[f"{block}.out"].astype(jnp.float32)
            error = jnp.where(mask, ((got.astype(jnp.float32) - want) ** 2).mean(-1), 0.0).sum()
            energy = jnp.where(mask, (want**2).mean(-1), 0.0).sum()
            terms[block] = Term(error, energy, 1.0 / len(blocks))
        return terms

    def cald(self, student: Slim, targets, batch, key) -> dict[str, Term]:
        names = roles.layers(student.spec)
        out = student(key=key, taps=names if targets else (), **inputs(batch))
        terms = ctc(student, out, batch)
        if targets:
            mask = layers.frame_mask(out.lengths, out.logits.shape[1])
            for name in names:
                distance = losses.hidden(out.taps[name], targets[name], mask, self.distance)
                terms[name] = distance._replace(weight=self.layer_weight / len(names))
            if self.logit_weight:
                kl = losses.kl(out.logits, targets["logits"], mask, self.temperature)
                terms["kl"] = kl._replace(weight=self.logit_weight)
        return terms

    def control(self) -> Method | None:
        if self.objective == "align":
            return None
        return Finetune(freeze=("feature_extractor",) if self.freeze_frontend else ())

    def group(self, name: str) -> str:
        if stored_statistic(name):
            return "frozen"
        if self.objective == "align":
            mixing = ".attention." in name and ".feature_" in name
            return "main" if mixing or self.align_projections and ".attention." in name else "frozen"
        return "frozen" if self.freeze_frontend and "feature_extractor" in name else "main"
