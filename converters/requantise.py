"""Weights into the codes of MLX's affine forms, group by group, with the error that this costs.

For weights whose own codes no form holds. Knows nothing of where they come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from converters.forms import Packed
from converters.layout import Layout
from converters.packing import pack_bits
from converters.rounding import Floats, rounded

Integers = npt.NDArray[np.int16]

# Below these bits, the levels that outliers waste are worth a search for better scales.
_REFINED = 6
# Codes that are so much nearer than chance to what they stand for, in squares, may be it exactly.
_CHANCE = 1e-6


def requantise(w: Floats, layout: Layout) -> Packed:
    """Round float32 weights (n, c) to an affine form, group by group.

    Codes span each group from its smallest to its largest weight. Below six bits, where that wastes
    levels on outliers, scale and bias are then refined by alternating least squares (codes fixed,
    solve for scale and bias; then round again), keeping what lowers the error.
    """
    groups = w.reshape(-1, layout.group_size)
    scale, bias, levels = _span(*_extremes(groups), layout)
    x = _nearest(groups, scale, bias, levels)
    with np.errstate(invalid="ignore"):
        q = x.astype(np.uint8)
    if layout.bits < _REFINED:
        q, scale, bias = _refine(groups, q, scale, bias, levels, layout.dtype)
        x = q.astype(np.float32)
    packed = _packed(q.reshape(w.shape), scale, bias, layout)
    packed.error.add(groups, _values(x, scale, bias))
    return packed


def requantise_integers(p: Integers, unit: Floats, layout: Layout) -> Packed:
    """What :func:`requantise` makes of the weights ``unit * p``, in half the time.

    Args:
        p: int16 (n, c).
        unit: of each group of the layout's size, (n, c / group size).
    """
    groups, each = p.reshape(-1, layout.group_size), unit.reshape(-1)
    least, most = (end * each for end in _extremes(groups))
    scale, bias, levels = _span(np.minimum(least, most), np.maximum(least, most), layout)
    if layout.bits < _REFINED or not scale.all():
        return _through_floats(groups, each, p.shape, layout)
    x: Floats = groups.astype(np.float32)
    squared_weight = np.einsum("i,i,i->", np.vecdot(x, x), each, each, dtype=np.float64)
    # In steps from a group's lowest code, of which the nearest whole number is taken.
    inverse = np.float32(1) / scale
    _times(x, each * inverse)
    x -= (bias * inverse)[:, None]
    nearest = np.rint(x)
    np.clip(nearest, 0, levels, out=nearest)
    x -= nearest
    if np.vecdot(x, x).sum() <= _CHANCE * x.size:
        return _through_floats(groups, each, p.shape, layout)
    packed = _packed(nearest.astype(np.uint8).reshape(p.shape), scale, bias, layout)
    packed.error.squared_weight = float(squared_weight)
    packed.error.add_difference(_times(x, scale))
    return packed


def _through_floats(
    groups: Integers, each: Floats, shape: tuple[int, ...], layout: Layout
) -> Packed:
    return requantise((groups * each[:, None]).reshape(shape), layout)


def _span(low: Floats, high: Floats, layout: Layout) -> tuple[Floats, Floats, int]:
    """Scales and biases (n,) with which a form's codes span groups, and its highest code."""
    levels = (1 << layout.bits) - 1
    scale = (high - low).astype(np.float32) / np.float32(levels)
    return *_round_pair(scale, low.astype(np.float32), layout.dtype), levels


def _packed(q: npt.NDArray[np.uint8], scale: Floats, bias: Floats, layout: Layout) -> Packed:
    shape = (len(q), -1)
    arrays = {
        "weight": pack_bits(q, layout.bits),
        "scales": rounded(scale, layout.dtype)[0].reshape(shape),
        "biases": rounded(bias, layout.dtype)[0].reshape(shape),
    }
    return Packed(layout, arrays)


def _times(x: Floats, each: Floats) -> Floats:
    """Groups (n, g) times a factor of each (n,), in their place."""
    x *= each[:, None]
    return x


def _extremes(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Smallest and largest of each row (n, 2^k).

    Far faster than short reductions: a few neighbours move as one element to where long runs are
    compared with one another, and so do the few that are left of each row.
    """
    across = np.ascontiguousarray(x.view("V16").T).view(x.dtype)
    return _fold(across, len(x), np.minimum), _fold(across, len(x), np.maximum)


def _fold(across: npt.NDArray[Any], n: int, smaller: np.ufunc) -> npt.NDArray[Any]:
    few = smaller.reduce(across, axis=0).reshape(n, -1)
    found: npt.NDArray[Any] = smaller.reduce(np.ascontiguousarray(few.T), axis=0)
    return found


def _round_pair(scale: Floats, bias: Floats, dtype: str) -> tuple[Floats, Floats]:
    return rounded(scale, dtype)[1], rounded(bias, dtype)[1]


def _nearest(w: Floats, scale: Floats, bias: Floats, levels: int) -> Floats:
    """The code nearest to each weight of groups (n, g), given scales and biases (n,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)
    x: Floats = w - bias[:, None]
    x *= inverse[:, None]
    np.rint(x, out=x)
    return np.clip(x, 0, levels, out=x)


def _values(x: Floats, scale: Floats, bias: Floats) -> Floats:
    """What MLX computes from codes (n, g), in their place."""
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
    """Alternate least squares for scale and bias with rounding, group by group."""
    best = _squared_errors(w, q, scale, bias)
    for _ in range(rounds):
        x = q.astype(np.float32)
        x_mean, w_mean = x.mean(axis=1), w.mean(axis=1)
        x -= x_mean[:, None]
        spread = np.einsum("ij,ij->i", x, x)
        fit = np.einsum("ij,ij->i", x, w)
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where(spread > 0, fit / spread, scale).astype(np.float32)
        s, b = _round_pair(s, (w_mean - s * x_mean).astype(np.float32), dtype)
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
