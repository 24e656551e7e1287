"""One array into the form that a recipe asks for, with the error that this costs.

Chunks of rows are shared by a pool of threads, as in ``quantize.encode``. MLX
evaluates in the calling thread: an array is read where its file was opened.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from converters.directory.weights import dtype_name
from converters.quantize.affine import Arrays, ErrorStats, Packed, pack_floats, requantize
from converters.quantize.encode import CHUNK_WEIGHTS, Patch, chunks, gather
from converters.quantize.layout import Layout
from converters.quantize.packing import Floats, from_float

_FLOATS = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Recoded:
    """An array in its new form: numpy arrays by suffix, leading axes as they were."""

    layout: Layout
    arrays: Arrays
    error: ErrorStats


def to_numpy(array: mx.array) -> npt.NDArray[np.generic]:
    """The data of an array without a copy; bfloat16 as uint16 bit patterns."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False)


def recode(
    array: mx.array, layout: Layout, pool: ThreadPoolExecutor, patch: Patch | None = None
) -> Recoded:
    """Floats of any shape in another form; quantised along the last axis.

    Args:
        array: floating point; a layout that is quantised needs columns that fill its groups.
        patch: what its rows go through first; the error is against the result.
    """
    shape = array.shape
    columns = shape[-1] if shape else 1
    stored, dtype = to_numpy(mx.contiguous(array)).reshape(-1, columns), dtype_name(array)
    rows = len(stored)

    def work(part: slice) -> Packed:
        with np.errstate(invalid="ignore", over="ignore"):  # told from the error that it leaves
            values = np.ascontiguousarray(from_float(stored[part], dtype))
            return _pack(patch(values, np.arange(rows)[part]) if patch else values, layout)

    # MLX's own packing runs where its arrays live.
    over = map if layout.mode in _BY_MLX else pool.map
    arrays, error = gather(work, chunks(rows, columns, CHUNK_WEIGHTS), over)
    return Recoded(layout, {k: a.reshape(*shape[:-1], -1) for k, a in arrays.items()}, error)


_BY_MLX = ("mxfp4", "mxfp8", "nvfp4")


def _pack(values: Floats, layout: Layout) -> Packed:
    """Rows (n, columns) of float32 in a layout."""
    if not layout.quantized:
        packed = pack_floats(values, layout.dtype)
        if layout.dtype == "float32":
            packed.error.add(values, values)  # nothing is lost; this sums the weights
        return packed
    return requantize(values, layout) if layout.mode == "affine" else _microscaled(values, layout)


def _microscaled(values: Floats, layout: Layout) -> Packed:
    """MLX's own rounding to one of its fixed modes."""
    weight, scales = mx.quantize(
        mx.array(values), group_size=layout.group_size, bits=layout.bits, mode=layout.mode
    )[:2]
    back = dequantised([weight, scales], layout)
    packed = Packed(layout, {"weight": np.array(weight), "scales": np.array(scales)})
    packed.error.add(values, np.array(back, copy=False))
    return packed


def dequantised(parts: list[mx.array], layout: Layout) -> mx.array:
    """The float32 weights of packed codes, scales and (affine) biases."""
    weight, scales, biases = parts[0], parts[1], parts[2] if len(parts) > 2 else None
    return mx.dequantize(
        weight,
        scales if biases is None else scales.astype(mx.float32),
        None if biases is None else biases.astype(mx.float32),
        group_size=layout.group_size,
        bits=layout.bits,
        mode=layout.mode,
        dtype=mx.float32,
    )


def keep_packed(parts: list[mx.array], stored: Layout, wanted: Layout) -> Recoded:
    """The same codes; scales and biases in the wanted type."""
    error = ErrorStats() if _finite(parts, stored) else ErrorStats(squared_weight=math.nan)
    if stored.mode == "affine" and stored.dtype != wanted.dtype:
        dtype = next(kind for kind, name in _FLOATS.items() if name == wanted.dtype)
        cast = [parts[0], *(part.astype(dtype) for part in parts[1:])]
        before, after = (to_numpy(dequantised(each, stored)) for each in (parts, cast))
        error.add(before.astype(np.float32), after.astype(np.float32))
        parts = cast
    names = ("weight", "scales", "biases")
    arrays = {name: to_numpy(part) for name, part in zip(names, parts, strict=False)}
    return Recoded(wanted if stored.mode == "affine" else stored, arrays, error)


def _finite(parts: list[mx.array], stored: Layout) -> bool:
    """Whether no weight is infinite or not a number, as its scale, its bias or its code says."""
    if stored.mode == "affine":
        return all(bool(mx.isfinite(part).all().item()) for part in parts[1:])
    # E4M3 has one not-a-number of each sign; E8M0 only this one (OCP Microscaling Formats 1.0).
    floats = {"mxfp4": [], "mxfp8": parts[:1], "nvfp4": parts[1:]}[stored.mode]
    powers = [] if stored.mode == "nvfp4" else parts[1:]
    bad = [(part.view(mx.uint8) & 0x7F) == 0x7F for part in floats]
    bad += [part == 0xFF for part in powers]
    return not any(bool(each.any().item()) for each in bad)
