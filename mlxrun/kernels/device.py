"""The device that MLX computes on, and the choices that the rest of the code makes by it.

Imports MLX only when it is asked, and only after a BLAS (:mod:`mlxrun.kernels.blas`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Final

from mlxrun.kernels import blas

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class Device:
    """How MLX computes on one kind of device.

    Attributes:
        half_precision: activations are half precision unless asked otherwise.
        fast_packed_matmul: ``mx.quantized_matmul`` is no slower than a plain product. On the CPU it
            runs on one core, so weights are expanded where memory allows.
        gathers_halves: ``mx.gather_mm`` computes in half precision.
        joins_projections: projections of one input are one product: fewer launches.
        fused_attention: attention scores never reach memory.
        fused_rope: ``mx.fast.rope`` is one operation also where each row has its own position.
        keeps_blocks: GGUF blocks stay as they are in the file, rather than being repacked.
        own_memory: models share a working set of the device, rather than the host's free memory.
        prefill_budget: prefill tokens in a step that also decodes, before the scheduler adapts:
            enough for products to be efficient, few enough that a short prompt behind a long one
            starts about as soon as on an idle machine.
    """

    half_precision: bool
    fast_packed_matmul: bool
    gathers_halves: bool
    joins_projections: bool
    fused_attention: bool
    fused_rope: bool
    keeps_blocks: bool
    own_memory: bool
    prefill_budget: int


CPU: Final = Device(
    half_precision=False,
    fast_packed_matmul=False,
    gathers_halves=False,
    joins_projections=False,
    fused_attention=False,
    fused_rope=False,
    keeps_blocks=True,
    own_memory=False,
    prefill_budget=64,
)
GPU: Final = Device(
    half_precision=True,
    fast_packed_matmul=True,
    gathers_halves=True,
    joins_projections=True,
    fused_attention=True,
    fused_rope=True,
    keeps_blocks=False,
    own_memory=True,
    prefill_budget=256,
)


def device() -> Device:
    """The kind of MLX's default device."""
    mx = _mlx()
    return CPU if mx.default_device() == mx.cpu else GPU


def device_name() -> str:
    """Of the default device: ``CPU``, or the GPU's name."""
    return "CPU" if device() is CPU else str(_mlx().device_info()["device_name"])


def working_set() -> int:
    """Bytes that the default device recommends to use at most; 0 where it recommends nothing."""
    if device() is CPU:
        return 0
    return int(_mlx().device_info().get("max_recommended_working_set_size") or 0)


def can_wire() -> bool:
    """Whether MLX can keep memory from being swapped out."""
    return bool(_mlx().metal.is_available())


def stream_devices() -> list[mx.DeviceType]:
    """The devices that a thread needs streams for."""
    mx = _mlx()
    return [mx.cpu, mx.gpu] if mx.is_available(mx.gpu) else [mx.cpu]


def _mlx() -> ModuleType:
    blas.preload()  # before the first import of MLX, which loads a BLAS
    import mlx.core as mx

    return mx
