"""Text of a stream of tokens: no part of a character, no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from mlxrun.errors import ParameterError

__all__ = ["StopMatcher", "StreamingDetokenizer"]


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


class StopMatcher:
    """Passes text through up to the first stop string, however it is cut into chunks.

    The stop string that starts first wins, even if one that starts later ends sooner.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ParameterError("stop", stop, "a string of at least one character")
        self._stops = stops
        self._first_characters = {stop[0] for stop in stops}
        self._pending = ""  # starts with a prefix of a stop string
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was found."""
        if self._stopped:
            return "", True
        text = self._pending + text
        self._pending = ""
        for start, character in enumerate(text):
            if character not in self._first_characters:
                continue
            begun = [s for s in self._stops if s.startswith(text[start : start + len(s)])]
            if begun:
                self._stopped = min(map(len, begun)) <= len(text) - start
                self._pending = "" if self._stopped else text[start:]
                return text[:start], self._stopped
        return text, False

    def finish(self) -> str:
        """The pending text, at the end of the input."""
        text, self._pending, self._stopped = self._pending, "", True
        found = (text.find(stop) for stop in self._stops if stop in text)
        return text[: min(found, default=len(text))]
