"""From drawn tokens to a reply: text as it becomes certain, where it ends, and what it cost.

Knows text and clocks; knows nothing of models or of who else is served.
"""

from __future__ import annotations

import time
from dataclasses import replace

from mlxrun.outputs import Chunk, FinishReason, Request, TokenLogprob, Usage
from mlxrun.text.stops import StopMatcher
from mlxrun.text.tokenizer import Tokenizer

# Tokens from which their rate means something: the next one is computed while one is handed out.
TIMED = 8


class Reply:
    """One request's reply while it is made.

    Args:
        request: what is wanted.
        tokenizer: the model's.
        limit: the most tokens there may be.
        started: when the request came, in seconds of ``time.perf_counter``.
        cached: tokens of the prompt that a cache held.

    Attributes:
        reason: why the reply has ended, or None.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, limit: int, started: float, cached: int = 0
    ) -> None:
        self._limit = limit
        self._prompt, self.cached = len(request.prompt), cached
        self._tokenizer = tokenizer
        self._ending = frozenset() if request.ignore_eos else tokenizer.eog_ids
        self._text = tokenizer.detokenizer(skip_special=True, continues=True)
        self._stops = StopMatcher(request.stop)
        self._started = self._first = self._last = started
        self._count = self._shown = 0
        self.reason: FinishReason | None = None

    def add(self, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> Chunk | None:
        """The next token's chunk; None for one that ends the turn and is not shown."""
        self._last = time.perf_counter()
        self._count += 1
        if self._count == 1:
            self._first = self._last
        if token in self._ending:
            self.reason = "stop"
            return None
        self._shown += 1
        shown, stopped = self._stops.add(self._text.add(token))
        if stopped:
            self.reason = "stop"
        elif self._count == self._limit:
            self.reason = "length"
        return Chunk(shown, (token,), tuple(self._spelled(entry) for entry in logprobs))

    def finish(self, reason: FinishReason | None = None, *, peak_memory: int = 0) -> Chunk:
        """The last chunk: the text that was held back, the reason and the cost."""
        rest, _ = self._stops.add(self._text.finish())
        why = reason or self.reason or "length"
        return Chunk(rest + self._stops.finish(), (), (), why, self._usage(peak_memory))

    def _spelled(self, entry: TokenLogprob) -> TokenLogprob:
        """With the bytes of its tokens; a model may have logits that are no tokens."""
        known = entry.token < self._tokenizer.vocab_size
        spelled = self._tokenizer.token_bytes(entry.token) if known else b""
        return replace(entry, bytes=spelled, top=tuple(map(self._spelled, entry.top)))

    def _usage(self, peak_memory: int) -> Usage:
        first = self._first - self._started
        decoding = max(self._last - self._first, 1e-9)
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._shown,
            cached_tokens=self.cached,
            time_to_first_token=first,
            tokens_per_second=(self._count - 1) / decoding if self._count >= TIMED else None,
            prompt_tokens_per_second=(self._prompt - self.cached) / first if first > 0 else None,
            total_time=time.perf_counter() - self._started,
            peak_memory=peak_memory,
        )
