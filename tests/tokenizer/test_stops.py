"""Stop strings in text that arrives in chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.errors import ParameterError
from mlxrun.tokenizer import StopMatcher

few_letters = st.text("abc", max_size=20)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> str:
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


@given(parts=st.lists(few_letters, max_size=8), stops=stop_lists)
def test_like_searching_the_whole_text(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for part in parts:
        emitted, stopped = matcher.add(part)
        shown += emitted
        if stopped:
            break
    shown += matcher.finish()
    text = "".join(parts)
    assert shown == naive(text, stops)
    assert not stopped or any(stop in text for stop in stops)


@given(parts=st.lists(few_letters, max_size=8), stops=stop_lists)
def test_holds_back_only_a_prefix_of_a_stop_string(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for part in parts:
        emitted, stopped = matcher.add(part)
        seen, shown = seen + part, shown + emitted
        if stopped:
            return
        held = seen[len(shown) :]
        pending = any(stop in held for stop in stops)
        assert not held or pending or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_spans_chunks_and_ends_the_text() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.add("text <") == ("text ", False)
    assert matcher.add("/e") == ("", False)
    assert matcher.add("nd> more") == ("", True)
    assert matcher.add("more") == ("", True)
    assert matcher.finish() == ""


def test_a_false_start_is_shown() -> None:
    matcher = StopMatcher(["abab"])
    assert matcher.add("aba") == ("", False)
    assert matcher.add("ca") == ("abac", False)
    assert matcher.finish() == "a"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_empty_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(ParameterError, match="at least one character"):
        StopMatcher(stops)
