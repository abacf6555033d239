"""How much each head, share of units or channels, and sub-layer matters: the task's loss without it.

For each block that can be pruned: every head alone removed, all heads; the 25, 50, 75 and 100 % of units or channels
with the smallest weights. One program for all of them, because closed gates are data. Validation data, never test.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxslim import config, cost, hub
from jaxslim.config import ConfigError, Recipe, Train
from jaxslim.data import task_of
from jaxslim.methods.finetune import task as task_loss
from jaxslim.methods.prune import Prune, magnitude
from jaxslim.models import bind, gates, layers
from jaxslim.recipe import training_batches
from jaxslim.slim import Outputs, Slim, inputs
from jaxslim.spec import Spec, kind
from jaxslim.train import mesh as M

FILE = "sensitivity.json"
SHARES = (0.25, 0.5, 0.75, 1.0)
ROWS = 16   # clips of the batch that everything is measured on
log = logging.getLogger(__name__)


def run(path: str, output: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`jaxslim slim RECIPE --sensitivity`: measures the recipe's teacher into output/sensitivity.json.

    Returns what the file says: {"fingerprint", "data", "loss" of the whole model, "rows": [{block, removed, share,
    loss, change, params, gmacs}]}, where params and gmacs (at 10 s) are what the removal saves. A file that was
    measured before for the same model and data is returned as it is.
    """
    recipe = config.load(Recipe, path, overrides)
    data = recipe.data.validation or recipe.data.train
    if not data:
        raise ConfigError(f"{path}: data.validation (or data.train) must be set.")
    teacher, file = hub.load(recipe.teacher), epath.Path(output) / FILE
    key = {"fingerprint": teacher.fingerprint, "data": data, "rows_measured": ROWS}
    if file.exists() and (old := json.loads(file.read_text())).items() >= key.items():
        log.info("%s is there.", file)
        return old
    task = task_of(teacher.spec, hub.folder(recipe.teacher), recipe.data.language)
    first = next((s.train for s in recipe.stages if s.train), None) or Train()
    cfg = dataclasses.replace(first, per_device_batch_seconds=0.0, per_device_train_batch_size=ROWS, buckets=(),
                              gradient_accumulation_steps=1, speed_perturb=(), augment={}, join_seconds=0.0)
    mesh = M.make("data=1", jax.devices()[:1])
    batches = training_batches(data, task, cfg, mesh)
    batch = {k: v for k, v in next(iter(batches)).items() if k != "row"}
    batches.close()
    result = key | measure(teacher, batch)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def measure(model: Slim, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Loss on `batch` of the whole model and without each part."""
    spec = Prune(gates=("channels", "heads", "units")).gated(model.spec)
    base = gates.plain(spec)
    whole = float(_loss(spec, model.params, gates.masked(spec, {}), batch))
    rows, size, macs = [], cost.params(base), cost.macs(base).total
    for group in gates.groups(spec):
        order = np.argsort(magnitude(group, model.params), kind="stable")
        for removed, kept in variants(group, order):
            loss = float(_loss(spec, model.params, gates.masked(spec, {group.block: kept}), batch))
            small = gates.plain(gates.with_units(spec, group.block, kept))
            rows.append({"block": group.block, "removed": removed, "share": round(1 - len(kept) / group.size, 4),
                         "loss": loss, "change": loss - whole, "params": size - cost.params(small),
                         "gmacs": (macs - cost.macs(small).total) / 1e9})
        log.info("%s: %s", group.block, ", ".join(f"{r['removed']} {r['change']:+.4f}" for r in rows
                                                   if r["block"] == group.block))
    return {"loss": whole, "rows": rows}


def variants(group: gates.Group, order: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    """(what is removed, numbers of the units that stay); `order`: units by weight, the smallest first."""
    if gates.FIELD[kind(group.block)] == "heads":
        for i in range(group.size):
            yield f"head {i}", [j for j in range(group.size) if j != i]
        yield "all heads", []
        return
    for share in SHARES:
        least = 1 if kind(group.block) == "frontend" else 0
        kept = sorted(order[min(round(share * group.size), group.size - least):].tolist())
        yield f"{share:.0%} of {gates.FIELD[kind(group.block)]}", kept


@functools.partial(jax.jit, static_argnames="spec")
def _loss(spec: Spec, params, state, batch) -> jax.Array:
    out: Outputs = bind.bind(spec, gates.fold(spec, params, state))(layers.Call(), **inputs(batch))
    terms = task_loss(Slim(gates.plain(spec), params), out, batch)
    return sum(t.weight * t.sum / jnp.maximum(t.count, 1e-6) for t in terms.values())


def table(result: Mapping[str, Any]):
    """The least sensitive parts per GMAC saved first, for the terminal."""
    from rich.table import Table

    out = Table(caption=f"loss of the whole model {result['loss']:.4f}; sorted by change of the loss per GMAC saved")
    for name in ("block", "removed", "change of loss", "MMACs saved", "parameters saved"):
        out.add_column(name, justify="left" if name in ("block", "removed") else "right")
    for r in sorted(result["rows"], key=lambda r: r["change"] / max(r["gmacs"], 1e-9)):
        out.add_row(r["block"], r["removed"], f"{r['change']:+.4f}", f"{1e3 * r['gmacs']:,.1f}", f"{r['params']:,}")
    return out

