"""Codebook types: each index selects a row of small integers from a fixed grid.

The grids are constants of the format (up to 2048 rows of 8); the ``gguf`` package carries them, so
it is imported when the first such block is decoded and not before.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from converters.gguf.quants.base import Bytes, Codec, Codes, bit_fields, half
from converters.gguf.types import GGMLType
from converters.quantize.packing import gathered


@cache
def _grid(name: str) -> np.ndarray:
    """The grid of a type as int8, shape (entries, 4 or 8)."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return np.ascontiguousarray(kind.grid.reshape(kind.grid_shape)).astype(np.int8)


@cache
def _sign_table() -> np.ndarray:
    """+1 or -1 for each of 8 weights by a seven-bit index; the eighth sign makes parity even."""
    index = np.arange(128, dtype=np.uint8)
    parity = np.unpackbits(index[:, None], axis=1).sum(axis=1).astype(np.uint8) & 1
    return _signs((index | parity << 7)[:, None])


def _signs(masks: Bytes) -> np.ndarray:
    """Bit masks to +1 (clear) or -1 (set), int8, lowest bit first: (n, b) -> (n, 8 b)."""
    bits = np.unpackbits(masks, axis=1, bitorder="little").view(np.int8)
    return 1 - 2 * bits


def _words(blocks: Bytes, start: int, count: int, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize * count
    return gathered(blocks[:, start : start + size]).view(dtype)


def _signed_codes(values: np.ndarray, step: int, offset: int) -> Bytes:
    """Signed integer levels on a lattice of ``step`` as unsigned codes."""
    return (values.astype(np.int16) // step + offset).astype(np.uint8)


class IQ2_XXS(Codec):  # noqa: N801
    """Groups of 32: four grid rows, four seven-bit sign indices and a four-bit scale."""

    type, bits = GGMLType.IQ2_XXS, 8

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        words = _words(blocks, 2, 16, "<u4").reshape(n, 8, 2)
        scale = (
            half(blocks, 0) * (0.5 + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
        )
        index = np.ascontiguousarray(words[..., 0]).view(np.uint8)  # (n, 32)
        shifts = np.array([0, 7, 14, 21], np.uint32)
        signs = _sign_table()[(words[..., 1, None] >> shifts & 0x7F).reshape(n, 32)]
        values = _grid("IQ2_XXS")[index] * signs  # (n, 32, 8)
        return Codes(_signed_codes(values, 1, 128).reshape(n, 256), scale, -128 * scale)


class IQ2_XS(Codec):  # noqa: N801
    """Groups of 16: nine-bit grid indices with seven-bit sign indices, four-bit scales."""

    type, bits = GGMLType.IQ2_XS, 8

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        words = _words(blocks, 2, 32, "<u2")
        sub = bit_fields(blocks[:, 66:74], 4, 1).astype(np.float32)  # (n, 16)
        scale = half(blocks, 0) * (0.5 + sub) * np.float32(0.25)
        values = _grid("IQ2_XS")[words & 511] * _sign_table()[words >> 9]
        return Codes(_signed_codes(values, 1, 128).reshape(n, 256), scale, -128 * scale)


class IQ2_S(Codec):  # noqa: N801
    """Groups of 16: ten-bit grid indices, explicit signs, four-bit scales."""

    type, bits = GGMLType.IQ2_S, 8

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        high = bit_fields(blocks[:, 66:74], 2, 1).astype(np.uint16)
        index = blocks[:, 2:34] | high << 8  # (n, 32)
        sub = bit_fields(blocks[:, 74:82], 4, 1).astype(np.float32)
        scale = half(blocks, 0) * (0.5 + sub) * np.float32(0.25)
        values = _grid("IQ2_S")[index] * _signs(blocks[:, 34:66]).reshape(n, 32, 8)
        return Codes(_signed_codes(values, 1, 128).reshape(n, 256), scale, -128 * scale)


class IQ3_XXS(Codec):  # noqa: N801
    """Groups of 32: eight grid rows of four even integers, four sign indices, a four-bit scale."""

    type, bits = GGMLType.IQ3_XXS, 6

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        words = _words(blocks, 66, 8, "<u4")
        # The grid holds even integers up to 62: a lattice of step two, hence twice the scale.
        scale = half(blocks, 0) * (0.5 + (words >> 28).astype(np.float32))
        shifts = np.array([0, 7, 14, 21], np.uint32)
        signs = _sign_table()[(words[..., None] >> shifts & 0x7F).reshape(n, 32)]
        values = _grid("IQ3_XXS")[blocks[:, 2:66]].reshape(n, 32, 8) * signs
        return Codes(_signed_codes(values, 2, 32).reshape(n, 256), scale, -32 * scale)


class IQ3_S(Codec):  # noqa: N801
    """Groups of 32: nine-bit grid indices, explicit signs, odd levels up to 15, four-bit scales."""

    type, bits = GGMLType.IQ3_S, 4

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
        index = blocks[:, 2:66] | high << 8  # (n, 64)
        step = half(blocks, 0) * (1 + 2 * bit_fields(blocks[:, 106:110], 4, 1).astype(np.float32))
        values = _grid("IQ3_S")[index].reshape(n, 32, 8) * _signs(blocks[:, 74:106]).reshape(
            n, 32, 8
        )
        # Odd levels v = 2 c - 15 for c in 0..15.
        codes = (values + 15).view(np.uint8) >> 1
        return Codes(codes.reshape(n, 256), 2 * step, -15 * step)


class IQ1_S(Codec):  # noqa: N801
    """Groups of 32: ternary grid rows moved by an eighth up or down, three-bit scales."""

    type, bits = GGMLType.IQ1_S, 2

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        qh = _words(blocks, 34, 8, "<u2")
        scale = half(blocks, 0) * (2 * (qh >> 12 & 7).astype(np.float32) + 1)
        delta = np.where(qh & 0x8000, np.float32(-0.125), np.float32(0.125))
        high = (qh[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(n, 32)
        values = _grid("IQ1_S")[blocks[:, 2:34] | high << 8]  # (n, 32, 8) of -1, 0, 1
        return Codes((values + 1).view(np.uint8).reshape(n, 256), scale, scale * (delta - 1))


class IQ1_M(Codec):  # noqa: N801
    """Groups of 16 by scale, of 8 by shift: levels s * (8 g +- 1), s odd up to 15, g ternary.

    All levels of 32 neighbors are odd multiples of d / 8 up to 135, hence 136 codes of step d / 4.
    """

    type, bits = GGMLType.IQ1_M, 8

    def unpack(self, blocks: Bytes) -> Codes:
        n = len(blocks)
        packed = _words(blocks, 48, 4, "<u2")
        nibbles = packed >> 12  # the float16 scale, a nibble in the top of each word
        shifts = np.array([0, 4, 8, 12], np.uint16)
        d = np.bitwise_or.reduce(nibbles << shifts, axis=1).astype(np.uint16).view(np.float16)
        s = packed[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7  # (n, 4, 4)
        s = (2 * s + 1).astype(np.int16).reshape(n, 16, 1)
        qh = bit_fields(blocks[:, 32:48], 4, 1)  # (n, 32)
        index = blocks[:, :32] | (qh & 7).astype(np.uint16) << 8
        shift = np.where(qh & 8, np.int16(-1), np.int16(1))[..., None]
        levels = _grid("IQ1_M")[index].astype(np.int16) * 8 + shift  # (n, 32, 8)
        codes = (levels.reshape(n, 16, 16) * s + 135) >> 1
        step = np.repeat(d.astype(np.float32)[:, None] / 8, 8, axis=1)
        return Codes(codes.astype(np.uint8).reshape(n, 256), 2 * step, -135 * step)
