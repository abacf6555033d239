"""Orbax v1 checkpoints of a training state: asynchronous, latest few kept, restored onto any mesh."""
from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run, or cannot be read."""


class Checkpoints:
    """The folder `checkpoints/` of a run. `meta` (spec, config, data position) travels as JSON beside the arrays."""

    def __init__(self, folder: str, keep: int = 2):
        folder = os.fspath(folder)
        self.folder = epath.Path(folder if "://" in folder else os.path.abspath(folder))  # Orbax takes no relative path
        policies = ocp.training
        self._open = lambda: policies.Checkpointer(
            self.folder, preservation_policy=policies.preservation_policies.LatestN(keep),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1), cleanup_tmp_directories=True)
        self._manager = self._open()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts an asynchronous save; an earlier one still running is waited for. Raises CheckpointError when that
        one failed (a full disk); those before it are kept."""
        with self._failures():
            if step not in self.steps():
                self._manager.save_async(step, _tree(state), custom_metadata=meta)

    def steps(self) -> list[int]:
        return sorted(c.step for c in self._manager.checkpoints)

    def restore(self, state: Any, fits) -> tuple[Any, dict] | None:
        """(state, meta) of the newest readable checkpoint, laid out like `state`; None when there is none.

        `fits(meta)` raises CheckpointError for a checkpoint of another run. A corrupt one is named and skipped.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(state))
        damaged = []
        for step in reversed(self.steps()):
            try:
                meta = self._manager.metadata(step).custom_metadata
                fits(meta)
                loaded = self._manager.load(step, abstract)
            except CheckpointError:
                raise
            except Exception as error:  # orbax raises many kinds for damaged files
                log.warning("Checkpoint %s/%d cannot be read (%s); trying the one before.", self.folder, step,
                            str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
                damaged.append(step)
                continue
            for old in damaged:  # they would stand where this run is going to save
                self._manager.delete(old)
            return jax.tree.unflatten(jax.tree.structure(state), loaded["leaves"]), meta
        return None

    def close(self) -> None:
        """Waits for the last save; errors as `save`."""
        with self._failures():
            self._manager.close()

    @contextlib.contextmanager
    def _failures(self):
        try:
            yield
        except Exception as error:  # orbax, tensorstore and the file system each have their own
            why = next((e for e in _causes(error) if isinstance(e, OSError)), error)
            kept = max((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), default=None)
            rest = "there is none before it" if kept is None else f"the newest complete one is of step {kept}"
            why = " ".join(str(why).split())[:200]
            raise CheckpointError(f"A checkpoint could not be written to {self.folder} ({why}); {rest}. Make room and "
                                  "run it again.") from error


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _tree(state: Any) -> dict:
    return {"leaves": jax.tree.leaves(state)}
