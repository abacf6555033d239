"""Recipes: stages run one after another, each saved and resumable, measured beside the teacher and a control.

    DIR/<nn-name>/     a finished stage: HF folder, stage.json, metrics.jsonl, TensorBoard events
    DIR/<nn-name>.partial/   one in work: its checkpoints; gone when it is finished
    DIR/control-<name>/      the control: the teacher trained on, same data, steps and rates, no surgery (DESIGN 6)
    DIR/final/  DIR/summary.json  DIR/predictions-ROLE.jsonl  DIR/speed.json  DIR/report.html
"""
from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from jaxslim import config, cost, hub, perplexity, scratch, versus
from jaxslim.config import ConfigError, Recipe, Stage, Train
from jaxslim.data import (
    Batches,
    CausalTask,
    Seq2SeqTask,
    TextBatches,
    TextTask,
    TokenBatches,
    augment,
    load_rows,
    streaming,
    task_of,
)
from jaxslim.data.joined import joined
from jaxslim.data.streaming import StreamBatches
from jaxslim.evaluate import evaluate, frame_agreement
from jaxslim.methods import METHODS
from jaxslim.slim import Method, Slim
from jaxslim.spec import nearest
from jaxslim.train import cached, loop
from jaxslim.train import mesh as M
from jaxslim.train.step import for_control, groups

log = logging.getLogger(__name__)


def run(path: str, output: str, overrides: Sequence[str] = (), *, overwrite: bool = False) -> dict[str, Any]:
    """Runs a recipe's stages into `output` and returns its summary. Run again, it goes on where it stood.

    Raises:
      ConfigError: the recipe, or a finished stage in `output` that was made with another config or parent; nothing is
        removed unless `overwrite`.
    """
    recipe, folder = config.load(Recipe, path, overrides), epath.Path(output)
    methods = [method_of(s) for s in recipe.stages]          # all that can be checked is checked before any work
    for stage, method in zip(recipe.stages, methods, strict=True):
        cached.check(method, stage.train or Train())
    _claim(folder, "recipe.yaml")
    if not recipe.data.train:
        raise ConfigError(f"{path}: data.train must be set.")
    for data in filter(None, (recipe.data.train, recipe.data.validation, recipe.data.test,
                              *(s.data for s in recipe.stages))):
        load_rows(data)
    for stage in recipe.stages:
        M.make(stage.train.mesh if stage.train else "data=-1")
    teacher = hub.load(recipe.teacher)
    task = task_of(teacher.spec, hub.folder(recipe.teacher), recipe.data.language)
    if not (folder / "recipe.yaml").exists():
        (folder / "recipe.yaml").write_text(config.dump(recipe))
    work = _Work(recipe, folder, teacher, task, overwrite)
    model, stages = teacher, []
    for i, (stage, method) in enumerate(zip(recipe.stages, methods, strict=True), 1):
        model, info = work.stage(f"{i:02d}-{stage.name}", stage, method, model)
        stages.append(info)
    hub.save(model, folder / "final", source=recipe.teacher)
    control, info = teacher, None
    for stage, method in zip(recipe.stages, methods, strict=True):
        if recipe.control and stage.train and (same := method.control()) is not None:
            control, info = work.stage(f"control-{stage.name}", stage, same, control, True)
    (folder / "recipe.yaml").write_text(config.dump(recipe))  # not before: what was there before may be refused
    return work.summary(path, model, stages, control if info else None, info)


@dataclasses.dataclass(frozen=True)
class _Work:
    """A recipe in its run folder."""

    recipe: Recipe
    folder: epath.Path
    teacher: Slim
    task: Any                                  # data.task_of
    overwrite: bool

    def stage(self, name: str, stage: Stage, method: Method, parent: Slim, control: bool = False) -> tuple[Slim, dict]:
        """A finished stage from its folder, or run now. Returns its model and what stage.json says."""
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        wanted = json.loads(json.dumps({
            "method": type(method).__name__.lower(), "options": config.to_dict(method),
            "train": stage.train and config.to_dict(stage.train), "data": stage.data or self.recipe.data.train,
            "seed": self.recipe.seed, "teacher": self.teacher.fingerprint, "parent": parent.fingerprint,
            "validation": self.recipe.data.validation if stage.train and stage.train.eval_steps else None}))
        if (target / "stage.json").exists():
            info = json.loads((target / "stage.json").read_text())
            if self.same(target, info["config"], wanted):
                log.info("%s: finished before.", name)
                _remove(partial)
                return hub.load(target), info
        kept = partial / "checkpoints"
        saved = kept.exists() and (partial / "stage.json").exists() and any(p.name.isdigit() for p in kept.iterdir())
        if saved and not self.same(partial, json.loads((partial / "stage.json").read_text()), wanted) or not saved:
            _remove(partial)  # nothing in it, or checkpoints of another config or parent
        log.info("%s: %s", name, method)
        started, trained = time.monotonic(), 0
        mesh = M.make(stage.train.mesh if stage.train else "data=-1")
        cfg = stage.train or Train()
        batches = training_batches(stage.data or self.recipe.data.train, self.task, cfg, mesh, method.labelled())
        student = method.start(parent, batches, jax.random.key(self.recipe.seed))
        if stage.train:
            cfg = for_control(method, student.params, cfg) if control else cfg
            trained = sum(student.params[k].size for k in groups(method, student.params, cfg)
                          if not k.startswith("teacher/"))
            partial.mkdir(parents=True, exist_ok=True)
            _write_json(partial / "stage.json", wanted)
            guide = self.teacher
            if cfg.teacher_cache and not control:
                batches, guide = cached.attach(cfg.teacher_cache, method, guide, batches, cfg), None
            student = loop.run(method, student, guide, cfg, batches, partial, mesh=mesh, name=name,
                               validate=validation(self.recipe.data, self.task))
        student = method.finish(student, batches)
        info = {"name": stage.name, "path": name, "config": wanted, "fingerprint": student.fingerprint,
                "params": [cost.params(m.spec) for m in (parent, student)],
                "gmacs": [cost.macs(m.spec).total / 1e9 for m in (parent, student)], "trained_params": trained,
                "scores": self.validate(student), "seconds": round(time.monotonic() - started, 1)}
        if jax.process_index() == 0:
            if target.exists():
                target.rmtree()
            hub.save(student, target, source=self.recipe.teacher)
            for left in ("metrics.jsonl", "tensorboard"):  # copied: killed here, the next run finds them again
                if (partial / left).exists():
                    _copy(partial / left, target / left)
            _write_json(target / "stage.json", info)
            _remove(partial)
        return student, info

    def same(self, folder: epath.Path, then: dict, now: dict) -> bool:
        """Whether `folder` was made with this config. Raises ConfigError if not, unless it may be overwritten."""
        free = loop.FREE  # how a stage was logged and saved does not change what it is
        plain = lambda tree: {**tree, "train": tree.get("train") and {  # noqa: E731
            k: v for k, v in tree["train"].items() if k not in free or k == "eval_steps"}}
        differs = config.differences(plain(then), plain(now))
        if differs and not self.overwrite:
            raise ConfigError(f"{folder} was made with another config ({'; '.join(differs[:4])}). Choose another "
                              "--output, or --overwrite to run it again.")
        return not differs

    def validate(self, model: Slim) -> dict[str, float]:
        check = validation(self.recipe.data, self.task)
        scores = check(model) if check else {}
        return {k: scores[k] for k in ("wer", "cer", "accuracy", "bits_per_character") if k in scores}

    def summary(self, path: str, student: Slim, stages: list[dict], control: Slim | None, info) -> dict[str, Any]:
        """Scores, sizes and speed of teacher, control and student; what an earlier run measured is kept."""
        from jaxslim import card, report, speed
        from jaxslim.info import environment

        try:
            old = json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError):
            old = {}
        models = {"teacher": (self.teacher, self.recipe.teacher, 0),
                  "student": (student, "final", stages[-1]["trained_params"])}
        if control is not None:
            models["control"] = (control, info["path"], info["trained_params"])
        result: dict[str, Any] = {"version": 1, "recipe": os.path.basename(path)}
        for role, (model, place, trained) in models.items():
            before = old.get(role, {})
            data = self.recipe.data
            if (before.get("fingerprint"), before.get("data"), before.get("normalize", data.normalize)) == (
                    model.fingerprint, data.test, data.normalize):
                result[role] = before
                continue
            entry = {"path": os.fspath(place), "fingerprint": model.fingerprint, "data": self.recipe.data.test,
                     "params": cost.params(model.spec), "trained_params": trained,
                     "gmacs": cost.macs(model.spec).total / 1e9}
            if self.recipe.data.test:
                log.info("Evaluating the %s on %s.", role, self.recipe.data.test)
                kind = "bits" if model.spec.head == "causal" else "predictions"
                scores = evaluate(model, self.recipe.data.test, task=self.task, normalize=data.normalize,
                                  predictions=self.folder / f"{kind}-{role}.jsonl")
                entry |= {k: v for k, v in scores.items() if isinstance(v, int | float | str)}
                if model is not self.teacher and model.spec.head == "ctc":
                    entry["frame_agreement"] = frame_agreement(model, self.teacher, self.recipe.data.test,
                                                               task=self.task)
            result[role] = entry
        result["stages"] = [{k: s[k] for k in ("name", "path", "seconds")} for s in stages]
        if control is not None and "wer" in result["student"]:
            said = (versus.read(self.folder, role) for role in ("student", "control"))
            result["student_minus_control"] = versus.paired(*said)
        if control is not None and "bits_per_character" in result["student"]:
            result["bits_student_minus_control"] = perplexity.paired(self.folder, "student", "control")
        if self.recipe.bench_seconds:
            before = old.get("speed_of") == [student.fingerprint, list(self.recipe.bench_seconds)]
            rows = before and (self.folder / "speed.json").exists() and json.loads(
                (self.folder / "speed.json").read_text())
            if not rows:
                log.info("Measuring speed and memory at %s s.", ", ".join(f"{s:g}" for s in self.recipe.bench_seconds))
                rows = speed.bench(self._where(self.recipe.teacher), seconds=self.recipe.bench_seconds, repeats=5,
                                   baseline=os.fspath(self.folder / "final"), progress=log.info)
                for row in rows:
                    row["role"] = "student" if row["model"].endswith("final") else "teacher"
                _write_json(self.folder / "speed.json", rows)
            result["speed_of"] = [student.fingerprint, list(self.recipe.bench_seconds)]
            for row in rows:
                if row.get("audio_seconds") == 10 and "error" not in row:
                    result[row["role"]] |= {k: row[k] for k in ("seconds_per_second", "peak_bytes") if k in row}
        here = environment()
        result["environment"] = {"device": ", ".join(here["devices"]), "platform": here["platform"],
                                 "cpus": here["cpus"], "versions": here["versions"]}
        _write_json(self.folder / "summary.json", result)
        (self.folder / "final" / "README.md").write_text(card.card(
            result, config.dump(self.recipe), student.spec, self.recipe.data.train, self.recipe.data.test))
        if "wer" in result["student"]:
            report.save_clips(self.folder, self.recipe.data.test)
        log.info("Report: %s", report.report(self.folder))
        return result

    @staticmethod
    def _where(name: str) -> str:
        return name if name.startswith("bundled:") else os.fspath(hub.folder(name))


def retarget(path: str, overrides: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Overrides that give the recipe's pruning stage the budgets `targets`, each 'macs=0.6'."""
    if not targets:
        return []
    stages = [s for s in config.load(Recipe, path, overrides).stages if s.options.get("target")]
    if len(stages) != 1:
        raise ConfigError(f"--target: {path} has {len(stages)} stages with a budget; it must have one. Give it by "
                          "STAGE.options.target={macs: 0.6}.")
    pairs = [t.partition("=") for t in targets]
    try:
        wanted = {name: float(value) for name, _, value in pairs}
    except ValueError:
        raise ConfigError(f"--target {' '.join(targets)}: write COST=VALUE, such as macs=0.6.") from None
    return [f"{stages[0].name}.options.target={json.dumps(wanted)}"]


def demo(output: str) -> dict[str, Any]:
    """`jaxslim demo`: the bundled recipe on bundled model and speech. Returns its summary."""
    return run(os.fspath(epath.resource_path("jaxslim") / "assets" / "demo.yaml"), output)


def _claim(folder: epath.Path, marker: str) -> None:
    """Makes a run folder. Raises ConfigError if it cannot be written or holds what is not of a run (`marker`)."""
    if jax.process_index() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").write_text("")
        (folder / ".write").unlink()
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.suffix not in (".log", ".txt")]
    except OSError as error:
        raise ConfigError(f"Cannot write the output folder {folder}: {error.strerror or error}. Choose a folder you "
                          "may write to.") from error
    if others and not (folder / marker).exists():
        raise ConfigError(f"The output folder {folder} holds files that are not of a run ({', '.join(others[:3])}); "
                          "choose another or empty it.")


def _remove(folder: epath.Path) -> None:
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()


def _copy(source: epath.Path, target: epath.Path) -> None:
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for inner in source.iterdir():
            _copy(inner, target / inner.name)
    else:
        source.copy(target, overwrite=True)


def _write_json(path: epath.Path, value: Any) -> None:
    """All or nothing: a reader never sees half a file."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(json.dumps(value, indent=1, default=str))
    temporary.replace(path)


def method_of(stage: Stage) -> Method:
    """The method object of a stage; its options are strict."""
    if stage.method not in METHODS:
        raise ConfigError(f"Stage {stage.name}: unknown method {stage.method!r}.{nearest(stage.method, METHODS)} "
                          f"Known are {sorted(METHODS)}.")
    return config.build(METHODS[stage.method], stage.options, f"Stage {stage.name}: options")


def training_batches(data: str, task, cfg: Train, mesh, labelled: bool = True) -> Batches:
    """Shuffled endless global batches for `cfg` on `mesh`; if not `labelled`, of clips without text too."""
    common = dict(multiple_of=M.shards(mesh) * cfg.gradient_accumulation_steps, seed=cfg.seed,
                  host=jax.process_index(), hosts=jax.process_count())
    if isinstance(task, TextTask):
        batches = TextBatches(load_rows(data), task, batch_size=loop.batch_size(cfg, mesh), **common,
                              buckets=[round(b) for b in cfg.buckets] or None)
    elif isinstance(task, CausalTask):
        if len(cfg.buckets) > 1:
            raise ConfigError(f"train.buckets {list(cfg.buckets)}: a language model has rows of one length; give one.")
        batches = TokenBatches(load_rows(data), task, batch_size=loop.batch_size(cfg, mesh), **common,
                               length=round(cfg.buckets[0]) if cfg.buckets else None)
    else:
        size = {"batch_size": loop.batch_size(cfg, mesh)}
        if cfg.per_device_batch_seconds:
            size = {"batch_seconds": cfg.per_device_batch_seconds * common["multiple_of"]}
        common |= size | dict(max_seconds=cfg.max_seconds, min_seconds=cfg.min_seconds, buckets=cfg.buckets or None,
                              augment=augment.build(cfg.speed_perturb, cfg.augment, task.sampling_rate))
        labels = labelled or isinstance(task, Seq2SeqTask)   # a decoder reads them
        if data.startswith(streaming.PREFIX):
            batches = StreamBatches(data, task, labels=labels, **common)
        else:
            rows = load_rows(data)
            if cfg.join_seconds:
                rows = joined(rows, cfg.join_seconds, cfg.seed)
            known = all(x not in (None, "") for x in rows.column(task.column))
            batches = Batches(rows, task, labels=labels or known, **common)
    log.info(batches.summary)
    return batches


def train(path: str, overrides: Sequence[str] = ()) -> Slim:
    """`jaxslim train CONFIG`: fine-tunes `model` on `data.train`, leaves OUTPUT_DIR with final/ in it."""
    cfg = config.load(config.Run, path, overrides)
    if not (cfg.model and cfg.data.train and cfg.output_dir):
        raise ConfigError(f"{path}: model, data.train and output_dir must be set.")
    folder = epath.Path(cfg.output_dir)
    _claim(folder, "config.yaml")
    if jax.process_index() == 0 and not (folder / "config.yaml").exists():
        (folder / "config.yaml").write_text(config.dump(cfg))
    name = source(cfg, folder / "initial")
    model = scratch.changed(hub.load(name), cfg.model_config)
    task = task_of(model.spec, hub.folder(name), cfg.data.language)
    method = config.build(METHODS["train"], cfg.options, f"{path}: options")
    mesh = M.make(cfg.mesh)
    batches = training_batches(cfg.data.train, task, cfg, mesh)
    validate = validation(cfg.data, task)
    if jax.process_index() == 0:
        (folder / "config.yaml").write_text(config.dump(cfg))

    def snapshot(model: Slim, step: int) -> None:
        if jax.process_index() == 0:
            hub.save(model, folder / f"step-{step}", source=name)

    trained = loop.run(method, model, None, cfg, batches, folder, mesh=mesh, name=folder.name, validate=validate,
                       snapshot=snapshot)
    if jax.process_index() == 0:
        hub.save(trained, folder / "final", source=name)
        log.info("Saved %s.", folder / "final")
    return trained


def source(cfg: config.Run, folder) -> str:
    """Name of the model that `cfg` starts from; one that does not exist yet is made in `folder`."""
    if not isinstance(cfg.model, str):
        return scratch.create(cfg.model, folder, cfg.data.train, cfg.seed, cfg.vocabulary)
    if cfg.labels not in ("model", "data"):
        raise ConfigError(f"labels {cfg.labels!r}: model, or data for a new classification head.")
    if cfg.labels == "data":
        return scratch.with_labels(cfg.model, folder, cfg.data.train, cfg.seed)
    if cfg.vocabulary not in ("model", "data"):
        raise ConfigError(f"vocabulary {cfg.vocabulary!r}: model, or data for a new head; others are for new language "
                          "models (model: {model_type: gpt_neox, ...}).")
    if cfg.vocabulary == "data":
        return scratch.with_vocabulary(cfg.model, folder, cfg.data.train, cfg.seed)
    return cfg.model


def validation(data: config.Data, task):
    """Slim -> scores on validation data; None without data."""
    if not data.validation:
        return None
    rows = load_rows(data.validation)

    def check(model: Slim):
        return evaluate(model, rows, task=task, normalize=data.normalize, progress=False)

    check.rows = rows  # for the clips in TensorBoard
    return check
