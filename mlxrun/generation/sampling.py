"""From logits to a token, on the device and without waiting for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxrun.generation.request import SamplingParams


class Sampled(NamedTuple):
    """What one step drew, unevaluated."""

    token: mx.array  # (B,) uint32
    logprob: mx.array | None = None  # (B,) of the drawn token
    top_tokens: mx.array | None = None  # (B, N)
    top_logprobs: mx.array | None = None  # (B, N)


class Sampler:
    """Draws the tokens of one request, one step after another."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        context_tokens: Sequence[int] = (),
        dry_breakers: Collection[Sequence[int]] = (),
    ) -> None:
        self.params = params
        self._key = mx.random.key(params.seed or 0)

    def sample(self, logits: mx.array) -> Sampled:
        """The next token of logits (1, V); may be called again before anything is evaluated."""
        if self.params.greedy:
            return Sampled(mx.argmax(logits, axis=-1))
        self._key, key = mx.random.split(self._key)
        return Sampled(mx.random.categorical(logits / self.params.temperature, key=key))
