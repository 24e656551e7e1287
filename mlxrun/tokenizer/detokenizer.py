"""Stop strings in streamed text.

Aho-Corasick (Aho and Corasick, "Efficient string matching", CACM 1975): one step per character for
any number of stop strings; the automaton's depth is the length of the text that may still become a
stop string and is held back. The output does not depend on the chunks of the input.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence

from mlxrun.errors import ParameterError

__all__ = ["StopMatcher", "StreamingDetokenizer"]


class StopMatcher:
    """Passes text through up to the first stop string.

    The stop string that starts first wins, even if one that starts later ends sooner.

    Raises:
        ParameterError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ParameterError("stop", stop, "a string of at least one character")
        self._next: list[dict[str, int]] = [{}]
        self._fail: list[int] = [0]
        self._depth: list[int] = [0]
        self._match: list[int] = [0]  # length of the longest stop that ends in this state
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""  # from the start of the longest candidate, or of an earlier match
        self._match_at: int | None = None  # in _held, while an earlier candidate is alive
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was found."""
        if self._stopped:
            return "", True
        held = self._held + text
        begin = 0
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._step(character)
            if self._match[self._state]:
                found = end - self._match[self._state]
                self._match_at = found if self._match_at is None else min(found, self._match_at)
            begin = end - self._depth[self._state]
            if self._match_at is not None and self._match_at <= begin:
                return held[: self._stop()], True
        self._held = held[begin:]
        if self._match_at is not None:
            self._match_at -= begin
        return held[:begin], False

    def finish(self) -> str:
        """The text held back, at the end of the input."""
        held = self._held if self._match_at is None else self._held[: self._match_at]
        self._stop()
        return held

    def _stop(self) -> int:
        at = self._match_at or 0
        self._stopped, self._held, self._match_at = True, "", None
        return at

    def _step(self, character: str) -> None:
        state = self._state
        while state and character not in self._next[state]:
            state = self._fail[state]
        self._state = self._next[state].get(character, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Failure links, breadth first; a state inherits the matches of what it fails to."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                fail = self._fail[state]
                while fail and character not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(character, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
                queue.append(child)


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
