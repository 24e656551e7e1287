"""A prompt in the tokens of a session: the same bytes, as many cached tokens as possible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxrun.cli.conversation import keep_tokens

# Tokens that overlap in many ways; the last two are control tokens.
BYTES = [b"a", b"b", b"ab", b"ba", b"aab", b"abb", b"c", b"<s>", b"<e>"]
IDS = st.lists(st.integers(0, len(BYTES) - 1), max_size=8)


class Vocabulary:
    def token_bytes(self, token_id: int) -> bytes:
        return BYTES[token_id]

    def is_control(self, token_id: int) -> bool:
        return token_id >= 7


def marks(ids: list[int]) -> list[tuple[bool, bytes]]:
    """Text with control tokens apart: what must not change."""
    found: list[tuple[bool, bytes]] = []
    for token in ids:
        control = Vocabulary().is_control(token)
        if found and not control and not found[-1][0]:
            found[-1] = (False, found[-1][1] + BYTES[token])
        else:
            found.append((control, BYTES[token]))
    return found


def naive(cached: list[int], prompt: list[int]) -> list[int]:
    """The longest cached prefix with the bytes of a prefix of the prompt."""
    for i in range(len(cached), -1, -1):
        for j in range(len(prompt) + 1):
            if marks(cached[:i]) == marks(prompt[:j]):
                return cached[:i] + prompt[j:]
    raise AssertionError("empty prefixes are equal")


@given(IDS, IDS)
def test_like_the_naive_search(cached, prompt):
    assert keep_tokens(cached, prompt, Vocabulary()) == naive(cached, prompt)


@given(IDS, IDS)
def test_bytes_and_control_tokens_stay(cached, prompt):
    assert marks(keep_tokens(cached, prompt, Vocabulary())) == marks(prompt)


@given(IDS, IDS)
def test_keeps_equal_tokens(shared, rest):
    assert keep_tokens(shared, shared + rest, Vocabulary()) == shared + rest


def test_tokens_of_the_model_stay():
    assert keep_tokens([7, 0, 1, 8], [7, 2, 8, 6], Vocabulary()) == [7, 0, 1, 8, 6]
