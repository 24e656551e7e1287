"""A prompt spelled as a session remembers it: the same bytes, as many known tokens as can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxrun.cli.conversation import keep_tokens

# Spellings that overlap in many ways; the last two are control tokens.
BYTES = [b"a", b"b", b"ab", b"ba", b"aab", b"abb", b"c", b"<s>", b"<e>"]
IDS = st.lists(st.integers(0, len(BYTES) - 1), max_size=8)


class Spelling:
    def token_bytes(self, token_id: int) -> bytes:
        return BYTES[token_id]

    def is_control(self, token_id: int) -> bool:
        return token_id >= 7


def marks(ids: list[int]) -> list[tuple[bool, bytes]]:
    """Text with control tokens apart: what must not change."""
    found: list[tuple[bool, bytes]] = []
    for token in ids:
        control = Spelling().is_control(token)
        if found and not control and not found[-1][0]:
            found[-1] = (False, found[-1][1] + BYTES[token])
        else:
            found.append((control, BYTES[token]))
    return found


def naive(held: list[int], prompt: list[int]) -> list[int]:
    """The longest remembered beginning that some beginning of the prompt spells."""
    for i in range(len(held), -1, -1):
        for j in range(len(prompt) + 1):
            if marks(held[:i]) == marks(prompt[:j]):
                return held[:i] + prompt[j:]
    raise AssertionError("nothing spells nothing")


@given(IDS, IDS)
def test_like_the_naive_search(held, prompt):
    assert keep_tokens(held, prompt, Spelling()) == naive(held, prompt)


@given(IDS, IDS)
def test_means_the_same(held, prompt):
    assert marks(keep_tokens(held, prompt, Spelling())) == marks(prompt)


@given(IDS, IDS)
def test_keeps_what_is_spelled_alike(shared, rest):
    assert keep_tokens(shared, shared + rest, Spelling()) == shared + rest


def test_the_models_own_spelling_stands():
    assert keep_tokens([7, 0, 1, 8], [7, 2, 8, 6], Spelling()) == [7, 0, 1, 8, 6]
