"""In which dtype a model runs on this machine, and whether its packed weights are expanded."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

from mlxrun.errors import ParameterError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What plain float32 weights may take on the CPU: a share of the free memory, and no more than can
# be filled in a few seconds before the first token.
PLAIN_SHARE, PLAIN_BYTES = 0.5, 2 << 30


def on_cpu() -> bool:
    """Whether MLX computes on the CPU by default."""
    return bool(mx.default_device() == mx.cpu)


def resolve_dtype(dtype: str | None, preferred: str) -> str:
    """The dtype of activations: float32 on the CPU, else half precision as the weights prefer."""
    if dtype is None:
        return "float32" if on_cpu() else preferred
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ParameterError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return dtype


def expands(elements: int, dtype: str, *, kept: bool) -> bool:
    """Whether quantised weights are held as plain float32.

    Args:
        elements: weights that would be expanded.
        dtype: of activations.
        kept: experts are in one of MLX's own 4-bit modes. Their makers chose it for its size, so
            such a model stays as small as its file.

    On the CPU that is exact and, where memory allows, several times faster than packed codes: MLX's
    packed product there runs on one core (docs/architecture.md has the figures).
    """
    if kept or dtype != "float32" or not on_cpu():
        return False
    return 4 * elements < min(PLAIN_BYTES, PLAIN_SHARE * free_memory())


def free_memory() -> int:
    """Bytes of physical memory that are free or can be freed; 0 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 0
