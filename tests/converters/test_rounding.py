"""Rounding to half precision against numpy's own and MLX's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.quantize.packing import from_float, rounded

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
        wanted = x.astype(np.float16)
    stored, values = rounded(x, "float16")
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored.view(np.uint16), wanted.view(np.uint16))
    np.testing.assert_array_equal(values, wanted.astype(np.float32))


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
