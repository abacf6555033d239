"""The one training step: jitted, sharded, on flat dicts of arrays.

It first sums every term's count over all microbatches (counts depend on the batch only), then accumulates the
gradient of sum_i weight_i * sum_i / count_i. Normalising each microbatch by itself would weight short ones too much.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxslim.config import Group, Train
from jaxslim.slim import Array, Method, Slim
from jaxslim.spec import Spec
from jaxslim.train import mesh as M


class State(NamedTuple):
    """What a step changes; donated. Names are Hugging Face names, `aux.*` and `teacher/*`."""

    params: dict[str, Array]     # trained parameters, fp32
    optimizer: Any
    step: Array                  # () int32, also the fold of the random key
    skipped: Array               # () int32, steps whose loss or gradient was not finite
    skipped_in_a_row: Array


class ConfigMismatch(ValueError):
    """The method's groups and those of the config differ."""


def schedule(group: Group, max_steps: int) -> optax.Schedule:
    """Linear warm-up, then linear, cosine or no decay to final_factor at max_steps."""
    peak, end = group.learning_rate, group.learning_rate * group.final_factor
    rest = max(max_steps - group.warmup_steps, 1)
    decay = {"linear": optax.linear_schedule(peak, end, rest), "constant": optax.constant_schedule(peak),
             "cosine": optax.cosine_decay_schedule(peak, rest, group.final_factor)}[group.schedule]
    if not group.warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, group.warmup_steps), decay], [group.warmup_steps])


def optimizer(cfg: Train, labels: Mapping[str, str]) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW by group. Vectors get no weight decay."""
    def adamw(g: Group):
        return optax.adamw(schedule(g, cfg.max_steps), g.beta1, g.beta2, g.eps, weight_decay=g.weight_decay,
                           mask=lambda params: jax.tree.map(lambda x: jnp.ndim(x) > 1, params))

    clip = [optax.clip_by_global_norm(cfg.max_grad_norm)] if cfg.max_grad_norm else []
    return optax.chain(*clip, optax.partition({name: adamw(g) for name, g in cfg.groups.items()}, dict(labels)))


def groups(method: Method, params: Mapping[str, Array], cfg: Train) -> dict[str, str]:
    """Name -> group of the trained parameters. Raises ConfigMismatch when a group has no optimiser."""
    labels = {k: method.group(k) for k, v in params.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    labels = {k: g for k, g in labels.items() if g != "frozen"}
    unknown = sorted(set(labels.values()) - set(cfg.groups))
    if unknown:
        wanted = sorted(set(labels.values()))
        raise ConfigMismatch(f"train.groups has no {unknown}; {type(method).__name__} trains {wanted}.")
    if not labels:
        raise ConfigMismatch(f"{type(method).__name__}: every parameter is frozen; there is nothing to train.")
    return labels


def init(method: Method, student: Slim, cfg: Train,
         mesh) -> tuple[State, dict[str, Array], optax.GradientTransformation]:
    """State on the mesh, the frozen parameters on the mesh, and the optimiser.

    The trained arrays are copied, because student and teacher share arrays and the step donates its state.
    """
    labels = groups(method, student.params, cfg)
    tx = optimizer(cfg, labels)
    placed = M.place(student.params, mesh)
    trained = {k: jnp.array(placed[k], jnp.float32, copy=True) for k in labels}
    frozen = {k: v for k, v in placed.items() if k not in labels}
    zero = lambda: M.put(jnp.zeros((), jnp.int32), M.NamedSharding(mesh, M.P()))  # noqa: E731
    where = M.like_params(jax.eval_shape(tx.init, trained), M.sharding(trained, mesh), mesh)
    return State(trained, jax.jit(tx.init, out_shardings=where)(trained), zero(), zero(), zero()), frozen, tx


def make(method: Method, spec: Spec, tx: optax.GradientTransformation, cfg: Train, state: State, mesh):
    """step(state, frozen, teacher, batch) -> (state, metrics), compiled once per batch shape and teacher presence."""
    accumulate = cfg.gradient_accumulation_steps

    def terms(trained, frozen, teacher, batch, key, step):
        targets = {}
        if teacher is not None:
            targets = jax.lax.stop_gradient(method.targets(teacher, batch, jax.random.fold_in(key, 1), step))
        student = Slim(spec, {**frozen, **trained}, (("dtype", cfg.dtype), ("remat", cfg.remat)))
        return method.loss(student, targets, batch, jax.random.fold_in(key, 2), step)

    def step(state: State, frozen, teacher, batch):
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
        at = lambda i: (jax.tree.map(lambda x: x[i], micro), jax.random.fold_in(key, i))  # noqa: E731

        def loss(trained, batch, key, counts):
            out = terms(trained, frozen, teacher, batch, key, state.step)
            counts = {k: t.count for k, t in out.items()} if counts is None else counts
            values = {k: t.sum / jnp.maximum(jax.lax.stop_gradient(counts[k]), 1e-6) for k, t in out.items()}
            return sum(out[k].weight * v for k, v in values.items()), values

        grad = jax.value_and_grad(loss, has_aux=True)
        if accumulate == 1:
            (total, values), grads = grad(state.params, *at(0), None)
        else:
            def count(i):  # everything but the counts is dead code here and never runs
                out = terms(state.params, frozen, teacher, *at(i), state.step)
                return {k: t.count for k, t in out.items()}

            counts = jax.tree.map(lambda x: x.sum(0), jax.lax.map(count, jnp.arange(accumulate)))

            def add(carry, i):
                return jax.tree.map(jnp.add, carry, grad(state.params, *at(i), counts)), None

            first = grad(state.params, *at(0), counts)
            ((total, values), grads), _ = jax.lax.scan(add, first, jnp.arange(1, accumulate))

        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, new = tx.update(grads, state.optimizer, state.params)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)  # noqa: E731
        bad = jnp.where(ok, 0, 1)
        state = State(keep(optax.apply_updates(state.params, updates), state.params), keep(new, state.optimizer),
                      state.step + 1, state.skipped + bad, jnp.where(ok, 0, state.skipped_in_a_row + 1))
        return state, {"loss": total, "grad_norm": norm, **{f"loss/{k}": v for k, v in values.items()}}

    params = M.sharding(state.params, mesh)
    replicated = M.NamedSharding(mesh, M.P())
    where = State(params, M.like_params(state.optimizer, params, mesh), replicated, replicated, replicated)
    # without out_shardings the second call would compile again
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None),
                   in_shardings=(where, None, None, M.NamedSharding(mesh, M.BATCH)))
