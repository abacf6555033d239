"""`train`: fine-tuning (CTC, classification, seq2seq), and the control of recovery tables (the teacher trained on)."""
from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp

from jaxslim.slim import Method, Slim, Term, inputs
from jaxslim.spec import SpecError
from jaxslim.train import losses


@dataclasses.dataclass(frozen=True)
class Finetune(Method):
    """Task loss only."""

    freeze: tuple[str, ...] = ()   # regular expressions on parameter names, e.g. "feature_extractor"

    def loss(self, student: Slim, targets, batch, key, step) -> dict[str, Term]:
        out = student(key=key, **inputs(batch))
        return task(student, out, batch)

    def control(self) -> Method:
        return self

    def group(self, name: str) -> str:
        return "frozen" if stored_statistic(name) or any(re.search(p, name) for p in self.freeze) else "main"


def task(student: Slim, out, batch) -> dict[str, Term]:
    """The loss that goes with the model's head."""
    if student.spec.head == "ctc":
        return ctc(student, out, batch)
    if student.spec.head in ("classification", "frames", "seq2seq", "causal"):
        return {"ce": losses.cross_entropy(out.logits, batch["labels"])}
    raise SpecError(f"A model with head {student.spec.head!r} has no task loss here; it has one for ctc, "
                    "classification, frames, seq2seq, causal.")


def ctc(student: Slim, out, batch) -> dict[str, Term]:
    """CTC term of a forward pass; and `unfit`, the share of rows with too few frames (weight 0)."""
    rows, frames = out.logits.shape[:2]
    lengths = out.lengths if out.lengths is not None else jnp.full(rows, frames)
    term, unfit = losses.ctc(out.logits, lengths, batch["labels"], student.spec["pad_token_id"])
    labelled = (batch["labels"] >= 0).any(-1).sum()
    return {"ctc": term, "unfit": Term(unfit.astype(jnp.float32), labelled.astype(jnp.float32), 0.0)}


def stored_statistic(name: str) -> bool:
    """Batch-norm statistics are read, never trained."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))
