"""Codes in MLX's words, and floats rounded to the types of a checkpoint."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.quantize.packing import (
    bit_fields,
    from_float,
    pair_nibbles,
    rounded,
    spread_nibbles,
    sums,
)


def some_bytes(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)


@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([8, 16, 32]), st.integers(1, 4))
def test_nibbles_of_a_run_become_neighbors(seed: int, rows: int, run: int, runs: int) -> None:
    x = some_bytes(seed, rows, run * runs)
    expected = []
    for row in x.reshape(rows, runs, run):
        codes = [code for part in row for code in (*(part & 15), *(part >> 4))]
        expected.append([a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)])
    np.testing.assert_array_equal(pair_nibbles(x, run), np.array(expected, np.uint8))
    np.testing.assert_array_equal(
        spread_nibbles(pair_nibbles(x, run)), bit_fields(x, 4, run), strict=True
    )


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4, 16, 32]),
    st.integers(1, 3),
)
def test_fields_of_a_run_follow_one_another(seed: int, width: int, run: int, runs: int) -> None:
    x = some_bytes(seed, 3, run * runs)
    expected = [
        [part[k] >> shift & (1 << width) - 1 for part in row for shift in range(0, 8, width)
         for k in range(run)]
        for row in x.reshape(3, runs, run).tolist()
    ]  # fmt: skip
    np.testing.assert_array_equal(bit_fields(x, width, run), np.array(expected, np.uint8))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("width", [4, 8])
@given(seed=st.integers(0, 2**32), groups=st.integers(1, 6))
def test_sums_are_exact(width: int, group: int, seed: int, groups: int) -> None:
    stored = some_bytes(seed, groups, group * width // 8)
    codes = stored if width == 8 else spread_nibbles(stored)
    total, squares = sums(stored, width, groups)
    wide = codes.astype(np.int64)
    np.testing.assert_array_equal(total, wide.sum(axis=1))
    np.testing.assert_array_equal(squares, (wide * wide).sum(axis=1))


@pytest.mark.parametrize("width", [4, 8])
def test_sums_hold_the_largest_group(width: int) -> None:
    most = 255 if width == 8 else 15
    stored = np.full((1, 256 * width // 8), 255, np.uint8)
    total, squares = sums(stored, width, 1)
    assert (int(total[0]), int(squares[0])) == (256 * most, 256 * most * most)


MX = {"float16": mx.float16, "bfloat16": mx.bfloat16}


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from(sorted(MX)))
def test_halves_are_rounded_as_mlx_rounds(values: list[float], dtype: str) -> None:
    x = np.array(values, np.float32)
    stored, ours = rounded(x, dtype)
    np.testing.assert_array_equal(ours, from_float(stored, dtype))
    theirs = np.array(mx.array(x).astype(MX[dtype]).astype(mx.float32))
    # MLX on this CPU may flush subnormals to zero; they keep their value here.
    near = np.isclose(ours, theirs, rtol=0, atol=1.2e-38, equal_nan=True)
    assert near.all(), (x[~near], ours[~near], theirs[~near])


def assert_as_numpy(x: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    stored, values = rounded(x, "float16")
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(values, expected.astype(np.float32))


@pytest.mark.parametrize("exponent", range(256))
def test_float16_of_numbers_of_every_exponent(exponent: int) -> None:
    rng = np.random.default_rng(exponent)
    bits = rng.integers(0, 1 << 23, 4096, dtype=np.uint32) | np.uint32(exponent << 23)
    bits[::2] &= np.uint32(0x7FFFF000 | 1 << 31)  # ties, too
    assert_as_numpy(bits.view(np.float32))
    assert_as_numpy(-bits.view(np.float32))


def test_float16_of_what_is_halfway_between_two_and_next_to_it() -> None:
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    for x in (
        between,
        np.nextafter(between, np.float32(0)),
        np.nextafter(between, np.float32(9e9)),
    ):
        assert_as_numpy(x)
        assert_as_numpy(-x)


@pytest.mark.parametrize(
    "values", [[], [-0.0, 0.0], [65519.996, -65519.996], [65520.0, 1.0], [np.nan]]
)
def test_float16_at_its_ends(values: list[float]) -> None:
    assert_as_numpy(np.array(values, np.float32))
