"""MXFP4 and NVFP4 blocks into MLX's modes of the same name, never through floats.

Both worlds store the same four-bit floats (E2M1) and one-byte scales; only the order of the nibbles
differs: ggml pairs element j of a group with element j + half a group, MLX pairs neighbours.
Source: OCP Microscaling Formats specification 1.0; NVIDIA's NVFP4 description.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.forms import Error, Packed, keep_floats
from converters.gguf.types import BLOCKS, GGMLType
from converters.layout import Layout
from converters.packing import gathered, pair_nibbles, spread_nibbles

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def repack(raw: Bytes, kind: GGMLType, layout: Layout) -> Packed:
    """Rows of blocks (n, bytes per row) in MLX's mode, or as plain floats if asked.

    The packed form is exact unless a scale byte means another number to MLX than to ggml (the
    reserved ones at the ends of the range); then the error says so.
    """
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    head, group = (1, 32) if kind is GGMLType.MXFP4 else (4, 16)
    scales = gathered(blocks[:, :head])
    pairs = pair_nibbles(blocks[:, head:], group // 2)  # (blocks, elements / 2)
    if not layout.quantized:
        values = _values(spread_nibbles(pairs), scales, kind)
        return keep_floats(values.reshape(len(raw), -1), layout.dtype)
    words = pairs.reshape(len(raw), -1).view("<u4")
    packed = Packed(layout, {"weight": words, "scales": scales.reshape(len(raw), -1)})
    odd = (scales == 255) if kind is GGMLType.MXFP4 else (scales >= 0x7F)
    if odd.any():
        packed.error = Error(float("inf"), 1.0, float("inf"), equal=False)
    return packed


def _values(codes: Bytes, scales: Bytes, kind: GGMLType) -> Floats:
    """Dequantised weights (blocks, elements) as ggml reads them."""
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
