"""Bias, penalties and DRY against the plain ones; the incremental repeats against a search."""

from __future__ import annotations

import mlx.core as mx
import naive_sampling as naive
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.sampling import penalties

VOCABULARY = 6
token = st.integers(0, VOCABULARY - 1)
past_tokens = naive.pasts(VOCABULARY)
row = st.lists(st.floats(-20, 20, width=32), min_size=VOCABULARY, max_size=VOCABULARY)
break_sequences = naive.breakers(3)


def window_of(past: list[int], width: int) -> mx.array:
    last = past[max(0, len(past) - width) :]
    return mx.array([[-1] * (width - len(last)) + last], dtype=mx.int32).reshape(1, width)


@given(row, st.dictionaries(token, st.floats(-50, 50, width=32), min_size=1))
def test_bias_is_added(logits: list[float], bias: dict[int, float]) -> None:
    ids = mx.array([list(bias)], dtype=mx.uint32)
    result = penalties.add_bias(mx.array([logits]), ids, mx.array([list(bias.values())]))
    expected = [np.float32(v) + np.float32(bias.get(i, 0)) for i, v in enumerate(logits)]
    assert np.array_equal(np.array(result)[0], np.array(expected, dtype=np.float32))


@given(row, past_tokens, st.integers(1, 50), st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties(
    logits: list[float],
    past: list[int],
    width: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    result = penalties.penalize(
        mx.array([logits]), window_of(past, width), repetition, presence, frequency
    )
    expected = naive.penalize(logits, naive.last(past, width), repetition, presence, frequency)
    np.testing.assert_allclose(np.array(result)[0], expected, rtol=1e-5, atol=1e-4)


def repeats_after(
    past: list[int], breakers: set[tuple[int, ...]], width: int, start: int
) -> mx.array:
    """What the sampler carries: found at once for ``past[:start]``, then token by token."""
    initial = penalties.initial_repeats(past[:start], sorted(breakers))
    initial = initial[max(0, len(initial) - width) :]
    repeats = mx.array([[0] * (width - len(initial)) + initial], dtype=mx.int32)
    patterns = mx.array(
        [[[-1] * (3 - len(each)) + list(each) for each in sorted(breakers)]], dtype=mx.int32
    )
    for end in range(start + 1, len(past) + 1):
        window = window_of(past[:end], width)
        repeats = penalties.extend_repeats(repeats, window)
        if breakers:
            repeats = mx.where(penalties.ends_with_any(window, patterns), 0, repeats)
    return repeats


@settings(max_examples=200)
@given(row, past_tokens, break_sequences, st.integers(3, 50), st.integers(1, 4), st.data())
def test_dry(
    logits: list[float],
    past: list[int],
    breakers: set[tuple[int, ...]],
    width: int,
    allowed: int,
    data: st.DataObject,
) -> None:
    start = data.draw(st.integers(0, len(past)))
    repeats = repeats_after(past, breakers, width, start)
    exempt = mx.array([[(i,) in breakers for i in range(VOCABULARY)]])
    result = penalties.dry(
        mx.array([logits]), window_of(past, width), repeats, 0.8, 1.5, allowed, exempt
    )
    expected = naive.dry(logits, past, width, breakers, 0.8, 1.5, allowed)
    np.testing.assert_allclose(np.array(result)[0], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=300)
@given(past_tokens, break_sequences)
def test_initial_repeats_are_found_by_a_search(
    past: list[int], breakers: set[tuple[int, ...]]
) -> None:
    limit = naive.since_breaker(past, breakers)
    found = penalties.initial_repeats(past, sorted(breakers))
    for place in range(len(past)):
        length = 0
        while length < min(limit, place + 1) and past[place - length] == past[-1 - length]:
            length += 1
        assert found[place] == length


def test_dry_stays_finite_in_a_long_repetition() -> None:
    past = [1] * 2000
    repeats = mx.array([penalties.initial_repeats(past, [])], dtype=mx.int32)
    logits = mx.zeros((1, VOCABULARY))
    result = penalties.dry(logits, window_of(past, 2000), repeats, 100.0, 100.0, 1)
    assert mx.all(mx.isfinite(result)).item()
    assert int(mx.argmin(result).item()) == 1


def test_dry_has_nothing_to_say_about_less_than_two_tokens() -> None:
    logits = mx.array([[1.0, 2.0]])
    for past in ([], [1]):
        width = max(1, len(past))
        result = penalties.dry(logits, window_of(past, width), mx.zeros((1, width)), 1.0, 2.0, 1)
        assert mx.array_equal(result, logits)


def test_rows_have_pasts_and_parameters_of_their_own() -> None:
    random = np.random.default_rng(0)
    logits = mx.array(random.normal(size=(3, VOCABULARY)).astype(np.float32))
    window = mx.array(random.integers(-1, VOCABULARY, size=(3, 12)), dtype=mx.int32)
    values = [mx.array(random.uniform(0.5, 2, size=(3, 1)).astype(np.float32)) for _ in range(3)]
    together = penalties.penalize(logits, window, *values)
    for i in range(3):
        own = [value[i : i + 1] for value in values]
        alone = penalties.penalize(logits[i : i + 1], window[i : i + 1], *own)
        assert mx.array_equal(together[i : i + 1], alone)
