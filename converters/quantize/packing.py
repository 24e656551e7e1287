"""Codes in and out of MLX's packed words, and floats rounded to the types of a checkpoint.

Everything works on 64-bit words or whole arrays, so that numpy moves many codes in one instruction.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
#: Arrays as they are stored; bfloat16, which numpy has no type for, as uint16 bit patterns.
Stored = npt.NDArray[np.generic]

# Widths of the lanes that are merged in pairs while the codes of eight bytes are squeezed together.
_LANES = (8, 16, 32)


def _every(lane: int, low: int) -> np.uint64:
    """A 64-bit mask: the lowest ``low`` bits of each lane of ``lane`` bits."""
    return np.uint64((2**64 - 1) // (2**lane - 1) * (2**low - 1))


_NIBBLES = _every(8, 4)
_SECOND_NIBBLES = np.uint64(int(_every(16, 4)) << 4)


def gathered(x: Bytes) -> Bytes:
    """A contiguous copy of strided rows (n, b); moving each row as one element is far faster."""
    return x.view(f"V{x.shape[1]}").copy().view(np.uint8)


def pack_bits(codes: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """Pack uint8 codes (n, c) into MLX's words, uint32 (n, c * bits / 32).

    Eight codes at a time in one 64-bit word: each step shifts the upper half of a lane down to its
    lower half, so lanes double while the codes in them become contiguous.
    """
    n = codes.shape[0]
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    x = np.array(codes, order="C").view("<u8")
    upper = np.empty_like(x)
    for lane in _LANES:
        width = bits * lane // 8
        np.right_shift(x, np.uint64(lane - width), out=upper)
        upper &= np.uint64(int(_every(2 * lane, width)) << width)
        x &= _every(2 * lane, width)
        x |= upper
    return _low_bytes(x.reshape(-1), bits).reshape(n, -1).view("<u4")


def _low_bytes(x: Words, count: int) -> Bytes:
    """The lowest ``count`` bytes of each word, one after the other."""
    parts = {2: "<u2", 3: "<u2,u1", 4: "<u4", 5: "<u4,u1", 6: "<u4,<u2"}[count].split(",")
    fields, at = [], 0
    for i, kind in enumerate(parts):
        fields.append((f"f{i}", kind, at))
        at += np.dtype(kind).itemsize
    out = np.empty(len(x), np.dtype([(name, kind) for name, kind, _ in fields]))
    whole = x.view(np.uint8).reshape(-1, 8)
    for name, kind, start in fields:
        out[name] = whole[:, start : start + np.dtype(kind).itemsize].view(kind)[:, 0]
    return out.view(np.uint8)


def pair_nibbles(x: Bytes, run: int) -> Bytes:
    """Nibbles in ggml's order to neighbors in a byte, the first one low: (n, b) -> (n, b).

    In each run of ``run`` bytes ggml keeps codes 0 to run - 1 in the low nibbles and the next
    ``run`` codes in the high ones.
    """
    n = len(x)
    # Swapping the middle nibbles of two bytes makes those of a half neighbors.
    words = gathered(x).view("<u8")
    moved = words >> np.uint64(4)
    moved ^= words
    moved &= _SECOND_NIBBLES
    words ^= moved
    moved <<= np.uint64(4)
    words ^= moved
    out = np.empty((n, x.shape[1] // run, 2, run // 2), np.uint8)
    whole = out.view(f"V{run // 2}")[..., 0]  # a run's half moves as one element
    pairs = words.view("<u2")
    for half in range(2):
        if half:
            pairs >>= np.uint16(8)
        whole[:, :, half] = pairs.astype(np.uint8).view(f"V{run // 2}").reshape(n, -1)
    return out.reshape(n, -1)


def join_bits(low: Bytes, high: Bytes, width: int) -> Bytes:
    """``low | high << width``, in place; no bit of ``high`` may be shifted out of its byte."""
    words = low.view("<u8")
    words |= high.view("<u8") << np.uint64(width)
    return low


def bit_fields(x: Bytes, width: int, run: int) -> Bytes:
    """Split bytes into fields of ``width`` bits, lowest first, run by run.

    Within each run of ``run`` bytes all lowest fields come first, then all second ones: the order
    in which ggml lays out nibbles and bit planes. (n, b) -> (n, b * 8 / width).
    """
    n, columns = x.shape
    x = gathered(x)
    words = x.view("<u8") if columns % 8 == 0 else x
    shifted = np.empty_like(words)
    count = 8 // width
    out = np.empty((n, columns // run, count, run), np.uint8)
    whole = out.view(f"V{run}")[..., 0]  # a run moves as one element
    mask = _every(8, width).astype(words.dtype)
    for i in range(count):
        np.right_shift(words, words.dtype.type(i * width), out=shifted)
        shifted &= mask
        whole[:, :, i] = shifted.view(np.uint8).view(f"V{run}").reshape(n, -1)
    return out.reshape(n, -1)


def spread_nibbles(pairs: Bytes) -> Bytes:
    """Two neighbors in a byte to a byte each: (n, b) -> (n, 2 b) codes of four bits."""
    wide = pairs.astype("<u2")
    wide |= wide << np.uint16(4)
    wide &= np.uint16(0x0F0F)
    return wide.view(np.uint8)


def sums(stored: Bytes, width: int, groups: int) -> tuple[Words, Words]:
    """Sum and sum of squares of the codes of each group, exactly.

    Args:
        stored: rows of codes, at most 256 to a group, in ``width`` bits each (8, or 4 for two in a
            byte).
        groups: their number.

    Returns:
        uint64 (groups,) each.
    """
    words = stored.view("<u8").reshape(-1)
    if width == 8:
        pairs = _add_lanes(words, 8)
        wide = stored.reshape(-1).astype("<u2")
        wide *= wide
        squares = _add_lanes(wide.view("<u8"), 16)
        return _across(pairs, groups, 16), _across(squares, groups, 32)
    low = words & _NIBBLES
    high = words >> np.uint64(4)
    high &= _NIBBLES
    total = low + high
    # q (15 - q) is at most 56: the sum of four fits a byte, that of four squares does not.
    products = _by_complement(low)
    products += _by_complement(high)
    sums_of = [_across(_add_lanes(x[0::2] + x[1::2], 8), groups, 16) for x in (total, products)]
    return sums_of[0], np.uint64(15) * sums_of[0] - sums_of[1]


def _by_complement(nibbles: Words) -> Words:
    """``q (15 - q)`` of four-bit codes, one in a byte."""
    rest = nibbles ^ _NIBBLES
    each = rest.view(np.uint8)
    np.multiply(each, nibbles.view(np.uint8), out=each)
    return rest


def _add_lanes(words: Words, lane: int) -> Words:
    """Neighboring lanes of ``lane`` bits added into lanes of twice the width."""
    mask = _every(2 * lane, lane)
    upper = words >> np.uint64(lane)
    upper &= mask
    upper += words & mask
    return upper


def _across(words: Words, groups: int, lane: int) -> Words:
    """The sum of all lanes of each group's words, which must fit a lane."""
    columns = words.reshape(groups, -1)
    total = columns[:, 0].copy()
    for i in range(1, columns.shape[1]):
        total += columns[:, i]
    total *= _every(lane, 1)
    total >>= np.uint64(64 - lane)
    return total


_EXPONENT, _LOWEST_EXPONENT = np.uint32(0xFF << 23), np.uint32((127 - 14) << 23)
# From the power of two below a number to 1.5 times the one 13 above it.
_MAGIC = np.uint32((13 << 23) + (1 << 22))
_SIGN = np.uint32(1 << 15)
# From float32's exponent bias to float16's.
_REBIASED = np.float32(2.0**-112)
# Smaller numbers round to a finite float16.
_OVERFLOW = 65520.0


def rounded(x: Floats, dtype: str) -> tuple[Stored, Floats]:
    """Round float32 to ``dtype``, half to even: the stored array, and its values as float32."""
    if dtype == "float32":
        return x, x
    if dtype == "bfloat16":
        stored = _bfloat16(x)
        return stored, from_float(stored, dtype)
    if x.min(initial=0) > -_OVERFLOW and x.max(initial=0) < _OVERFLOW:
        return _float16(x)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)  # also infinities and not-a-number
    return half, half.astype(np.float32)


def from_float(stored: Stored, dtype: str) -> Floats:
    """The float32 values of a stored array; bfloat16 comes as uint16 bit patterns."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _float16(x: Floats) -> tuple[Stored, Floats]:
    """Numbers within float16's range, vectorized where numpy's cast goes one by one.

    Adding and subtracting 1.5 times the power of two 13 above a number's own leaves the 11 digits
    of a float16, or fewer where float16 is subnormal. What remains is to move exponent and sign.
    """
    bits = x.view(np.uint32)
    magic = bits & _EXPONENT
    np.maximum(magic, _LOWEST_EXPONENT, out=magic)
    magic += _MAGIC
    values: Floats = x + magic.view(np.float32)
    values -= magic.view(np.float32)
    half = (values * _REBIASED).view(np.uint32)
    half >>= np.uint32(13)
    np.right_shift(bits, np.uint32(16), out=magic)
    magic &= _SIGN
    half |= magic
    return half.astype(np.uint16).view(np.float16), values


def _bfloat16(x: Floats) -> Stored:
    bits = x.view(np.uint32)
    # Round to nearest even on the upper half; the quiet bit keeps not-a-number one.
    near = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, near).astype(np.uint16)
