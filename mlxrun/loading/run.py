"""In which dtype a model runs on this machine, and whether its packed weights are expanded."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxrun.errors import ParameterError
from mlxrun.kernels.device import device
from mlxrun.memory import SHARE, plain_room, plain_share

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def resolve_dtype(dtype: str | None, preferred: str) -> str:
    """The dtype of activations: float32 on the CPU, else half precision as the weights prefer."""
    if dtype is None:
        return preferred if device().half_precision else "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ParameterError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return dtype


@dataclass(frozen=True)
class Form:
    """Whether quantised weights are held as plain float32, and why."""

    plain: bool
    why: str

    def __str__(self) -> str:
        return f"{'plain float32' if self.plain else 'packed'}: {self.why}"


def form(elements: int, dtype: str, *, kept: bool) -> Form:
    """How quantised weights are held.

    Args:
        elements: weights that would be expanded.
        dtype: of activations.
        kept: experts are in one of MLX's own 4-bit modes. Their makers chose it for its size, so
            such a model stays as small as its file.

    On the CPU plain float32 is exact and, where memory allows, several times faster than packed
    codes: MLX's packed product there runs on one core (docs/architecture.md has the figures).

    Raises:
        ParameterError: ``MLXRUN_PLAIN_SHARE`` is no number from 0 to 1.
    """
    if device().fast_packed_matmul:
        return Form(False, "a GPU multiplies packed codes")
    if dtype != "float32":
        return Form(False, f"activations are {dtype}")
    if kept:
        return Form(False, "experts in one of MLX's own 4-bit modes stay as small as their file")
    needed, most = 4 * elements, plain_room()
    return Form(
        needed < most,
        f"{needed / 1e9:.3g} GB of {most / 1e9:.3g} GB, which is {100 * plain_share():.3g}% of the "
        f"free memory (--policy, {SHARE})",
    )
