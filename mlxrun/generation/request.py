"""What a caller asks for and what it gets back: requests, chunks and completions.

Plain values from the standard library only: a scheduler, a server or a test can handle them without
a tensor library. This module does not know tokenizers, models or how a token is drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mlxrun.cache.sparsity import pattern
from mlxrun.cache.types import cache_type
from mlxrun.errors import ParameterError
from mlxrun.generation.parameters import Range, SamplingParams, checked_strings, checked_token

__all__ = [
    "Chunk",
    "Completion",
    "FinishReason",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
    "completed",
]

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue.

    Args:
        prompt: token ids, at least one.
        params: how tokens are chosen.
        max_tokens: the most tokens to generate; None generates until the context is full.
        stop: strings that end the reply and are no part of it; a single string will do.
        ignore_eos: go on past the model's end-of-turn tokens.
        priority: which of several requests goes first: the higher.
        deadline: seconds after which it ends, with what there is by then; None for no limit.
        cache_type_k, cache_type_v: how its keys and values are stored; None as the rest is.
        attention: which tokens its drawn ones attend to; None as the rest does, ``dense`` all.

    Raises:
        ParameterError: an empty prompt, a token that is no id, or a value outside its range.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    priority: int = 0
    deadline: float | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        prompt = tuple(checked_token("prompt", token) for token in self.prompt)
        if not prompt:
            raise ParameterError("prompt", (), "at least one token long")
        object.__setattr__(self, "prompt", prompt)
        if self.max_tokens is not None:
            limit = Range(1, whole=True).check("max_tokens", self.max_tokens)
            object.__setattr__(self, "max_tokens", limit)
        object.__setattr__(self, "stop", checked_strings("stop", self.stop))
        if not isinstance(self.ignore_eos, bool):
            raise ParameterError("ignore_eos", self.ignore_eos, "True or False")
        Range(-1000, 1000, whole=True).check("priority", self.priority)
        if self.deadline is not None:
            Range(0, 1e9).check("deadline", self.deadline)
        if not isinstance(self.params, SamplingParams):
            raise ParameterError("params", self.params, "SamplingParams")
        cache_type(self.cache_type_k, "cache_type_k")
        cache_type(self.cache_type_v, "cache_type_v")
        pattern(self.attention)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost.

    Args:
        prompt_tokens: length of the prompt, cached part included.
        cached_tokens: how many of them a cache already held.
        completion_tokens: tokens of the reply; a token that ends the turn is none of them.
        time_to_first_token: seconds from the request's start to its first token.
        tokens_per_second: rate of decoding after the first token; None for fewer than eight.
        prompt_tokens_per_second: rate of prefill over the tokens that no cache held; None for a
            request that ended before its first token.
        total_time: seconds from start to end.
        peak_memory: the most bytes that MLX held meanwhile, with the mapped weights of the model.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    time_to_first_token: float = 0.0
    tokens_per_second: float | None = None
    prompt_tokens_per_second: float | None = None
    total_time: float = 0.0
    peak_memory: int = 0

    @property
    def speed(self) -> str:
        """The rate of decoding for people; empty where it cannot be told."""
        rate = self.tokens_per_second
        return "" if rate is None else f"{rate:.1f} tokens/s"

    def to_dict(self) -> dict[str, int | float | None]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model, before any sampling parameter acts.

    Args:
        token: its id.
        logprob: the natural logarithm of its probability.
        top: the likeliest tokens, likeliest first.
        bytes: what it adds to a text, maybe a part of a character.
    """

    token: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    bytes: bytes = b""

    @property
    def text(self) -> str:
        """Its bytes as text; those that are no UTF-8 become U+FFFD."""
        return self.bytes.decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: a log-probability of minus infinity becomes None."""
        return {**self._entry(), "top": [entry._entry() for entry in self.top]}

    def _entry(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "text": self.text,
            "bytes": list(self.bytes),
            "logprob": self.logprob if math.isfinite(self.logprob) else None,
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed reply: the text that became certain and the tokens it took.

    The last chunk, and only that, has a ``finish_reason`` and ``usage``. ``text`` may be empty
    while a character or a possible stop string is incomplete. ``print(chunk, end="")`` prints the
    text; ``"".join(chunk.text for chunk in chunks)`` joins it.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        return _as_dict(self)


@dataclass(frozen=True, slots=True, repr=False)
class Completion:
    """A finished reply. ``str(completion)`` is its text."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:59] + "…"
        return f"Completion({text!r}, {self._summary()})"

    def _repr_html_(self) -> str:
        """The reply and its cost, for a notebook. The text is escaped: a model may write markup."""
        return (
            f'<div><pre style="white-space: pre-wrap">{html.escape(self.text)}</pre>'
            f"<small>{html.escape(self._summary())}</small></div>"
        )

    def _summary(self) -> str:
        usage = self.usage
        speed = f", {usage.speed}" if usage.speed else ""
        return (
            f"{len(self.tokens)} token{'s' * (len(self.tokens) != 1)}, {self.finish_reason}, "
            f"first after {usage.time_to_first_token:.2f} s{speed}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types, ready for ``json.dumps``."""
        return _as_dict(self)


def completed(chunks: Sequence[Chunk]) -> Completion:
    """The reply that all its chunks make up, the last one included."""
    last = chunks[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Completion(
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.tokens],
        last.finish_reason,
        last.usage,
        tuple(entry for chunk in chunks for entry in chunk.logprobs),
    )


def _as_dict(reply: Chunk | Completion) -> dict[str, Any]:
    return {
        "text": reply.text,
        "tokens": list(reply.tokens),
        "finish_reason": reply.finish_reason,
        "usage": reply.usage.to_dict() if reply.usage else None,
        "logprobs": [entry.to_dict() for entry in reply.logprobs],
    }
