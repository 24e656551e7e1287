"""Every truncation against the plain one, and the order in which candidates stand."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import naive_sampling as naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlxrun.sampling import truncation

logit = st.one_of(
    st.floats(-30, 30, width=32), st.sampled_from([-math.inf, 0.0, -0.0, 1.0, 2.0, -5.0])
)
some_logits = st.lists(logit, min_size=1, max_size=40).filter(lambda row: max(row) > -math.inf)
fraction = st.floats(0, 1, exclude_max=True)


def survivors(logits: mx.array, ids: mx.array) -> set[int]:
    """The tokens that are left, those of probability 0 from the start aside."""
    kept = np.array(logits)[0] > -math.inf
    return {int(token) for token in np.array(ids)[0][kept]}


def check(
    row: list[float],
    stage: Callable[[mx.array], mx.array],
    reference: Callable[[naive.Candidates], naive.Candidates],
) -> None:
    naive.CLOSE.clear()
    expected = reference(naive.rank(row))
    assume(all(distance > 1e-5 for distance in naive.CLOSE))
    ranked, ids = truncation.ranked(mx.array([row]), len(row))
    left = stage(ranked)
    assert survivors(left, ids) == {token for token, value in expected if value > -math.inf}
    unchanged = np.array(left)[0] > -math.inf
    assert np.array_equal(np.array(left)[0][unchanged], np.array(ranked)[0][unchanged])


@pytest.mark.parametrize("size", [2560, 2561, 50_000])
@pytest.mark.parametrize("k", [1, 7, 40, 200])
@pytest.mark.parametrize("kind", ["distinct", "many equal", "few possible"])
def test_ranked_among_many(size: int, k: int, kind: str) -> None:
    rng = np.random.default_rng(size + k)
    logits = rng.normal(size=(3, size)).astype(np.float32)
    if kind == "many equal":
        logits = np.round(logits)
    if kind == "few possible":
        logits[:, rng.integers(0, size - 1, size - 9)] = -np.inf
        logits[:, -1] = -0.0
    ranked, ids = truncation.ranked(mx.array(logits), k)
    expected = [np.lexsort((np.arange(size), -row))[:k] for row in logits]
    assert np.array_equal(np.array(ids), expected)
    assert np.array_equal(np.array(ranked), np.take_along_axis(logits, np.array(expected), 1))


def test_xtc_knows_probabilities_of_a_large_vocabulary() -> None:
    """The threshold lies in a gap between two tokens that are nearly as likely."""
    logits = np.sort(np.random.default_rng(0).normal(size=262_144).astype(np.float32))[::-1]
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    above = 20_000 + int(np.argmax(exact[20_000:20_100] / exact[20_001:20_101]))
    threshold = float(np.sqrt(exact[above] * exact[above + 1]))
    left = truncation.xtc(mx.array(logits[None].copy()), threshold, mx.array([[True]]))
    assert mx.isinf(left).sum().item() == above


@given(some_logits, st.data())
def test_ranked_orders_by_logit_then_id(row: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    logits, ids = truncation.ranked(mx.array([row]), k)
    expected = naive.rank(row)[:k]
    assert np.array(ids)[0].tolist() == [token for token, _ in expected]
    assert np.array(logits)[0].tolist() == [value for _, value in expected]


def test_ranked_breaks_ties_by_id_in_a_large_vocabulary() -> None:
    row = mx.zeros((1, 50_000))
    _, ids = truncation.ranked(row, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


@given(some_logits, fraction)
def test_top_p(row: list[float], p: float) -> None:
    check(row, lambda x: truncation.top_p(x, p), lambda c: naive.top_p(c, p))


@given(some_logits, st.floats(1e-4, 1))
def test_min_p(row: list[float], p: float) -> None:
    check(row, lambda x: truncation.min_p(x, p), lambda c: naive.min_p(c, p))


@given(some_logits, fraction)
def test_typical_p(row: list[float], p: float) -> None:
    check(row, lambda x: truncation.typical_p(x, p), lambda c: naive.typical_p(c, p))


@given(some_logits, st.floats(0.01, 0.5))
def test_xtc(row: list[float], threshold: float) -> None:
    active = mx.array([[True]])
    check(
        row,
        lambda x: truncation.xtc(x, threshold, active),
        lambda c: naive.xtc(c, threshold),
    )


@given(some_logits, st.floats(0.01, 20))
def test_mirostat(row: list[float], mu: float) -> None:
    check(row, lambda x: truncation.mirostat(x, mu), lambda c: naive.mirostat(c, mu))


def test_min_p_of_one_keeps_the_likeliest_and_its_equals() -> None:
    left = truncation.min_p(mx.array([[1.5, 1.5, 1.4, -3.0]]), 1.0)
    assert (left > -math.inf).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("stage", [truncation.top_p, truncation.typical_p])
@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_the_smallest_share_leaves_one_candidate(
    stage: Callable[[mx.array, float], mx.array], size: int
) -> None:
    logits = mx.zeros((1, size))
    assert mx.sum(stage(logits, 0.0) > -math.inf).item() == 1


def test_xtc_spares_rows_where_the_dice_fell_otherwise() -> None:
    logits = mx.array([[1.0, 0.9, 0.8, -4.0]] * 2)
    left = truncation.xtc(logits, 0.1, mx.array([[True], [False]]))
    assert (left > -math.inf).tolist() == [[False, False, True, True], [True] * 4]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_rows_have_parameters_of_their_own(seed: int) -> None:
    random = np.random.default_rng(seed)
    row = mx.array(random.normal(size=(3, 20)).astype(np.float32) * 3)
    logits, _ = truncation.ranked(row, 20)
    values = random.uniform(0.05, 0.95, size=(3, 1)).astype(np.float32)
    for stage in (truncation.top_p, truncation.min_p, truncation.typical_p, truncation.mirostat):
        together = stage(logits, mx.array(values))
        for i in range(3):
            alone = stage(logits[i : i + 1], mx.array(values[i : i + 1]))
            assert mx.array_equal(together[i : i + 1], alone)
