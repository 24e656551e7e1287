"""Sums over a vocabulary, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.kernels.cpu_ops import log_softmax, total

Doubles = npt.NDArray[np.float64]


def exact_log_softmax(x: npt.NDArray[np.float32]) -> Doubles:
    shifted = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    exact: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return exact


def doubles(x: mx.array) -> Doubles:
    return np.array(x, dtype=np.float64)


@given(st.integers(1, 3), st.integers(1, 5000))
@settings(max_examples=30)
def test_sums_leave_nothing_out(rows: int, width: int) -> None:
    x = np.random.default_rng(width).integers(0, 100, (rows, width)).astype(np.float32)
    assert np.array(total(mx.array(x))).tolist() == x.sum(axis=-1, keepdims=True).tolist()


@pytest.mark.parametrize("width", [262_144, 262_200, 49_152, 1000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_log_probabilities_sum_to_one(width: int, spread: float) -> None:
    x = np.random.default_rng(0).normal(scale=spread, size=(2, width)).astype(np.float32)
    got = doubles(log_softmax(mx.array(x)))
    np.testing.assert_allclose(np.exp(got).sum(axis=-1), 1, atol=1e-6)
    # To which float32 rounds: numbers between 16 and 32 lie 1.9e-6 apart.
    np.testing.assert_allclose(got, exact_log_softmax(x), atol=1e-6, rtol=2e-7)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = mx.array(np.random.default_rng(1).standard_normal((3, 50_000)).astype(np.float32))
    alone = [np.array(log_softmax(x[row : row + 1]))[0] for row in range(3)]
    assert np.array_equal(np.array(log_softmax(x)), alone)


def test_what_cannot_be_has_no_probability() -> None:
    logits = mx.array([[0.0, -mx.inf, 0.0]])
    assert log_softmax(logits).tolist()[0] == pytest.approx([-0.6931472, -mx.inf, -0.6931472])
