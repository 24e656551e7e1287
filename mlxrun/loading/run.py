"""In which dtype a model runs on this machine, and whether its packed weights are expanded."""

from __future__ import annotations

import mlx.core as mx

from mlxrun.errors import ParameterError
from mlxrun.memory import free_memory, on_cpu, plain_room

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


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
    return 4 * elements < plain_room(free_memory())
