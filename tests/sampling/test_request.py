"""Requests and what comes back: validation, display, JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.errors import ParameterError
from mlxrun.outputs import (
    Chunk,
    Completion,
    Request,
    SamplingParams,
    TokenLogprob,
    Usage,
)

USAGE = Usage(prompt_tokens=5, completion_tokens=3, time_to_first_token=0.25, tokens_per_second=58)


def completion(text: str = "Hello.") -> Completion:
    top = TokenLogprob(7, -0.5, bytes=b"Hel"), TokenLogprob(9, -math.inf, bytes=b"\xc3")
    entry = TokenLogprob(7, -0.5, top, b"Hel")
    return Completion(text, (7, 8, 9), "stop", USAGE, (entry,))


def test_a_request_normalizes_its_lists() -> None:
    request = Request([1, 2], SamplingParams(seed=1), max_tokens=4, stop="###")
    assert request.prompt == (1, 2)
    assert request.stop == ("###",)
    assert Request([1], stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", [[], [-1], [1.0], ["a"], [True]]),
        ("max_tokens", [0, -1, 2.5, "3", True, math.inf]),
        ("stop", [[""], "", [1], 3, b"a"]),
        ("ignore_eos", [1, "yes", None]),
        ("params", [{"temperature": 1}, None]),
    ],
)
def test_wrong_values_are_refused(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ParameterError) as caught:
            Request(**{"prompt": [1], name: value})  # type: ignore[arg-type]
        assert caught.value.name == name
        assert str(caught.value).startswith(f"{name} must be ")


def test_a_completion_is_its_text() -> None:
    assert str(completion("Once")) == "Once"
    assert str(Chunk("upon")) == "upon"


def test_repr_is_short() -> None:
    shown = repr(completion("word " * 1000))
    assert len(shown) < 160
    assert "3 tokens, stop" in shown


class Markup(HTMLParser):
    """Collects the tags and the text that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text() | st.sampled_from(["<script>alert(1)</script>", "</pre><img src=x>", "&lt;"]))
def test_html_shows_the_text_and_nothing_of_it_becomes_markup(text: str) -> None:
    plain, hostile = Markup(), Markup()
    plain.feed(completion("")._repr_html_())
    hostile.feed(completion(text)._repr_html_())
    assert hostile.tags == plain.tags
    assert hostile.text == text + plain.text


def test_json_round_trip() -> None:
    data = json.loads(json.dumps(completion().to_dict(), allow_nan=False))
    assert data["text"] == "Hello."
    assert data["tokens"] == [7, 8, 9]
    assert data["finish_reason"] == "stop"
    assert data["usage"]["time_to_first_token"] == 0.25
    assert Usage(**data["usage"]) == USAGE
    first = {"token": 7, "text": "Hel", "bytes": [72, 101, 108], "logprob": -0.5}
    second = {"token": 9, "text": "\ufffd", "bytes": [0xC3], "logprob": None}
    assert data["logprobs"] == [{**first, "top": [first, second]}]
    chunk = json.loads(json.dumps(Chunk("a", (1,)).to_dict(), allow_nan=False))
    assert chunk == {
        "text": "a",
        "tokens": [1],
        "finish_reason": None,
        "usage": None,
        "logprobs": [],
    }


@pytest.mark.parametrize("module", ["mlxrun.outputs", "mlxrun.sampling.dry"])
def test_no_tensor_library_is_imported(module: str) -> None:
    code = f"import sys, {module}; print({{'mlx', 'numpy'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
