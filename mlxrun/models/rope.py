"""Rotary position embeddings as a function chosen once per layer."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxrun.models.config import Rope
from mlxrun.on_cpu import rotation_of_single_tokens

Rotation = Callable[[mx.array, int | mx.array], mx.array]


def rotation(rope: Rope | None) -> Rotation:
    """``(x (B, H, T, D), offset) -> x`` with its leading dimensions rotated by position.

    ``offset`` is the position of the first token, or one per row (B,).
    """
    if rope is None:
        return lambda x, offset: x
    base: float | None = rope.base
    periods = values = None
    if rope.factors is not None:
        powers = rope.base ** (np.arange(0, rope.dims, 2) / rope.dims)
        values = (powers * rope.factors).astype(np.float32)
        base, periods = None, mx.array(values)

    def rotate(x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, rope.dims, traditional=rope.traditional,
            base=base, scale=rope.scale, offset=offset, freqs=periods,
        )  # fmt: skip

    if mx.default_device() != mx.cpu:
        return rotate
    known = None if values is None else tuple(map(float, values))
    single = rotation_of_single_tokens(rope.dims, rope.base, rope.scale, rope.traditional, known)
    return lambda x, offset: (
        rotate(x, offset) if isinstance(offset, int) or x.shape[2] > 1 else single(x, offset)
    )
