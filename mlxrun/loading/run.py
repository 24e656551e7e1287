"""In which dtype a model runs on this machine, and whether its packed weights are expanded."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from converters.gguf.types import GGMLType
from mlxrun import kernels
from mlxrun.errors import ParameterError
from mlxrun.memory import SHARE, on_cpu, plain_room, plain_share

if TYPE_CHECKING:
    from mlxrun.kernels.gpu import Kernels as GPUKernels

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def resolve_dtype(dtype: str | None, preferred: str) -> str:
    """The dtype of activations: float32 on the CPU, else half precision as the weights prefer."""
    if dtype is None:
        return "float32" if on_cpu() else preferred
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ParameterError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return dtype


def cpu_kernels(types: Iterable[GGMLType], dtype: str) -> kernels.Kernels | kernels.Missing | None:
    """Kernels for blocks of some types and for plain float32; None where they are not for a run.

    Args:
        dtype: of activations.
    """
    if dtype != "float32" or not on_cpu():
        return None
    return kernels.available({*types, GGMLType.F32}, _say)


def gpu_kernels(types: Iterable[GGMLType]) -> GPUKernels | kernels.Missing | None:
    """Kernels for those of some types of blocks that a GPU multiplies faster; None on a CPU."""
    if on_cpu():
        return None
    from mlxrun.kernels import gpu

    return gpu.available(types)


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


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
    if not on_cpu():
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
