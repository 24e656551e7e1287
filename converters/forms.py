"""Codes and floats into MLX's packed arrays, with the error that this costs.

Knows MLX's layouts (packed least significant bit first along the row, in uint32 words) and nothing
of GGUF files or model names. Works on numpy arrays, chunk by chunk, so that memory stays bounded
and the threads of a pool can share the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.quants import Codes
from converters.layout import Layout, dense
from converters.packing import pack_bits, spread_nibbles, sums
from converters.rounding import Floats, rounded

Words = npt.NDArray[np.uint64]
Arrays = dict[str, npt.NDArray[np.generic]]

# Between these, no square of what adds up to it matters that float32 does not hold.
_SMALLEST, _LARGEST = 1e-20, 1e38
# A smaller share of its positive terms than this is too near to float32's rounding of them.
_CANCELLED = 1e-2


@dataclass
class Error:
    """Sums from which the error of a tensor follows; chunks add up.

    ``relative RMSE = sqrt(sum((w' - w)^2) / sum(w^2))``; not-a-number and infinite weights count
    as errors of their own only when they change.
    """

    squared_error: float = 0.0
    squared_weight: float = 0.0
    maximum: float = 0.0
    equal: bool = True

    def add(self, wanted: Floats, got: Floats) -> None:
        """Account for one chunk of weights, both float32 and of the same shape."""
        self.squared_weight += _squares(wanted)
        difference = got - wanted
        squared = _squares(difference)
        if np.isnan(squared) and np.array_equal(wanted, got, equal_nan=True):
            return
        self._include(difference, squared)

    def add_difference(self, difference: Floats) -> None:
        """Account for what was lost of one chunk of finite weights, float32."""
        self._include(difference, _squares(difference))

    def _include(self, difference: Floats, squared: float) -> None:
        if squared == 0.0:
            return
        self.equal = False
        self.squared_error += squared
        self.maximum = max(self.maximum, float(difference.max()), -float(difference.min()))

    def merge(self, other: Error) -> None:
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
    """Sum of squares; again in float64 where squares leave the range of float32."""
    flat = x.reshape(-1)
    total = float(np.einsum("i,i->", flat, flat))
    if _SMALLEST < total < _LARGEST or (total == 0.0 and not flat.any()):
        return total
    wide = flat.astype(np.float64)
    return float(wide @ wide)


@dataclass
class Packed:
    """A chunk of rows in MLX form: arrays by suffix (``weight``, ``scales``, ``biases``)."""

    layout: Layout
    arrays: Arrays
    error: Error = field(default_factory=Error)


def regroup(codes: Codes, rows: int, group_size: int) -> Codes:
    """Codes of blocks as codes of rows, with groups of ``group_size`` that divide a block's."""
    repeat = codes.group // group_size
    scale, bias = codes.scale.reshape(rows, -1), codes.bias.reshape(rows, -1)
    if repeat > 1:
        scale, bias = np.repeat(scale, repeat, axis=1), np.repeat(bias, repeat, axis=1)
    return Codes(codes.stored.reshape(rows, -1), scale, bias, codes.width)


def keep_codes(codes: Codes, layout: Layout) -> Packed:
    """An affine form with the file's own codes; only scales and biases are rounded.

    Args:
        codes: of whole rows, with the layout's group size.
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


def _measure_rounding(codes: Codes, scale: Floats, bias: Floats, error: Error) -> None:
    """Error of ``scale * q + bias`` against the codes' own values, from sums over each group.

    The difference is linear in q, so its square needs only the sum and the sum of squares of q in
    each group, and its largest value is at the ends of the range of q.
    """
    s, b = codes.scale.reshape(-1), codes.bias.reshape(-1)
    sums_of = sums(codes.stored, codes.width, len(s))
    error.squared_weight += _sum_of_squares(s, b, sums_of, codes.group)
    # Exact: what rounding takes from a number has no more digits than it.
    ds, db = scale.reshape(-1) - s, bias.reshape(-1) - b
    largest = _largest(codes, ds, db)
    if largest == 0.0:
        return
    error.equal = False
    error.squared_error += _sum_of_squares(ds, db, sums_of, codes.group)
    error.maximum = max(error.maximum, largest)


def _sum_of_squares(s: Floats, b: Floats, sums_of: tuple[Words, Words], group: int) -> float:
    """The sum of ``(s q + b)^2`` over groups, given the sums of q and of its squares in each.

    In float64 where squares leave the range of float32, or where its rounding would show because
    what is added up cancels.
    """
    found, positive = _moments(s, b, sums_of, group, np.dtype("f4"))
    if not (_SMALLEST < found < _LARGEST and found > _CANCELLED * positive):
        found, _ = _moments(s, b, sums_of, group, np.dtype("f8"))
    return float(np.maximum(found, 0.0))


def _moments(
    s: Floats, b: Floats, sums_of: tuple[Words, Words], group: int, kind: Any
) -> tuple[float, float]:
    """That sum, and the sum of those of its terms that are never negative."""
    s, b = s.astype(kind, copy=False), b.astype(kind, copy=False)
    total, squares = (x.astype(kind) for x in sums_of)
    squares *= s
    total *= b
    positive = np.einsum("i,i->", squares, s) + group * np.einsum("i,i->", b, b)
    return float(positive + 2 * np.einsum("i,i->", total, s)), float(positive)


def _largest(codes: Codes, ds: Floats, db: Floats) -> float:
    """The largest ``|ds * q + db|``, looking only at groups that can have it."""
    bound = ds * np.float32(_most(codes))
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


def _most(codes: Codes) -> int:
    """No code is larger."""
    return 15 if codes.width == 4 else int(codes.stored.max())


def keep_floats(x: Floats, dtype: str) -> Packed:
    """A plain array of ``dtype`` from float32 weights of any shape."""
    stored, values = rounded(x, dtype)
    packed = Packed(dense(dtype), {"weight": stored})
    if dtype != "float32":
        packed.error.add(x, values)
    return packed
