"""Spell a prompt with the tokens that a session already holds.

A model may spell a text with other tokens than the tokenizer would. Encoding the conversation anew
would then differ from what the caches hold and cost a prefill of everything after that place. Where
both sequences spell the same bytes, the model's own tokens stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Speller(Protocol):
    """The part of a tokenizer that is needed here."""

    def token_bytes(self, token_id: int) -> bytes: ...
    def is_control(self, token_id: int) -> bool: ...


def respell(held: Sequence[int], prompt: Sequence[int], speller: Speller) -> list[int]:
    """``prompt`` with as much of its beginning as possible in the spelling of ``held``.

    Control tokens are marks, not text: they match only themselves.

    Returns:
        ``held[:i] + prompt[j:]``, where ``held[:i]`` and ``prompt[:j]`` spell the same.
    """
    i = j = 0  # tokens taken
    agreed = (0, 0)
    ahead, behind = b"", b""  # what one has spelled and the other has not: one of them is empty
    while True:
        if not ahead and not behind:
            agreed = i, j
            if i == len(held) or j == len(prompt):
                break
            if held[i] == prompt[j]:
                i, j = i + 1, j + 1
                continue
        if len(ahead) <= len(behind):
            if i == len(held) or speller.is_control(held[i]):
                break
            ahead, i = ahead + speller.token_bytes(held[i]), i + 1
        else:
            if j == len(prompt) or speller.is_control(prompt[j]):
                break
            behind, j = behind + speller.token_bytes(prompt[j]), j + 1
        common = min(len(ahead), len(behind))
        if ahead[:common] != behind[:common]:
            break
        ahead, behind = ahead[common:], behind[common:]
    return [*held[: agreed[0]], *prompt[agreed[1] :]]
