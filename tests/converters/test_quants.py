"""Every GGML codec against the ``gguf`` package: random blocks and those of llama-quantize."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Kind, random_blocks

from converters.gguf.quants import CODECS
from converters.gguf.reader import read_gguf
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.affine import pack_codes, regroup
from converters.quantize.layout import affine

OURS_ALONE = {GGMLType.Q1_0, GGMLType.Q2_0}  # the gguf package cannot read these
SHARED = sorted(set(CODECS) - OURS_ALONE)


def names(kinds: list[GGMLType]) -> list[str]:
    return [kind.name for kind in kinds]


def blocks_of(kind: GGMLType, count: int, seed: int, scale: float | None = None) -> np.ndarray:
    return random_blocks(kind.name, count, BLOCKS[kind][1], np.random.default_rng(seed), scale)


def truth(kind: GGMLType, blocks: np.ndarray) -> np.ndarray:
    """What the gguf package reads; (blocks, elements)."""
    return gguf.quants.dequantize(blocks, Kind[kind.name])


def equal(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_there_is_a_codec_or_a_float_for_all_that_gguf_can_dequantize() -> None:
    readable = {kind.name for kind in Kind if kind in gguf.quants._type_traits}
    floats_and_microscaling = {"F32", "F16", "BF16", "MXFP4", "NVFP4"}
    assert readable - floats_and_microscaling == {kind.name for kind in SHARED}


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for kind in SHARED:
        assert gguf.GGML_QUANT_SIZES[Kind[kind.name]] == BLOCKS[kind]


@pytest.mark.parametrize("kind", SHARED, ids=names(SHARED))
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
@settings(max_examples=25)
def test_any_finite_block_has_gguf_values(kind: GGMLType, seed: int, count: int) -> None:
    blocks = blocks_of(kind, count, seed)
    equal(CODECS[kind].decode(blocks).values(), truth(kind, blocks))


@pytest.mark.parametrize("kind", SHARED, ids=names(SHARED))
def test_every_value_of_every_byte(kind: GGMLType) -> None:
    """Each byte of a block takes all 256 values, so that no code and no sub-scale is left out."""
    elements, size = BLOCKS[kind]
    base = blocks_of(kind, 1, seed=elements)
    swept = np.repeat(base, 256 * size, axis=0).reshape(size, 256, size)
    for position in range(size):
        swept[position, :, position] = np.arange(256)
    swept = swept.reshape(-1, size)
    with np.errstate(invalid="ignore"):
        expected = truth(kind, swept)
    finite = np.isfinite(expected).all(axis=1)
    assert finite.mean() > 0.95
    equal(CODECS[kind].decode(swept[finite]).values(), expected[finite])


def test_products_are_the_same_weights() -> None:
    codec = CODECS[GGMLType.Q6_K]
    blocks = blocks_of(GGMLType.Q6_K, 300, seed=11)
    products = codec.products(blocks)
    assert products is not None
    equal(products.values(), codec.decode(blocks).values())
    factor = np.array([2, -4, 0.125], np.float32)
    scaled, decoded = products.times(factor), codec.decode(blocks).times(factor)
    equal(scaled.values(), decoded.values())


def test_q1_0_by_its_definition() -> None:
    """128 signs, lowest bit first, and a scale: w = d where the bit is set, else -d."""
    blocks = blocks_of(GGMLType.Q1_0, 50, seed=1)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    signs = np.array([[b[2 + i // 8] >> (i % 8) & 1 for i in range(128)] for b in blocks], bool)
    equal(CODECS[GGMLType.Q1_0].decode(blocks).values(), np.where(signs, d, -d))


def test_q2_0_by_its_definition() -> None:
    """64 codes of two bits, lowest first, and a scale: w = d * (q - 1)."""
    blocks = blocks_of(GGMLType.Q2_0, 50, seed=2)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    codes = [[b[2 + i // 4] >> (2 * (i % 4)) & 3 for i in range(64)] for b in blocks]
    equal(CODECS[GGMLType.Q2_0].decode(blocks).values(), d * (np.array(codes, np.float32) - 1))


@pytest.mark.parametrize("kind", sorted(CODECS), ids=names(sorted(CODECS)))
def test_codes_fit_the_bits_that_the_codec_states(kind: GGMLType) -> None:
    codes = CODECS[kind].decode(blocks_of(kind, 64, seed=3))
    assert codes.q.dtype == np.uint8
    assert int(codes.q.max()) < 1 << CODECS[kind].bits
    assert codes.q.shape == (64, BLOCKS[kind][0])


FOURS = [GGMLType.Q2_K, GGMLType.Q6_K, GGMLType.IQ2_XS, GGMLType.IQ2_S]


def test_only_four_types_have_scales_too_narrow_for_mlx() -> None:
    assert {kind for kind in CODECS if not CODECS[kind].mlx_group} == set(FOURS)
    for kind in CODECS:
        group = CODECS[kind].decode(blocks_of(kind, 1, seed=4)).group
        assert group == 16 if kind in FOURS else group % CODECS[kind].mlx_group == 0


KEPT = sorted(kind for kind in CODECS if CODECS[kind].mlx_group)


@pytest.mark.parametrize("kind", KEPT, ids=names(KEPT))
def test_mlx_dequantizes_kept_codes_to_the_same_floats(kind: GGMLType) -> None:
    """The file's own codes under float32 scales: what ``exact`` rests on."""
    rows = 8
    blocks = blocks_of(kind, 4 * rows, seed=5)
    codes = CODECS[kind].decode(blocks)
    layout = affine(CODECS[kind].bits, CODECS[kind].mlx_group, "float32")
    arrays = pack_codes(regroup(codes, rows, layout.group_size), layout).arrays
    got = mx.dequantize(
        *(mx.array(arrays[name]) for name in ("weight", "scales", "biases")),
        group_size=layout.group_size,
        bits=layout.bits,
    )
    equal(np.array(got), codes.values().reshape(rows, -1))


def test_weights_of_the_oracle(oracle: Path) -> None:
    """All quantized tensors that llama-quantize wrote, of each of its file types."""
    seen = set()
    for path in sorted((oracle / "quants").glob("*.gguf")):
        for tensor in read_gguf(path).tensors:
            if tensor.type in SHARED:
                seen.add(tensor.type)
                blocks = tensor.raw().reshape(-1, BLOCKS[tensor.type][1])
                equal(CODECS[tensor.type].decode(blocks).values(), truth(tensor.type, blocks))
    assert seen == set(SHARED)
