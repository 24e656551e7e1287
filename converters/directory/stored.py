"""Weights that other tools have quantised: decoded, or taken over as they are.

fp8: eight-bit floats (E4M3) with a scale per block, DeepSeek-V3, arXiv:2412.19437, section 3.3.
mxfp4: four-bit floats with a scale per 32, OCP Microscaling Formats 1.0, as gpt-oss stores them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from converters.directory.weights import Origin, Weights
from converters.errors import CheckpointError
from converters.quantize.layout import fixed

_BLOCK = (128, 128)


def decode(config: dict[str, Any], weights: Weights) -> None:
    """Eight-bit floats become bfloat16, four-bit blocks MLX's mxfp4, in place."""
    section = config.get("quantization_config")
    block = section.get("weight_block_size") if isinstance(section, dict) else None
    size = (int(block[0]), int(block[1])) if block else _BLOCK
    for name in [name for name in weights.arrays if name.endswith(".weight_scale_inv")]:
        target = name.removesuffix("_scale_inv")
        codes, scale = weights.arrays[target], weights.arrays.pop(name)
        weights.arrays[target] = _eight_bits(target, codes, scale, size)
        weights.origins[target] = Origin(weights.origin(target).name, "float8_e4m3", 8.0)
    for name in [name for name in weights.arrays if name.endswith("_blocks")]:
        module = name.removesuffix("_blocks")
        _four_bits(module, weights)


def _eight_bits(name: str, codes: mx.array, scale: mx.array, block: tuple[int, int]) -> mx.array:
    """Floats of one byte, times their scale: one for all, or one for each block."""
    if codes.dtype != mx.uint8:
        raise CheckpointError(f"{name} has scales of eight-bit floats and holds {codes.dtype}")
    floats = mx.from_fp8(codes, dtype=mx.float32)
    if scale.size > 1:
        rows, columns = codes.shape
        wanted = (-(-rows // block[0]), -(-columns // block[1]))
        if scale.shape != wanted:
            raise CheckpointError(f"{name}_scale_inv has the shape {scale.shape}, not {wanted}")
        scale = mx.repeat(mx.repeat(scale, block[0], 0)[:rows], block[1], 1)[:, :columns]
    return (floats * scale.astype(mx.float32)).astype(mx.bfloat16)


def _four_bits(module: str, weights: Weights) -> None:
    """``_blocks`` (..., rows, groups, 16) and ``_scales`` (..., rows, groups), both bytes."""
    blocks, scales = weights.arrays[f"{module}_blocks"], weights.arrays.get(f"{module}_scales")
    if scales is None or blocks.dtype != mx.uint8 or scales.shape != blocks.shape[:-1]:
        raise CheckpointError(f"{module}_blocks has no scales that fit it")
    weights.move(f"{module}_blocks", f"{module}.weight")
    weights.move(f"{module}_scales", f"{module}.scales")
    # Both worlds keep neighbours in one byte, the first in its lower half.
    weights.arrays[f"{module}.weight"] = blocks.view(mx.uint32).flatten(-2)
    weights.layouts[module] = fixed("mxfp4")
