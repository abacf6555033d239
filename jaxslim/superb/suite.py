"""`jaxslim eval MODEL --suite micro-superb`: upstreams x tasks, each result kept, so that a stopped run goes on.

    OUTPUT/<fingerprint>/features-<data>/    hidden states of all clips, fp16 (data/store.py)
    OUTPUT/<fingerprint>/<options>/TASK.json    metric, options, seconds; TASK.npz: each test item
    OUTPUT/results-<fingerprint>.json    the table of one model beside its baselines
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxslim import config, cost, hub
from jaxslim.data.extractor import Extractor
from jaxslim.methods import generate
from jaxslim.slim import Slim
from jaxslim.spec import nearest
from jaxslim.superb import clips as C
from jaxslim.superb import fidelity, keywords, query, recognition, upstreams, voices
from jaxslim.superb.features import Features, extract
from jaxslim.superb.retention import retention
from jaxslim.superb.tasks import Arrays, Options, Task

log = logging.getLogger(__name__)
TASKS: tuple[Task, ...] = (recognition.CHAR, recognition.ASR, keywords.TASK, query.TASK, voices.LANGUAGE,
                           voices.SPEAKER, voices.VERIFICATION)
NAMES = tuple(t.name for t in TASKS)
TEACHER = "bundled:wav2vec2-ctc-en"
ROLES = ("log-mel", "random", "teacher", "model")


def options(pairs: Sequence[str]) -> Options:
    """Options of KEY=VALUE strings. Raises ConfigError naming an unknown key."""
    tree = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep:
            raise config.ConfigError(f"--suite-options {pair!r}: write KEY=VALUE.")
        tree[key.replace("-", "_")] = config.parse_yaml(value, pair)
    return config.build(Options, tree, "--suite-options")


def evaluate(model: Slim | str, *, teacher: Slim | str = TEACHER, output: str | os.PathLike = "runs/micro-superb",
             tasks: Sequence[str] = (), options: Options | None = None, generated_layers: int = 0) -> dict[str, Any]:
    """Runs the suite on a model and on the baselines that are not in `output` yet.

    Args:
      model, teacher: as hub.load reads, or a Slim of waveforms.
      tasks: names out of NAMES; () = all.
      generated_layers: a generative student stops after so many; 0 = all.
    Returns:
      {"fingerprint", "params", "gmacs", "tasks": {task: {metric, better, ROLE: value}}, "retention": as `retention`,
      "fidelity": as `fidelity.fidelity` for the model, "rollout": of generative students, "seconds": {role: s}}.
    Raises:
      ConfigError: an unknown task. DataError: speech of the suite is missing.
    """
    if unknown := sorted(set(tasks) - set(NAMES)):
        raise config.ConfigError(f"micro-superb has no task {unknown[0]!r}.{nearest(unknown[0], NAMES)} Known are "
                                 f"{', '.join(NAMES)}.")
    options = options or Options()
    chosen = [t for t in TASKS if not tasks or t.name in tasks]
    clips, data = C.load(options.prompts, options.max_seconds, options.limit)
    (model, extractor), (guide, heard) = _load(model), _load(teacher)
    if generated_layers:
        model = generate.stop_at(model, generated_layers)
    same = model.fingerprint == guide.fingerprint
    makers = {"log-mel": lambda: upstreams.LogMel(), "teacher": lambda: upstreams.Model(guide, heard),
              "random": lambda: upstreams.Model(upstreams.random(model), extractor),
              "model": lambda: upstreams.Model(model, extractor)}
    folder, found, seconds = epath.Path(output), {}, {}
    runs: dict[str, _Upstream] = {}
    for role in ROLES:
        if role == "model" and same:
            runs["model"], found["model"], seconds["model"] = runs["teacher"], found["teacher"], seconds["teacher"]
            continue
        started = time.monotonic()
        runs[role] = _Upstream(role, makers[role](), folder, clips, data, options)
        found[role] = {t.name: runs[role].task(t) for t in chosen}
        runs[role].release()
        seconds[role] = round(time.monotonic() - started, 1)
    table = {t.name: {"metric": t.metric, "better": t.better, "chance": t.chance,
                      **{role: runs[role].values[t.name] for role in ROLES}} for t in chosen}
    result = {"suite": "micro-superb", "fingerprint": model.fingerprint, "teacher": guide.fingerprint, "data": data,
              "options": config.to_dict(options), "params": cost.params(model.spec),
              "gmacs": cost.macs(model.spec).total / 1e9, "tasks": table, "seconds": seconds,
              "info": runs["model"].infos, "retention": retention(chosen, found)}
    result["fidelity"] = _kept(folder, f"fidelity-{model.fingerprint[:12]}-{guide.fingerprint[:12]}.json", data,
                               lambda: _fidelity(model, guide, extractor, runs, clips))
    _write(folder / f"results-{model.fingerprint[:12]}.json", result)
    return result


@dataclasses.dataclass
class _Upstream:
    """One upstream in its folder."""

    role: str
    upstream: Any
    root: epath.Path
    clips: list[C.Clip]
    data: str
    options: Options

    def __post_init__(self):
        self.plain = json.loads(json.dumps(config.to_dict(self.options)))
        made = hashlib.sha256(json.dumps([self.plain, self.data], sort_keys=True).encode()).hexdigest()
        self.root = self.root / self.upstream.fingerprint[:12]
        self.folder = self.root / made[:8]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, float] = {}
        self.infos: dict[str, Any] = {}
        self._features: Features | None = None

    @property
    def features(self) -> Features:
        if self._features is None:
            started = time.monotonic()
            store = extract(self.upstream, self.clips, self.data, self.root / f"features-{self.data[:8]}")
            self._features = Features(store, self.clips)
            log.info("%s: hidden states of %.1f min of speech, %.0f s.", self.role,
                     sum(c.seconds for c in self.clips) / 60, time.monotonic() - started)
        return self._features

    def release(self) -> None:
        if self._features is not None:
            self._features.release()

    def task(self, task: Task) -> Arrays:
        """The arrays of a task, from its files if they are there."""
        path = self.folder / f"{task.name}.json"   # written last
        if path.exists():
            with (self.folder / f"{task.name}.npz").open("rb") as file, np.load(file) as arrays:
                return self._done(task, dict(arrays), json.loads(path.read_text())["info"])
        features, started = self.features, time.monotonic()
        arrays, info = task.run(features, self.options)
        took = round(time.monotonic() - started, 1)
        temporary = self.folder / f".{task.name}.npz"
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(self.folder / f"{task.name}.npz")
        value = task.value(arrays, np.arange(task.items(arrays)))
        _write(path, {"task": task.name, task.metric: value, "options": self.plain, "data": self.data,
                      "seconds": took, "upstream": self.upstream.fingerprint, "info": info})
        log.info("%s: %s %s %.4f, %.0f s.", self.role, task.name, task.metric, value, took)
        return self._done(task, arrays, info)

    def _done(self, task: Task, arrays: Arrays, info: Any) -> Arrays:
        self.values[task.name] = task.value(arrays, np.arange(task.items(arrays)))
        self.infos[task.name] = info
        return arrays


def _load(model: Slim | str) -> tuple[Slim, Extractor]:
    if isinstance(model, Slim):
        return model, Extractor()
    loaded = hub.load(model)
    return loaded, Extractor.from_pretrained(hub.folder(model), loaded.spec.family)


def _fidelity(model, guide, extractor, runs, clips) -> dict[str, Any]:
    found = {role: fidelity.fidelity(model, runs[role].features, runs["teacher"].features)
             for role in ("model", "random")}
    rows = fidelity.rollout(model, guide, extractor, clips) if model.spec.generator else None
    return {"model": found["model"], "random": found["random"], "rollout": rows}


def _kept(folder: epath.Path, name: str, data: str, make) -> dict[str, Any]:
    path = folder / name
    if path.exists() and (kept := json.loads(path.read_text()))["data"] == data:
        return kept
    value = make() | {"data": data}
    _write(path, value)
    return value


def _write(path: epath.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def render(result: dict[str, Any]):
    """The result as a rich table with the retention below it."""
    from rich.table import Table

    kept = result["retention"]
    table = Table(title=f"micro-superb: {result['params'] / 1e6:.2f} M parameters, {result['gmacs']:.2f} GMACs at 10 s",
                  caption=_caption(result), caption_justify="left")
    for name, style in (("task", "left"), ("metric", "left"), *((r, "right") for r in ROLES), ("retention", "right")):
        table.add_column(name, justify=style)
    for name, row in result["tasks"].items():
        share = kept["tasks"][name]
        table.add_row(name, f"{row['metric']} ({'+' if row['better'] == 'higher' else '-'})",
                      *(f"{100 * row[role]:.1f}" for role in ROLES),
                      f"{100 * share['retention']:.0f} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"
                      if share["resolved"] else "not resolved")
    return table


def _caption(result: dict[str, Any]) -> str:
    kept, near = result["retention"], result["fidelity"]["model"]["mean"]
    mean = "Retention: the teacher is not resolved to be better than log-mel on any task."
    if kept["mean"] is not None:
        mean = (f"Mean retention {100 * kept['mean']:.0f} % (95 % interval {100 * kept['low']:.0f} to "
                f"{100 * kept['high']:.0f}) over {', '.join(kept['of'])}.")
    lines = [mean, "Fidelity to the teacher's states: " + ", ".join(
        f"{k} {near[k]:.3f}" for k in ("cka", "cosine", "l1") if k in near)]
    for row in result["fidelity"].get("rollout") or []:
        lines.append(f"  layer {row['layer']}: L1 {row['l1']:.3f}, with the teacher's history {row['forced_l1']:.3f}, "
                     f"cosine {row['cosine']:.3f}, CKA {row['cka']:.3f}")
    return "\n".join([*lines, "Tasks and retention in %; + higher is better, - lower. Not SUPERB: see docs/superb.md."])
