"""Recipes: stages run one after another, each saved and resumable; the control; and `jaxslim train`.

    DIR/<nn-name>/   HF folder + stage.json (written last: its presence says the stage is finished), metrics.jsonl
    DIR/control/     the teacher trained on with the same data, steps and learning rate, no surgery (DESIGN 6)
    DIR/final/       the last stage's model         DIR/summary.json   scores, sizes and speed of all of them
"""
from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence

import jax
from etils import epath

from jaxslim import config, cost, hub
from jaxslim.evaluate import evaluate
from jaxslim.config import ConfigError, Recipe, Stage, Train
from jaxslim.data import Batches, CTCTask, load_rows
from jaxslim.data.audio import speed_perturb
from jaxslim.methods import METHODS
from jaxslim.slim import Method, Slim
from jaxslim.spec import nearest
from jaxslim.train import loop
from jaxslim.train import mesh as M

log = logging.getLogger(__name__)


def method_of(stage: Stage) -> Method:
    """The method object of a stage; its options are strict."""
    if stage.method not in METHODS:
        raise ConfigError(f"Stage {stage.name}: unknown method {stage.method!r}.{nearest(stage.method, METHODS)} "
                          f"Known are {sorted(METHODS)}.")
    return config.build(METHODS[stage.method], stage.options, f"Stage {stage.name}: options")


def training_batches(data: str, task: CTCTask, cfg: Train, mesh) -> Batches:
    """Shuffled endless global batches for `cfg` on `mesh`."""
    size = {"batch_size": loop.batch_size(cfg, mesh)}
    if cfg.per_device_batch_seconds:
        size = {"batch_seconds": cfg.per_device_batch_seconds * M.shards(mesh) * cfg.gradient_accumulation_steps}
    batches = Batches(load_rows(data), task, **size, multiple_of=M.shards(mesh) * cfg.gradient_accumulation_steps,
                      seed=cfg.seed, max_seconds=cfg.max_seconds, min_seconds=cfg.min_seconds, buckets=cfg.buckets or None,
                      augment=speed_perturb(cfg.speed_perturb) if cfg.speed_perturb else None,
                      host=jax.process_index(), hosts=jax.process_count())
    log.info(batches.summary)
    return batches


def train(path: str, overrides: Sequence[str] = ()) -> Slim:
    """`jaxslim train CONFIG`: fine-tunes `model` on `data.train`, leaves OUTPUT_DIR with final/ in it."""
    cfg = config.load(config.Run, path, overrides)
    if not (cfg.model and cfg.data.train and cfg.output_dir):
        raise ConfigError(f"{path}: model, data.train and output_dir must be set.")
    folder = epath.Path(cfg.output_dir)
    model, task = hub.load(cfg.model), CTCTask.from_pretrained(hub.folder(cfg.model))
    method = config.build(METHODS["train"], cfg.options, f"{path}: options")
    mesh = M.make(cfg.mesh)
    batches = training_batches(cfg.data.train, task, cfg, mesh)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.dump(cfg))
    trained = loop.run(method, model, None, cfg, batches, folder, mesh=mesh, name=folder.name,
                       validate=validation(cfg.data.validation, task))
    hub.save(trained, folder / "final", source=cfg.model)
    log.info("Saved %s.", folder / "final")
    return trained


def validation(data: str | None, task: CTCTask):
    """Slim -> scores on validation data; None without data."""
    if not data:
        return None
    rows = load_rows(data)
    return lambda model: evaluate(model, rows, task=task, progress=False)
