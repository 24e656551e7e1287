"""Codes in and out of words, many at a time: bytes, neighbouring nibbles, MLX's packed rows.

Knows bits and nothing of what they mean. Everything works on 64-bit words or whole arrays of bytes,
so that numpy moves many codes in one instruction.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

# Widths of the lanes that are merged in pairs while the codes of eight bytes are squeezed together.
_LANES = (8, 16, 32)


def _every(lane: int, low: int) -> np.uint64:
    """A 64-bit mask: the lowest ``low`` bits of each lane of ``lane`` bits."""
    return np.uint64((2**64 - 1) // (2**lane - 1) * (2**low - 1))


_NIBBLES = _every(8, 4)
_SECOND_NIBBLES = np.uint64(int(_every(16, 4)) << 4)


def gathered(x: Bytes) -> Bytes:
    """A copy of rows of bytes (n, b) that lie apart, of each row as one element: far faster."""
    return x.view(f"V{x.shape[1]}").copy().view(np.uint8)


def pack_bits(codes: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """Pack uint8 codes (n, c) into MLX's words, uint32 (n, c * bits / 32).

    Eight codes at a time, as lanes of one 64-bit word: each step moves the upper half of a lane
    down against its lower half, so lanes double while the codes in them become contiguous.
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
    """Nibbles in ggml's order as neighbours in a byte, the first one low: (n, b) -> (n, b).

    In each run of ``run`` bytes ggml keeps codes 0 to run - 1 in the low nibbles and the next
    ``run`` codes in the high ones.
    """
    n = len(x)
    # Of each two bytes the middle nibbles change places: both of a half are neighbours then.
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
    """``low | high << width`` in place of ``low``, of which nothing may leave its byte."""
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
    """The inverse of two neighbours in a byte: (n, b) -> (n, 2 b) codes of four bits."""
    wide = pairs.astype("<u2")
    wide |= wide << np.uint16(4)
    wide &= np.uint16(0x0F0F)
    return wide.view(np.uint8)


def sums(stored: Bytes, width: int, groups: int) -> tuple[Words, Words]:
    """Sum and sum of squares of the codes of each group, exactly.

    Args:
        stored: rows of codes, of at most 256 to a group, in ``width`` bits each: a byte, or 4 for
            two in a byte.
        groups: how many groups there are in all.

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
    # q (15 - q) is at most 56, so that those of four codes fit a byte, as four squares do not.
    products = _by_complement(low)
    products += _by_complement(high)
    sums_of = [_across(_add_lanes(x[0::2] + x[1::2], 8), groups, 16) for x in (total, products)]
    return sums_of[0], np.uint64(15) * sums_of[0] - sums_of[1]


def _by_complement(nibbles: Words) -> Words:
    """``q (15 - q)`` of codes of four bits, one in a byte."""
    rest = nibbles ^ _NIBBLES
    each = rest.view(np.uint8)
    np.multiply(each, nibbles.view(np.uint8), out=each)
    return rest


def _add_lanes(words: Words, lane: int) -> Words:
    """Neighbouring lanes of ``lane`` bits added into one of twice the width."""
    mask = _every(2 * lane, lane)
    upper = words >> np.uint64(lane)
    upper &= mask
    upper += words & mask
    return upper


def _across(words: Words, groups: int, lane: int) -> Words:
    """The sum of all lanes of each group's words; it must fit a lane."""
    columns = words.reshape(groups, -1)
    total = columns[:, 0].copy()
    for i in range(1, columns.shape[1]):
        total += columns[:, i]
    total *= _every(lane, 1)
    total >>= np.uint64(64 - lane)
    return total
