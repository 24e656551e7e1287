"""Texts, types and bytes of a vocabulary's tokens.

Two alphabets for bytes: GPT-2's, where every byte is a printable character, and sentencepiece's,
where U+2581 is a space and ``<0xXX>`` a byte.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Final, SupportsIndex

from converters.gguf.vocab import TokenType
from mlxrun.errors import TokenizerError

__all__ = ["BYTE_ALPHABET", "Pieces"]

_LITERAL: Final = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
_CONTROL: Final = (TokenType.CONTROL, TokenType.UNKNOWN)


def _gpt2_alphabet() -> dict[str, int]:
    """Character -> byte (Radford et al. 2019, ``encoder.py``): printable Latin-1 stands for itself,
    the other bytes in order for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_ALPHABET: Final = _gpt2_alphabet()
"""GPT-2's alphabet: character -> byte."""


class Pieces:
    """The tokens of a vocabulary.

    Args:
        byte_level: GPT-2's alphabet rather than sentencepiece's.
        escaped: whether U+2581 is a space.
    """

    def __init__(
        self, texts: Sequence[str], types: Sequence[TokenType], byte_level: bool, escaped: bool
    ) -> None:
        self._texts = texts
        self._types = types
        self._byte_level = byte_level
        self._escaped = escaped

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, token_id: int) -> str:
        return self._texts[self._index(token_id)]

    def is_control(self, token_id: int) -> bool:
        return self._types[self._index(token_id)] in _CONTROL

    def spell(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""
        index = self._index(token_id)
        text, type_ = self._texts[index], self._types[index]
        if type_ == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if type_ in _LITERAL:
            return _raw(text)
        if self._byte_level:
            return b"".join(
                bytes([BYTE_ALPHABET[c]]) if c in BYTE_ALPHABET else _raw(c) for c in text
            )
        return _raw(text.replace("\u2581", " ") if self._escaped else text)

    def spell_visible(self, token_id: int) -> bytes:
        return b"" if self.is_control(token_id) else self.spell(token_id)

    def ids(self) -> dict[str, int]:
        """Text -> id."""
        return self._ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self._texts)}

    def _index(self, token_id: SupportsIndex) -> int:
        """The id as an int, also of numpy and MLX; raises TokenizerError."""
        try:
            index = operator.index(token_id)
        except TypeError:
            raise TokenizerError(f"{token_id!r} is no token id") from None
        if not 0 <= index < len(self._texts):
            raise TokenizerError(
                f"token {index} is outside the vocabulary of {len(self._texts)} tokens"
            )
        return index


def _raw(text: str) -> bytes:
    """UTF-8, with the invalid bytes of the vocabulary restored."""
    return text.encode("utf-8", "surrogateescape")
