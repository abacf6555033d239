"""Large memory pages for the CPU backend.

XLA takes its temporary arrays from malloc at every call, and glibc gives memory of that size back to the system at
once: each step of a small model then waits for some 300,000 page faults, a sixth of its time. glibc reads the setting
that helps only when a process starts, so the command line starts itself again with it.
"""
from __future__ import annotations

import glob
import os
import platform
import sys

# Transparent huge pages: a hundredth of the faults. Keeping freed memory as well (mmap_max=0, no trimming) is a little
# faster still in training, but such a heap gets holes: peak memory of long audio tripled.
TUNABLES = "glibc.malloc.hugetlb=1"
DEVICES = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")  # GPUs and TPUs


def wanted() -> bool:
    """Whether this process would gain: glibc, the CPU backend, and nobody has chosen settings.

    `JAXSLIM_MALLOC=system` leaves malloc as it is.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "")
    cpu = chosen.startswith("cpu") or not chosen and not any(glob.glob(pattern) for pattern in DEVICES)
    return (cpu and sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
            and "GLIBC_TUNABLES" not in os.environ and os.environ.get("JAXSLIM_MALLOC") != "system")


def others() -> dict[str, str]:
    """The environment for other people's programs: without our setting, unless the user made it."""
    ours = ("GLIBC_TUNABLES", "JAXSLIM_MALLOC") if os.environ.get("JAXSLIM_MALLOC") == "pages" else ()
    return {k: v for k, v in os.environ.items() if k not in ours}


def restart() -> None:
    """Replaces this process by the same command with large pages, if that is wanted. To be called before any work."""
    if wanted() and sys.orig_argv:
        os.environ |= {"GLIBC_TUNABLES": TUNABLES, "JAXSLIM_MALLOC": "pages"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
