"""Sampled tokens of one request to chunks of text, with stop strings and usage."""

from __future__ import annotations

import time
from dataclasses import replace

from mlxrun.outputs import Chunk, FinishReason, Request, TokenLogprob, Usage
from mlxrun.tokenizer.detokenizer import StopMatcher
from mlxrun.tokenizer.tokenizer import Tokenizer

# Fewer tokens give no decode rate: the next one is computed while one is handed out.
MIN_TIMED_TOKENS = 8


class OutputProcessor:
    """Incremental detokenization of one request.

    Args:
        started: arrival of the request, seconds of ``time.perf_counter``.

    Attributes:
        num_cached: prompt tokens taken from a cache.
        num_tokens: tokens added so far, one that ends the turn included.
        finish_reason: None while it runs.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, limit: int, started: float) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._num_prompt, self.num_cached = len(request.prompt), 0
        self._eog_ids = frozenset() if request.ignore_eos else tokenizer.eog_ids
        self._text = tokenizer.detokenizer(skip_special=True, continues=True)
        self._stops = StopMatcher(request.stop)
        self._started_at = self._first_at = self._last_at = started
        self.num_tokens = self._num_output = 0
        self.finish_reason: FinishReason | None = None

    def add(self, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> Chunk | None:
        """The chunk of the next token; None for one that ends the turn and is not shown."""
        self._last_at = time.perf_counter()
        self.num_tokens += 1
        if self.num_tokens == 1:
            self._first_at = self._last_at
        if token in self._eog_ids:
            self.finish_reason = "stop"
            return None
        self._num_output += 1
        text, stopped = self._stops.add(self._text.add(token))
        if stopped:
            self.finish_reason = "stop"
        elif self.num_tokens == self._limit:
            self.finish_reason = "length"
        return Chunk(text, (token,), tuple(self._with_bytes(entry) for entry in logprobs))

    def finish(self, reason: FinishReason | None = None, *, peak_memory: int = 0) -> Chunk:
        """The last chunk: text held back for stop strings, the finish reason and usage."""
        rest, _ = self._stops.add(self._text.finish())
        reason = reason or self.finish_reason or "length"
        return Chunk(rest + self._stops.finish(), (), (), reason, self._usage(peak_memory))

    def _with_bytes(self, entry: TokenLogprob) -> TokenLogprob:
        # A model may have more logits than its vocabulary has tokens.
        known = entry.token < self._tokenizer.vocab_size
        text = self._tokenizer.token_bytes(entry.token) if known else b""
        return replace(entry, bytes=text, top=tuple(map(self._with_bytes, entry.top)))

    def _usage(self, peak_memory: int) -> Usage:
        first = self._first_at - self._started_at
        decoding = max(self._last_at - self._first_at, 1e-9)
        timed = self.num_tokens >= MIN_TIMED_TOKENS
        return Usage(
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_output,
            cached_tokens=self.num_cached,
            time_to_first_token=first,
            tokens_per_second=(self.num_tokens - 1) / decoding if timed else None,
            prompt_tokens_per_second=(
                (self._num_prompt - self.num_cached) / first if first > 0 else None
            ),
            total_time=time.perf_counter() - self._started_at,
            peak_memory=peak_memory,
        )
