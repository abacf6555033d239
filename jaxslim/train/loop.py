"""run(): data -> step -> log -> checkpoint -> validate, until max_steps; resumes where it stood when run again."""
from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from jaxslim import config
from jaxslim.slim import Method, Slim
from jaxslim.train import mesh as M
from jaxslim.train import step as S
from jaxslim.train.checkpoint import CheckpointError, Checkpoints
from jaxslim.train.log import Logger

log = logging.getLogger(__name__)
# keys that may change between a run and its resumption
FREE = ("logging_steps", "save_steps", "save_total_limit", "eval_steps", "mesh", "max_nonfinite_steps")


class NumericalStop(RuntimeError):
    """Too many steps in a row without a finite loss (exit code 5)."""


class Preempted(RuntimeError):
    """The run was asked to stop and has saved its state (exit code 75)."""


def batch_size(cfg: config.Train, mesh) -> int:
    """Rows of a global batch."""
    return cfg.per_device_train_batch_size * M.shards(mesh) * cfg.gradient_accumulation_steps


def run(method: Method, student: Slim, teacher: Slim | None, cfg: config.Train, batches, folder: str, *, mesh=None,
        validate: Callable[[Slim], dict[str, float]] | None = None, name: str = "train") -> Slim:
    """Trains `student` and returns it with its trained parameters on the host.

    Args:
      batches: `data.batch.Batches` in global batches of `batch_size(cfg, mesh)` rows.
      folder: gets metrics.jsonl, TensorBoard events and checkpoints/; a rerun resumes from there.
      validate: called every `eval_steps`; returns metrics with "wer"; the parameters of the best are returned.
    Raises:
      NumericalStop, Preempted: state saved; see their docs. CheckpointError: the folder holds another run.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = mesh or M.make(cfg.mesh)
    state, frozen, tx = S.init(method, student, cfg, mesh)
    step = S.make(method, student.spec, tx, cfg, state, mesh)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.save_total_limit)
    meta = {"config": {k: v for k, v in config.to_dict(cfg).items() if k not in FREE}, "spec": student.spec.json,
            "method": {"name": type(method).__name__, **config.to_dict(method)}, "best": None}
    found = checkpoints.restore(state, lambda old: _same(meta, old, folder))
    if found:
        state, old = found
        meta["best"] = old["best"]
        batches.set_state(old["data"])
        log.info("%s: resumed at step %d of %d.", name, int(state.step), cfg.max_steps)
    at, started, audio, best = int(state.step), time.monotonic(), 0.0, folder / "best.npz"
    logger = Logger(folder, total_steps=cfg.max_steps, step=at, name=name)
    rates = {g: S.schedule(c, cfg.max_steps) for g, c in cfg.groups.items()}
    placed: dict[int, tuple[Slim, Slim]] = {}

    def guide(step: int) -> Slim | None:  # the teacher of a step, put on the mesh once
        now = method.teacher_at(teacher, step) if teacher is not None else None
        if now is not None and id(now) not in placed:
            placed.clear()
            placed[id(now)] = now, Slim(now.spec, M.place(now.params, mesh), (("dtype", cfg.dtype),))
        return None if now is None else placed[id(now)][1]

    def current() -> Slim:
        return Slim(student.spec, {**frozen, **state.params})

    def save() -> None:
        checkpoints.save(at, state, {**meta, "data": batches.get_state()})

    stream, since = iter(batches), time.monotonic()
    with _stop_signals() as stop, logger:
        while at < cfg.max_steps:
            rows = next(stream)
            spoken = "attention_mask" in rows and "input_ids" not in rows  # a text's mask counts tokens
            audio += float(rows["attention_mask"].sum()) / 16000 if spoken else 0.0
            batch = M.batch({k: v for k, v in rows.items() if k != "row"}, mesh)
            state, metrics = step(state, frozen, guide(at), batch)
            at += 1
            if at % cfg.logging_steps == 0 or at == cfg.max_steps:
                row = {k: float(v) for k, v in jax.device_get(metrics).items()}
                logger.write({"step": at, **row, **{f"lr/{g}": float(f(at - 1)) for g, f in rates.items()},
                              "skipped": int(state.skipped), "audio_seconds": audio,
                              "seconds": time.monotonic() - started})
                if int(state.skipped_in_a_row) >= cfg.max_nonfinite_steps:
                    (folder / "nonfinite.json").write_text(json.dumps({"step": at, "rows": _ids(batches, rows)}))
                    save()
                    checkpoints.close()
                    raise NumericalStop(f"{name}: {int(state.skipped_in_a_row)} steps in a row had no finite loss or "
                                        f"gradient; the rows of the last are in {folder / 'nonfinite.json'}. Lower the "
                                        "learning rate or look at those rows.")
            if validate and cfg.eval_steps and (at % cfg.eval_steps == 0 or at == cfg.max_steps):
                scores = validate(current())
                logger.write({"step": at, **{f"validation/{k}": v for k, v in scores.items()
                                             if isinstance(v, int | float)}})
                if meta["best"] is None or scores["wer"] < meta["best"]["wer"]:
                    meta["best"] = {"step": at, "wer": scores["wer"]}
                    _save_best(best, state.params)
            if stop or cfg.save_steps and at % cfg.save_steps == 0 or at == cfg.max_steps:
                save()
            if stop:  # in the last step too: what comes after it would not know
                checkpoints.close()
                raise Preempted(f"{name}: stopped at step {at} of {cfg.max_steps} and saved; run it again to go on.")
    checkpoints.close()
    if hasattr(batches, "close"):
        batches.close()
    log.info("%s: %d steps in %.0f s.", name, cfg.max_steps, time.monotonic() - since)
    params = {**frozen, **state.params}
    if meta["best"] is not None and best.exists() and meta["best"]["step"] != at:
        log.info("%s: best validation WER %.4f at step %d; its parameters are kept.", name, meta["best"]["wer"],
                 meta["best"]["step"])
        params |= _load_best(best)
    return Slim(student.spec, {k: np.asarray(_host(v)) for k, v in params.items()})


def _host(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return x


def _save_best(path: epath.Path, params) -> None:
    arrays = {k: np.asarray(_host(v)) for k, v in params.items()}
    if jax.process_index() == 0:
        temporary = path.parent / "best.tmp"
        with temporary.open("wb") as f:
            np.savez(f, **arrays)
        temporary.replace(path)


def _load_best(path: epath.Path) -> dict[str, np.ndarray]:
    with path.open("rb") as f, np.load(f) as arrays:
        return dict(arrays)


def _same(mine: dict, old: dict, folder) -> None:
    for part, what in (("spec", "another model"), ("method", "another method"), ("config", "another config")):
        then, now = (json.loads(json.dumps(x[part])) for x in (old, mine))
        if part == "spec":
            then, now = json.loads(then), json.loads(now)
        if changed := config.differences(then, now):
            more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise CheckpointError(f"{folder} holds checkpoints of {what} ({'; '.join(changed[:4])}{more}). Use the "
                                  "same, or another folder.")


def _ids(batches, rows) -> list[str]:
    ids = batches.rows.column("id")
    return [ids[i] for i in rows["row"] if i >= 0]


@contextlib.contextmanager
def _stop_signals():
    """A list that becomes non-empty on SIGTERM or Ctrl-C; a second Ctrl-C stops at once."""
    stop: list[int] = []
    old = {}

    def handler(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            old[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
