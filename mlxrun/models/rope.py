"""Rotary position embeddings as a function chosen once per layer."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxrun.models.config import Rope

Rotation = Callable[[mx.array, int | mx.array], mx.array]


def rotation(rope: Rope | None) -> Rotation:
    """``(x (B, H, T, D), offset) -> x`` with its leading dimensions rotated by position.

    ``offset`` is the position of the first token, or one per row (B,).
    """
    if rope is None:
        return lambda x, offset: x
    base: float | None = rope.base
    periods = None
    if rope.factors is not None:
        exponents = np.arange(0, rope.dims, 2) / rope.dims
        values = rope.base**exponents * np.asarray(rope.factors)
        base, periods = None, mx.array(values.astype(np.float32))

    def rotate(x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            rope.dims,
            traditional=rope.traditional,
            base=base,
            scale=rope.scale,
            offset=offset,
            freqs=periods,
        )

    return rotate
