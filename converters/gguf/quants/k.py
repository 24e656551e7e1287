"""K-quants: blocks of 256 weights with two levels of scales, and IQ4_XS, which is built alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.gguf.quants.base import (
    Bytes,
    Codec,
    Codes,
    Floats,
    Products,
    bit_fields,
    half,
    paired,
)
from converters.gguf.quants.plain import IQ4_CODES
from converters.gguf.types import GGMLType
from converters.quantize.packing import gathered, join_bits


def _six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minimums of six bits from twelve bytes (Q4_K, Q5_K).

    The first four of each fill the low six bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 and their two top bits above the first four.
    """
    a, b, c = gathered(packed).view("<u4").T
    low, top = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
    pairs = np.empty((2, len(packed), 2), "<u4")
    pairs[:, :, 0] = a, b
    pairs[:, :, 0] &= low | top
    for each, first, nibbles in zip(pairs, (a, b), (c, c >> np.uint32(4)), strict=True):
        each[:, 1] = nibbles & low | first >> np.uint32(2) & top
    scales, minimums = pairs.view(np.uint8).astype(np.float32)
    return scales, minimums


class Q2_K(Codec):  # noqa: N801
    """Groups of 16: w = d * s * q - dmin * m, s and m of four bits."""

    type, bits = GGMLType.Q2_K, 2

    def unpack(self, blocks: Bytes) -> Codes:
        scales = blocks[:, :16]
        d, dmin = half(blocks, 80), half(blocks, 82)
        q = bit_fields(blocks[:, 16:80], 2, 32)
        return Codes(
            q,
            d * (scales & 0x0F).astype(np.float32),
            -dmin * (scales >> 4).astype(np.float32),
        )


class Q3_K(Codec):  # noqa: N801
    """Groups of 16: w = d * (s - 32) * (q - 4), six-bit s, three-bit q.

    Both factors are small integers, so 32 neighbors share one lattice of step d: their products
    span -124..128. The lattice is mirrored (step -d) so that the span fits 0..252 around 128, which
    keeps the bias a power of two times d and therefore exact in half precision.
    """

    type, bits = GGMLType.Q3_K, 8

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        d = half(blocks, 108)
        low = bit_fields(blocks[:, 96:104], 4, 8)
        high = bit_fields(blocks[:, 104:108], 2, 4)
        s = (low | high << 4).astype(np.int16) - 32  # (n, 16)
        q = bit_fields(blocks[:, 32:96], 2, 32) | (bit_fields(blocks[:, :32], 1, 32) << 2)
        products = s[:, :, None] * (q.astype(np.int16) - 4).reshape(n, 16, 16)
        codes = (128 - products).astype(np.uint8).reshape(n, 256)
        scale = np.repeat(-d, 8, axis=1)
        return Codes(codes, scale, -128 * scale)


class Q4_K(Codec):  # noqa: N801
    """Groups of 32: w = d * s * q - dmin * m, s and m of six bits, four-bit q."""

    type, bits = GGMLType.Q4_K, 4

    def unpack(self, blocks: Bytes) -> Codes:
        s, m = _six_bit_pairs(blocks[:, 4:16])
        return paired(blocks[:, 16:], 32, half(blocks, 0) * s, -half(blocks, 2) * m)


class Q5_K(Codec):  # noqa: N801
    """Groups of 32: as Q4_K with a fifth bit of each code in a plane of its own."""

    type, bits = GGMLType.Q5_K, 5

    def unpack(self, blocks: Bytes) -> Codes:
        s, m = _six_bit_pairs(blocks[:, 4:16])
        q = bit_fields(blocks[:, 48:], 4, 32)
        join_bits(q, bit_fields(blocks[:, 16:48], 1, 32), 4)
        return Codes(q, half(blocks, 0) * s, -half(blocks, 2) * m)


class Q6_K(Codec):  # noqa: N801
    """Groups of 16: w = d * s * (q - 32), signed eight-bit s."""

    type, bits = GGMLType.Q6_K, 6

    def unpack(self, blocks: Bytes) -> Codes:
        scale = half(blocks, 208) * self._scales(blocks).astype(np.float32)
        return Codes(self._codes(blocks), scale, -32 * scale)

    def products(self, raw: Bytes) -> Products:
        blocks = self.blocks(raw)
        p = self._codes(blocks).astype(np.int16)
        p -= np.int16(32)
        groups = p.reshape(-1, 16)
        groups *= self._scales(blocks).reshape(-1, 1).astype(np.int16)
        return Products(p, half(blocks, 208))

    @staticmethod
    def _codes(blocks: Bytes) -> Bytes:
        return join_bits(
            bit_fields(blocks[:, :128], 4, 64), bit_fields(blocks[:, 128:192], 2, 32), 4
        )

    @staticmethod
    def _scales(blocks: Bytes) -> npt.NDArray[np.int8]:
        return blocks[:, 192:208].view(np.int8)


class IQ4_XS(Codec):  # noqa: N801
    """Groups of 32: w = d * (s - 32) * level, six-bit s, the sixteen uneven levels of IQ4_NL."""

    type, bits = GGMLType.IQ4_XS, 8

    def unpack(self, blocks: Bytes) -> Codes:
        low = bit_fields(blocks[:, 4:8], 4, 1)
        high = bit_fields(blocks[:, 2:4], 2, 1)
        s = (low | high << 4).astype(np.float32) - 32
        scale = half(blocks, 0) * s
        return Codes(IQ4_CODES[bit_fields(blocks[:, 8:], 4, 16)], scale, -128 * scale)
