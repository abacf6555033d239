"""Distil-Whisper (Gandhi et al., arXiv 2311.00430): a Whisper whose shallow decoder begins as some layers of the
teacher's, behind the teacher's own encoder, which stays frozen.

L = ce_weight * cross-entropy on pseudo-labels + kl_weight * KL(teacher || student) at a temperature. Pseudo-labels are
the teacher's transcripts of the training speech, without those that are too far from its texts: `jaxslim data label`
makes them (pseudo.py), and is run before. The weights are those of the authors' code as we know it; the copied layers
are evenly spread with the first and the last among them, as theirs.
"""
from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np

from jaxslim.methods.finetune import Finetune
from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import Spec, SpecError
from jaxslim.train import losses

ENCODER = r"^model\.encoder\."
LAYER = re.compile(r"^(model\.)?decoder\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class DistilWhisper(Method):
    decoder_layers: int = 2             # of the student
    copied: tuple[int, ...] = ()        # the teacher's layers that they begin as; () = evenly spread
    ce_weight: float = 0.8
    kl_weight: float = 1.0
    temperature: float = 2.0
    freeze: tuple[str, ...] = (ENCODER,)   # regular expressions on parameter names

    def start(self, teacher: Slim, batches, key) -> Slim:
        """The student: the teacher with `decoder_layers` of its decoder's layers. One that has so few already is
        trained on as it is."""
        layers = self.layers(teacher.spec)
        if len(layers) == teacher.spec["decoder_layers"]:
            return teacher
        place, params = {old: new for new, old in enumerate(layers)}, {}
        for name, value in teacher.params.items():
            if (found := LAYER.match(name)) is None:
                params[name] = value
            elif (old := int(found[2])) in place:
                params[f"{found[1] or ''}decoder.layers.{place[old]}.{name[found.end():]}"] = value
        blocks = {}
        for block, fields in teacher.spec.blocks.items():
            side, number, *rest = block.split(".")
            if side != "decoder":
                blocks[block] = fields
            elif int(number) in place:
                blocks[".".join([side, str(place[int(number)]), *rest])] = fields
        config = {**teacher.spec.config, "decoder_layers": len(layers)}
        return Slim(teacher.spec.replace(config=config, blocks=blocks), params, teacher.defaults)

    def layers(self, teacher: Spec) -> tuple[int, ...]:
        """The teacher's decoder layers that are copied. Raises SpecError for what cannot be."""
        if teacher.family != "whisper" or teacher.head != "seq2seq":
            raise SpecError(f"distil_whisper: the teacher is a {teacher.family} model with head {teacher.head!r}; it "
                            "must be a Whisper model with its decoder.")
        count = teacher["decoder_layers"]
        if not 1 <= self.decoder_layers <= count:
            raise SpecError(f"distil_whisper: {self.decoder_layers} decoder_layers of a teacher with {count}.")
        if not self.copied:
            spread = np.linspace(0, count - 1, self.decoder_layers).round().astype(int)
            return tuple(map(int, spread)) if self.decoder_layers > 1 else (count - 1,)
        if len(self.copied) != self.decoder_layers or list(self.copied) != sorted(set(self.copied)) or not (
                0 <= self.copied[0] and self.copied[-1] < count):
            raise SpecError(f"distil_whisper: copied {list(self.copied)}; give {self.decoder_layers} ascending numbers "
                            f"from 0 to {count - 1}.")
        return self.copied

    def targets(self, teacher: Slim, batch, key, step) -> dict[str, jax.Array]:
        return {"logits": teacher(**inputs(batch)).logits} if self.kl_weight else {}

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        out = student(key=key, **inputs(batch))
        terms = {"ce": losses.cross_entropy(out.logits, batch["labels"])._replace(weight=self.ce_weight)}
        if "logits" in targets:
            kl = losses.kl(out.logits, targets["logits"], batch["labels"] >= 0, self.temperature)
            terms["kl"] = kl._replace(weight=self.kl_weight)
        return terms

    def control(self) -> Method:
        return Finetune(freeze=self.freeze)

    def group(self, name: str) -> str:
        return "frozen" if any(re.search(p, name) for p in self.freeze) else "main"
