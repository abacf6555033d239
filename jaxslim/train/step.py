"""The one training step: jitted, sharded, on flat dicts of arrays.

It first sums every term's count over all microbatches (counts depend on the batch only), then accumulates the
gradient of sum_i weight_i * sum_i / count_i. Normalising each microbatch by itself would weight short ones too much.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxslim.config import Group, Train
from jaxslim.models import gates
from jaxslim.slim import Array, Method, Slim
from jaxslim.spec import Spec
from jaxslim.train import cached, random
from jaxslim.train import mesh as M

NOT_TURNED = re.compile(r"embed|lm_head|classifier|A_log")
TEACHER = "teacher/"   # prefix of the parameters of a teacher that is trained beside the student


class State(NamedTuple):
    """What a step changes; donated. Names are Hugging Face names, `aux.*` and `teacher/*`."""

    params: dict[str, Array]     # trained parameters, fp32
    optimizer: Any
    step: Array                  # () int32, also the fold of the random key
    skipped: Array               # () int32, steps whose loss or gradient was not finite
    skipped_in_a_row: Array
    average: dict[str, Array] | None = None   # of params, with ema_decay


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
    """Clip by the global norm, then AdamW or Muon by group. Vectors get no weight decay.

    Muon: arXiv 2502.16982, whose scaling (RMS 0.2) makes a learning rate of AdamW fit."""
    def decayed(params):  # matrices, but not Mamba's decays
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.ndim(x) > 1 and not str(path[-1].key).endswith("A_log"), params)

    def turned(params):  # hidden matrices, not tables and output layers, as is usual with Muon
        def kind(path, x):
            return "muon" if jnp.ndim(x) == 2 and not NOT_TURNED.search(str(path[-1].key)) else "adamw"

        return jax.tree_util.tree_map_with_path(kind, params)

    def of(g: Group):
        rate = schedule(g, max(cfg.max_steps // g.every, 1))
        tx = optax.adamw(rate, g.beta1, g.beta2, g.eps, weight_decay=g.weight_decay, mask=decayed,
                         mu_dtype=cfg.adam_mu_dtype)
        if g.optimizer == "muon":  # optax's own rest would be Adam with Nesterov momentum
            muon = optax.contrib.muon(rate, eps=g.eps, weight_decay=g.weight_decay, weight_decay_mask=decayed,
                                      mu_dtype=cfg.adam_mu_dtype, consistent_rms=0.2)
            tx = optax.partition({"muon": muon, "adamw": tx}, turned)
        every = lambda step: (step + 1) % g.every == 0  # noqa: E731
        return tx if g.every == 1 else optax.transforms.conditionally_mask(tx, every)

    clip = [optax.clip_by_global_norm(cfg.max_grad_norm)] if cfg.max_grad_norm else []
    whose = {k: "teacher" if k.startswith(TEACHER) else "student" for k in labels}
    if clip and "teacher" in whose.values():  # each by its own norm
        clip = [optax.partition({"student": clip[0], "teacher": clip[0]}, whose)]
    return optax.chain(*clip, optax.partition({name: of(g) for name, g in cfg.groups.items()}, dict(labels)))


def groups(method: Method, params: Mapping[str, Array], cfg: Train) -> dict[str, str]:
    """Name -> group of the trained parameters. Raises ConfigMismatch when a group has no optimiser, or an optimiser
    of the config no parameter."""
    labels = {k: method.group(k) for k, v in params.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    labels = {k: g for k, g in labels.items() if g != "frozen"}
    unknown = sorted(set(labels.values()) - set(cfg.groups))
    if unknown:
        wanted = sorted(set(labels.values()))
        raise ConfigMismatch(f"train.groups has no {unknown}; {type(method).__name__} trains {wanted}.")
    if labels and (idle := sorted(set(cfg.groups) - set(labels.values()))):
        raise ConfigMismatch(f"train.groups has {idle}, but no parameter is in it; {type(method).__name__} trains "
                             f"{sorted(set(labels.values()))}. Remove it.")
    if not labels:
        raise ConfigMismatch(f"{type(method).__name__}: every parameter is frozen; there is nothing to train.")
    return labels


def for_control(method: Method, params: Mapping[str, Array], cfg: Train) -> Train:
    """`cfg` without the groups that `method` has no parameter for: a control lacks what the stage's surgery added."""
    used = {method.group(k) for k in params}
    return dataclasses.replace(cfg, groups={g: c for g, c in cfg.groups.items() if g in used} or cfg.groups)


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
    average = jax.tree.map(jnp.copy, trained) if cfg.ema_decay else None
    return State(trained, jax.jit(tx.init, out_shardings=where)(trained), zero(), zero(), zero(), average), frozen, tx


def make(method: Method, spec: Spec, tx: optax.GradientTransformation, cfg: Train, state: State, mesh):
    """step(state, frozen, teacher, batch) -> (state, metrics), compiled once per batch shape and teacher presence."""
    accumulate = cfg.gradient_accumulation_steps
    # the plain programs on accelerators, also when compiling on a CPU for one that is not there
    plain = mesh.devices.flat[0].platform != "cpu"
    options = (("dtype", cfg.dtype), ("attention", "dense" if plain else "auto"), ("layers", cfg.layers))
    options += (("collect", M.Collect(mesh, cfg.dtype)),) if mesh.shape["fsdp"] > 1 else ()
    gated = gates.reads(spec)

    def terms(trained, frozen, teacher, batch, key, step):
        everything = M.gather({**frozen, **trained}, mesh, cfg.dtype, gated)
        own = (*options, ("remat", cfg.remat))
        key = jax.random.fold_in(key, 2)  # one key for both: a method may share its noise or fold it on
        targets = cached.targets(batch)   # without a teacher: what it said before, or nothing
        if teacher is not None and not teacher.params:  # it is trained in this very step
            live = {k.removeprefix(TEACHER): v for k, v in everything.items() if k.startswith(TEACHER)}
            targets = method.targets(Slim(teacher.spec, live, own), batch, key, step)
        elif teacher is not None:
            guide = teacher.replace(params=M.gather(teacher.params, mesh, cfg.dtype), defaults=options)
            targets = jax.lax.stop_gradient(method.targets(guide, batch, key, step))
        student = Slim(spec, {k: v for k, v in everything.items() if not k.startswith(TEACHER)}, own)
        return method.loss(student, targets, batch, key, step)

    def decay(step):  # short at first, so that the start is forgotten soon (as in TensorFlow and timm)
        return jnp.minimum(cfg.ema_decay, (1.0 + step) / (10.0 + step))

    def step(state: State, frozen, teacher, batch):
        key = jax.random.fold_in(random.key(cfg.seed, cfg.prng), state.step)
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
        bad, moved = jnp.where(ok, 0, 1), keep(optax.apply_updates(state.params, updates), state.params)
        average = state.average and {k: a + (1 - decay(state.step)) * (moved[k] - a) for k, a in state.average.items()}
        state = State(moved, keep(new, state.optimizer), state.step + 1, state.skipped + bad,
                      jnp.where(ok, 0, state.skipped_in_a_row + 1), average)
        return state, {"loss": total, "grad_norm": norm, **{f"loss/{k}": v for k, v in values.items()}}

    params = M.sharding(state.params, mesh)
    replicated = M.NamedSharding(mesh, M.P())
    where = State(params, M.like_params(state.optimizer, params, mesh), replicated, replicated, replicated,
                  state.average and params)
    # without out_shardings the second call would compile again
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None),
                   in_shardings=(where, None, None, M.NamedSharding(mesh, M.BATCH)))
