"""Tokens of 2,000 strings of every kind are llama.cpp's, and become the text that it spells."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_models import Figures
from real_texts import PROMPTS, fingerprint, strings

from mlxrun.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def expected(figures: Figures, special: bool) -> list[list[int]]:
    """llama.cpp's tokens of each string, without BOS."""
    rows = figures.rows("tokens")
    if special:
        changed = figures.arrays["special_index"].tolist()
        for index, row in zip(changed, figures.rows("special_tokens"), strict=True):
            rows[index] = row
    return rows


def test_the_figures_are_of_these_strings(figures: Figures) -> None:
    assert fingerprint(strings()) == figures.facts["strings"]


@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("parse_special", [False, True])
def test_strings_become_llama_cpps_tokens(
    tokenizer: Tokenizer, figures: Figures, add_special: bool, parse_special: bool
) -> None:
    before = figures.facts["bos"] if add_special else []
    rows = expected(figures, parse_special)
    assert len(rows) == 2000
    for text, row in zip(strings(), rows, strict=True):
        assert tokenizer.encode(text, add_special, parse_special) == [*before, *row], repr(text)


def test_tokens_become_the_text_that_llama_cpp_spells(
    tokenizer: Tokenizer, figures: Figures
) -> None:
    """Nearly always the string itself: few bytes have no token, and a blank may become ``▁``."""
    decoded = figures.facts["decoded"]
    texts = strings()
    assert len(decoded) < 0.06 * len(texts)
    for index, (text, row) in enumerate(zip(texts, expected(figures, False), strict=True)):
        assert tokenizer.decode(row) == decoded.get(str(index), text)


def test_prompts_become_llama_cpps_tokens(tokenizer: Tokenizer, figures: Figures) -> None:
    for name, continuation in figures.continuations.items():
        assert tokenizer.encode(PROMPTS[name], parse_special=True) == continuation.prompt
