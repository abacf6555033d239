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
          "decoder_attention_mask", "token_type_ids", "audio_mel", "audio_mel_mask")


def inputs(batch: dict[str, Any], model: Slim | None = None) -> dict[str, Any]:
    """The entries of a batch that go into the model; the rest (labels, rows) is the loss's. With a `model` that has
    several adapters, also which one each row uses (the data's column `adapter_id`)."""
    several = ("adapter_ids",) if model is not None and model.spec.slots > 1 else ()
    return {k: batch[k] for k in (*INPUTS, *several) if k in batch}


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


class Names(tuple):
    """Names that make no difference: another one in a jitted function's argument compiles nothing again."""

    __eq__ = lambda self, other: isinstance(other, Names)  # noqa: E731
    __hash__ = lambda self: 0                              # noqa: E731


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)  # equal are equal fingerprints; == of dicts of arrays is an error
class Slim:
    """A model as data: a static Spec and a flat dict of arrays with Hugging Face names and torch memory layout."""

    spec: Spec
    params: dict[str, Array]
    defaults: tuple[tuple[str, Any], ...] = ()   # call options (dtype, remat, ...) for callers that name none
    adapters: tuple[str, ...] = ()               # names of the adapter slots
    active: Array | None = None                  # () int32: the slot for callers that give no adapter_ids, -1 = none

    def __post_init__(self):
        if len(self.adapters) != (slots := self.spec.slots):
            object.__setattr__(self, "adapters", tuple(map(str, range(slots))))

    def tree_flatten(self):
        return (self.params, self.active), (self.spec, self.defaults, Names(self.adapters))

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(static[0], children[0], static[1], tuple(static[2]), children[1])

    def __call__(self, *, output_hidden_states: bool = False, taps: tuple[str, ...] = (), key: jax.Array | None = None,
                 dtype: Any = None, remat: str | None = None, adapter_ids: Array | None = None,
                 attention: str | None = None, layers: str | None = None, **inputs: Array) -> Outputs:
        """Forward pass.

        Args:
          output_hidden_states: also return every hidden state, in the order of transformers.
          taps: names of intermediate values to return (`encoder.3.attention.out`, `encoder.3`, `logits`, ...).
          key: PRNG key for dropout and SpecAugment; None means evaluation.
          dtype: compute dtype of the matrix products (norms, softmax and losses stay fp32); None = the parameters'.
          remat: what a layer keeps for the backward pass: "none" (all), "dots", "full" (nothing).
          adapter_ids: slot of each row (B,), of each frame (B, T), or of all (); -1 is the model without adapters.
            None: `active`, or the only slot.
          attention: "auto", "dense" or "blocked" softmax attention and convolutions; dense is the oracle.
          layers: "loop", or "scan": runs of equal layers as one loop, which compiles faster.
          **inputs: named and shaped as in transformers: `input_values` (B, samples), `attention_mask` (B, samples).
        """
        ids = self._adapter_ids(adapter_ids)
        if isinstance(ids, np.ndarray) and (ids < 0).all():  # the base's own program: the same bits, and no detour
            from jaxslim.adapters import base

            return base(self)(output_hidden_states=output_hidden_states, taps=taps, key=key, dtype=dtype, remat=remat,
                              attention=attention, **inputs)
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
            inputs = {k: np.asarray(v) if not isinstance(v, jax.Array) else v for k, v in inputs.items()}
        defaults = dict(self.defaults)
        dtype, remat = dtype or defaults.get("dtype"), remat or defaults.get("remat", "none")
        attention, layers = attention or defaults.get("attention", "auto"), layers or defaults.get("layers", "loop")
        return _forward(self.params, inputs, key, ids, spec=self.spec, hidden=output_hidden_states, taps=tuple(taps),
                        dtype=None if dtype is None else jnp.dtype(dtype).name, remat=remat, attention=attention,
                        layers=layers, collect=defaults.get("collect"))

    def _adapter_ids(self, ids: Array | None) -> Array | None:
        slots, ids = self.spec.slots, self.active if ids is None else ids
        if ids is None:
            if slots > 1:
                raise ValueError(f"This model has {slots} adapters ({', '.join(self.adapters)}); say which by "
                                 "adapter_ids, or by set_adapter.")
            return None
        if not slots:
            raise ValueError("adapter_ids: this model has no adapters.")
        if not isinstance(ids, jax.core.Tracer):
            ids = np.asarray(ids)
            if not np.issubdtype(ids.dtype, np.integer) or ids.ndim > 2 or ids.size and not (
                    -1 <= ids.min() and ids.max() < slots):
                raise ValueError(f"adapter_ids: integers from -1 (no adapter) to {slots - 1}, by row or by frame, "
                                 f"not {ids.dtype} {ids.shape} from {ids.min()} to {ids.max()}.")
            ids = ids.astype(np.int32)
        return ids

    def replace(self, **changes) -> Slim:
        return dataclasses.replace(self, **changes)

    # ---- adapters, in the manner of PEFT; each returns a new model (adapters.py, adapter_*.py) ----

    def add_adapter(self, name: str, kind: str = "tpa", *, seed: int = 0, **options) -> Slim:
        """With a new adapter that changes nothing yet; `options` are those of methods.adapter.Adapter."""
        from jaxslim import adapters
        from jaxslim.methods.adapter import Adapter

        made = Adapter(kind=kind, **options).start(adapters.base(self), None, jax.random.key(seed))
        return adapters.put(self, name, adapters.extract(made))

    def load_adapter(self, folder: str, name: str | None = None, *, force: bool = False) -> Slim:
        """With the adapter of a folder or file (ours, PEFT's LoRA, AdapterHub's, MMS's); `name`: by default its own."""
        from jaxslim import adapter_files

        return adapter_files.load(self, folder, name, force=force)

    def save_adapter(self, folder: str, name: str | None = None, *, head: bool = False,
                     base_name: str | None = None) -> dict[str, Any]:
        """Writes one adapter, LoRA as PEFT does; `head`: with the output layer. Returns its config."""
        from jaxslim import adapter_files

        return adapter_files.save(self, folder, name, head=head, base_name=base_name)

    def set_adapter(self, name: str) -> Slim:
        """With this adapter for calls that give no adapter_ids."""
        from jaxslim import adapters

        return self.replace(active=np.int32(adapters.index(self, name)))

    def disable_adapter(self) -> Slim:
        """Without adapters for calls that give no adapter_ids: bit for bit the model they stand on."""
        return self.replace(active=np.int32(-1))

    def delete_adapter(self, name: str) -> Slim:
        from jaxslim import adapters

        return adapters.delete(self, name)

    def merge(self, name: str | None = None) -> Slim:
        """With one adapter merged into the weights, and no other."""
        from jaxslim import adapter_merge

        return adapter_merge.merge(self, name)

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


@functools.partial(jax.jit, static_argnames=("spec", "hidden", "taps", "dtype", "remat", "attention", "layers",
                                              "collect"))
def _forward(params, inputs, key, adapter_ids=None, *, spec, hidden, taps, dtype, remat, attention, layers,
             collect=None):
    # One module-level jit: a call from Python costs about 2 ms instead of 150, and a caller's jit inlines it.
    from jaxslim.models import bind, gates
    from jaxslim.models.layers import Call

    if gates.shapes(spec):  # in fp32, before anything is cast
        bind.check(spec, params)
        state = gates.settle(spec, params) if key is None else gates.sample(spec, params, key)
        plain, params = params, gates.fold(spec, params, state)
        if collect is not None:
            params = {k: v if v is plain.get(k) else collect(k, v) for k, v in params.items()}
    if dtype is not None:  # vectors (norms, biases) and decays keep their precision
        params = {k: v.astype(dtype) if v.ndim > 1 and jnp.issubdtype(v.dtype, jnp.floating)
                  and not k.endswith("A_log") else v
                  for k, v in params.items()}
    whole = adapter_ids is not None and adapter_ids.ndim == 2
    call = Call(key, frozenset(taps), hidden, remat, attention, whole, layers, collect)
    out = bind.bind(spec, params, adapter_ids)(call, **inputs)
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

    def labelled(self) -> bool:
        """Whether the loss reads labels; without, clips that have no text are trained on too."""
        return True

    def cacheable(self) -> bool:
        """Whether `targets` are features (B, T, D) of each clip that depend on neither key nor step."""
        return False

    def keeps_best(self) -> bool:
        """Whether the parameters with the best validation score are kept, or the last ones."""
        return True

    def control(self) -> Method | None:
        """What the control trains in place of this stage; None when the stage has no task loss."""
        return None

    def finish(self, student: Slim, batches: Batches) -> Slim:
        """Fold, cut, merge; drops every name starting 'aux.' or 'teacher/'"""
        own = {k: v for k, v in student.params.items() if not k.startswith(("aux.", "teacher/"))}
        return student.replace(params=own)
