"""Windows and scored tokens, against the loops of llama-perplexity written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.errors import ContextLengthError, ParameterError
from mlxrun.eval.windows import windows

BOS = -1


def scored(plan) -> list[tuple[list[int], int]]:
    """The prefix of each scored token, and the token."""
    return [
        (window[:place], window[place])
        for window in plan
        for place in range(len(window) - plan.scored, len(window))
    ]


@given(st.integers(5, 40), st.integers(0, 150), st.booleans(), st.booleans())
def test_windows_side_by_side(context, extra, adds_bos, bos):
    text, before = list(range(context + extra)), (BOS,) if adds_bos else ()
    tokens = [*before, *text]
    expected = []
    for chunk in range(len(tokens) // context):
        own = tokens[chunk * context : (chunk + 1) * context]
        if adds_bos and bos:
            own[0] = BOS
        expected += [(own[: j + 1], own[j + 1]) for j in range(context // 2, context - 1)]
    assert scored(windows(text, before, 1000, context=context, bos=bos)) == expected


@given(st.integers(5, 40), st.integers(0, 150), st.data())
def test_windows_that_overlap(context, extra, data):
    stride = data.draw(st.integers(1, context - 1))
    text = list(range(context + extra))
    expected, start = [], 0
    while start + context <= len(text):
        own = text[start : start + context]
        expected += [(own[: j + 1], own[j + 1]) for j in range(context - stride - 1, context - 1)]
        start += stride
    got = scored(windows(text, (), 1000, context=context, stride=stride))
    assert got == expected
    targets = [target for _, target in got]
    assert targets == list(range(context - stride, context - stride + len(targets)))  # each once


@given(st.integers(1, 12))
def test_no_more_windows_than_asked_for(chunks):
    whole = list(windows(list(range(100)), (), 1000, context=10))
    assert list(windows(list(range(100)), (), 1000, context=10, chunks=chunks)) == whole[:chunks]


def test_the_usual_window_is_the_models_where_that_is_smaller():
    text = list(range(600))
    assert windows(text, (), 4096).context == 512
    assert windows(text, (), 300).context == 300


def test_a_text_stands_behind_the_tokenizers_prefix():
    plan = windows(list(range(18)), (-2, -1), 100, context=10)
    assert list(plan) == [[-2, -1, *range(8)], [-2, -1, *range(10, 18)]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 4}, "context must be"),
        ({"context": 10.5}, "context must be"),
        ({"context": 10, "stride": 0}, "stride must be"),
        ({"context": 10, "stride": 10}, "between 1 and 9"),
        ({"context": 10, "chunks": 0}, "chunks must be"),
        (
            {"context": 21},
            "at least 21, a window .take a longer text or a .*, not 20",
        ),
    ],
)
def test_impossible_windows(options, message):
    with pytest.raises(ParameterError, match=message):
        windows(list(range(20)), (), 100, **options)


def test_a_window_that_the_model_cannot_see():
    with pytest.raises(ContextLengthError, match="at most 16"):
        windows(list(range(20)), (), 16, context=17)
