"""Memory of this machine: how much there is, how much is free, and MLX's own limits; its cores.

Imports MLX only when it is asked about the device. ``MLXRUN_MEMORY_LIMIT`` in the environment
overrides the machine's memory: a number of bytes such as ``24GB``, or ``none`` for no limit;
``MLXRUN_PLAIN_SHARE`` overrides :data:`PLAIN_SHARE`, from 0 (quantized weights stay packed) to 1.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlxrun.errors import ParameterError
from mlxrun.kernels.device import can_wire, device, working_set

LIMIT = "MLXRUN_MEMORY_LIMIT"
SHARE = "MLXRUN_PLAIN_SHARE"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# A container's limit on Linux: control groups of version 2 and 1.
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# The share of the free memory that plain float32 weights may take on the CPU. The other half is for
# caches, passes and other programs.
PLAIN_SHARE = 0.5
_CACHED_SHARE, _MOST_CACHED = 0.25, 2 << 30
_bound: int | None = None  # set by bound_cache


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_memory() -> int:
    """Bytes that models may take on this machine; 0 where the system does not say.

    With Metal the device's recommended working set, which leaves the rest to the system; elsewhere
    the physical memory, or a container's limit.
    """
    limit = _limit()
    if limit is not None:
        return limit
    if recommended := working_set():
        return recommended
    return min(filter(None, (_physical_memory(), _container_memory())), default=0)


def room() -> int:
    """Bytes that a model may take on this machine now; 0 where the system does not say.

    On the CPU the free memory and all that MLX holds; with Metal the recommended working set,
    which other programs share.
    """
    if _limit() is not None or device().own_memory:
        return machine_memory()
    import mlx.core as mx

    free = free_memory() + mx.get_active_memory() + mx.get_cache_memory()
    return min(filter(None, (free, machine_memory())), default=0)


def free_memory() -> int:
    """Bytes of physical memory that are free or can be freed; 0 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _physical_memory() // 2


def plain_share() -> float:
    """The part of the free memory that plain float32 weights may take on the CPU."""
    text = os.environ.get(SHARE, "").strip()
    if not text:
        return PLAIN_SHARE
    if re.fullmatch(r"0|1|[01]?\.\d+", text) is None or float(text) > 1:
        raise ParameterError(SHARE, text, "a number from 0 to 1")
    return float(text)


def plain_room() -> float:
    """Bytes that a model's weights may take as plain float32 on the CPU."""
    free = min(filter(None, (free_memory(), machine_memory())), default=0)
    return plain_share() * free


def bound_cache(weights: int) -> None:
    """Bound the buffers that MLX keeps for reuse, unless the user has set a bound.

    The next pass reuses the buffers of this one, but nothing reuses an outgrown KV cache. A quarter
    of the memory besides the weights, at most 2 GiB, is enough for a pass; the rest is for KV
    caches. MLX's CPU backend keeps none.
    """
    import mlx.core as mx

    global _bound
    left = machine_memory() - weights
    known = left > -weights
    bound = int(min(_MOST_CACHED, max(0, left) * _CACHED_SHARE)) if known else _MOST_CACHED
    before = mx.set_cache_limit(bound)
    # MLX's own bound is its limit on all memory.
    if before not in (0, _bound, mx.get_memory_limit()):
        mx.set_cache_limit(before)
        return
    _bound = bound


def give_back() -> None:
    """Return memory that MLX and glibc keep for reuse to the system."""
    import ctypes

    import mlx.core as mx

    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def wire(nbytes: int | None = None) -> int:
    """Let MLX keep that much memory from being swapped out; returns the bytes.

    Args:
        nbytes: at most the device's recommended working set; None for all of that.
    """
    import mlx.core as mx

    if not can_wire():
        raise ParameterError("wired", True if nbytes is None else nbytes, "left out without Metal")
    most = int(mx.device_info()["max_recommended_working_set_size"])
    wired = most if nbytes is None else nbytes
    if not 0 <= wired <= most:
        raise ParameterError("wired", wired, f"from 0 to {most} bytes on this device")
    mx.set_wired_limit(wired)
    return wired


def _limit() -> int | None:
    """``MLXRUN_MEMORY_LIMIT``: bytes, 0 for no limit, None where it is not set."""
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return None
    if text.lower() == "none":
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ParameterError(LIMIT, text, "a number of bytes such as 24GB, or none")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _container_memory() -> int:
    for file in _CONTAINER:
        try:
            return int(Path(file).read_text())
        except (OSError, ValueError):  # "max" means none
            continue
    return 0
