"""What storing a token makes of it, by MLX's own packing and unpacking of that token alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from naive_cache import Stored


def packed(bits: int, group: int, mode: str = "affine", across: bool = False) -> Stored:
    """There and back; ``across`` heads side by side, else each head by itself."""

    def stored(x: np.ndarray) -> np.ndarray:  # (B, H, 1, D)
        rows = x.reshape(x.shape[0], 1, 1, -1) if across else x
        codes, scales, *biases = mx.quantize(mx.array(rows), group, bits, mode)
        bias = biases[0] if biases else None
        back = mx.dequantize(codes, scales, bias, group, bits, mode, dtype=mx.float32)
        return np.array(back).reshape(x.shape)

    return stored


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)
