"""The windows of a text that are scored, as llama.cpp's llama-perplexity cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from mlxrun.config import Config, Flag, Range, documented, option
from mlxrun.errors import ContextLengthError, ParameterError

# The window of llama-perplexity.
USUAL = 512
# A smaller window has less than two tokens in its second half.
SMALLEST = 5


class WindowOptions(TypedDict, total=False):
    """The options of windows: see :class:`WindowConfig`."""

    context: int | None
    stride: int | None
    chunks: int | None
    bos: bool


@documented
@dataclass(frozen=True, kw_only=True)
class WindowConfig(Config):
    """How a text is cut into windows."""

    context: int | None = option(
        None,
        Range(SMALLEST, whole=True),
        "Tokens of a window, such as 4096 or 4k.",
        default_help="512, or the model's context if that is less",
        metavar="N",
    )
    stride: int | None = option(
        None,
        Range(1, whole=True),
        "Begin windows N tokens apart, and score the last N of each.",
        default_help="windows side by side; the second half of each is scored",
        metavar="N",
    )
    chunks: int | None = option(
        None, Range(1, whole=True), "Use no more than N windows.", metavar="N"
    )
    bos: bool = option(
        True,
        Flag(),
        "Begin windows with the tokenizer's prefix instead of a token of their own.",
    )


@dataclass(frozen=True)
class Windows:
    """A text's windows; iterating yields the token ids of each.

    Attributes:
        tokens: of the text, behind the tokenizer's prefix.
        first: tokens that each window begins with in place of its own.
        context: tokens of a window.
        step: tokens from the start of one window to the next one's.
        scored: tokens at the end of a window that are scored.
        count: of windows.
    """

    tokens: Sequence[int]
    first: tuple[int, ...]
    context: int
    step: int
    scored: int
    count: int

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(self.count):
            start = index * self.step
            own = self.tokens[start + len(self.first) : start + self.context]
            yield [*self.first, *own]


def windows(
    tokens: Sequence[int],
    prefix: tuple[int, ...],
    longest: int,
    **options: Unpack[WindowOptions],
) -> Windows:
    """The windows of a text.

    Args:
        tokens: of the text.
        prefix: the tokenizer's, such as BOS.
        longest: the model's context.

    Raises:
        ParameterError: a value outside its range, or a text shorter than a window.
        ContextLengthError: a window longer than the model's context.
    """
    config = WindowConfig(**options)
    size = config.context or min(USUAL, longest)
    if size > longest:
        raise ContextLengthError(
            f"a window of {size} tokens does not fit the model's context of {longest}",
            hint=f"Take a context of at most {longest}",
        )
    step, scored = size, size - 1 - size // 2
    if config.stride is not None:
        most = Range(1, size - max(1, len(prefix)), whole=True)
        step = scored = int(most.check("stride", config.stride))
    whole = [*prefix, *tokens]
    if len(whole) < size:
        remedy = "longer text or a smaller context" if len(whole) >= SMALLEST else "longer text"
        need = f"at least {size}, a window (take a {remedy})"
        raise ParameterError("tokens of the text", len(whole), need)
    count = (len(whole) - size) // step + 1
    if config.chunks is not None:
        count = min(count, config.chunks)
    return Windows(whole, prefix if config.bos else (), size, step, scored, count)
