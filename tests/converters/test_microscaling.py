"""MXFP4 and NVFP4 blocks in MLX's own modes, against the ``gguf`` package."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Kind, random_blocks

from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.affine import Packed, repack
from converters.quantize.layout import dense, fixed
from converters.quantize.policy import FIXED

KINDS = sorted(FIXED)


def dequantized(packed: Packed) -> np.ndarray:
    weight, scales = (mx.array(packed.arrays[name]) for name in ("weight", "scales"))
    layout = packed.layout
    return np.array(
        mx.dequantize(
            weight,
            scales,
            group_size=layout.group_size,
            bits=layout.bits,
            mode=layout.mode,
            dtype=mx.float32,
        )
    )


def rows_of(kind: GGMLType, blocks: np.ndarray, rows: int) -> np.ndarray:
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), across=st.integers(1, 4))
def test_mlx_reads_repacked_blocks_as_ggml_does(
    kind: GGMLType, seed: int, rows: int, across: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = random_blocks(kind.name, rows * across, BLOCKS[kind][1], rng)
    if kind is GGMLType.MXFP4:  # MLX flushes subnormal products on some devices
        blocks[:, 0] = np.clip(blocks[:, 0], 4, 250)
    packed = repack(blocks.reshape(rows, -1), kind, fixed(FIXED[kind]))
    assert packed.error.equal
    expected = gguf.quants.dequantize(blocks, Kind[kind.name]).reshape(rows, -1)
    np.testing.assert_array_equal(dequantized(packed), expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_scale_byte_is_right_or_known_to_be_wrong(kind: GGMLType) -> None:
    """A form must not claim equality where MLX reads a reserved byte in another way than ggml."""
    head = 1 if kind is GGMLType.MXFP4 else 4
    for byte in range(256):
        block = random_blocks(kind.name, 1, BLOCKS[kind][1], np.random.default_rng(byte))
        block[:, :head] = byte
        packed = repack(block, kind, fixed(FIXED[kind]))
        with np.errstate(over="ignore"):
            expected = gguf.quants.dequantize(block, Kind[kind.name])
        got = dequantized(packed)
        tiny = np.abs(expected).max() < 1e-37  # MLX may flush subnormal numbers to zero
        same = np.array_equal(got, expected) or (tiny and np.abs(got).max() < 1e-37)
        assert packed.error.equal <= same, (byte, got[0, :4], expected[0, :4])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_plain_floats_are_what_ggml_reads_for_every_scale_byte(kind: GGMLType) -> None:
    blocks = random_blocks(kind.name, 256, BLOCKS[kind][1], np.random.default_rng(0))
    head = 1 if kind is GGMLType.MXFP4 else 4
    blocks[:, :head] = np.arange(256, dtype=np.uint8)[:, None]
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(blocks, Kind[kind.name])
    with np.errstate(over="ignore", invalid="ignore"):
        got = repack(blocks, kind, dense("float32")).arrays["weight"]
    np.testing.assert_array_equal(got, expected)
