"""How keys and values are stored: plain, or quantised along each head's width.

A format turns tokens (B, H, T, D) into arrays whose first three axes are the same, so that caches
move tokens about without knowing what they hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx

Arrays = tuple[mx.array, ...]


class Format(ABC):
    """How tokens are stored."""

    @abstractmethod
    def pack(self, x: mx.array) -> Arrays:
        """Tokens (B, H, T, D) as arrays (B, H, T, ...)."""

    @abstractmethod
    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        """The tokens again, (B, H, T, D)."""


@dataclass(frozen=True)
class Plain(Format):
    """As they come."""

    def pack(self, x: mx.array) -> Arrays:
        return (x,)

    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        return arrays[0]


@dataclass(frozen=True)
class Quantised(Format):
    """In one of MLX's packed forms, in groups along each head's width.

    Attributes:
        bits: width of a code.
        group_size: neighbours that share a scale.
        mode: ``affine`` or one of MLX's fixed ones.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def pack(self, x: mx.array) -> Arrays:
        return tuple(mx.quantize(x, self.group_size, self.bits, self.mode))

    def unpack(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        codes, scales, *rest = arrays
        return mx.dequantize(
            codes,
            scales,
            rest[0] if rest else None,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )


PLAIN = Plain()
