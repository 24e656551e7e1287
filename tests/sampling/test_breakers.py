"""Which token sequences carry a breaker, against every way to spell it."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from mlxrun.sampling.dry import breaker_tokens

PIECES = [b"a", b"b", b"c", b"ab", b"bc", b"ca", b"cab", b""]


def encode(text: str) -> list[int]:
    """The longest piece first, as a tokenizer might."""
    ids = []
    while text:
        piece = max((p for p in PIECES if p and text.encode().startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def test_a_token_that_contains_the_string() -> None:
    assert breaker_tokens(["c"], PIECES, encode) == {(2,), (4,), (5,), (6,)}


def test_a_string_over_several_tokens() -> None:
    found = breaker_tokens(["ab"], PIECES, encode)
    assert found == {(3,), (6,), (0, 1), (5, 1)}


def test_several_strings_and_none() -> None:
    assert breaker_tokens([], PIECES, encode) == frozenset()
    both = breaker_tokens(["c", "ab"], PIECES, encode)
    single = breaker_tokens(["c"], PIECES, encode) | breaker_tokens(["ab"], PIECES, encode)
    assert both == single


@given(st.text("abc", min_size=1, max_size=4))
def test_every_sequence_spells_the_string_once_and_starts_inside_it(string: str) -> None:
    target = string.encode()
    for sequence in breaker_tokens([string], PIECES, encode):
        spelled = b"".join(PIECES[token] for token in sequence)
        assert target in spelled
        assert target not in PIECES[sequence[0]] or len(sequence) == 1
    first_pieces = {sequence[0] for sequence in breaker_tokens([string], PIECES, encode)}
    starts = {
        i
        for (i, piece), n in product(enumerate(PIECES), range(1, len(target) + 1))
        if piece.endswith(target[:n])
    }
    assert starts <= first_pieces


@given(st.lists(st.text("abc", min_size=1, max_size=5), max_size=6))
def test_many_strings_are_the_union_of_single_ones(strings: list[str]) -> None:
    single = (breaker_tokens([string], PIECES, encode) for string in strings)
    assert breaker_tokens(strings, PIECES, encode) == frozenset().union(*single)


def test_characters_cut_in_the_middle_are_passed_over() -> None:
    pieces = ["€".encode(), "€".encode()[:1], "€".encode()[1:]]
    assert breaker_tokens(["€"], pieces, lambda text: [0]) == {(0,)}
