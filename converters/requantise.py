"""Floats into the codes of MLX's affine forms, group by group, with the error that this costs.

For weights whose own codes no form holds. Knows nothing of where they come from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.forms import Packed
from converters.layout import Layout
from converters.packing import pack_bits
from converters.rounding import Floats, rounded


def requantise(w: Floats, layout: Layout) -> Packed:
    """Round float32 weights (n, c) to an affine form, group by group.

    Codes span each group from its smallest to its largest weight. Below six bits, where that wastes
    levels on outliers, scale and bias are then refined by alternating least squares (codes fixed,
    solve for scale and bias; then round again), keeping what lowers the error.
    """
    groups = w.reshape(-1, layout.group_size)
    low, high = _extremes(groups)
    levels = (1 << layout.bits) - 1
    scale = (high - low).astype(np.float32) / np.float32(levels)
    scale, bias = _round_pair(scale, low.astype(np.float32), layout.dtype)
    x = _nearest(groups, scale, bias, levels)
    with np.errstate(invalid="ignore"):
        q = x.astype(np.uint8)
    if layout.bits < 6:
        q, scale, bias = _refine(groups, q, scale, bias, levels, layout.dtype)
        x = q.astype(np.float32)
    shape = (w.shape[0], -1)
    packed = Packed(
        layout,
        {
            "weight": pack_bits(q.reshape(w.shape), layout.bits),
            "scales": rounded(scale, layout.dtype)[0].reshape(shape),
            "biases": rounded(bias, layout.dtype)[0].reshape(shape),
        },
    )
    packed.error.add(groups, _values(x, scale, bias))
    return packed


def _extremes(x: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest of each row (n, 2^k).

    Far faster than a short reduction: 16 neighbours move as one element to where long runs are
    compared with one another, and the last 16 pair up as neighbours.
    """
    across = np.ascontiguousarray(x.view("V64").T).view(x.dtype)
    return _fold(across, len(x), np.minimum), _fold(across, len(x), np.maximum)


def _fold(across: Floats, n: int, smaller: np.ufunc) -> Floats:
    x: Floats = smaller.reduce(across, axis=0)
    while len(x) > n:
        x = smaller(x[0::2], x[1::2])
    return x


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
    x *= scale[:, None]
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
