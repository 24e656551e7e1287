"""What storing a token makes of it, by MLX's own packing and unpacking of that token alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from naive_cache import Stored

from mlxrun.kv_cache.attention import AttentionOp, Mask
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.formats import StoredKV
from mlxrun.kv_cache.shared_prefix import PrefixedKV

STORED = StoredKV, PrefixedKV


class _Recorder(AttentionOp):
    """Attention that is not computed: it records its arguments."""

    keys: mx.array
    values: mx.array
    mask: Mask = None

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        self.keys, self.values, self.mask = k, v, mask
        return mx.zeros((*q.shape[:3], v.shape[3]), q.dtype)

    def attend_quantized(self, q: mx.array, keys: object, values: object, mask: Mask) -> mx.array:
        assert isinstance(keys, STORED) and isinstance(values, STORED)
        return self(q, keys.unpacked(), values.unpacked(), mask)


def append(cache: KVCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
    """Append tokens (R, H, T, D); the keys, values and mask that they attend to."""
    seen = _Recorder()
    cache.attend(keys, keys, values, seen)
    return seen.keys, seen.values, seen.mask


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
