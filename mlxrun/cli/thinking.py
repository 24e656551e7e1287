"""A model's thinking, apart from its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlxrun.outputs import Chunk
    from mlxrun.tokenizer.tokenizer import Tokenizer

# Opening to closing marker: DeepSeek R1, Qwen3, GLM-4.5 and most others; Magistral; Seed-OSS.
MARKERS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}
# Tokens in which an opening marker and the whitespace after it fit.
_OPENING = 16

Think = Literal["show", "hide"]
# Text, and whether it is thinking.
Span = tuple[str, bool]


class Thinking:
    """How one model marks its thinking.

    Attributes:
        markers: opening to closing marker; empty if the model does not think.
        controls: markers that are control tokens, which are not part of a chunk's text, by id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        sources = [template.source for template in tokenizer.chat_templates.values()]

        def token(text: str) -> int | None:
            ids = tokenizer.encode(text, add_special=False, parse_special=True)
            return ids[0] if len(ids) == 1 else None

        self.markers = {
            opening: closing
            for opening, closing in MARKERS.items()
            if token(opening) is not None or any(closing in source for source in sources)
        }
        ids = {token(text): text for pair in self.markers.items() for text in pair}
        self.controls = {
            index: text
            for index, text in ids.items()
            if index is not None and tokenizer.is_control(index)
        }

    def text(self, chunk: Chunk) -> str:
        """A chunk's text, with markers that are control tokens."""
        if not self.controls:
            return chunk.text
        return "".join(self.controls.get(token, "") for token in chunk.tokens) + chunk.text

    def answer(self, completion: str) -> str:
        """A completion without its thinking."""
        opened = None
        for opening, closing in self.markers.items():
            before, found, _ = completion.partition(closing)
            if found and opening not in before:  # the prompt had opened it
                opened = closing
        splitter = Splitter(self.markers, opened)
        spans = [*splitter.add(completion), *splitter.finish()]
        return "".join(text for text, thought in spans if not thought)

    def splitter(self, prompt: Sequence[int]) -> Splitter:
        end = self._tokenizer.decode(prompt[-_OPENING:]).rstrip() if self.markers else ""
        opened = (closing for opening, closing in self.markers.items() if end.endswith(opening))
        return Splitter(self.markers, next(opened, None))


class Splitter:
    """Splits streamed text into thinking and answer, without markers.

    An opening marker counts before the answer only: an answer may be about markers. Thinking that
    is never closed lasts to the end. Whitespace after a marker is dropped.

    Args:
        markers: opening to closing marker.
        closing: the marker that closes thinking opened by the prompt, if it does.
    """

    def __init__(self, markers: Mapping[str, str], closing: str | None = None) -> None:
        self._markers = markers
        self._closing = closing  # of the current thinking; None outside
        self._pending = ""
        self._answered = False  # whether the answer has begun, whitespace apart
        self._trims = closing is not None

    def add(self, text: str) -> list[Span]:
        """The non-empty spans that this text completes."""
        self._pending += text
        spans: list[Span] = []
        while (found := self._next_marker()) is not None:
            at, marker = found
            self._emit(spans, at)
            self._pending = self._pending[len(marker) :]
            self._closing = None if self._closing else self._markers[marker]
            self._trims = True
        self._emit(spans, len(self._pending) - self._unsure())
        return spans

    def finish(self) -> list[Span]:
        spans: list[Span] = []
        self._emit(spans, len(self._pending))
        return spans

    def _next_marker(self) -> tuple[int, str] | None:
        if self._closing:
            at = self._pending.find(self._closing)
            return None if at < 0 else (at, self._closing)
        if self._answered:
            return None
        text = self._pending.lstrip()
        opening = next((marker for marker in self._markers if text.startswith(marker)), None)
        return None if opening is None else (len(self._pending) - len(text), opening)

    def _unsure(self) -> int:
        """Pending characters at the end that may begin a marker."""
        if self._closing is None:
            text = self._pending.lstrip()
            opens = any(marker.startswith(text) for marker in self._markers)
            return len(text) if opens and not self._answered else 0
        lengths = range(1, min(len(self._closing), len(self._pending) + 1))
        return max((n for n in lengths if self._pending.endswith(self._closing[:n])), default=0)

    def _emit(self, spans: list[Span], length: int) -> None:
        """Take so many pending characters as a span."""
        text, self._pending = self._pending[:length], self._pending[length:]
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        if text:
            self._answered |= self._closing is None and not text.isspace()
            spans.append((text, self._closing is not None))
