"""The thinking of a model in its reply: which markers enclose it, and a filter that finds it.

The markers are those that the chat template or the vocabulary of the model has. A prompt may end in
an opening marker; then the reply begins with thinking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlxrun.outputs import Chunk
    from mlxrun.text.tokenizer import Tokenizer

# Opening to closing marker: DeepSeek R1, Qwen3, GLM-4.5 and most others; Magistral; Seed-OSS.
MARKERS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}
# Tokens in which an opening marker and the whitespace after it fit.
_OPENING = 16

# Whether thinking is shown.
Think = Literal["show", "hide"]
# A part of a reply, and whether it is thinking.
Span = tuple[str, bool]


class Thinking:
    """How one model marks its thinking.

    Args:
        tokenizer: the model's.

    Attributes:
        markers: opening to closing marker; empty where the model does not think.
        controls: markers that are control tokens, which a reply's text does not have, by token id.

    Raises:
        TemplateError: the model's chat template does not parse.
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

    def spell(self, chunk: Chunk) -> str:
        """A chunk's text, with the markers that are control tokens."""
        if not self.controls:
            return chunk.text
        return "".join(self.controls.get(token, "") for token in chunk.tokens) + chunk.text

    def answer(self, reply: str) -> str:
        """A whole reply without its thinking."""
        opened = None
        for opening, end in self.markers.items():
            before, found, _ = reply.partition(end)
            if found and opening not in before:  # the prompt had opened it
                opened = end
        splitter = Splitter(self.markers, opened)
        spans = [*splitter.add(reply), *splitter.finish()]
        return "".join(text for text, thought in spans if not thought)

    def splitter(self, prompt: Sequence[int]) -> Splitter:
        """A filter for the reply to a prompt of token ids."""
        end = self._tokenizer.decode(prompt[-_OPENING:]).rstrip() if self.markers else ""
        closing = (self.markers[opening] for opening in self.markers if end.endswith(opening))
        return Splitter(self.markers, next(closing, None))


class Splitter:
    """Cuts a reply that comes in pieces into thinking and answer, without markers.

    An opening marker counts before the answer only: within it the model writes about markers.
    Thinking that is never closed lasts to the end. Whitespace after a marker is dropped.

    Args:
        markers: opening to closing marker.
        closing: the marker that ends the thinking which the prompt has opened, if it has.

    Attributes:
        closing: the marker that would end the thinking in which the reply is now; None outside.
    """

    def __init__(self, markers: Mapping[str, str], closing: str | None = None) -> None:
        self._markers, self.closing = markers, closing
        self._held = ""
        self._answered = False  # whether some of the answer was there, besides whitespace
        self._trims = closing is not None

    def add(self, text: str) -> list[Span]:
        """The parts that this piece of text completes, none of them empty."""
        self._held += text
        spans: list[Span] = []
        while (found := self._next()) is not None:
            at, marker = found
            self._emit(spans, self._held[:at])
            self._held = self._held[at + len(marker) :]
            self.closing = None if self.closing else self._markers[marker]
            self._trims = True
        keep = self._unsure()
        self._emit(spans, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return spans

    def finish(self) -> list[Span]:
        """The rest."""
        spans: list[Span] = []
        self._emit(spans, self._held)
        self._held = ""
        return spans

    def _next(self) -> tuple[int, str] | None:
        """Where the next marker begins, and which it is."""
        if self.closing:
            at = self._held.find(self.closing)
            return None if at < 0 else (at, self.closing)
        if self._answered:
            return None
        text = self._held.lstrip()
        opening = next((marker for marker in self._markers if text.startswith(marker)), None)
        return None if opening is None else (len(self._held) - len(text), opening)

    def _unsure(self) -> int:
        """Characters at the end of what is held that may be the beginning of a marker."""
        if self.closing is None:
            text = self._held.lstrip()
            opens = any(marker.startswith(text) for marker in self._markers)
            return len(text) if opens and not self._answered else 0
        lengths = range(1, min(len(self.closing), len(self._held) + 1))
        return max((n for n in lengths if self._held.endswith(self.closing[:n])), default=0)

    def _emit(self, spans: list[Span], text: str) -> None:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        if not text:
            return
        self._answered |= self.closing is None and not text.isspace()
        spans.append((text, self.closing is not None))
