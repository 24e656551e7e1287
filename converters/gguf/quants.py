"""GGML block types: integer codes on an affine lattice, one scale and bias per group.

Every GGML weight type stores ``w = scale * code + bias`` for groups of 16 to 256 neighbors, only
packed differently. A :class:`Codec` undoes the packing; ``converters.quantize.affine`` chooses an
MLX form for the codes.

Source of all block layouts: ggml's ``ggml-common.h`` (facts), checked bit for bit against the
``gguf`` package in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.packing import (
    bit_fields,
    gathered,
    join_bits,
    pair_nibbles,
    spread_nibbles,
)

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


@dataclass(frozen=True)
class Codec:
    """One GGML block type.

    Attributes:
        type: the GGML type.
        bits: the fewest bits MLX can hold the codes in (2, 3, 4, 5, 6 or 8).
        unpack: from blocks (n, bytes per block) to codes.
        group: weights that share a scale and a bias in :class:`Codes`.
        half_scales: scales and biases are float16 numbers, which MLX holds exactly.
        unpack_products: the same weights as :class:`Products`, where a type has that form.
    """

    type: GGMLType
    bits: int
    unpack: Callable[[Bytes], Codes]
    group: int = 32
    half_scales: bool = False
    unpack_products: Callable[[Bytes], Products] | None = None

    def decode(self, raw: Bytes) -> Codes:
        """Unpack raw bytes, a whole number of blocks."""
        return self.unpack(raw.reshape(-1, BLOCKS[self.type][1]))

    def products(self, raw: Bytes) -> Products | None:
        """The same weights without scales narrower than a block, where a type has that form."""
        if self.unpack_products is None:
            return None
        return self.unpack_products(raw.reshape(-1, BLOCKS[self.type][1]))

    @property
    def mlx_group(self) -> int:
        """The group size of an MLX form with these codes; 0 where the type's is too narrow."""
        return min(self.group, 128) if self.group >= 32 else 0


CODECS: dict[GGMLType, Codec] = {}

Unpack = Callable[[Bytes], Codes]


def _codec(type_: GGMLType, bits: int, **properties: Any) -> Callable[[Unpack], Unpack]:
    """Register a function as the ``unpack`` of a :class:`Codec`."""

    def register(unpack: Unpack) -> Unpack:
        CODECS[type_] = Codec(type_, bits, unpack, **properties)
        return unpack

    return register


def _paired(nibbles: Bytes, run: int, scale: Floats, bias: Floats) -> Codes:
    """Codes of four bits from bytes (n, b) that hold ``run`` in their low halves, then as many."""
    return Codes(pair_nibbles(nibbles, run), scale, bias, width=4)


def half(blocks: Bytes, start: int, count: int = 1) -> Floats:
    """Read ``count`` little-endian float16 values of each block as float32, shape (n, count)."""
    return gathered(blocks[:, start : start + 2 * count]).view("<f2").astype(np.float32)


# --- blocks with one scale ------------------------------------------------------------------------


def _high_bits(blocks: Bytes, start: int) -> Bytes:
    """The 32 fifth bits of Q5 blocks, already shifted into place, shape (n, 32)."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    bits <<= 4
    return bits


@_codec(GGMLType.Q4_0, bits=4, half_scales=True)
def _q4_0(blocks: Bytes) -> Codes:
    """32 nibbles and a scale: w = d * (q - 8)."""
    d = half(blocks, 0)
    return _paired(blocks[:, 2:], 16, d, -8 * d)


@_codec(GGMLType.Q4_1, bits=4, half_scales=True)
def _q4_1(blocks: Bytes) -> Codes:
    """32 nibbles, a scale and a minimum: w = d * q + m."""
    return _paired(blocks[:, 4:], 16, half(blocks, 0), half(blocks, 2))


@_codec(GGMLType.Q5_0, bits=5, half_scales=True)
def _q5_0(blocks: Bytes) -> Codes:
    """32 five-bit codes and a scale: w = d * (q - 16)."""
    d = half(blocks, 0)
    return Codes(bit_fields(blocks[:, 6:], 4, 16) | _high_bits(blocks, 2), d, -16 * d)


@_codec(GGMLType.Q5_1, bits=5, half_scales=True)
def _q5_1(blocks: Bytes) -> Codes:
    """32 five-bit codes, a scale and a minimum: w = d * q + m."""
    q = bit_fields(blocks[:, 8:], 4, 16) | _high_bits(blocks, 4)
    return Codes(q, half(blocks, 0), half(blocks, 2))


@_codec(GGMLType.Q8_0, bits=8, half_scales=True)
def _q8_0(blocks: Bytes) -> Codes:
    """32 signed bytes and a scale: w = d * q."""
    d = half(blocks, 0)
    return Codes(blocks[:, 2:] ^ np.uint8(0x80), d, -128 * d)


@_codec(GGMLType.Q1_0, bits=2, group=128, half_scales=True)
def _q1_0(blocks: Bytes) -> Codes:
    """128 signs and a scale: w = -d or d."""
    d = half(blocks, 0)
    q = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return Codes(q, 2 * d, -d)


@_codec(GGMLType.Q2_0, bits=2, group=64, half_scales=True)
def _q2_0(blocks: Bytes) -> Codes:
    """64 two-bit codes, neighbors in one byte, and a scale: w = d * (q - 1)."""
    d = half(blocks, 0)
    return Codes(bit_fields(blocks[:, 2:], 2, 1), d, -d)


@_codec(GGMLType.TQ1_0, bits=2, group=256, half_scales=True)
def _tq1_0(blocks: Bytes) -> Codes:
    """256 ternary digits, five to a byte as a base-3 fraction of 256: w = d * (q - 1)."""
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    digits = [
        ((x[:, None, :] * powers[:count]).astype(np.uint16) * 3 >> 8).reshape(len(x), -1)
        for x, count in parts
    ]
    d = half(blocks, 52)
    return Codes(np.concatenate(digits, axis=1).astype(np.uint8), d, -d)


@_codec(GGMLType.TQ2_0, bits=2, group=256, half_scales=True)
def _tq2_0(blocks: Bytes) -> Codes:
    """256 ternary digits of two bits each: w = d * (q - 1)."""
    d = half(blocks, 64)
    return Codes(bit_fields(blocks[:, :64], 2, 32), d, -d)


# The 16 levels of the non-linear four-bit types, moved by 128 to be unsigned.
IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)
IQ4_CODES = (IQ4_LEVELS + 128).astype(np.uint8)


@_codec(GGMLType.IQ4_NL, bits=8, half_scales=True)
def _iq4_nl(blocks: Bytes) -> Codes:
    """32 indices into 16 uneven integer levels: w = d * level."""
    d = half(blocks, 0)
    return Codes(IQ4_CODES[bit_fields(blocks[:, 2:], 4, 16)], d, -128 * d)


# --- K-quants: 256 weights with two levels of scales, and IQ4_XS, which has the same structure ----


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


@_codec(GGMLType.Q2_K, bits=2, group=16)
def _q2_k(blocks: Bytes) -> Codes:
    """Groups of 16: w = d * s * q - dmin * m, s and m of four bits."""
    scales = blocks[:, :16]
    d, dmin = half(blocks, 80), half(blocks, 82)
    q = bit_fields(blocks[:, 16:80], 2, 32)
    return Codes(
        q,
        d * (scales & 0x0F).astype(np.float32),
        -dmin * (scales >> 4).astype(np.float32),
    )


@_codec(GGMLType.Q3_K, bits=8, half_scales=True)
def _q3_k(blocks: Bytes) -> Codes:
    """Groups of 16: w = d * (s - 32) * (q - 4), six-bit s, three-bit q.

    Both factors are small integers, so 32 neighbors share one lattice of step d: their products
    span -124..128. The lattice is mirrored (step -d) so that the span fits 0..252 around 128, which
    keeps the bias a power of two times d and therefore exact in half precision.
    """
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


@_codec(GGMLType.Q4_K, bits=4)
def _q4_k(blocks: Bytes) -> Codes:
    """Groups of 32: w = d * s * q - dmin * m, s and m of six bits, four-bit q."""
    s, m = _six_bit_pairs(blocks[:, 4:16])
    return _paired(blocks[:, 16:], 32, half(blocks, 0) * s, -half(blocks, 2) * m)


@_codec(GGMLType.Q5_K, bits=5)
def _q5_k(blocks: Bytes) -> Codes:
    """Groups of 32: as Q4_K with a fifth bit of each code in a plane of its own."""
    s, m = _six_bit_pairs(blocks[:, 4:16])
    q = bit_fields(blocks[:, 48:], 4, 32)
    join_bits(q, bit_fields(blocks[:, 16:48], 1, 32), 4)
    return Codes(q, half(blocks, 0) * s, -half(blocks, 2) * m)


def _q6_k_codes(blocks: Bytes) -> Bytes:
    return join_bits(bit_fields(blocks[:, :128], 4, 64), bit_fields(blocks[:, 128:192], 2, 32), 4)


def _q6_k_products(blocks: Bytes) -> Products:
    p = _q6_k_codes(blocks).astype(np.int16)
    p -= np.int16(32)
    groups = p.reshape(-1, 16)
    groups *= blocks[:, 192:208].view(np.int8).reshape(-1, 1).astype(np.int16)
    return Products(p, half(blocks, 208))


@_codec(GGMLType.Q6_K, bits=6, group=16, unpack_products=_q6_k_products)
def _q6_k(blocks: Bytes) -> Codes:
    """Groups of 16: w = d * s * (q - 32), signed eight-bit s."""
    scale = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Codes(_q6_k_codes(blocks), scale, -32 * scale)


@_codec(GGMLType.IQ4_XS, bits=8)
def _iq4_xs(blocks: Bytes) -> Codes:
    """Groups of 32: w = d * (s - 32) * level, six-bit s, the sixteen uneven levels of IQ4_NL."""
    low = bit_fields(blocks[:, 4:8], 4, 1)
    high = bit_fields(blocks[:, 2:4], 2, 1)
    s = (low | high << 4).astype(np.float32) - 32
    scale = half(blocks, 0) * s
    return Codes(IQ4_CODES[bit_fields(blocks[:, 8:], 4, 16)], scale, -128 * scale)


# --- codebook types: each index selects a row of small integers from a fixed grid -----------------


@cache
def _grid(name: str) -> np.ndarray:
    """The grid of a type as int8, shape (entries, 4 or 8), out of the ``gguf`` package.

    Imported when the first such block is decoded: grids have up to 2048 rows of 8.
    """
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


@_codec(GGMLType.IQ2_XXS, bits=8)
def _iq2_xxs(blocks: Bytes) -> Codes:
    """Groups of 32: four grid rows, four seven-bit sign indices and a four-bit scale."""
    n = len(blocks)
    words = _words(blocks, 2, 16, "<u4").reshape(n, 8, 2)
    scale = half(blocks, 0) * (0.5 + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8)  # (n, 32)
    shifts = np.array([0, 7, 14, 21], np.uint32)
    signs = _sign_table()[(words[..., 1, None] >> shifts & 0x7F).reshape(n, 32)]
    values = _grid("IQ2_XXS")[index] * signs  # (n, 32, 8)
    return Codes(_signed_codes(values, 1, 128).reshape(n, 256), scale, -128 * scale)


@_codec(GGMLType.IQ2_XS, bits=8, group=16)
def _iq2_xs(blocks: Bytes) -> Codes:
    """Groups of 16: nine-bit grid indices with seven-bit sign indices, four-bit scales."""
    n = len(blocks)
    words = _words(blocks, 2, 32, "<u2")
    sub = bit_fields(blocks[:, 66:74], 4, 1).astype(np.float32)  # (n, 16)
    scale = half(blocks, 0) * (0.5 + sub) * np.float32(0.25)
    values = _grid("IQ2_XS")[words & 511] * _sign_table()[words >> 9]
    return Codes(_signed_codes(values, 1, 128).reshape(n, 256), scale, -128 * scale)


@_codec(GGMLType.IQ2_S, bits=8, group=16)
def _iq2_s(blocks: Bytes) -> Codes:
    """Groups of 16: ten-bit grid indices, explicit signs, four-bit scales."""
    n = len(blocks)
    high = bit_fields(blocks[:, 66:74], 2, 1).astype(np.uint16)
    index = blocks[:, 2:34] | high << 8  # (n, 32)
    sub = bit_fields(blocks[:, 74:82], 4, 1).astype(np.float32)
    scale = half(blocks, 0) * (0.5 + sub) * np.float32(0.25)
    values = _grid("IQ2_S")[index] * _signs(blocks[:, 34:66]).reshape(n, 32, 8)
    return Codes(_signed_codes(values, 1, 128).reshape(n, 256), scale, -128 * scale)


@_codec(GGMLType.IQ3_XXS, bits=6)
def _iq3_xxs(blocks: Bytes) -> Codes:
    """Groups of 32: eight grid rows of four even integers, four sign indices, a four-bit scale."""
    n = len(blocks)
    words = _words(blocks, 66, 8, "<u4")
    # The grid holds even integers up to 62: a lattice of step two, hence twice the scale.
    scale = half(blocks, 0) * (0.5 + (words >> 28).astype(np.float32))
    shifts = np.array([0, 7, 14, 21], np.uint32)
    signs = _sign_table()[(words[..., None] >> shifts & 0x7F).reshape(n, 32)]
    values = _grid("IQ3_XXS")[blocks[:, 2:66]].reshape(n, 32, 8) * signs
    return Codes(_signed_codes(values, 2, 32).reshape(n, 256), scale, -32 * scale)


@_codec(GGMLType.IQ3_S, bits=4)
def _iq3_s(blocks: Bytes) -> Codes:
    """Groups of 32: nine-bit grid indices, explicit signs, odd levels up to 15, four-bit scales."""
    n = len(blocks)
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    index = blocks[:, 2:66] | high << 8  # (n, 64)
    step = half(blocks, 0) * (1 + 2 * bit_fields(blocks[:, 106:110], 4, 1).astype(np.float32))
    values = _grid("IQ3_S")[index].reshape(n, 32, 8) * _signs(blocks[:, 74:106]).reshape(n, 32, 8)
    # Odd levels v = 2 c - 15 for c in 0..15.
    codes = (values + 15).view(np.uint8) >> 1
    return Codes(codes.reshape(n, 256), 2 * step, -15 * step)


@_codec(GGMLType.IQ1_S, bits=2)
def _iq1_s(blocks: Bytes) -> Codes:
    """Groups of 32: ternary grid rows moved by an eighth up or down, three-bit scales."""
    n = len(blocks)
    qh = _words(blocks, 34, 8, "<u2")
    scale = half(blocks, 0) * (2 * (qh >> 12 & 7).astype(np.float32) + 1)
    delta = np.where(qh & 0x8000, np.float32(-0.125), np.float32(0.125))
    high = (qh[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(n, 32)
    values = _grid("IQ1_S")[blocks[:, 2:34] | high << 8]  # (n, 32, 8) of -1, 0, 1
    return Codes((values + 1).view(np.uint8).reshape(n, 256), scale, scale * (delta - 1))


@_codec(GGMLType.IQ1_M, bits=8)
def _iq1_m(blocks: Bytes) -> Codes:
    """Groups of 16 by scale, of 8 by shift: levels s * (8 g +- 1), s odd up to 15, g ternary.

    All levels of 32 neighbors are odd multiples of d / 8 up to 135, hence 136 codes of step d / 4.
    """
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
