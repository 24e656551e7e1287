"""How many tokens prompts and outputs have, and where most of them lie.

Counts with whatever tokenizer it is given; knows no files and no MLX.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlxrun.bench.dataset import Exchange
from mlxrun.errors import DatasetError, TemplateError

PERCENTILES = (50, 75, 90, 95, 99)


class Tokens(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str, add_special: bool = ...) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...


@dataclass(frozen=True)
class Lengths:
    """Tokens of exchanges, one after the other.

    Attributes:
        prompts: of every exchange.
        outputs: of the same; None where there is none.
    """

    prompts: Sequence[int]
    outputs: Sequence[int | None]

    @property
    def drawn(self) -> list[int]:
        """Tokens of the outputs that there are."""
        return [length for length in self.outputs if length is not None]

    def both(self, prompt: int, output: int) -> float:
        """The share of complete exchanges that are no longer than this, in prompt and in output."""
        pairs = [(p, o) for p, o in zip(self.prompts, self.outputs, strict=True) if o is not None]
        return sum(p <= prompt and o <= output for p, o in pairs) / len(pairs)


@dataclass(frozen=True)
class Summary:
    """Some lengths in a few numbers.

    Attributes:
        count: how many.
        mean, longest: in tokens.
        percentiles: per cent to the least length that so many do not exceed.
    """

    count: int
    mean: float
    longest: int
    percentiles: Mapping[int, int]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Summary:
        """Of at least one length."""
        found = {percent: percentile(lengths, percent) for percent in PERCENTILES}
        return cls(len(lengths), statistics.fmean(lengths), max(lengths), found)


def counted(
    path: Path,
    exchanges: Sequence[Exchange],
    tokens: Tokens,
    progress: Callable[[int, int], None] | None = None,
) -> Lengths:
    """Tokens of a file's exchanges, as the model sees them.

    A prompt goes through the chat template, an output is its text alone: the token that ends it is
    not counted.

    Raises:
        DatasetError: the template refuses a conversation.
    """
    prompts, outputs = [], []
    for done, exchange in enumerate(exchanges, 1):
        try:
            prompts.append(len(tokens.encode_chat(exchange.messages)))
        except TemplateError as error:
            raise DatasetError(path, exchange.line, error.message, hint=error.hint) from error
        text = exchange.output
        outputs.append(None if text is None else len(tokens.encode(text, add_special=False)))
        if progress:
            progress(done, len(exchanges))
    return Lengths(prompts, outputs)


def percentile(lengths: Sequence[int], percent: int) -> int:
    """The least length that ``percent`` of them do not exceed: the nearest rank, so it is one."""
    rank = -(-percent * len(lengths) // 100)
    return sorted(lengths)[max(rank, 1) - 1]
