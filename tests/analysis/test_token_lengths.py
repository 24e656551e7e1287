"""Percentiles against their definition; tokens of prompts and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Tiny

from mlxrun.analysis.dataset import (
    PERCENTILES,
    Exchange,
    Lengths,
    percentile,
    summary,
    token_lengths,
)
from mlxrun.errors import DatasetError
from mlxrun.tokenizer.tokenizer import Tokenizer, load_tokenizer

lengths = st.lists(st.integers(0, 5000), min_size=1, max_size=300)
FILE = Path("data.jsonl")


@given(lengths, st.integers(1, 100))
def test_a_percentile_covers_as_many_and_no_smaller_one_does(found, percent):
    least = percentile(found, percent)
    assert least in found
    assert 100 * sum(n <= least for n in found) >= percent * len(found)
    assert 100 * sum(n < least for n in found) < percent * len(found)


@given(lengths)
def test_a_summary(found):
    made = summary(found)
    levels = [made["percentiles"][percent] for percent in PERCENTILES]
    assert levels == sorted(levels)
    assert made["count"] == len(found)
    assert levels[-1] <= made["longest"] == max(found)
    assert made["mean"] == pytest.approx(sum(found) / len(found))


def test_both_are_covered_only_together():
    found = Lengths([1, 9, 1, 9, 1], [1, 1, 9, 9, None])
    assert found.known_outputs == [1, 1, 9, 9]
    assert found.covered(9, 9) == 1
    assert found.covered(1, 9) == found.covered(9, 1) == 0.5
    assert found.covered(1, 1) == 0.25


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    made = Tiny(template=template).write(tmp_path_factory.mktemp("lengths") / "tiny.gguf")
    return load_tokenizer(made)


def asked(line: int, text: str, output: str | None, role: str = "user") -> Exchange:
    return Exchange(line, ({"role": role, "content": text},), output)


def test_prompts_count_with_their_template_and_outputs_as_text(tokenizer):
    seen = []
    pairs = [asked(1, "ab", "cde"), asked(2, "", None)]
    found = token_lengths(FILE, pairs, tokenizer, lambda *done: seen.append(done))
    conversation = [{"role": "user", "content": "ab"}]
    assert found.prompts[0] == len(tokenizer.encode_chat(conversation))
    assert found.prompts[0] > found.prompts[1] > 0
    assert found.outputs == [len(tokenizer.encode("cde", add_special=False)), None]
    assert seen == [(1, 2), (2, 2)]


def test_a_refusal_of_the_template_names_the_line(tokenizer):
    with pytest.raises(DatasetError, match="line 5: the chat template refuses: no system"):
        token_lengths(FILE, [asked(1, "a", "b"), asked(5, "a", "b", "system")], tokenizer)
