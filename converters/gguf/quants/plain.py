"""Blocks with one scale: the Q*_0 and Q*_1 types, ternary types and the non-linear IQ4_NL."""

from __future__ import annotations

import numpy as np

from converters.gguf.quants.base import Bytes, Codec, Codes, bit_fields, half, paired
from converters.gguf.types import GGMLType


def _high_bits(blocks: Bytes, start: int) -> Bytes:
    """The 32 fifth bits of Q5 blocks, already shifted into place, shape (n, 32)."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    bits <<= 4
    return bits


class Q4_0(Codec):  # noqa: N801 - GGML's own name
    """32 nibbles and a scale: w = d * (q - 8)."""

    type, bits = GGMLType.Q4_0, 4

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 0)
        return paired(blocks[:, 2:], 16, d, -8 * d)


class Q4_1(Codec):  # noqa: N801
    """32 nibbles, a scale and a minimum: w = d * q + m."""

    type, bits = GGMLType.Q4_1, 4

    def unpack(self, blocks: Bytes) -> Codes:
        return paired(blocks[:, 4:], 16, half(blocks, 0), half(blocks, 2))


class Q5_0(Codec):  # noqa: N801
    """32 five-bit codes and a scale: w = d * (q - 16)."""

    type, bits = GGMLType.Q5_0, 5

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 0)
        return Codes(bit_fields(blocks[:, 6:], 4, 16) | _high_bits(blocks, 2), d, -16 * d)


class Q5_1(Codec):  # noqa: N801
    """32 five-bit codes, a scale and a minimum: w = d * q + m."""

    type, bits = GGMLType.Q5_1, 5

    def unpack(self, blocks: Bytes) -> Codes:
        q = bit_fields(blocks[:, 8:], 4, 16) | _high_bits(blocks, 4)
        return Codes(q, half(blocks, 0), half(blocks, 2))


class Q8_0(Codec):  # noqa: N801
    """32 signed bytes and a scale: w = d * q."""

    type, bits = GGMLType.Q8_0, 8

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 0)
        return Codes(blocks[:, 2:] ^ np.uint8(0x80), d, -128 * d)


class Q1_0(Codec):  # noqa: N801
    """128 signs and a scale: w = -d or d."""

    type, bits = GGMLType.Q1_0, 2

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 0)
        q = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
        return Codes(q, 2 * d, -d)


class Q2_0(Codec):  # noqa: N801
    """64 two-bit codes, neighbors in one byte, and a scale: w = d * (q - 1)."""

    type, bits = GGMLType.Q2_0, 2

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 0)
        return Codes(bit_fields(blocks[:, 2:], 2, 1), d, -d)


class TQ1_0(Codec):  # noqa: N801
    """256 ternary digits, five to a byte as a base-3 fraction of 256: w = d * (q - 1)."""

    type, bits = GGMLType.TQ1_0, 2

    def unpack(self, blocks: Bytes) -> Codes:
        parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
        powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
        digits = [
            ((x[:, None, :] * powers[:count]).astype(np.uint16) * 3 >> 8).reshape(len(x), -1)
            for x, count in parts
        ]
        d = half(blocks, 52)
        return Codes(np.concatenate(digits, axis=1).astype(np.uint8), d, -d)


class TQ2_0(Codec):  # noqa: N801
    """256 ternary digits of two bits each: w = d * (q - 1)."""

    type, bits = GGMLType.TQ2_0, 2

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 64)
        return Codes(bit_fields(blocks[:, :64], 2, 32), d, -d)


# The 16 levels of the non-linear four-bit types, moved by 128 to be unsigned.
IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)
IQ4_CODES = (IQ4_LEVELS + 128).astype(np.uint8)


class IQ4_NL(Codec):  # noqa: N801
    """32 indices into 16 uneven integer levels: w = d * level."""

    type, bits = GGMLType.IQ4_NL, 8

    def unpack(self, blocks: Bytes) -> Codes:
        d = half(blocks, 0)
        return Codes(IQ4_CODES[bit_fields(blocks[:, 2:], 4, 16)], d, -128 * d)
