"""Split a text at its special tokens.

Follows llama.cpp: longer tokens are matched first, wherever they are. User-defined tokens are
always matched; control tokens only on request, since text of users must not become one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["SpecialToken", "SpecialTokens"]

_WHITE = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is matched in text as a whole.

    Attributes:
        control: only matched on request.
        lstrip, rstrip: strips the white space before or after it.
    """

    text: str
    id: int
    control: bool
    lstrip: bool = False
    rstrip: bool = False


class SpecialTokens:
    """All special tokens of a vocabulary."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        there = [token for token in tokens if token.text != ""]  # which would be everywhere
        self._tokens = sorted(there, key=lambda token: -len(token.text.encode("utf-8", "replace")))

    def split(self, text: str, control: bool) -> list[str | int]:
        """Plain parts (never empty) and ids of the special tokens between them.

        Args:
            control: match control tokens, too.
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
