"""Placeholders that keep users' text from becoming control tokens."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mlxrun.tokenizer.special_tokens import Shield

CONTROL = ["<|a|>", "<|ab|>", "</s>", "[/a]"]
texts = st.text("<|abs/>[]\\ue0f13\ue0f0\ue0f1\ue0f2\ue0f3", max_size=20)


@given(parts=st.lists(texts, max_size=5))
def test_no_marker_within_or_across_strings_and_the_text_is_restored(parts: list[str]) -> None:
    shield = Shield(CONTROL)
    joined = "".join(shield.escape(parts))
    assert not any(marker in joined for marker in CONTROL)
    assert shield.restore(joined) == "".join(parts)


@given(text=texts, ascii_only=st.booleans())
def test_placeholders_survive_json(text: str, ascii_only: bool) -> None:
    shield = Shield(CONTROL)
    dumped = json.dumps(shield.escape(text), ensure_ascii=ascii_only)
    assert json.loads(shield.restore(dumped)) == text


def test_keys_and_nested_values_are_escaped_but_roles_are_not() -> None:
    shield = Shield([*CONTROL, "user"])
    escaped = shield.escape({"role": "user", "</s>": [{"x": ("<|a|>", 3, None)}]})
    assert escaped["role"] == "user"
    assert "</s>" not in escaped and "<|a|>" not in str(escaped)
    assert shield.restore(str(escaped)).count("</s>") == 1


@given(st.lists(st.text("<|a>", min_size=1, max_size=5), max_size=6), st.text("<|a>b", max_size=8))
def test_every_end_that_could_become_a_control_token_is_escaped(
    control: list[str], text: str
) -> None:
    """The unescaped end of a message begins no control token, unless it is a word."""
    shield = Shield(control)
    escaped = shield.escape(text)
    assert shield.restore(escaped) == text
    for size in range(1, len(escaped) + 1):
        tail = escaped[-size:]
        assert tail.isalnum() or not any(t != tail and t.startswith(tail) for t in control)
