"""What a GGML block type means: integer codes on an affine lattice, one scale and bias per group.

Every GGML weight type stores ``w = scale * code + bias`` for groups of 16 to 256 neighbors, only
packed differently. A :class:`Codec` undoes the packing and nothing else; choosing an MLX form for
the codes is the business of ``converters.quantize.affine``.

Source of all block layouts: ggml's ``ggml-common.h`` (facts), checked bit for bit against the
``gguf`` package in the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.packing import bit_fields, gathered, pair_nibbles, spread_nibbles

__all__ = ["CODECS", "Codec", "Codes", "Products", "bit_fields", "half", "paired"]

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """Unpacked weights of ``n`` blocks: ``w[i, g G + k] = scale[i, g] q[i, g G + k] + bias[i, g]``.

    In float32 the product is exact for every type, so the sum rounds at most once and the value is
    bit-equal to ggml's own dequantization.

    Attributes:
        stored: the codes, uint8: one in a byte, shape (n, elements per block), or two neighbors in
            a byte, the first one low, shape (n, elements per block / 2).
        scale: float32, shape (n, groups per block).
        bias: float32, shape (n, groups per block).
        width: bits that a code is stored in, 8 or 4.
    """

    stored: Bytes
    scale: Floats
    bias: Floats
    width: int = 8

    @property
    def q(self) -> Bytes:
        """The codes, one in a byte, uint8 (n, elements per block)."""
        return self.stored if self.width == 8 else spread_nibbles(self.stored)

    @property
    def group(self) -> int:
        """Neighboring weights that share one scale and bias."""
        return int(self.stored.shape[1] * 8 // self.width // self.scale.shape[1])

    def values(self) -> Floats:
        """Dequantized weights, float32, shape (n, elements per block)."""
        q = self.q.astype(np.float32)
        groups = q.reshape(*self.scale.shape, self.group)
        groups *= self.scale[:, :, None]
        groups += self.bias[:, :, None]
        return q

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.bias).all())

    def times(self, factor: Floats) -> Codes:
        """The weights times a factor of each row, (rows,), of a whole number of blocks."""
        each = np.repeat(factor, len(self.scale) // len(factor))[:, None]
        return replace(self, scale=self.scale * each, bias=self.bias * each)


@dataclass(frozen=True)
class Products:
    """Weights of ``n`` blocks as whole numbers: ``w[i, k] = unit[i] p[i, k]``, exact in float32.

    Attributes:
        p: int16, shape (n, elements per block).
        unit: float32, shape (n, 1).
    """

    p: Integers
    unit: Floats

    def values(self) -> Floats:
        """See :meth:`Codes.values`."""
        values: Floats = self.p.astype(np.float32)
        values *= self.unit
        return values

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.unit).all())

    def times(self, factor: Floats) -> Products:
        """See :meth:`Codes.times`."""
        each = np.repeat(factor, len(self.unit) // len(factor))[:, None]
        return replace(self, unit=self.unit * each)


def paired(nibbles: Bytes, run: int, scale: Floats, bias: Floats) -> Codes:
    """Codes of four bits from bytes (n, b) that hold ``run`` in their low halves, then as many."""
    return Codes(pair_nibbles(nibbles, run), scale, bias, width=4)


class Codec(ABC):
    """One GGML block type. Subclasses register themselves by ``type``.

    Attributes:
        type: the GGML type.
        bits: the fewest bits MLX can hold the codes in (2, 3, 4, 5, 6 or 8).
    """

    type: ClassVar[GGMLType]
    bits: ClassVar[int]

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "type"):
            CODECS[cls.type] = cls()

    def decode(self, raw: Bytes) -> Codes:
        """Unpack raw bytes, a whole number of blocks, into codes."""
        return self.unpack(self.blocks(raw))

    def blocks(self, raw: Bytes) -> Bytes:
        """Raw bytes as blocks, shape (n, bytes per block)."""
        return raw.reshape(-1, BLOCKS[self.type][1])

    def products(self, raw: Bytes) -> Products | None:
        """The same weights without scales narrower than a block, where a type has that form."""
        return None

    @abstractmethod
    def unpack(self, blocks: Bytes) -> Codes:
        """Unpack blocks of shape (n, bytes per block)."""


CODECS: dict[GGMLType, Codec] = {}


def half(blocks: Bytes, start: int, count: int = 1) -> Floats:
    """Read ``count`` little-endian float16 values of each block as float32, shape (n, count)."""
    return gathered(blocks[:, start : start + 2 * count]).view("<f2").astype(np.float32)
