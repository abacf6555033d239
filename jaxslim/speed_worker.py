"""One measurement in a process of its own: `python -m jaxslim.speed_worker`, started by speed.py.

The first line on stdin is a job (JSON); the answer holds what is known of the model and the times of compilation and of
the first call. Each further line asks for one timed call. Also here: what a bench name means, and random weights.
"""
from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxslim import formulas
from jaxslim.shapes import SHAPES
from jaxslim.spec import Spec, nearest

RATE = 16000
JSON = "spec:"  # internal name: a Spec as JSON, random weights


class BenchError(ValueError):
    """A bench that cannot be run as asked; says what to do."""


def random_model(spec: Spec, seed: int = 0):
    """A Slim with random float32 weights: normal 0.02 (front end: He), norms 1, biases 0. For shapes without a file."""
    from jaxslim.models import bind
    from jaxslim.slim import Slim

    def draw(rng, name, shape, dtype):
        leaf = name.rsplit(".", 1)[-1]
        if len(shape) < 2 or leaf == "original0":  # weight norm: gain 1; norms and variances 1; other vectors 0
            ones = leaf in ("weight", "running_var", "original0")
            return np.full(shape, float(ones), dtype)
        std = (2 / np.prod(shape[1:])) ** 0.5 if "feature_extractor" in name else 0.02
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    rng = np.random.default_rng(seed)
    return Slim(spec, {k: draw(rng, k, x.shape, x.dtype) for k, x in bind.shapes(spec).items()})


def resolve(name: str, seed: int = 0):
    """The Slim behind a bench name (module docstring), with random weights where there is no file.

    Returns:
      (model, weights): weights is "loaded", "random" or "partly random".
    Raises:
      BenchError: unknown `config:` name, or a change that fits no block. hub.HubError, spec.SpecError.
    """
    from jaxslim import hub

    if name.startswith(JSON):
        return random_model(Spec(**json.loads(name.removeprefix(JSON))), seed), "random"
    name, _, changes = name.partition("?")
    if name.startswith("config:"):
        key = name.removeprefix("config:")
        if key not in SHAPES:
            raise BenchError(f"No stock shape {key!r}; known are {', '.join(SHAPES)}.{nearest(key, SHAPES)}")
        family, head, config = SHAPES[key]
        return random_model(changed(Spec(config, family, head), changes), seed), "random"
    model = hub.load(name)
    if not changes:
        return model, "loaded"
    new = random_model(changed(model.spec, changes), seed)
    kept = {k: model.params[k] for k, v in new.params.items() if k in model.params and model.params[k].shape == v.shape}
    return new.replace(params=new.params | kept), "loaded" if len(kept) == len(new.params) else "partly random"


def changed(spec: Spec, changes: str) -> Spec:
    """`spec` with `PATTERN.field=value` (YAML), joined by `&`, in every block that fits a pattern, and `key=value` of
    the config."""
    import yaml

    from jaxslim.models.roles import blocks

    for change in filter(None, changes.split("&")):
        path, equals, value = change.partition("=")
        pattern, _, field = path.rpartition(".")
        if equals and path in spec.config:
            spec = spec.replace(config={**spec.config, path: yaml.safe_load(value)})
            continue
        found = fnmatch.filter(blocks(spec), pattern)
        if not found or not equals:
            raise BenchError(f"Change {change!r} fits no block; write BLOCK.FIELD=VALUE, such as "
                             "encoder.*.attention.mixer=hedgehog.")
        for block in found:
            spec = spec.with_block(block, **{field: yaml.safe_load(value)})
    return spec


def batch_of(spec: Spec, job: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the model is called with: seeded noise in the shape of its input, or a file repeated or cut to length."""
    shapes, rng = formulas.inputs(spec, job["seconds"], job["batch"]), np.random.default_rng(job["seed"])
    tokens = lambda x: rng.integers(0, spec["vocab_size"], x.shape).astype(np.int32)  # noqa: E731
    if job["wav"] is None or spec.family in formulas.TEXT:
        return {k: rng.standard_normal(x.shape, np.float32) * np.float32(0.1) if np.issubdtype(x.dtype, np.floating)
                else tokens(x) for k, x in shapes.items()}
    from jaxslim.data import Extractor, audio
    from jaxslim.data.extractor import KINDS

    wave = np.resize(audio.load(job["wav"], RATE), round(job["seconds"] * RATE))
    name = next(iter(shapes))
    rows = shapes[name].shape[0] // job["batch"]          # Whisper: windows of a clip
    size = -(-len(wave) // rows)
    pieces = [wave[i * size : (i + 1) * size] for i in range(rows)]
    kind, window = KINDS.get(spec.family, ("values",))[0], spec.get("max_source_positions", 0) / 50
    mels = spec.get("num_mel_bins") or spec.get("feature_projection_input_dim", 2) // 2
    extractor = Extractor(kind, do_normalize=False, mels=mels, window=window)
    made = {name: np.tile(extractor(pieces, size)[name], (job["batch"], *[1] * (len(shapes[name].shape) - 1)))}
    return made | {k: tokens(x) for k, x in shapes.items() if k != name}


def setup_jax(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Any], Callable[[], int] | None]:
    """(facts, one forward pass, peak bytes of the device or None on a CPU) of a jaxslim model, compiled."""
    import jax
    import jax.numpy as jnp

    from jaxslim import cost

    jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured, not looked up
    model, weights = resolve(job["name"], job["seed"])
    fingerprint, spec, seconds, device = model.fingerprint, model.spec, job["seconds"], jax.devices()[0]
    dtype = jnp.dtype(job["dtype"] or jnp.float32)
    params = {k: jnp.asarray(v, dtype if v.ndim > 1 and jnp.issubdtype(v.dtype, jnp.floating) else v.dtype)
              for k, v in model.params.items()}
    batch = {k: jnp.asarray(v) for k, v in batch_of(spec, job).items()}
    run_macs = cost.traced_macs(spec, seconds, job["batch"], attention=job["attention"])

    def forward(model, batch):
        out = model(**batch, attention=job["attention"])
        return out.last_hidden_state if out.logits is None else out.logits

    model = model.replace(params=params)
    start = time.perf_counter()
    compiled = jax.jit(forward).lower(model, batch).compile()
    facts = {"compile_seconds": time.perf_counter() - start, "weights": weights, "fingerprint": fingerprint,
             "dtype": dtype.name, "params": cost.params(spec), "gmacs": cost.macs(spec).total / 1e9,
             "gmacs_here": cost.macs(spec, seconds, job["batch"]).total / 1e9, "gmacs_as_run": run_macs / 1e9,
             "device": _cpu() if device.platform == "cpu" else device.device_kind,
             "versions": _versions("jax", "jaxlib", "flax"), "malloc": os.environ.get("GLIBC_TUNABLES", "system"),
             "exclusive": device.platform == "tpu"}
    counted = "peak_bytes_in_use" in (device.memory_stats() or {})  # GPU, TPU; a CPU has no such count
    peak = (lambda: device.memory_stats()["peak_bytes_in_use"]) if counted else None
    return facts, lambda: jax.block_until_ready(compiled(model, batch)), peak


def setup_torch(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Any], Callable[[], int] | None]:
    """The same of the stock transformers model in PyTorch: from its folder, or its config with random weights."""
    import jax
    import torch
    import transformers

    from jaxslim import hub
    from jaxslim.architectures import architecture

    model, weights = resolve(job["name"], job["seed"])
    spec = model.spec
    path = hub.folder(job["name"]) if weights == "loaded" and not spec.blocks else None
    del model
    mode = job["engine"].split()[-1]
    cuda = jax.default_backend() == "gpu"
    if cuda and not torch.cuda.is_available():
        raise BenchError("The baseline torch would run on the CPU: this PyTorch sees no GPU. Install one with CUDA.")
    torch.set_num_threads(job["threads"])
    batch, frames = batch_of(spec, job), formulas.attended(spec, job["seconds"])
    rows = next(iter(batch.values())).shape[0]
    scores, free = 2 * 4 * rows * spec.of("encoder", "num_attention_heads") * frames**2, _free()
    if mode == "eager" and not cuda and free and scores > 0.8 * free:
        raise MemoryError(f"not run: eager attention needs about {scores / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    cls = getattr(transformers, architecture(spec.family, spec.head))
    kwargs = dict(attn_implementation="sdpa" if mode == "compile" else mode,
                  dtype=getattr(torch, job["dtype"] or "float32"))
    if path is None:
        config = transformers.CONFIG_MAPPING[spec.family].from_dict(dict(spec.config))
        model = cls._from_config(config, **kwargs)
    else:
        model = cls.from_pretrained(path, **kwargs)
    device = torch.device("cuda" if cuda else "cpu")
    model = model.eval().to(device)
    x = {k: torch.from_numpy(v).to(device, kwargs["dtype"] if v.dtype == np.float32 else torch.int64)
         for k, v in batch.items()}
    run = torch.compile(model, dynamic=False) if mode == "compile" else model

    def call():
        with torch.inference_mode():
            run(**x)
        if cuda:
            torch.cuda.synchronize()

    facts = {"weights": "loaded" if path else "random", "dtype": job["dtype"] or "float32",
             "params": sum(p.numel() for p in model.parameters()),
             "device": torch.cuda.get_device_name() if cuda else _cpu(), "versions": _versions("torch", "transformers"),
             "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
             "malloc": os.environ.get("GLIBC_TUNABLES", "system"), "exclusive": False}
    return facts, call, torch.cuda.max_memory_allocated if cuda else None


def setup_onnx(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Any], None]:
    """The same of the model's ONNX export, on the CPU."""
    from jaxslim import cost, export, onnx_graph
    from jaxslim.dense import ExportError

    model, weights = resolve(job["name"], job["seed"])
    folder = tempfile.TemporaryDirectory()
    start = time.perf_counter()
    try:
        export.export(model, folder.name, format="onnx", check=False)
    except ExportError as error:
        raise RuntimeError(f"no graph: {error}") from None   # a row that says so, not the end of the others
    run, batch = onnx_graph.read(folder.name), batch_of(model.spec, job)
    values = next(iter(batch.values()))
    batch = {"attention_mask": np.ones(values.shape[:2], np.int64)} | batch
    facts = {"compile_seconds": time.perf_counter() - start, "weights": weights, "dtype": "float32",
             "params": cost.params(model.spec), "device": _cpu(), "versions": _versions("onnxruntime", "torch"),
             "malloc": os.environ.get("GLIBC_TUNABLES", "system"), "exclusive": False}
    return facts, lambda: (folder, run(**batch)), None


def cpu_numbers() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _versions(*names: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in ("jaxslim", *names)}}


def _cpu() -> str:
    """What the CPU calls itself."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _free() -> int:
    """Bytes of memory that a process can still get; 0 = unknown."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _rss(peak: bool) -> int:
    """Resident bytes of this process, now or at most since `_reset_peak`."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:" if peak else "VmRSS:"):
                return int(line.split()[1]) * 1024
    import resource  # not Linux: the highest ever stands for both, so the difference is a lower bound

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> None:
    """Gives freed memory back and forgets the peak that loading and compiling left."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the answers

    def timed(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def answer(make):
        try:
            reply = make()
        except (ValueError, ImportError) as error:  # hub, spec, bench and data errors: the request was wrong
            reply = {"error": str(error), "usage": True}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=answers, flush=True)
        return "error" not in reply

    job, state = json.loads(sys.stdin.readline()), {}

    def first():
        cpus = cpu_numbers()
        if job["threads"] < len(cpus) and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus[:job["threads"]])
        setup = {"torch": setup_torch, "onnxruntime": setup_onnx}.get(job["engine"].split()[0], setup_jax)
        facts, state["call"], state["peak"] = setup(job)
        _reset_peak()
        state["before"] = _rss(peak=False)
        facts |= {k: job[k] for k in ("model", "engine", "batch", "threads")}
        return facts | {"audio_seconds": job["seconds"], "load": round(os.getloadavg()[0], 2),
                        "first_seconds": timed(state["call"])}

    def again():
        seconds = timed(state["call"])
        return {"seconds": seconds, "peak_bytes": (state["peak"] or (lambda: _rss(peak=True) - state["before"]))()}

    if answer(first):
        while sys.stdin.readline() and answer(again):
            pass


if __name__ == "__main__":
    main()
