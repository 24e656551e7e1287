"""blocks.h, compiled as plain C++, against the gguf package and the converter: bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from decoders import FLOATS, Decoders
from tiny_models import HALF_SCALES, Kind, random_blocks

from converters.gguf.quants import CODECS
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.affine import microscaled
from converters.quantize.packing import pair_nibbles, spread_nibbles

MICROSCALING = {GGMLType.MXFP4, GGMLType.NVFP4}
CODED = sorted(set(CODECS) | MICROSCALING)
OURS_ALONE = {GGMLType.Q1_0, GGMLType.Q2_0}  # the gguf package cannot read these
SHARED = sorted((set(CODED) | set(FLOATS)) - OURS_ALONE)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    return Decoders(tmp_path_factory.mktemp("rows"))


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal numbers with equal signs (of zero, too); NaN where NaN is."""
    got, expected = got.reshape(-1), expected.astype(np.float32).reshape(-1)
    odd = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), odd)
    np.testing.assert_array_equal(got[~odd].view(np.uint32), expected[~odd].view(np.uint32))


def raw_bytes(kind: GGMLType, blocks: int, seed: int) -> np.ndarray:
    """Any bytes at all, (blocks, bytes): infinite, subnormal, negative and missing scales, too."""
    return np.random.default_rng(seed).integers(0, 256, (blocks, BLOCKS[kind][1]), dtype=np.uint8)


def named(kinds: list[GGMLType]) -> list[str]:
    return [kind.name for kind in kinds]


def test_every_weight_type_has_a_decoder(decoders: Decoders) -> None:
    described = decoders.types()
    assert sorted(each.type for each in described) == CODED
    for each in described:
        assert (each.block, each.bytes) == BLOCKS[each.type]


@pytest.mark.parametrize("kind", SHARED, ids=named(SHARED))
def test_any_bytes_are_the_gguf_packages_weights(decoders: Decoders, kind: GGMLType) -> None:
    blocks = 4000 if BLOCKS[kind][0] > 1 else 160000
    raw = raw_bytes(kind, blocks, seed=int(kind))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, Kind[kind.name])
    same_bits(decoders.values(kind, raw.reshape(1, -1)), expected)


@pytest.mark.parametrize("scale", [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00])
def test_every_kind_of_half(decoders: Decoders, scale: int) -> None:
    """Zeros of either sign, the least and greatest subnormals, the greatest, infinite, NaN."""
    for kind in (kind for kind in SHARED if kind.name in HALF_SCALES):
        raw = raw_bytes(kind, 64, seed=scale)
        for start in HALF_SCALES[kind.name]:
            raw[:, start : start + 2] = np.array([scale], "<u2").view(np.uint8)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, Kind[kind.name])
        same_bits(decoders.values(kind, raw.reshape(1, -1)), expected)


@pytest.mark.parametrize("kind", CODED, ids=named(CODED))
def test_the_converters_own_weights(decoders: Decoders, kind: GGMLType) -> None:
    raw = random_blocks(kind.name, 500, BLOCKS[kind][1], np.random.default_rng(7))
    if kind in MICROSCALING:
        head, group = (1, 32) if kind is GGMLType.MXFP4 else (4, 16)
        codes = spread_nibbles(pair_nibbles(np.ascontiguousarray(raw[:, head:]), group // 2))
        with np.errstate(over="ignore"):  # the greatest scales
            expected = microscaled(codes, raw[:, :head], kind)
    else:
        expected = CODECS[kind].decode(raw).values()
    np.testing.assert_array_equal(decoders.values(kind, raw), expected)


@pytest.mark.parametrize("kind", CODED, ids=named(CODED))
def test_the_list_states_the_range_the_group_and_the_zero(
    decoders: Decoders, kind: GGMLType
) -> None:
    row = next(each for each in decoders.types() if each.type is kind)
    raw = random_blocks(kind.name, 3000, BLOCKS[kind][1], np.random.default_rng(3), 0.01)
    w, q, sm = decoders.decode(kind, raw)
    assert (q.min(), q.max()) == (row.low, row.high)
    assert row.high <= 63 if row.low == 0 else row.low < 0 == row.zero
    assert bool(sm[:, 1].any()) == bool(row.minimum)
    if not row.minimum:
        assert not w[q == row.zero].any()
    grouped = sm.reshape(-1, row.group // 16, 2)
    assert (grouped == grouped[:, :1]).all()
    if row.group == 16:
        assert (sm[0::2] != sm[1::2]).any()
