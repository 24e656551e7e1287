"""Means and their errors, against the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.eval.perplexity import Estimate, exponential, mean, root_mean_square

numbers = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(numbers, min_size=2, max_size=40))
def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_count(values):
    got = mean(np.array(values))
    centre = sum(values) / len(values)
    variance = sum((x - centre) ** 2 for x in values) / (len(values) - 1)  # unbiased
    assert got.value == pytest.approx(centre, abs=1e-9)
    assert got.error == pytest.approx(math.sqrt(variance / len(values)), abs=1e-9)


def test_one_observation_has_no_error():
    for got in (mean(np.array([3.0])), root_mean_square(np.array([3.0]))):
        assert got.value == pytest.approx(3)
        assert math.isnan(got.error)


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_a_share_has_the_error_of_a_binomial(true):
    got, p = mean(np.array(true, np.float64)), sum(true) / len(true)
    assert got.value == pytest.approx(p)
    assert got.error == pytest.approx(math.sqrt(p * (1 - p) / (len(true) - 1)))


@given(st.lists(numbers, min_size=2, max_size=40))
def test_a_root_mean_square_squares_back(values):
    got = root_mean_square(np.array(values))
    squares = mean(np.array(values) ** 2)
    assert got.value**2 == pytest.approx(squares.value)
    # d(x^2) = 2 x dx
    assert 2 * got.value * got.error == pytest.approx(squares.error if got.value else 0)


@given(st.floats(-50, 50), st.floats(0, 1e-4))
def test_an_exponential_moves_by_its_error(value, error):
    got = exponential(Estimate(value, error))
    step = math.exp(value + error) - math.exp(value)
    assert got.value == math.exp(value)
    assert got.error == pytest.approx(step, rel=1e-3, abs=1e-12 * got.value)


def test_an_overflow_is_infinite():
    assert exponential(Estimate(1e4, 0.0)) == Estimate(math.inf, 0.0)
