"""How much memory this machine has for models, and what is free of it.

Imports MLX only when it is asked about the device. Knows nothing of models.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlxrun import blas

# Where Linux says what a container may take: control groups of version 2 and 1.
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# What plain float32 weights may take on the CPU: a share of the free memory, and no more than can
# be filled in a few seconds before the first token.
_PLAIN_SHARE, _PLAIN_BYTES = 0.5, 2 << 30


def on_cpu() -> bool:
    """Whether MLX computes on the CPU by default."""
    blas.preload()  # whoever imports MLX first decides which BLAS it finds
    import mlx.core as mx

    return bool(mx.default_device() == mx.cpu)


def machine_memory() -> int:
    """Bytes that models may take on this machine; 0 where the system does not say.

    With Metal the device's recommended working set, which leaves the rest to the system; elsewhere
    the physical memory, or what a container has of it.
    """
    if not on_cpu():
        import mlx.core as mx

        if limit := mx.device_info().get("max_recommended_working_set_size"):
            return int(limit)
    return min(filter(None, (_physical_memory(), _container_memory())), default=0)


def room() -> int:
    """Bytes that a model may take on this machine now; 0 where the system does not say.

    On the CPU the free memory, what MLX holds of it among that; with Metal the recommended working
    set, which other programs share.
    """
    if not on_cpu():
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


def plain_room(free: int) -> float:
    """Bytes that a model's weights may take as plain float32 on the CPU, of ``free`` ones."""
    return min(_PLAIN_BYTES, _PLAIN_SHARE * free)


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _container_memory() -> int:
    """The limit of a container; 0 where there is none."""
    for file in _CONTAINER:
        try:
            return int(Path(file).read_text())
        except (OSError, ValueError):  # "max" means none
            continue
    return 0
