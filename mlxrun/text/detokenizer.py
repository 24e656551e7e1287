"""Streaming detokenizer: never emits part of a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable

__all__ = ["StreamingDetokenizer"]


class StreamingDetokenizer:
    """Decodes one sequence; its joined output equals ``Tokenizer.decode(ids)``.

    Args:
        token_bytes: the bytes of a token.
        skip_first: a token dropped if it comes first (BOS).
        strip_space: drop one space at the very start (SPM's dummy prefix).
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        skip_first: int | None = None,
        strip_space: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_first = skip_first
        self._strip_space = strip_space

    def add(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._skip_first is not None:
            skip, self._skip_first = self._skip_first == token_id, None
            if skip:
                return ""
        raw = self._token_bytes(token_id)
        if self._strip_space:
            raw, self._strip_space = raw.removeprefix(b" "), False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """U+FFFD if the sequence ended within a character, else nothing."""
        return self._decoder.decode(b"", final=True)
