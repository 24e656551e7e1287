"""Find the special tokens that a text contains, and cut it there.

Follows llama.cpp: longer tokens are found before shorter ones, wherever they stand. User-defined
tokens are always found; control tokens only if asked, because text that users type must not become
one. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["SpecialToken", "SpecialTokens"]

_WHITE = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is found in text as a whole.

    Attributes:
        control: only found where control tokens are asked for.
        lstrip, rstrip: swallows the white space before or after it.
    """

    text: str
    id: int
    control: bool
    lstrip: bool = False
    rstrip: bool = False


class SpecialTokens:
    """All special tokens of a vocabulary, ready to be searched for."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        there = [token for token in tokens if token.text != ""]  # which would be everywhere
        self._tokens = sorted(there, key=lambda token: -len(token.text.encode("utf-8", "replace")))

    def split(self, text: str, control: bool) -> list[str | int]:
        """Cut a text into raw pieces (never empty) and the ids of the special tokens among them.

        Args:
            text: any text.
            control: whether control tokens are looked for too.
        """
        if not text:
            return []
        pieces: list[str | int] = [text]
        characters = set(text)
        for token in self._tokens:
            if token.control and not control:
                continue
            if token.text[0] in characters and token.text in text:
                pieces = [part for piece in pieces for part in _cut(piece, token)]
        return pieces

    def control_texts(self) -> list[str]:
        """The texts of all control tokens, longest first."""
        return [token.text for token in self._tokens if token.control]


def _cut(piece: str | int, token: SpecialToken) -> list[str | int]:
    if isinstance(piece, int) or token.text not in piece:
        return [piece]
    parts: list[str | int] = []
    raw = piece.split(token.text)
    for index, part in enumerate(raw):
        if index and token.rstrip:
            part = part.lstrip(_WHITE)
        if index < len(raw) - 1 and token.lstrip:
            part = part.rstrip(_WHITE)
        if part:
            parts.append(part)
        if index < len(raw) - 1:
            parts.append(token.id)
    return parts
