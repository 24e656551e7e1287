"""Workloads: combinations, what fits, random requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxrun.bench.workloads import (
    Decode,
    FirstToken,
    Prefill,
    behind,
    fitting,
    plan,
    ragged,
    token_ids,
)
from mlxrun.errors import ContextLengthError


def test_a_plan_has_every_combination_and_always_one_sequence():
    planned = plan([8, 0], [4], [0, 16], [2])
    assert planned == [
        Prefill(8),
        Decode(4),
        Decode(4, 0, 2),
        Prefill(8, 16),
        Decode(4, 16),
        Decode(4, 16, 2),
    ]
    assert [w.name for w in planned[3:]] == ["pp8 @ d16", "tg4 @ d16", "tg4 x2 @ d16"]
    assert [w.tokens for w in planned[:3]] == [8, 4, 8]


@given(st.integers(2, 400))
def test_only_what_the_context_holds_is_run(length):
    workloads = plan([64], [64], [0, 64, 128], [1])
    try:
        fit, rest = fitting(workloads, length)
    except ContextLengthError:
        assert all(workload.length > length for workload in workloads)
        return
    assert all(workload.length <= length for workload in fit)
    assert sorted(map(repr, fit + rest)) == sorted(map(repr, workloads))


@given(st.integers(4, 5000), st.integers(1, 40))
def test_ragged_requests_fit_any_context(length, requests):
    made = ragged(length, requests=requests)
    assert made == ragged(length, requests=requests)
    assert made.parallel == requests
    assert made.length <= length
    assert made.tokens == sum(made.completions)
    if length >= 460:
        assert min(made.prompts) >= 4 and max(made.prompts) <= 300
        assert min(made.completions) >= 16 and max(made.completions) <= 160


@given(st.integers(8, 100_000))
def test_a_short_request_is_shorter_than_the_long_one(length):
    alone, late = behind(length)
    assert isinstance(alone, FirstToken)
    assert isinstance(late, FirstToken)
    assert (alone.behind, alone.prompt) == (0, late.prompt)
    assert late.prompt < late.behind < length


@given(st.integers(1, 50), st.integers(1, 5000), st.integers(0, 9))
def test_random_tokens_are_in_the_vocabulary_and_repeat(count, vocabulary, seed):
    ids = token_ids(count, vocabulary, seed)
    assert len(ids) == count
    assert all(0 <= token < vocabulary for token in ids)
    assert ids == token_ids(count, vocabulary, seed)
