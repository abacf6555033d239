"""The shared types: Slim, Method, Term, Outputs. Everything else takes and returns these."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxslim.spec import Spec, nearest

Array = jax.Array | np.ndarray
Batches = Callable[[], Iterator[dict[str, np.ndarray]]]   # one pass over training data per call


INPUTS = ("input_values", "attention_mask", "input_features", "input_ids", "decoder_input_ids",
          "decoder_attention_mask", "token_type_ids")


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The entries of a batch that go into the model; the rest (labels, rows) is the loss's."""
    return {k: batch[k] for k in INPUTS if k in batch}


class Outputs(NamedTuple):
    """What a forward pass returns, named as in transformers. Frames beyond a row's length are zero in `taps`."""

    logits: jax.Array | None = None                    # (B, T, V)
    last_hidden_state: jax.Array | None = None         # (B, T, D)
    hidden_states: tuple[jax.Array, ...] | None = None  # HF order: embedding, then every layer
    taps: dict[str, jax.Array] | None = None           # block tap name -> (B, T, *)
    lengths: jax.Array | None = None                   # (B,) valid frames
    encoder_last_hidden_state: jax.Array | None = None  # (B, S, D); with a decoder the fields above are the decoder's
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    pooler_output: jax.Array | None = None             # (B, D), of text encoders with a pooler


class Term(NamedTuple):
    """One loss term: `weight * sum / count`. `count` may depend on the batch only, never on parameters."""

    sum: jax.Array
    count: jax.Array
    weight: jax.Array | float = 1.0


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)  # equal are equal fingerprints; == of dicts of arrays is an error
class Slim:
    """A model as data: a static Spec and a flat dict of arrays with Hugging Face names and torch memory layout."""

    spec: Spec
    params: dict[str, Array]
    defaults: tuple[tuple[str, Any], ...] = ()   # call options (dtype, remat) for callers that name none

    def tree_flatten(self):
        return (self.params,), (self.spec, self.defaults)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(static[0], children[0], static[1])

    def __call__(self, *, output_hidden_states: bool = False, taps: tuple[str, ...] = (), key: jax.Array | None = None,
                 dtype: Any = None, remat: str | None = None, adapter_ids: Array | None = None,
                 attention: str = "auto", **inputs: Array) -> Outputs:
        """Forward pass.

        Args:
          output_hidden_states: also return every hidden state, in the order of transformers.
          taps: names of intermediate values to return (`encoder.3.attention.out`, `encoder.3`, `logits`, ...).
          key: PRNG key for dropout and SpecAugment; None means evaluation.
          dtype: compute dtype of the matrix products (norms, softmax and losses stay fp32); None = the parameters'.
          remat: what a layer keeps for the backward pass: "none" (all), "dots", "full" (nothing).
          adapter_ids: (B,) slot of each row; no family of this release has adapter slots, so it must be None.
          attention: "auto", "dense" or "blocked" softmax attention and convolutions; dense is the oracle.
          **inputs: named and shaped as in transformers: `input_values` (B, samples), `attention_mask` (B, samples).
        """
        if adapter_ids is not None:
            raise ValueError("adapter_ids: this model has no adapter slots.")
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
            inputs = {k: np.asarray(v) if not isinstance(v, jax.Array) else v for k, v in inputs.items()}
        defaults = dict(self.defaults)
        dtype, remat = dtype or defaults.get("dtype"), remat or defaults.get("remat", "none")
        return _forward(self.params, inputs, key, spec=self.spec, hidden=output_hidden_states, taps=tuple(taps),
                        dtype=None if dtype is None else jnp.dtype(dtype).name, remat=remat, attention=attention)

    def replace(self, **changes) -> Slim:
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the canonical spec JSON and the sorted (name, dtype, shape, bytes) of the parameters."""
        digest = hashlib.sha256(self.spec.json.encode())
        for name in sorted(self.params):
            x = np.ascontiguousarray(np.asarray(self.params[name]))
            digest.update(f"{name} {x.dtype} {x.shape} ".encode())
            digest.update(x.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def save_pretrained(self, folder: str) -> None:
        from jaxslim import hub

        hub.save(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        from jaxslim import hub

        return hub.push(self, repo_id, **kwargs)


@functools.partial(jax.jit, static_argnames=("spec", "hidden", "taps", "dtype", "remat", "attention"))
def _forward(params, inputs, key, *, spec, hidden, taps, dtype, remat, attention):
    # One module-level jit: a call from Python costs about 2 ms instead of 150, and a caller's jit inlines it.
    from jaxslim.models import bind, layers

    if dtype is not None:  # vectors (norms, biases) keep their precision
        params = {k: v.astype(dtype) if v.ndim > 1 and jnp.issubdtype(v.dtype, jnp.floating) else v
                  for k, v in params.items()}
    call = layers.Call(key, frozenset(taps), hidden, remat, attention)
    out = bind.bind(spec, params)(call, **inputs)
    for tap in taps:
        if tap not in (out.taps or {}):
            from jaxslim.models import roles

            known = [*roles.layers(spec), *(f"{b}.{side}" for b in roles.blocks(spec) for side in ("in", "out"))]
            raise ValueError(f"This {spec.family} model has no tap {tap!r}.{nearest(tap, known)}")
    return out


class Method:
    """What a stage does to a model. A frozen dataclass of options; no state. Every hook but `loss` has a default."""

    def start(self, teacher: Slim, batches: Batches, key: jax.Array) -> Slim:
        """Surgery. `batches()` iterates training data (calibration), never validation or test."""
        return teacher

    def teacher_at(self, teacher: Slim, step: int) -> Slim | None:
        """Host side: the teacher that guides `step`; None = no teacher any more."""
        return teacher

    def targets(self, teacher: Slim, batch: dict[str, Array], key: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """What is wanted of the teacher, by tap."""
        return {}

    def loss(self, student: Slim, targets: dict[str, jax.Array], batch: dict[str, Array], key: jax.Array,
             step: jax.Array) -> dict[str, Term]:
        raise NotImplementedError(f"{type(self).__name__} defines no loss, so it cannot be trained.")

    def group(self, name: str) -> str:
        """'frozen' or a key of train.groups."""
        return "main"

    def control(self) -> Method | None:
        """What the control trains in place of this stage; None when the stage has no task loss."""
        return None

    def finish(self, student: Slim, batches: Batches) -> Slim:
        """Fold, cut, merge; drops every name starting 'aux.'"""
        return student.replace(params={k: v for k, v in student.params.items() if not k.startswith("aux.")})
