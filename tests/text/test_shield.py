"""Placeholders that keep users' text from becoming control tokens."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mlxrun.text.shield import Shield

CONTROL = ["<|a|>", "<|ab|>", "</s>", "[/a]"]
texts = st.text("<|abs/>[]\\ue0f13\ue0f0\ue0f1\ue0f2\ue0f3", max_size=20)


@given(parts=st.lists(texts, max_size=5))
def test_no_marker_within_or_across_strings_and_all_comes_back(parts: list[str]) -> None:
    shield = Shield(CONTROL)
    joined = "".join(shield.cover(parts))
    assert not any(marker in joined for marker in CONTROL)
    assert shield.restore(joined) == "".join(parts)


@given(text=texts, ascii_only=st.booleans())
def test_placeholders_survive_json(text: str, ascii_only: bool) -> None:
    shield = Shield(CONTROL)
    dumped = json.dumps(shield.cover(text), ensure_ascii=ascii_only)
    assert json.loads(shield.restore(dumped)) == text


def test_keys_and_nested_values_are_covered_but_roles_are_not() -> None:
    shield = Shield([*CONTROL, "user"])
    covered = shield.cover({"role": "user", "</s>": [{"x": ("<|a|>", 3, None)}]})
    assert covered["role"] == "user"
    assert "</s>" not in covered and "<|a|>" not in str(covered)
    assert shield.restore(str(covered)).count("</s>") == 1
