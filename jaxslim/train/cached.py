"""Distillation from features of the teacher that are computed once, in fp16, for many students.

    CACHE/<tap>/meta.json, shard-*.safetensors    one store (data/store.py) for each hidden state

A stage with `train.teacher_cache: CACHE` fills in what is missing there, then trains without the teacher: its batches
bring what `Method.targets` would have given, under CACHED + tap. Hosts share the work, and must share the folder. The
features are those of each clip as it is, so no augmentation fits them. Models with group norm see other zeros behind a
clip in the cache than in a batch, and differ by that, too.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxslim import config
from jaxslim.data.rows import DataError
from jaxslim.data.store import Store, plan
from jaxslim.slim import Method, Slim

log = logging.getLogger(__name__)
CACHED = "cached/"   # prefix of what a batch brings of the teacher


class CachedBatches:
    """data.Batches, each with the teacher's features of its clips, zero beyond each clip; all else is theirs."""

    def __init__(self, batches, stores: dict[str, Store], frames):
        self.batches, self.stores, self.frames = batches, stores, frames

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        iter(self.batches)
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self.batches)
        return batch | self.features(batch)

    def __call__(self, epochs: int | None = 1) -> CachedBatches:
        return CachedBatches(self.batches(epochs), self.stores, self.frames)

    def features(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """CACHED + tap -> fp16 (fp32 where a clip's is) (B, T, D) of a batch."""
        out = {}
        for name, shape in self.frames({k: v for k, v in batch.items() if k not in ("row", "samples")}).items():
            found = [self.stores[name].get(int(i))["x"][: shape[1]] if i >= 0 else None for i in batch["row"]]
            wide = any(x is not None and x.dtype == np.float32 for x in found)
            out[CACHED + name] = np.zeros(shape, np.float32 if wide else np.float16)
            for b, x in enumerate(found):
                if x is not None:
                    out[CACHED + name][b, : len(x)] = x
        return out


def check(method: Method, cfg: config.Train) -> None:
    """Raises ConfigError for a stage that cannot train from a cache."""
    if cfg.teacher_cache and not method.cacheable():
        raise config.ConfigError(f"train.teacher_cache: {type(method).__name__} with these options does not train on "
                                 "hidden states of each clip alone; leave it out.")
    if cfg.teacher_cache and (cfg.speed_perturb or cfg.augment or cfg.join_seconds):
        raise config.ConfigError("train.teacher_cache holds features of clips as they are; leave out speed_perturb, "
                                 "augment and join_seconds.")


def attach(folder: str | os.PathLike, method: Method, teacher: Slim, batches, cfg: config.Train) -> CachedBatches:
    """`batches` with the features of `teacher` that `method` wants, from `folder`; what is missing is computed first.

    Raises:
      ConfigError: a method whose targets are no features of a clip, or augmentation.
      StoreError: the folder holds features of another teacher, or of other data.
    """
    check(method, cfg)
    host, hosts = jax.process_index(), jax.process_count()
    shapes: dict[tuple, dict[str, tuple[int, ...]]] = {}

    def frames(batch) -> dict[str, tuple[int, ...]]:
        key = tuple((k, v.shape) for k, v in sorted(batch.items()))
        if key not in shapes:
            found = jax.eval_shape(lambda t, b: method.targets(t, b, None, jnp.int32(0)), teacher, batch)
            shapes[key] = {k: v.shape for k, v in found.items()}
        return shapes[key]

    names = list(frames({k: v for k, v in batches.fillers().items() if k not in ("row", "samples")}))
    rows, task, seconds = batches.rows, batches.task, {}
    for i in range(len(rows)):   # unreadable ones are the batches' to name
        try:
            if cfg.min_seconds - 1e-6 <= (length := rows.duration(i)) <= cfg.max_seconds + 1e-6:
                seconds[i] = length
        except DataError:
            continue
    shards = plan(seconds)
    meta = {"teacher": teacher.fingerprint, "data": rows.fingerprint, "seconds": [cfg.min_seconds, cfg.max_seconds]}
    stores = {n: Store(epath.Path(folder) / n, meta | {"tap": n}, [s[0] for s in shards]) for n in names}
    placed = teacher.replace(params=jax.device_put(teacher.params, jax.local_devices()[0]))
    run = jax.jit(lambda model, batch: method.targets(model, batch, None, jnp.int32(0)))
    todo = sorted(set().union(*(s.missing(host, hosts) for s in stores.values())))
    for done, n in enumerate(todo):
        members, size, end = shards[n]
        samples = round(end * task.sampling_rate)
        waves = [_wave(rows, i, samples, task) for i in members]
        found = jax.device_get(run(placed, task.extractor([*waves, *[None] * (size - len(waves))], samples)))
        for name, store in stores.items():
            if not store.path(n).exists():
                store.write(n, [{} if w is None else {"x": _trim(x)} for w, x in zip(waves, found[name])])
        if done % 20 == 0:
            log.info("Features of the teacher: %d of %d files.", done + 1, len(todo))
    if hosts > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("jaxslim.teacher_cache")
    return CachedBatches(batches, stores, frames)


def targets(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a batch brings of the teacher, by tap."""
    return {k.removeprefix(CACHED): v for k, v in batch.items() if k.startswith(CACHED)}


def _wave(rows, i: int, samples: int, task) -> np.ndarray | None:
    try:
        wave = rows.audio(i, task.sampling_rate)[:samples]
    except DataError:
        return None
    return wave if len(wave) >= task.extractor.shortest * task.sampling_rate else None


def _trim(x: np.ndarray) -> np.ndarray:
    """(T, D) up to its last frame that is not zero: padding is."""
    used = np.flatnonzero(np.any(x != 0, -1))
    return x[: used[-1] + 1 if used.size else 0]
