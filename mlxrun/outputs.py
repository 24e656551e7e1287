"""Request, and its results: Chunk, Completion, Usage, TokenLogprob.

Standard library only, so that a scheduler, a server or a test needs no tensor library.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mlxrun.config import (
    BatchStorageOptions,
    Flag,
    Range,
    StorageConfig,
    StorageOptions,
    Strings,
    check_options,
    checked_token,
    documented,
    option,
)
from mlxrun.errors import ParameterError
from mlxrun.sampling_params import SamplingOptions, SamplingParams, SharedSamplingOptions

__all__ = [
    "BatchOptions",
    "Chunk",
    "Completion",
    "FinishReason",
    "Request",
    "RequestOptions",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
    "completed",
]

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
MAX_TOKENS = 512


class RequestOptions(SamplingOptions, StorageOptions, total=False):
    """The options of :meth:`mlxrun.LLM.stream`: see :class:`Request`, :class:`SamplingParams`.

    ``parse_special`` lets ``<|markers|>`` in a text prompt become control tokens; ``template`` has
    variables for the chat template.
    """

    max_tokens: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    priority: int
    deadline: float | None
    params: SamplingParams | None
    parse_special: bool
    template: Mapping[str, Any] | None


class BatchOptions(SharedSamplingOptions, BatchStorageOptions, total=False):
    """The options of :meth:`mlxrun.LLM.batch`: some may be a list with a value per prompt."""

    temperature: float | Sequence[float]
    seed: int | Sequence[int | None] | None
    max_tokens: int | Sequence[int | None] | None
    stop: str | Sequence[str]
    ignore_eos: bool | Sequence[bool]
    priority: int | Sequence[int]
    deadline: float | Sequence[float | None] | None
    params: SamplingParams | Sequence[SamplingParams | None] | None
    parse_special: bool
    template: Mapping[str, Any] | None
    parallel: int | None
    context: int | None
    deterministic: bool
    stall: float | None
    prefix_bytes: int | None


@documented
@dataclass(frozen=True, slots=True)
class Request(StorageConfig):
    """One prompt to continue. Storage options that are None are the engine's.

    Args:
        prompt: token ids, at least one.
        params: how tokens are sampled.

    Raises:
        ParameterError: an empty prompt, a token that is no id, or a value outside its range.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = option(
        None,
        Range(1, whole=True),
        "The most tokens to generate; none: until the context is full.",
        metavar="N",
        alias="-n",
    )
    stop: Sequence[str] = option(
        (),
        Strings(),
        "Text that ends the completion and is not part of it; \\n is a newline.",
        metavar="TEXT",
    )
    ignore_eos: bool = option(False, Flag(), "Go on past the model's end-of-turn tokens.")
    priority: int = option(
        0,
        Range(-1000, 1000, whole=True),
        "Requests with a higher priority are served first.",
        metavar="N",
    )
    deadline: float | None = option(
        None,
        Range(0, 1e9),
        "Seconds after which it ends with the tokens sampled so far.",
        metavar="X",
    )

    def __post_init__(self) -> None:
        prompt = tuple(checked_token("prompt", token) for token in self.prompt)
        if not prompt:
            raise ParameterError("prompt", (), "at least one token long")
        object.__setattr__(self, "prompt", prompt)
        if not isinstance(self.params, SamplingParams):
            raise ParameterError("params", self.params, "SamplingParams")
        check_options(self)


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of a request.

    Args:
        prompt_tokens: length of the prompt, cached part included.
        cached_tokens: prompt tokens taken from a prefix cache or session.
        completion_tokens: sampled tokens without one that ends the turn.
        time_to_first_token: seconds from the request's start to its first token.
        tokens_per_second: rate of decoding after the first token; None for fewer than eight.
        prompt_tokens_per_second: rate of prefill without cached tokens; None for a request that
            ended before its first token.
        total_time: seconds from start to end.
        peak_memory: the most bytes that MLX allocated meanwhile, plus the mapped weights.
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
        """The rate of decoding in words; empty if unknown."""
        rate = self.tokens_per_second
        return "" if rate is None else f"{rate:.1f} tokens/s"

    def to_dict(self) -> dict[str, int | float | None]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model, before sampling options act.

    Args:
        token: its id.
        logprob: the natural logarithm of its probability.
        top: the likeliest tokens, likeliest first.
        bytes: its text in UTF-8, possibly a part of a character.
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
    """A part of a streamed completion: text that can no longer change, and its tokens.

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
    """A finished request. ``str(completion)`` is its text."""

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
        """The text and its cost, for a notebook. The text is escaped: a model may write markup."""
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
    """The completion of all chunks of a request."""
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


def _as_dict(output: Chunk | Completion) -> dict[str, Any]:
    return {
        "text": output.text,
        "tokens": list(output.tokens),
        "finish_reason": output.finish_reason,
        "usage": output.usage.to_dict() if output.usage else None,
        "logprobs": [entry.to_dict() for entry in output.logprobs],
    }
