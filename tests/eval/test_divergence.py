"""Probabilities and divergences in float32, against plain formulas in float64."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mlxrun.eval.kl_divergence import comparison, kl_divergence, token_scores
from mlxrun.eval.perplexity import exponential, mean, softmax

logits = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 300)),
    elements=st.floats(-200, 200, width=32),
)


def log_probabilities(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def naive(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    one, other = log_probabilities(a), log_probabilities(b)
    return (np.exp(one) * (one - other)).sum(axis=-1)


def ours(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array(kl_divergence(softmax(mx.array(a)), softmax(mx.array(b))))


@given(logits, st.data())
@settings(max_examples=60)
def test_negative_log_likelihoods(x, data):
    targets = data.draw(st.lists(st.integers(0, x.shape[1] - 1), min_size=len(x), max_size=len(x)))
    got = np.array(softmax(mx.array(x)).nll(mx.array(targets)))
    expected = -log_probabilities(x)[np.arange(len(x)), targets]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)


@given(logits, st.data())
@settings(max_examples=60)
def test_divergences_of_any_logits(a, data):
    b = data.draw(npst.arrays(np.float32, a.shape, elements=st.floats(-200, 200, width=32)))
    got = ours(a, b)
    assert (got >= 0).all()
    np.testing.assert_allclose(got, naive(a, b), rtol=2e-5, atol=2e-5)


@given(logits)
@settings(max_examples=30)
def test_nothing_diverges_from_itself(a):
    assert (ours(a, a) == 0).all()


def test_tokens_that_cannot_be():
    """A logit of minus infinity is a probability of 0, of which nothing is lost."""
    never = -math.inf
    a = mx.array([[1.0, 2.0, never], [1.0, 2.0, never], [1.0, 2.0, 0.0]])
    b = mx.array([[1.0, 2.0, never], [1.0, 2.0, 3.0], [1.0, 2.0, never]])
    same, less, lost = kl_divergence(softmax(a), softmax(b)).tolist()
    p, q = np.exp([1, 2]) / np.exp([1, 2]).sum(), np.exp([1, 2]) / np.exp([1, 2, 3]).sum()
    assert same == 0
    assert less == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)
    assert lost == math.inf


@pytest.mark.parametrize("off", [1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 4.0])
def test_small_divergences_are_resolved_beyond_the_precision_of_probabilities(off):
    rng = np.random.default_rng(0)
    a = 3 * rng.standard_normal((8, 30_000)).astype(np.float32)
    b = a + np.float32(off) * rng.standard_normal(a.shape).astype(np.float32)
    one, other = log_probabilities(a), log_probabilities(b)
    ratio = one - other
    expected = (np.exp(one) * (np.expm1(-ratio) + ratio)).sum(axis=-1)  # positive terms only
    assert (expected < 1.5 * off**2).all()  # at 1e-4 below 1e-8, under float32's epsilon
    np.testing.assert_allclose(ours(a, b), expected, rtol=5e-3 if off < 1e-3 else 5e-4)


def test_perplexity_over_a_large_vocabulary():
    logits = np.random.default_rng(3).standard_normal((2, 262_144)).astype(np.float32)
    targets = np.array([17, 262_143])
    got = np.array(softmax(mx.array(logits)).nll(mx.array(targets)), dtype=np.float64)
    exact = log_probabilities(logits)[np.arange(2), targets]
    np.testing.assert_allclose(got, -exact, atol=2e-6)


def test_the_scores_of_a_token():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((5, 40)).astype(np.float32) for _ in "ab")
    targets = rng.integers(0, 40, 5)
    scores = token_scores(mx.array(a), mx.array(b), mx.array(targets))
    nll_a, nll_b, divergence, agrees = np.array(scores)
    rows = np.arange(5)
    np.testing.assert_allclose(nll_a, -log_probabilities(a)[rows, targets], rtol=1e-5)
    np.testing.assert_allclose(nll_b, -log_probabilities(b)[rows, targets], rtol=1e-5)
    np.testing.assert_allclose(divergence, naive(a, b), rtol=1e-5)
    assert agrees.tolist() == (a.argmax(-1) == b.argmax(-1)).tolist()


@given(st.integers(2, 200))
@settings(max_examples=30)
def test_a_comparison(count):
    rng = np.random.default_rng(count)
    a, b, each = rng.exponential(2, (3, count))
    agrees = rng.random(count) < 0.7
    scores = np.stack([a, b, each, agrees])
    got = comparison(scores, tokens=count, windows=3, context=16, scored=7)
    assert got.agreement.value == pytest.approx(agrees.mean())
    change = np.exp(-b) - np.exp(-a)
    assert got.perplexity_b.value == pytest.approx(np.exp(b.mean()))
    assert (got.perplexity_a, got.perplexity_b) == (exponential(mean(a)), exponential(mean(b)))
    assert got.log_ratio.value == pytest.approx(np.log(got.perplexity_b.value / np.exp(a.mean())))
    # The variance of a difference has a covariance in it.
    paired = (np.var(a) + np.var(b) - 2 * np.cov(a, b, bias=True)[0, 1]) / (count - 1)
    assert got.log_ratio.error == pytest.approx(np.sqrt(paired))
    assert got.rms_change.value == pytest.approx(np.sqrt(np.mean(change**2)))
    assert got.change.value == pytest.approx(change.mean())
    assert got.largest == each.max()
    assert got.percentiles["50"] == pytest.approx(np.median(each))
    ordered = [*got.percentiles.values(), got.largest]
    assert ordered == sorted(ordered)
    assert (got.tokens, got.windows, got.context, got.scored) == (count, 3, 16, 7)
