"""Which version of an operation runs: plain XLA, or a kernel where the recorded table has it for this device kind.

The table, assets/kernels.json, is written by scripts/kernels_tpu.py: device kind -> operation -> "xla" or "kernel".
What is not in it runs as XLA. The environment variable JAXSLIM_KERNELS overrules it: `xla`, `kernel` (wherever there is
one) or `auto`, the table. A kernel that is asked for and cannot run here gives way to XLA, with one line in the log
that says why. Read when a function is traced: set the variable before the process starts.
"""
from __future__ import annotations

import functools
import importlib.resources
import json
import logging
import os
from collections.abc import Callable

import jax

log = logging.getLogger(__name__)
VARIABLE = "JAXSLIM_KERNELS"
CHOICES = ("auto", "xla", "kernel")
PLAIN = jax.make_user_context(default_value=False)   # `with PLAIN(True)`: XLA alone, for counts and exported programs


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """Device kind -> operation -> choice."""
    return json.loads((importlib.resources.files("jaxslim") / "assets" / "kernels.json").read_text(encoding="utf-8"))


def wanted(op: str) -> bool:
    """Whether the kernel of `op` should run on this process's devices."""
    if PLAIN.value:
        return False
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}: use {', '.join(CHOICES)}.")
    if choice == "auto":
        return jax.default_backend() != "cpu" and table().get(jax.devices()[0].device_kind, {}).get(op) == "kernel"
    return choice == "kernel"


@functools.lru_cache(maxsize=256)
def fall_back(op: str, why: str) -> None:
    """Says once why the kernel of `op` does not run."""
    log.warning("%s: no kernel here, XLA runs instead: %s.", op, why)


def recurrence(op: str, rows: int, frames: int, heads: int, groups: int, size: int, width: int) -> Callable | None:
    """The Pallas kernel for scan.ssd, scan.causal or scan.gla with these sizes; None = the XLA version."""
    if not wanted(op):
        return None
    backend, sizes = jax.default_backend(), (rows, frames, heads, groups, size, width)
    if backend not in ("gpu", "tpu"):
        return fall_back(op, f"there is one for GPU and TPU, this is {backend}")
    if jax.device_count() > 1:
        return fall_back(op, "a program over several devices does not split kernels")
    if backend == "gpu":
        from jaxslim.models import pallas_gpu as module

        cut = module.shape(op, *sizes)
    else:
        from jaxslim.models import pallas_gla, pallas_scan

        module = pallas_gla if op == "gla" else pallas_scan
        cut = module.shape(*sizes)
    if isinstance(cut, str):
        return fall_back(op, cut)
    return functools.partial(getattr(module, op), cut=cut)


def attention(q, k, v, mask, rate: float, bias, causal: bool) -> Callable | None:
    """The kernel for attention.attention on these arguments, a function of the scale; None = the XLA version."""
    if not wanted("attention"):
        return None
    from jaxslim.models import attention_kernels as others

    backend = jax.default_backend()
    if backend not in ("gpu", "tpu"):
        return fall_back("attention", f"there is one for GPU and TPU, this is {backend}")
    run, lacks = (others.cudnn, others.cudnn_lacks) if backend == "gpu" else (others.splash, others.splash_lacks)
    if why := lacks(q, k, v, mask, rate, bias, causal):
        return fall_back("attention", why)
    more = {"bias": bias} if backend == "gpu" else {}
    return lambda scale: run(q, k, v, mask, scale, causal=causal, **more)
