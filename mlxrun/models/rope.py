"""Rotary position embeddings as a function chosen once per layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxrun.kernels.cpu_ops import rotation_of_single_tokens
from mlxrun.kernels.device import device
from mlxrun.models.config import Rope
from mlxrun.weights.linear import settled

Rotation = Callable[[mx.array, int | mx.array], mx.array]


def frequencies(rope: Rope) -> mx.array:
    """Radians per position of each pair of dimensions, float32 (dims / 2,)."""
    if rope.factors is not None:
        return settled(mx.reciprocal(mx.array(_periods(rope, rope.factors))))
    steps = mx.arange(0, -(rope.dims // 2), -1, mx.float32)
    return settled(mx.exp(steps * (math.log(rope.base) / (rope.dims // 2))))


def _periods(rope: Rope, factors: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """Positions per radian, (dims / 2,), stretched by factors."""
    powers = rope.base ** (np.arange(0, rope.dims, 2) / rope.dims)
    return (powers * factors).astype(np.float32)


def rotation(rope: Rope | None) -> Rotation:
    """``(x (B, H, T, D), offset) -> x`` with its leading dimensions rotated by position.

    ``offset`` is the position of the first token, or one per row (B,).
    """
    if rope is None:
        return lambda x, offset: x
    base: float | None = rope.base
    periods = values = None
    if rope.factors is not None:
        values = _periods(rope, rope.factors)
        base, periods = None, mx.array(values)

    def rotate(x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, rope.dims, traditional=rope.traditional,
            base=base, scale=rope.scale, offset=offset, freqs=periods,
        )  # fmt: skip

    if device().fused_rope:
        return rotate
    known = None if values is None else tuple(map(float, values))
    single = rotation_of_single_tokens(rope.dims, rope.base, rope.scale, rope.traditional, known)
    return lambda x, offset: (
        rotate(x, offset) if isinstance(offset, int) or x.shape[2] > 1 else single(x, offset)
    )
