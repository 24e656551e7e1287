"""Packing against MLX itself, and the errors that forms state against errors recomputed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.gguf.quants import Codes
from converters.quantize.affine import (
    ErrorStats,
    Packed,
    pack_codes,
    pack_floats,
    requantize,
    requantize_integers,
)
from converters.quantize.layout import affine
from converters.quantize.packing import from_float, pack_bits

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DTYPES = ("float32", "float16", "bfloat16")
MX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def dequantized(packed: Packed) -> np.ndarray:
    """What MLX computes from a form, in float32."""
    layout = packed.layout
    if not layout.quantized:
        return from_float(packed.arrays["weight"], layout.dtype)
    scales, biases = (
        mx.array(from_float(packed.arrays[name], layout.dtype)) for name in ("scales", "biases")
    )
    return np.array(
        mx.dequantize(
            mx.array(packed.arrays["weight"]),
            scales,
            biases,
            group_size=layout.group_size,
            bits=layout.bits,
        )
    )


def assert_states_its_error(packed: Packed, wanted: np.ndarray) -> None:
    got, exact = dequantized(packed).astype(np.float64), wanted.astype(np.float64)
    rmse = np.sqrt(((got - exact) ** 2).sum() / (exact**2).sum())
    # MLX rounds each product and sum to float32, of the size of its terms.
    noise = 1e-6 * float(np.abs(exact).max())
    assert packed.error.rmse == pytest.approx(rmse, rel=1e-3, abs=2e-6)
    assert packed.error.maximum == pytest.approx(np.abs(got - exact).max(), rel=1e-3, abs=noise)


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``pack_bits``, bit by bit: uint32 words (n, w) to uint8 codes (n, c)."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = np.packbits(stream.reshape(len(words), -1, bits), axis=2, bitorder="little")
    return codes[:, :, 0]


@pytest.mark.parametrize("bits", BITS)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), groups=st.integers(1, 5))
@settings(max_examples=30)
def test_mlx_reads_packed_codes(bits: int, seed: int, rows: int, groups: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, 32 * groups), dtype=np.uint8)
    words = pack_bits(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (rows, groups * bits)
    one = mx.ones((rows, groups))
    got = mx.dequantize(mx.array(words), one, mx.zeros_like(one), group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(got), codes.astype(np.float32))
    np.testing.assert_array_equal(unpack_bits(words, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_unpacks_what_mlx_packs(bits: int) -> None:
    w = mx.random.normal((4, 256), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    codes = unpack_bits(np.array(words), bits)
    np.testing.assert_array_equal(pack_bits(codes, bits), np.array(words))
    values = codes.reshape(4, 4, 64) * np.array(scales)[..., None] + np.array(biases)[..., None]
    got = np.array(mx.dequantize(words, scales, biases, group_size=64, bits=bits))
    np.testing.assert_allclose(values.reshape(4, 256), got, rtol=1e-5, atol=1e-6)


def random_codes(seed: int, bits: int, group: int, spread: float, rows: int) -> Codes:
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 1 << bits, (rows, 4 * group), dtype=np.uint8)
    scale = (rng.standard_normal((rows, 4)) * 10 ** rng.uniform(-spread, spread)).astype(np.float32)
    bias = (rng.standard_normal((rows, 4)) * 10 ** rng.uniform(-spread, spread)).astype(np.float32)
    return Codes(q, scale, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@given(
    seed=st.integers(0, 2**32), group=st.sampled_from(GROUPS), rows=st.sampled_from([1, 3, 40, 200])
)
@settings(max_examples=20)
def test_kept_codes_state_the_error_of_their_rounded_scales(
    dtype: str, bits: int, seed: int, group: int, rows: int
) -> None:
    codes = random_codes(seed, bits, group, spread=1.5, rows=rows)
    packed = pack_codes(codes, affine(bits, group, dtype))
    np.testing.assert_array_equal(unpack_bits(packed.arrays["weight"], bits), codes.q)
    values = codes.q.reshape(rows, 4, group) * codes.scale.astype(np.float64)[..., None]
    values += codes.bias[..., None]
    assert_states_its_error(packed, values.reshape(rows, -1))
    assert packed.error.equal == (packed.error.maximum == 0)


@pytest.mark.parametrize("spread", [1, 3, 22])
def test_errors_of_weights_that_are_small_relative_to_their_biases(spread: int) -> None:
    """Codes near ``-bias / scale``: what is summed cancels, and float32 alone would not do."""
    rng = np.random.default_rng(spread)
    q = rng.integers(128 - spread, 129 + spread, (512, 1024), dtype=np.uint8)
    scale = rng.uniform(0.001, 0.01, (512, 32)).astype(np.float32)
    packed = pack_codes(Codes(q, scale, -128 * scale), affine(8, 32, "bfloat16"))
    rounded = [from_float(packed.arrays[name], "bfloat16") for name in ("scales", "biases")]
    codes = q.reshape(512, 32, 32).astype(np.float64)
    wanted = (codes - 128) * scale.astype(np.float64)[..., None]
    got = codes * rounded[0].astype(np.float64)[..., None] + rounded[1][..., None]
    rmse = np.sqrt(((got - wanted) ** 2).sum() / (wanted**2).sum())
    assert packed.error.rmse == pytest.approx(rmse, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
@settings(max_examples=10)
def test_requantized_weights_state_their_error(
    bits: int, group: int, seed: int, dtype: str
) -> None:
    w = np.random.default_rng(seed).standard_normal((3, 256)).astype(np.float32)
    packed = requantize(w, affine(bits, group, dtype))
    assert packed.arrays["scales"].shape == packed.arrays["biases"].shape == (3, 256 // group)
    assert_states_its_error(packed, w)
    assert not packed.error.equal


def random_products(seed: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers (4, 512) as of Q6_K, and the unit of each group of columns, of both signs."""
    rng = np.random.default_rng(seed)
    p = np.rint(rng.standard_normal((4, 512)) * 10 ** rng.uniform(0, 3)).astype(np.int16)
    unit = rng.standard_normal((4, 2)) * 10 ** rng.uniform(-6, 1)
    return p, np.repeat(unit, 256 // group, axis=1).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
@settings(max_examples=10)
def test_requantized_products_are_as_near_as_their_floats(
    bits: int, group: int, seed: int, dtype: str
) -> None:
    p, unit = random_products(seed, group)
    w = (p.reshape(-1, group) * unit.reshape(-1, 1)).reshape(p.shape)
    packed = requantize_integers(p, unit, affine(bits, group, dtype))
    wanted = requantize(w, affine(bits, group, dtype))
    for name in ("scales", "biases"):
        np.testing.assert_array_equal(packed.arrays[name], wanted.arrays[name])
    codes, expected = (unpack_bits(x.arrays["weight"], bits) for x in (packed, wanted))
    assert np.abs(codes.astype(int) - expected).max() <= 1  # halfway between two, either will do
    assert packed.error.rmse == pytest.approx(wanted.error.rmse, rel=1e-4)
    assert packed.error.equal == wanted.error.equal
    assert_states_its_error(packed, w)


@pytest.mark.parametrize("bits", BITS)
def test_products_that_a_form_holds_are_distinguished_from_near_ones(bits: int) -> None:
    p = np.random.default_rng(bits).integers(0, 1 << bits, (2, 64)).astype(np.int16)
    p[:, :2] = 0, (1 << bits) - 1
    p[1] = 0  # a group of one value
    unit = np.full((2, 1), -0.25, np.float32)
    packed = requantize_integers(p, unit, affine(bits, 64, "float32"))
    assert packed.error.equal
    np.testing.assert_array_equal(dequantized(packed), -0.25 * p)
    p[0, 2] = (1 << bits) // 2
    third = requantize_integers(p, unit / 3, affine(bits, 64, "bfloat16"))
    assert not third.error.equal


@pytest.mark.parametrize("bits", BITS)
def test_requantizing_is_no_worse_than_mlx_own_quantizer(bits: int) -> None:
    w = np.random.default_rng(bits).standard_t(4, (32, 512)).astype(np.float32)
    theirs = mx.dequantize(*mx.quantize(mx.array(w), group_size=64, bits=bits), 64, bits)
    error = ErrorStats()
    error.add(w, np.array(theirs))
    assert requantize(w, affine(bits, 64, "float32")).error.rmse <= 1.001 * error.rmse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_keep_what_a_bias_can_hold(bits: int, dtype: str) -> None:
    w = np.repeat(np.array([[0.0, 0.5, -2.0, 1024.0]], np.float32), 32, axis=1)
    packed = requantize(w, affine(bits, 32, dtype))
    assert packed.error.equal
    np.testing.assert_array_equal(dequantized(packed), w)


@given(st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_plain_floats_state_their_error(seed: int, dtype: str) -> None:
    w = np.random.default_rng(seed).standard_normal((5, 33)).astype(np.float32)
    packed = pack_floats(w, dtype)
    assert packed.error.equal == (dtype == "float32")
    assert_states_its_error(packed, w)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-10, 1.0, 1e15, 1e25, 1e37])
def test_errors_are_measured_at_any_magnitude(size: float) -> None:
    """Squares of float32 numbers leave float32's range long before the numbers do."""
    w = (np.random.default_rng(6).standard_normal(1000) * size).astype(np.float32)
    error = ErrorStats()
    error.add(w, np.float32(1.25) * w)
    assert error.rmse == pytest.approx(0.25, rel=1e-3)
    lost = ErrorStats()
    lost.add(w, np.zeros_like(w))
    assert lost.rmse == pytest.approx(1, rel=1e-3)


def test_an_error_of_nothing_is_infinite_and_no_error_is_none() -> None:
    zeros, error = np.zeros(4, np.float32), ErrorStats()
    error.add(zeros, zeros)
    assert error.rmse == 0
    error.add(zeros, zeros + 1)
    assert error.rmse == float("inf")


def test_an_overflow_is_never_a_small_error() -> None:
    w = np.array([[1e6, 1.0, 2.0, 3.0] * 8], np.float32)
    with np.errstate(all="ignore"):
        for packed in (
            pack_floats(w, "float16"),
            requantize(1e6 * w, affine(8, 32, "float16")),
            requantize_integers(w.astype(np.int16), w[:, :1], affine(8, 32, "float16")),
        ):
            assert not packed.error.rmse < 1e6
            assert not packed.error.equal


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_errors_of_chunks_add_up(seed: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((10, 8)).astype(np.float32)
    got = w + rng.standard_normal((10, 8)).astype(np.float32)
    whole, parts, second = ErrorStats(), ErrorStats(), ErrorStats()
    whole.add(w, got)
    parts.add(w[:cut], got[:cut])
    second.add(w[cut:], got[cut:])
    parts.merge(second)
    assert parts.rmse == pytest.approx(whole.rmse, rel=1e-5)
    assert parts.maximum == whole.maximum
