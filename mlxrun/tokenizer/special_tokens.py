"""Special tokens in text: find them, and keep those in users' text from becoming tokens."""

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
    """All special tokens of a vocabulary.

    As in llama.cpp, longer tokens are matched first, wherever they are. User-defined tokens are
    always matched.
    """

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        there = [token for token in tokens if token.text != ""]  # which would match everywhere
        self._tokens = sorted(there, key=lambda token: -len(token.text.encode("utf-8", "replace")))

    def split(self, text: str, control: bool) -> list[str | int]:
        """Plain parts (never empty) and ids of the special tokens between them.

        Args:
            control: match control tokens, too.
        """
        if not text:
            return []
        parts: list[str | int] = [text]
        characters = set(text)
        for token in self._tokens:
            if token.control and not control:
                continue
            if token.text[0] in characters and token.text in text:
                parts = [found for part in parts for found in _split(part, token)]
        return parts

    def control_texts(self) -> list[str]:
        """The texts of all control tokens, longest first."""
        return [token.text for token in self._tokens if token.control]


def _split(part: str | int, token: SpecialToken) -> list[str | int]:
    if isinstance(part, int) or token.text not in part:
        return [part]
    found: list[str | int] = []
    texts = part.split(token.text)
    for index, text in enumerate(texts):
        if index:
            found.append(token.id)
            if token.rstrip:
                text = text.lstrip(_WHITE)
        if token.lstrip and index < len(texts) - 1:
            text = text.rstrip(_WHITE)
        if text:
            found.append(text)
    return found


_OPEN, _DIGITS, _CLOSE = "\ue0f0", "\ue0f1\ue0f2", "\ue0f3"
# The marks of placeholders, and their JSON escapes after the backslash.
_RESERVED: Final = (f"[{_OPEN}{_DIGITS}{_CLOSE}]", r"(?<=\\)ue0f[0-3]")
_PLACEHOLDER: Final = re.compile(f"{_OPEN}([{_DIGITS}]+){_CLOSE}")
_ESCAPED_PLACEHOLDER: Final = re.compile(r"\\ue0f0(?:\\ue0f[12])+\\ue0f3")
_ROLES: Final = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")


class Shield:
    """Prompt-injection shield of one conversation: no text in messages becomes a control token.

    A template prints control tokens as text, and a message may contain the same text. Before
    rendering, ``escape`` replaces each occurrence in a message of a control token's text, or of a
    part that could complete one, by a placeholder of private-use characters; after the rendered
    prompt has been split at its control tokens, ``restore`` puts the original text back.

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
            text = re.sub(pattern, lambda match: self._placeholder(match[0]), value)
            return self._escape_tail(text)
        if isinstance(value, Mapping):
            return {
                self.escape(key): item
                if key == "role" and isinstance(item, str) and item in _ROLES
                else self.escape(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """The text with the originals in place of placeholders."""
        if not self._originals:
            return text
        text = _ESCAPED_PLACEHOLDER.sub(
            lambda match: re.sub(r"\\u(e0f[0-3])", lambda mark: chr(int(mark[1], 16)), match[0]),
            text,
        )
        return _PLACEHOLDER.sub(self._original, text)

    def _escape_tail(self, text: str) -> str:
        """Escape an end that the next string could complete to a control token."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            place = bisect_right(self._ordered, tail)
            begins = place < len(self._ordered) and self._ordered[place].startswith(tail)
            # Words are left alone: templates compare roles and types, and no marker starts with one
            if begins and not tail.isalnum():
                return text[:-size] + self._placeholder(tail)
        return text

    def _placeholder(self, original: str) -> str:
        self._originals.append(original)
        digits = f"{len(self._originals) - 1:b}".translate({48: _DIGITS[0], 49: _DIGITS[1]})
        return f"{_OPEN}{digits}{_CLOSE}"

    def _original(self, match: re.Match[str]) -> str:
        index = int(match[1].translate({ord(_DIGITS[0]): "0", ord(_DIGITS[1]): "1"}), 2)
        return self._originals[index] if index < len(self._originals) else ""
