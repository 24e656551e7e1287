"""Split a text at its special tokens.

Follows llama.cpp: longer tokens are matched first, wherever they are. User-defined tokens are
always matched; control tokens only on request, since text of users must not become one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Shield", "SpecialToken", "SpecialTokens"]


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


_OPEN, _DIGITS, _CLOSE = "\ue0f0", "\ue0f1\ue0f2", "\ue0f3"
_MARKS: Final = _OPEN + _DIGITS + _CLOSE
# The marks themselves, and their JSON escapes after the backslash.
_RESERVED: Final = (f"[{_MARKS}]", r"(?<=\\)ue0f[0-3]")
_ROLES: Final = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")


class Shield:
    """Placeholders for one conversation.

    Args:
        control: the texts of all control tokens.
    """

    def __init__(self, control: Sequence[str]) -> None:
        self._control = sorted(control, key=len, reverse=True)
        self._ordered = sorted(control)
        self._longest = max(map(len, control), default=0)
        self._originals: list[str] = []

    def escape(self, value: Any) -> Any:
        """A message, or any value in it, with placeholders in all of its strings."""
        if isinstance(value, str):
            # a pattern of all the control tokens would be slow; few of them occur
            present = [re.escape(text) for text in self._control if text in value]
            pattern = "|".join([*present, *_RESERVED])
            return self._escape_tail(re.sub(pattern, lambda match: self._put(match[0]), value))
        if isinstance(value, Mapping):
            return {
                self.escape(key): item if key == "role" and _is_role(item) else self.escape(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """The text with the originals in place of placeholders."""
        if not self._originals:
            return text
        text = _ESCAPED_PLACEHOLDER.sub(lambda match: _unescape(match[0]), text)
        return _PLACEHOLDER.sub(self._original, text)

    def _escape_tail(self, text: str) -> str:
        """Escape an end that the next string could complete to a control token."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if self._is_head(text[-size:]):
                return text[:-size] + self._put(text[-size:])
        return text

    def _is_head(self, text: str) -> bool:
        """Whether a control token starts with the text."""
        # Words are left alone: templates compare roles and types, and no marker starts with one.
        place = bisect_right(self._ordered, text)
        begins = place < len(self._ordered) and self._ordered[place].startswith(text)
        return begins and not text.isalnum()

    def _put(self, original: str) -> str:
        self._originals.append(original)
        digits = f"{len(self._originals) - 1:b}".translate({48: _DIGITS[0], 49: _DIGITS[1]})
        return f"{_OPEN}{digits}{_CLOSE}"

    def _original(self, match: re.Match[str]) -> str:
        index = int(match[1].translate({ord(_DIGITS[0]): "0", ord(_DIGITS[1]): "1"}), 2)
        return self._originals[index] if index < len(self._originals) else ""


def _is_role(value: Any) -> bool:
    return isinstance(value, str) and value in _ROLES


def _unescape(text: str) -> str:
    return re.sub(r"\\u(e0f[0-3])", lambda match: chr(int(match[1], 16)), text)


_ESCAPED_PLACEHOLDER: Final = re.compile(r"\\ue0f0(?:\\ue0f[12])+\\ue0f3")
_PLACEHOLDER: Final = re.compile(f"{_OPEN}([{_DIGITS}]+){_CLOSE}")
