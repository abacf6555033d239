"""Speed and memory of the forward pass, ours and PyTorch's, measured side by side.

Every measurement runs in a fresh process of its own (speed_worker.py), which loads, compiles, calls once and then makes
one timed call each time the parent asks. The parent asks all participants in turn (A B C A B C), so that a noisy
machine treats them alike, and never touches an accelerator itself.

PyTorch's threads wait passively unless OMP_WAIT_POLICY says otherwise: where anything else runs on the machine their
usual spinning makes PyTorch several times slower, which would flatter us. Rows carry the policy and the machine's load.

A model is named as in hub.py, or `config:NAME` (a stock shape with random weights: shapes.py), and may be
changed on the spot: `bundled:wav2vec2-ctc-en?encoder.*.attention.mixer=hedgehog`, `?num_hidden_layers=2` (new
parameters are random).
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from jaxslim import malloc
from jaxslim.spec import Spec
from jaxslim.speed_worker import JSON, BenchError, cpu_numbers, random_model, resolve

__all__ = ["BenchError", "bench", "main_rows", "random_model", "resolve", "table"]

ENGINES = {"torch": ("torch eager", "torch sdpa"), "torch-compile": ("torch compile",), "onnxruntime": ("onnxruntime",)}
ROW_KEYS = ("model", "engine", "weights", "audio_seconds", "batch", "dtype", "params", "gmacs", "gmacs_here",
            "gmacs_as_run", "compile_seconds", "first_seconds", "steady_seconds", "min_seconds", "max_seconds", "runs",
            "seconds_per_second", "rtfx", "peak_bytes", "ratio", "ratio_to", "baseline_seconds", "device", "threads",
            "omp_wait_policy", "malloc", "load", "versions", "fingerprint", "error")
# gmacs: at 10 s, batch 1; gmacs_here: at this length and batch; load: the load average at set-up


def bench(model: Any, *, seconds: Iterable[float] = (1, 10, 60), batch: int = 1, dtype: str | None = None,
          baseline: Any = None, repeats: int = 9, budget: float = 300.0, threads: int | None = None,
          wav: str | os.PathLike | None = None, seed: int = 0, attention: str = "auto",
          progress: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Times the forward pass (batch x seconds of audio -> logits) and its memory.

    Args:
      model: a name (module docstring), a Slim, or a Spec (random weights). On a TPU, which one process owns, a name.
      seconds: lengths of the audio, in s.
      dtype: of the matrix weights and activations ("bfloat16", ...), cast before timing; None = as stored.
      baseline: None, "torch" (the stock transformers model in PyTorch, eager and sdpa; for a converted model the stock
        architecture of its config with random weights), "torch-compile" (sdpa under torch.compile, which takes a C++
        compiler; its first call compiles), "onnxruntime" (our ONNX export), each also as "torch:MODEL" of another
        model, another model, or a list of these.
      repeats: timed calls of each participant beyond the first call; at least 3 are made even if they take longer
        than `budget` seconds in all.
      threads: of the CPU, the same for all; None = all that this process may use.
      wav: an audio file to feed, repeated or cut to length; None = seeded noise.
      attention: "auto", "dense" or "blocked", as in Slim.__call__.
      progress: called with a line of text before each measurement.
    Returns:
      One row a participant and length, `model` first, with the keys of ROW_KEYS that apply. `peak_bytes` on a CPU is
      the highest RSS from the first call on, less the RSS before it (which holds weights and compiled code); elsewhere
      it is the allocator's peak, weights included. A row whose process failed has `error` in place of times. With
      baselines the model's rows have `baseline_seconds` (all of them) and `ratio`, the median over rounds of ours /
      the one with the lowest median, which `ratio_to` names.
    Raises:
      BenchError: bad arguments, PyTorch missing, or a model that cannot be loaded.
    """
    lengths, baselines = [float(s) for s in seconds], baseline if isinstance(baseline, (list, tuple)) else [baseline]
    if not lengths or min(lengths) <= 0 or batch < 1 or repeats < 1:
        raise BenchError("bench: seconds and batch must be positive, repeats at least 1.")
    threads = threads or len(cpu_numbers())
    wanted = {b.split(":")[0] for b in baselines if isinstance(b, str)} & ENGINES.keys()
    if wanted and not importlib.util.find_spec("torch"):
        raise BenchError(f"The baseline {min(wanted)} needs PyTorch: pip install 'jaxslim[test]', or leave --baseline "
                         "out.")
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        label, name = _named(model, tmp, 0)
        jobs = [{"engine": "jaxslim", "model": label, "name": name}]
        for i, b in enumerate(b for b in baselines if b is not None):
            kind, _, other = b.partition(":") if isinstance(b, str) else ("", "", "")
            other, path = (other or label, other or name) if kind in ENGINES else _named(b, tmp, i + 1)
            engines = ENGINES.get(kind, ("jaxslim",))
            jobs += [{"engine": e, "model": other, "name": path} for e in engines]
        shared = dict(batch=batch, dtype=dtype, threads=threads, seed=seed, attention=attention,
                      wav=None if wav is None else os.path.abspath(wav))
        for length in lengths:
            rows += _side_by_side([{**job, **shared, "seconds": length} for job in jobs], repeats, budget, progress)
    return rows


def beside(student: str, teacher: str, *, seconds: float = 10.0, repeats: int = 9,
           progress: Callable[[str], None] | None = None) -> dict[str, float]:
    """Both in turn, batch 1: `student_` and `teacher_` with seconds_per_second, min_seconds and peak_bytes, and
    `time_share`, the student's median over the teacher's. What could not be measured is left out."""
    out: dict[str, float] = {}
    for row in bench(student, seconds=(seconds,), repeats=repeats, baseline=teacher, progress=progress):
        role = "student" if row["model"] == student else "teacher"
        out |= {f"{role}_{k}": row[k] for k in ("seconds_per_second", "min_seconds", "peak_bytes") if k in row}
    if {"student_seconds_per_second", "teacher_seconds_per_second"} <= out.keys():
        out["time_share"] = out["student_seconds_per_second"] / out["teacher_seconds_per_second"]
    return out


def _side_by_side(jobs: list[dict], repeats: int, budget: float, progress) -> list[dict[str, Any]]:
    """Rows of several jobs of the same length: each set up alone, then timed in turn."""
    rows, times, workers = [], [[] for _ in jobs], {}
    with contextlib.ExitStack() as stack:
        def rounds(number):
            start = time.monotonic()
            for r in range(number):
                if r >= min(3, number) and time.monotonic() - start > budget:
                    break
                for i in list(workers):
                    time.sleep(0.02)  # lets the thread pool of the last one go to sleep
                    reply = workers[i].ask("run")
                    times[i].append(reply.pop("seconds", None))
                    rows[i].update(reply)
                    if "error" in reply:
                        workers.pop(i).close()

        for i, job in enumerate(jobs):
            if progress:
                progress(f"{job['model']} ({job['engine']}), {job['seconds']:g} s")
            worker = stack.enter_context(contextlib.closing(_Worker(job["threads"], job["engine"])))
            rows.append(worker.ask(json.dumps(job)))
            if "error" in rows[i]:
                rows[i] |= {"model": job["model"], "engine": job["engine"], "audio_seconds": job["seconds"]}
                continue
            workers[i] = worker
            if rows[i].pop("exclusive"):  # the chip belongs to one process: no turns
                rounds(repeats)
                workers.pop(i).close()
        rounds(repeats)
    for row, t in zip(rows, times, strict=True):
        if "error" not in row:
            middle, audio = statistics.median(t), row["audio_seconds"] * row["batch"]
            row |= {"steady_seconds": middle, "min_seconds": min(t), "max_seconds": max(t), "runs": len(t),
                    "seconds_per_second": middle / audio, "rtfx": audio / middle}
    others = {i: r["steady_seconds"] for i, r in enumerate(rows) if i and "error" not in r}
    if others and "error" not in rows[0]:
        best = min(others, key=others.get)
        rows[0]["ratio"] = statistics.median(a / b for a, b in zip(times[0], times[best], strict=False))
        rows[0]["ratio_to"] = f"{rows[best]['model']} ({rows[best]['engine']})"
        rows[0]["baseline_seconds"] = {f"{rows[i]['model']} ({rows[i]['engine']})": s for i, s in others.items()}
    return [{k: row[k] for k in ROW_KEYS if k in row} for row in rows]


class _Worker:
    """A fresh process that measures one job. It answers each line with a line of JSON."""

    def __init__(self, threads: int, engine: str):
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # not a pipe: a full one would block the worker
        path = os.pathsep.join(filter(None, [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        environment = os.environ if engine == "jaxslim" else malloc.others()
        env = {"OMP_WAIT_POLICY": "PASSIVE", **environment, "PYTHONPATH": path, "NPROC": str(threads),
               "OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen([sys.executable, "-m", "jaxslim.speed_worker"], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def ask(self, line: str) -> dict[str, Any]:
        """Raises BenchError when the worker says that the request itself was wrong."""
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        if not reply:
            code = self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or [""])[-1]
            return {"error": "killed, most likely for want of memory" if code == -9 else f"exit status {code}: {last}"}
        answer = json.loads(reply)
        if answer.pop("usage", False):
            raise BenchError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()


def _named(model: Any, tmp: str, i: int) -> tuple[str, str]:
    """(label, name that a worker can load) of a name, Slim or Spec."""
    if isinstance(model, (str, os.PathLike)):
        text = os.fspath(model)
        return text, os.path.abspath(text) if os.path.isdir(text) else text
    if isinstance(model, Spec):
        return repr(model), JSON + json.dumps({**dataclasses.asdict(model), "config": dict(model.config)})
    model.save_pretrained(os.path.join(tmp, str(i)))
    return repr(model.spec), os.path.join(tmp, str(i))


def main_rows(model: Any, seconds: str | Iterable[float] = "1,10,60", baseline: str | Iterable[str] | None = None,
              **options: Any) -> list[dict[str, Any]]:
    """`bench` with arguments as a command line gives them: `seconds` "1,10,60", `baseline` "torch,MODEL"."""
    try:
        lengths = [float(s) for s in seconds.split(",")] if isinstance(seconds, str) else list(seconds)
    except ValueError:
        raise BenchError(f"--seconds takes numbers like 1,10,60, not {seconds!r}.") from None
    names = baseline.split(",") if isinstance(baseline, str) else baseline
    return bench(model, seconds=lengths, baseline=names, **options)


def table(rows: list[dict[str, Any]]):
    """The rows of `bench` as a rich.Table, one line a row; times in seconds, memory in MB."""
    from rich.table import Table

    out = Table(caption="; ".join(dict.fromkeys(
        f"{r['device']}, {r['threads']} threads, batch {r['batch']}, {r['dtype']}, "
        + ", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in rows if "versions" in r)))
    for name in ("model", "engine", "audio s", "GMACs", "compile", "first", "steady", "min", "max", "runs",
                 "per audio s", "peak MB", "ratio"):
        out.add_column(name, justify="left" if name in ("model", "engine") else "right", overflow="fold")

    def cell(row, key, form, scale=1.0):
        return format(row[key] / scale, form) if key in row else "-"

    for r in rows:
        start = [r["model"], r["engine"], f"{r['audio_seconds']:g}"]
        if "error" in r:
            out.add_row(*start, "-", r["error"])
            continue
        times = [cell(r, f"{k}_seconds", ".3f") for k in ("compile", "first", "steady", "min", "max")]
        out.add_row(*start, cell(r, "gmacs_here", ".1f"), *times, str(r["runs"]), cell(r, "seconds_per_second", ".4f"),
                    cell(r, "peak_bytes", ".1f", 1e6), cell(r, "ratio", ".2f"))
    return out
