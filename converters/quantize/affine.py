"""Weights in MLX's quantized forms, chunk by chunk, with the error that each costs.

Affine codes are a file's own (:func:`pack_codes`) or new ones (:func:`requantize`); MXFP4 and NVFP4
blocks are repacked without going through floats (:func:`repack`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.quants import Codes
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.layout import Layout, dense
from converters.quantize.packing import (
    Bytes,
    Floats,
    Words,
    gathered,
    pack_bits,
    pair_nibbles,
    rounded,
    spread_nibbles,
    sums,
)

Arrays = dict[str, npt.NDArray[np.generic]]
Integers = npt.NDArray[np.int16]

# Outside this range float32 loses squares that matter to the sum.
_SMALLEST, _LARGEST = 1e-20, 1e38
# A sum that cancels to a smaller share of its positive terms is too near float32's rounding.
_CANCELED = 1e-2
# Affine forms of fewer bits are worth a search for better scales.
_REFINED_BELOW = 6
# A mean square distance to the nearest codes this far below chance suggests that they are exact.
_CHANCE = 1e-6


@dataclass
class ErrorStats:
    """Sums over the weights of a chunk or a tensor that give its error.

    Not-a-number and infinite weights count as errors only when they change.
    """

    squared_error: float = 0.0
    squared_weight: float = 0.0
    maximum: float = 0.0
    equal: bool = True

    def add(self, weights: Floats, got: Floats) -> None:
        """Add a chunk of weights and their stored values, both float32 of one shape."""
        self.squared_weight += _squares(weights)
        difference = got - weights
        squared = _squares(difference)
        if not (np.isnan(squared) and np.array_equal(weights, got, equal_nan=True)):
            self._include(difference, squared)

    def add_difference(self, difference: Floats) -> None:
        """Add the float32 differences of a chunk of finite weights."""
        self._include(difference, _squares(difference))

    def _include(self, difference: Floats, squared: float) -> None:
        if squared == 0.0:
            return
        self.equal = False
        self.squared_error += squared
        self.maximum = max(self.maximum, float(difference.max()), -float(difference.min()))

    def merge(self, other: ErrorStats) -> None:
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight
        self.maximum = max(self.maximum, other.maximum)
        self.equal = self.equal and other.equal

    @property
    def rmse(self) -> float:
        """Root mean square error relative to the root mean square weight."""
        if self.squared_error == 0.0:
            return 0.0
        if not self.squared_weight:
            return float("inf")
        return float(np.sqrt(self.squared_error / self.squared_weight))


def _squares(x: Floats) -> float:
    """Sum of squares, in float64 where squares leave the range of float32."""
    flat = x.reshape(-1)
    total = float(np.einsum("i,i->", flat, flat))
    if _SMALLEST < total < _LARGEST or (total == 0.0 and not flat.any()):
        return total
    wide = flat.astype(np.float64)
    return float(wide @ wide)


@dataclass
class Packed:
    """A chunk of rows in a form: arrays by suffix (``weight``, ``scales``, ``biases``)."""

    layout: Layout
    arrays: Arrays
    error: ErrorStats = field(default_factory=ErrorStats)


def regroup(codes: Codes, rows: int, group_size: int) -> Codes:
    """Codes of blocks as codes of rows, in groups of ``group_size`` that divide a block's."""
    repeat = codes.group // group_size
    scale, bias = codes.scale.reshape(rows, -1), codes.bias.reshape(rows, -1)
    if repeat > 1:
        scale, bias = np.repeat(scale, repeat, axis=1), np.repeat(bias, repeat, axis=1)
    return Codes(codes.stored.reshape(rows, -1), scale, bias, codes.width)


def pack_codes(codes: Codes, layout: Layout) -> Packed:
    """A file's own codes in an affine form; only scales and biases are rounded.

    Args:
        codes: of whole rows, in groups of the layout's size.
        layout: affine, wide enough for every code.
    """
    scales, s = rounded(codes.scale, layout.dtype)
    biases, b = rounded(codes.bias, layout.dtype)
    same = codes.width == layout.bits
    words = codes.stored.view("<u4") if same else pack_bits(codes.q, layout.bits)
    packed = Packed(layout, {"weight": words, "scales": scales, "biases": biases})
    if layout.dtype != "float32":
        _measure_rounding(codes, s, b, packed.error)
    return packed


def _measure_rounding(codes: Codes, scale: Floats, bias: Floats, error: ErrorStats) -> None:
    """Error of ``scale * q + bias`` with rounded scale and bias, from sums over each group.

    The difference is linear in q: its square follows from the sums of q and of q^2 in each group,
    its maximum is at the ends of the range of q.
    """
    s, b = codes.scale.reshape(-1), codes.bias.reshape(-1)
    sums_of = sums(codes.stored, codes.width, len(s))
    error.squared_weight += _sum_of_squares(s, b, sums_of, codes.group)
    # Exact: a rounding difference has no more digits than the number.
    ds, db = scale.reshape(-1) - s, bias.reshape(-1) - b
    largest = _largest(codes, ds, db)
    if largest == 0.0:
        return
    error.equal = False
    error.squared_error += _sum_of_squares(ds, db, sums_of, codes.group)
    error.maximum = max(error.maximum, largest)


def _sum_of_squares(s: Floats, b: Floats, sums_of: tuple[Words, Words], group: int) -> float:
    """The sum of ``(s q + b)^2``, given the sums of q and of q^2 in each group.

    In float64 where squares leave the range of float32 or the terms cancel.
    """
    for kind in ("f4", "f8"):
        s, b = s.astype(kind, copy=False), b.astype(kind, copy=False)
        total, squares = (x.astype(kind) for x in sums_of)
        squares *= s
        total *= b
        positive = np.einsum("i,i->", squares, s) + group * np.einsum("i,i->", b, b)
        found = float(positive + 2 * np.einsum("i,i->", total, s))
        if _SMALLEST < found < _LARGEST and found > _CANCELED * positive:
            break
    return float(np.maximum(found, 0.0))


def _largest(codes: Codes, ds: Floats, db: Floats) -> float:
    """The largest ``|ds * q + db|``; looks only into groups whose bound is near the highest."""
    bound = ds * np.float32(15 if codes.width == 4 else codes.stored.max())
    bound += db
    np.maximum(np.abs(bound, out=bound), np.abs(db), out=bound)
    highest = float(bound.max())
    if highest == 0.0 or np.isnan(highest):
        return highest
    stored = codes.stored.reshape(len(ds), -1)

    def largest(chosen: npt.NDArray[np.intp]) -> float:
        q = stored[chosen] if codes.width == 8 else spread_nibbles(stored[chosen])
        return float(np.abs(q * ds[chosen, None] + db[chosen, None]).max())

    near = np.float32(0.95 * highest)
    found = largest(np.flatnonzero(bound >= near))
    if found >= near:
        return found
    rest = np.flatnonzero((bound > found) & (bound < near))
    return max(found, largest(rest)) if len(rest) else found


def pack_floats(x: Floats, dtype: str) -> Packed:
    """A plain array of ``dtype`` from float32 weights of any shape."""
    stored, values = rounded(x, dtype)
    packed = Packed(dense(dtype), {"weight": stored})
    if dtype != "float32":
        packed.error.add(x, values)
    return packed


def requantize(w: Floats, layout: Layout) -> Packed:
    """Round float32 weights (n, c) to an affine form, group by group.

    Codes span each group from its smallest to its largest weight. Below six bits, where that wastes
    levels on outliers, scale and bias are refined by alternating least squares (solve for scale and
    bias with codes fixed, round again), as long as the error falls.
    """
    groups = w.reshape(-1, layout.group_size)
    scale, bias, levels = _affine_range(*_min_max(groups), layout)
    x = _nearest(groups, scale, bias, levels)
    with np.errstate(invalid="ignore"):
        q = x.astype(np.uint8)
    if layout.bits < _REFINED_BELOW:
        q, scale, bias = _refine(groups, q, scale, bias, levels, layout.dtype)
        x = q.astype(np.float32)
    packed = _packed(q.reshape(w.shape), scale, bias, layout)
    packed.error.add(groups, _values(x, scale, bias))
    return packed


def requantize_integers(p: Integers, unit: Floats, layout: Layout) -> Packed:
    """:func:`requantize` of the weights ``unit * p``, in half the time.

    Args:
        p: int16 (n, c).
        unit: one per group of the layout, (n, c / group size).
    """
    groups, each = p.reshape(-1, layout.group_size), unit.reshape(-1)
    least, most = (end * each for end in _min_max(groups))
    scale, bias, levels = _affine_range(np.minimum(least, most), np.maximum(least, most), layout)
    if layout.bits < _REFINED_BELOW or not scale.all():
        return requantize((groups * each[:, None]).reshape(p.shape), layout)
    x: Floats = groups.astype(np.float32)
    squared_weight = np.einsum("i,i,i->", np.vecdot(x, x), each, each, dtype=np.float64)
    # In steps from the group's lowest code, to be rounded to the nearest.
    inverse = np.float32(1) / scale
    _times(x, each * inverse)
    x -= (bias * inverse)[:, None]
    nearest = np.rint(x)
    np.clip(nearest, 0, levels, out=nearest)
    x -= nearest
    if np.vecdot(x, x).sum() <= _CHANCE * x.size:
        return requantize((groups * each[:, None]).reshape(p.shape), layout)
    packed = _packed(nearest.astype(np.uint8).reshape(p.shape), scale, bias, layout)
    packed.error.squared_weight = float(squared_weight)
    packed.error.add_difference(_times(x, scale))
    return packed


def _affine_range(low: Floats, high: Floats, layout: Layout) -> tuple[Floats, Floats, int]:
    """Scales and biases (n,) whose codes span low to high, and the highest code."""
    levels = (1 << layout.bits) - 1
    scale = (high - low).astype(np.float32) / np.float32(levels)
    bias = low.astype(np.float32)
    return rounded(scale, layout.dtype)[1], rounded(bias, layout.dtype)[1], levels


def _packed(q: npt.NDArray[np.uint8], scale: Floats, bias: Floats, layout: Layout) -> Packed:
    shape = (len(q), -1)
    arrays = {
        "weight": pack_bits(q, layout.bits),
        "scales": rounded(scale, layout.dtype)[0].reshape(shape),
        "biases": rounded(bias, layout.dtype)[0].reshape(shape),
    }
    return Packed(layout, arrays)


def _times(x: Floats, each: Floats) -> Floats:
    """Groups (n, g) times a factor each (n,), in place."""
    x *= each[:, None]
    return x


def _min_max(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Smallest and largest of each row (n, 2^k).

    Far faster than short reductions: transposed in elements of 16 bytes, long runs are compared
    with one another, and then the few that are left of each row.
    """
    across = np.ascontiguousarray(x.view("V16").T).view(x.dtype)
    return _fold(across, len(x), np.minimum), _fold(across, len(x), np.maximum)


def _fold(across: npt.NDArray[Any], n: int, smaller: np.ufunc) -> npt.NDArray[Any]:
    few = smaller.reduce(across, axis=0).reshape(n, -1)
    found: npt.NDArray[Any] = smaller.reduce(np.ascontiguousarray(few.T), axis=0)
    return found


def _nearest(w: Floats, scale: Floats, bias: Floats, levels: int) -> Floats:
    """The code nearest to each weight of groups (n, g), given scales and biases (n,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)
    x: Floats = w - bias[:, None]
    x *= inverse[:, None]
    np.rint(x, out=x)
    return np.clip(x, 0, levels, out=x)


def _values(x: Floats, scale: Floats, bias: Floats) -> Floats:
    """Dequantized codes (n, g), in place."""
    _times(x, scale)
    x += bias[:, None]
    return x


def _refine(
    w: Floats,
    q: npt.NDArray[np.uint8],
    scale: Floats,
    bias: Floats,
    levels: int,
    dtype: str,
    rounds: int = 3,
) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
    """Alternating least squares for scale and bias, group by group."""
    best = _squared_errors(w, q, scale, bias)
    for _ in range(rounds):
        x = q.astype(np.float32)
        x_mean, w_mean = x.mean(axis=1), w.mean(axis=1)
        x -= x_mean[:, None]
        spread = np.einsum("ij,ij->i", x, x)
        fit = np.einsum("ij,ij->i", x, w)
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where(spread > 0, fit / spread, scale).astype(np.float32)
        b = rounded((w_mean - s * x_mean).astype(np.float32), dtype)[1]
        s = rounded(s, dtype)[1]
        with np.errstate(invalid="ignore"):
            tried = _nearest(w, s, b, levels).astype(np.uint8)
        error = _squared_errors(w, tried, s, b)
        better = error < best
        if not better.any():
            break
        q = np.where(better[:, None], tried, q)
        scale, bias = np.where(better, s, scale), np.where(better, b, bias)
        best = np.minimum(error, best)
    return q, scale, bias


def _squared_errors(w: Floats, q: npt.NDArray[np.uint8], scale: Floats, bias: Floats) -> Floats:
    d = _values(q.astype(np.float32), scale, bias)
    d -= w
    result: Floats = np.einsum("ij,ij->i", d, d)
    return result


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def repack(raw: Bytes, kind: GGMLType, layout: Layout) -> Packed:
    """MXFP4 or NVFP4 blocks (n, bytes per row) in MLX's mode of that name, or as plain floats.

    Both store E2M1 codes and one-byte scales and differ in the order of the nibbles: ggml pairs
    element j of a group with element j + half a group, MLX pairs neighbors. Exact but for reserved
    scale bytes, which MLX reads otherwise; the error is infinite then.
    Source: OCP Microscaling Formats 1.0; NVIDIA's NVFP4 description.
    """
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    head, group = (1, 32) if kind is GGMLType.MXFP4 else (4, 16)
    scales = gathered(blocks[:, :head])
    pairs = pair_nibbles(blocks[:, head:], group // 2)  # (blocks, elements / 2)
    if not layout.quantized:
        values = microscaled(spread_nibbles(pairs), scales, kind)
        return pack_floats(values.reshape(len(raw), -1), layout.dtype)
    words = pairs.reshape(len(raw), -1).view("<u4")
    packed = Packed(layout, {"weight": words, "scales": scales.reshape(len(raw), -1)})
    reserved = (scales == 255) if kind is GGMLType.MXFP4 else (scales >= 0x7F)
    if reserved.any():
        packed.error = ErrorStats(float("inf"), 1.0, float("inf"), equal=False)
    return packed


def microscaled(codes: Bytes, scales: Bytes, kind: GGMLType) -> Floats:
    """Dequantized weights (blocks, elements) as ggml reads them."""
    if kind is GGMLType.MXFP4:
        # In float64: the largest scale is 2^128, which float32 cannot hold but its halves can.
        scale = np.ldexp(1.0, scales.astype(np.int32) - 127)
    else:
        exponent, mantissa = (scales >> 3 & 15).astype(np.int32), (scales & 7).astype(np.float32)
        normal = np.ldexp(1 + mantissa / 8, exponent - 7)
        scale = np.where(exponent == 0, mantissa * np.float32(2**-9), normal)
        scale = np.where(scales == 0x7F, 0, scale)
    grouped = E2M1[codes].reshape(*scales.shape, -1) * scale[..., None]
    values: Floats = grouped.reshape(codes.shape).astype(np.float32)
    return values
