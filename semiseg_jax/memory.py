"""Freed memory is kept for the next step instead of given back to the system, on CPU hosts.

XLA's CPU backend allocates a program's buffers anew at every call. glibc maps blocks of that size
from the system and unmaps them when they are freed, so that every step touches new pages: by
getrusage over 12 student steps of EfficientNet-Lite0 (configs/camvid.py:half, one core), 184,000
page faults and 1.44 s of CPU time a step; none and 1.13 s with the settings here.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def cpu_computes() -> bool:
    """Whether JAX will compute on the CPU, told before it starts: no other runtime is installed.

    Or JAX_PLATFORMS=cpu says so. The TPU's runtime is also installed to compile for TPUs that are
    not there (see `plan`): it counts where there is a device for it.
    """
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] == "cpu"
    # CUDA's and ROCm's register themselves as plugins; the TPU's is looked for by its name.
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not (importlib.util.find_spec("libtpu") and _has_tpu())


def _has_tpu() -> bool:
    """Whether the kernel shows a TPU: /dev/accel0, or from v5e on /dev/vfio/0."""
    devices = Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def keep_freed() -> bool:
    """Tells glibc to serve large blocks from its heap, and never to shrink it.

    One arena for all threads, because only the main one can hold blocks of any size: right where
    the CPU computes, and not on the host of a TPU or GPU, whose many input threads would wait for
    each other. Call it before JAX has started its backend: threads keep the arena that they have.
    The process's memory stays at its peak from then on.

    Returns:
        Whether the C library took it: False where it is not glibc, which nothing depends on.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in settings)
