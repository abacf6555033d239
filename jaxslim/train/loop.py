"""run(): data -> step -> log -> checkpoint -> validate, until max_steps; resumes where it stood when run again."""
from __future__ import annotations

import contextlib
import json
import logging
import os
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
from jaxslim.train.log import Logger, process_log

log = logging.getLogger(__name__)
# keys that may change between a run and its resumption
FREE = ("logging_steps", "save_steps", "save_total_limit", "snapshot_steps", "eval_steps", "mesh",
        "max_nonfinite_steps", "layers", "profile_steps", "teacher_cache")
# and these, because the data's own state says whether the global batches are the same
SPLIT = ("per_device_train_batch_size", "per_device_batch_seconds", "gradient_accumulation_steps")
CLIPS = 3  # of the validation data that TensorBoard plays beside their hypotheses


class NumericalStop(RuntimeError):
    """Too many steps in a row without a finite loss (exit code 5)."""


class OutOfMemory(ValueError):
    """A step that does not fit on its devices."""


class Preempted(RuntimeError):
    """The run was asked to stop and has saved its state (exit code 75)."""


def batch_size(cfg: config.Train, mesh) -> int:
    """Rows of a global batch."""
    return cfg.per_device_train_batch_size * M.shards(mesh) * cfg.gradient_accumulation_steps


def run(method: Method, student: Slim, teacher: Slim | None, cfg: config.Train, batches, folder: str, *, mesh=None,
        validate: Callable[[Slim], dict[str, float]] | None = None, name: str = "train",
        snapshot: Callable[[Slim, int], None] | None = None) -> Slim:
    """Trains `student` and returns it with its trained parameters on the host.

    Args:
      batches: `data.batch.Batches` in global batches of `batch_size(cfg, mesh)` rows.
      folder: gets metrics.jsonl, TensorBoard events and checkpoints/; a rerun resumes from there.
      snapshot: called with the model and the step every `snapshot_steps`.
      validate: called every `eval_steps`; by its wer, bits_per_character or accuracy the best parameters are returned.
    Raises:
      NumericalStop, Preempted: state saved; see their docs. CheckpointError: the folder holds another run, or the disk
        is full. OutOfMemory: names the batch and what to change.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with process_log(folder):
        return _run(method, student, teacher, cfg, batches, folder, mesh or M.make(cfg.mesh), validate, name,
                    snapshot)


def _run(method, student, teacher, cfg, batches, folder, mesh, validate, name, snapshot) -> Slim:
    state, frozen, tx = S.init(method, student, cfg, mesh)
    step = S.make(method, student.spec, tx, cfg, state, mesh)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.save_total_limit)
    fixed = {k: v for k, v in config.to_dict(cfg).items() if k not in FREE + SPLIT}
    meta = {"config": fixed, "spec": student.spec.json,
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
            placed[id(now)] = now, now.replace(params=M.place(_stored(now.params, cfg.teacher_dtype), mesh))
        return None if now is None else placed[id(now)][1]

    def current() -> Slim:
        return student.replace(params={**frozen, **(state.average or state.params)})

    def save() -> None:
        checkpoints.save(at, state, {**meta, "data": batches.get_state()})

    stream, since, first = iter(batches), time.monotonic(), at
    with _stop_signals() as stop, logger:
        while at < cfg.max_steps:
            if cfg.profile_steps and at == first + 2:  # the first steps compile
                jax.profiler.start_trace(os.fspath(folder / "profile"))
            rows = next(stream)
            audio += float(rows["samples"].sum()) / batches.task.sampling_rate if "samples" in rows else 0.0
            batch = M.batch({k: v for k, v in rows.items() if k not in ("row", "samples")}, mesh,
                            cfg.gradient_accumulation_steps)
            with _memory(name, batch, mesh, cfg):
                state, metrics = step(state, frozen, guide(at), batch)
                at += 1
                due = at % cfg.logging_steps == 0 or at == cfg.max_steps
                row = {k: float(v) for k, v in jax.device_get(metrics).items()} if due else {}
            if cfg.profile_steps and at == min(first + 2 + cfg.profile_steps, cfg.max_steps):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                log.info("%s: profile of %d steps in %s.", name, cfg.profile_steps, folder / "profile")
            if due:
                logger.write({"step": at, **row, **{f"lr/{g}": float(f(at - 1)) for g, f in rates.items()},
                              "skipped": int(state.skipped), "audio_seconds": _over_hosts(audio),
                              "seconds": time.monotonic() - started})
                if int(state.skipped_in_a_row) >= cfg.max_nonfinite_steps:
                    ids = json.dumps({"step": at, "rows": _ids(batches, rows)})
                    (folder / ("nonfinite.json" if jax.process_count() == 1 else
                               f"nonfinite-{jax.process_index()}.json")).write_text(ids)  # of this host's rows
                    save()
                    checkpoints.close()
                    raise NumericalStop(f"{name}: {int(state.skipped_in_a_row)} steps in a row had no finite loss or "
                                        f"gradient; the rows of the last are in {folder / 'nonfinite.json'}. Lower the "
                                        "learning rate or look at those rows.")
            if validate and cfg.eval_steps and (at % cfg.eval_steps == 0 or at == cfg.max_steps):
                scores = validate(current())
                logger.write({"step": at, **{f"validation/{k}": v for k, v in scores.items()
                                             if isinstance(v, int | float)}})
                error = next((scores[k] for k in ("wer", "bits_per_character") if k in scores), None)
                error = 1 - scores["accuracy"] if error is None else error
                if method.keeps_best() and (meta["best"] is None or error < meta["best"]["wer"]):
                    meta["best"] = {"step": at, "wer": error}
                    _save_best(best, state.average or state.params)
                _play(logger, at, scores, getattr(validate, "rows", None))
            if snapshot and cfg.snapshot_steps and at % cfg.snapshot_steps == 0:
                snapshot(student.replace(params={k: np.asarray(_host(v)) for k, v in current().params.items()}), at)
            stopping = _agreed(stop, at)
            if stopping or cfg.save_steps and at % cfg.save_steps == 0 or at == cfg.max_steps:
                save()
            if stopping:  # in the last step too: what comes after it would not know
                checkpoints.close()
                raise Preempted(f"{name}: stopped at step {at} of {cfg.max_steps} and saved; run it again to go on.")
    checkpoints.close()
    if hasattr(batches, "close"):
        batches.close()
    log.info("%s: %d steps in %.0f s.", name, cfg.max_steps, time.monotonic() - since)
    params = dict(current().params)
    if meta["best"] is not None and best.exists() and meta["best"]["step"] != at:
        log.info("%s: best validation error %.4f at step %d; its parameters are kept.", name, meta["best"]["wer"],
                 meta["best"]["step"])
        params |= _load_best(best)
    return student.replace(params={k: np.asarray(_host(v)) for k, v in params.items()})


def _stored(params, dtype: str):
    """Parameters in `dtype`, which only makes them smaller."""
    return {k: v.astype(dtype) if v.dtype == np.float32 and dtype != "float32" else v for k, v in params.items()}


def _over_hosts(value: float) -> float:
    """The sum of a number over all processes; every process must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return float(multihost_utils.process_allgather(np.float64(value)).sum())


def _agreed(stop: list[int], step: int) -> bool:
    """Whether to stop behind `step`: the same answer in every process, whichever of them was asked to."""
    if jax.process_count() == 1:
        return bool(stop)
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def _memory(name: str, batch, mesh, cfg: config.Train):
    """Turns an allocator's message into one that names the batch."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory")):  # accelerators, the CPU
            raise
        values = next(iter(batch.values()))
        rows = values.shape[0] // (M.shards(mesh) * cfg.gradient_accumulation_steps)
        length = f"{values.shape[1] / 16000:.2f} s" if "input_values" in batch else f"{values.shape[1]} frames"
        raise OutOfMemory(
            f"{name}: the batch of {rows} rows x {length} per device does not fit in memory. Lower "
            "per_device_train_batch_size (raise gradient_accumulation_steps instead), lower max_seconds, or set remat: "
            f"full. The allocator says: {' '.join(str(error).split())[:200]}") from error


def _play(logger: Logger, step: int, scores, rows) -> None:
    """A few validation clips with what the model hears in them, for TensorBoard."""
    texts = {u["id"]: u for u in getattr(scores, "utterances", [])}
    if rows is None or not texts or not logger.active or "audio" not in rows.columns:
        return
    ids = rows.column("id")
    for i in [i for i in range(len(ids)) if ids[i] in texts][:CLIPS]:
        said = texts[ids[i]]
        logger.audio(step, f"validation/{ids[i]}", rows.audio(i), text=f"heard: {said['pred_text']}\n\n"
                     f"said: {said['text']}")


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
        if part == "config":  # a key that an older version did not know had its default
            then = {k: v for k, v in config.to_dict(config.Train()).items() if k in now} | then
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
    """A list that becomes non-empty on SIGTERM or Ctrl-C; a second Ctrl-C stops at once. With several processes
    JAX listens to SIGTERM itself and lets them agree on a step."""
    stop: list[int] = []
    old = {}
    if jax.process_count() > 1:
        yield stop
        return

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
