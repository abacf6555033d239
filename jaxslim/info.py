"""`jaxslim info`: what a bug report needs; and a model's size, layer by layer."""
from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "safetensors", "numpy",
            "soundfile", "av", "soxr", "torch")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR",
         "XLA_PYTHON_CLIENT_PREALLOCATE", "GLIBC_TUNABLES", "HF_HUB_OFFLINE", "HF_HOME")


# flags that let the compiler hide collectives behind compute; checked: libtpu 0.0.42 and jaxlib 0.10.2 accept them
RECOMMENDED = {
    "tpu": {"LIBTPU_INIT_ARGS": "--xla_tpu_enable_async_collective_fusion=true "
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
            "--xla_enable_async_all_gather=true"},
    "gpu": {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_pipelined_all_gather=true "
            "--xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true"},
}


def environment() -> dict[str, Any]:
    """Versions, devices and the flags that change behaviour."""
    import jax

    from jaxslim import __version__

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"jaxslim": __version__, "python": platform.python_version(), "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "versions": {name: version(name) for name in PACKAGES},
            "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()],
            "processes": jax.process_count(), "compilation_cache": jax.config.jax_compilation_cache_dir,
            "recommended": RECOMMENDED, "flags": {name: os.environ[name] for name in FLAGS if name in os.environ}}


def model(name: str, seconds: float = 10.0) -> dict[str, Any]:
    """Parameters and MACs of a model (a hub.load name) at an audio length in seconds, whole and by layer."""
    from jaxslim import cost, hub

    slim = hub.load(name)
    return {"model": name, "family": slim.spec.family, "head": slim.spec.head, "fingerprint": slim.fingerprint,
            "changed_blocks": dict(slim.spec.blocks), "seconds": seconds, "params": cost.params(slim.spec),
            "gmacs": cost.macs(slim.spec, seconds).total / 1e9,
            "gmacs_as_run": cost.macs(slim.spec, seconds, as_run=True).total / 1e9,
            "layers": cost.per_layer_rows(slim.spec, seconds)}


def render(value: dict[str, Any]):
    """What `environment` or `model` returned, for the terminal."""
    from rich.table import Table

    if "layers" not in value:
        lines = [f"{k:18} {v}" for k, v in value.items() if not isinstance(v, dict | list)]
        lines += [f"{k:18} {v or 'not installed'}" for k, v in value["versions"].items()]
        lines += [f"device             {d}" for d in value["devices"]]
        lines += [f"{k}={v}" for k, v in value["flags"].items()]
        wanted = [f"on {platform:16}{k}='{v}'" for platform, flags in value["recommended"].items()
                  for k, v in flags.items()]
        return "\n".join([*lines, "flags that hide communication (set them before the command starts):", *wanted])
    title = (f"{value['model']}: {value['family']}, head {value['head']}, {value['params']:,} parameters, "
             f"{value['gmacs']:.3f} GMACs at {value['seconds']:g} s ({value['gmacs_as_run']:.3f} as run on this CPU), "
             f"fingerprint {value['fingerprint'][:12]}")
    table = Table(title=title, title_justify="left")
    for i, key in enumerate(value["layers"][0]):
        table.add_column(key, justify="right" if i else "left")
    for row in value["layers"]:
        table.add_row(*(f"{v:,.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
                        for v in row.values()))
    return table
