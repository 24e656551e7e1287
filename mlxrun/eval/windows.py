"""The windows of a text that are scored, as llama.cpp's llama-perplexity cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from mlxrun.config import Range
from mlxrun.errors import ContextLengthError, ParameterError

# The window of llama-perplexity.
USUAL = 512
# A smaller window has less than two tokens in its second half.
SMALLEST = 5


class WindowOptions(TypedDict, total=False):
    """The options of windows: see :func:`mlxrun.eval.perplexity.perplexity`."""

    context: int | None
    stride: int | None
    chunks: int | None
    bos: bool


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
    *,
    context: int | None = None,
    stride: int | None = None,
    chunks: int | None = None,
    bos: bool = True,
) -> Windows:
    """The windows of a text.

    Args:
        tokens: of the text.
        prefix: the tokenizer's, such as BOS.
        longest: the model's context.
        context, stride, chunks, bos: as :func:`mlxrun.eval.perplexity.perplexity` has them.

    Raises:
        ParameterError: a value outside its range, or a text shorter than a window.
        ContextLengthError: a window longer than the model's context.
    """
    size = min(USUAL, longest) if context is None else context
    size = int(Range(SMALLEST, whole=True).check("context", size))
    if size > longest:
        raise ContextLengthError(
            f"a window of {size} tokens does not fit the model's context of {longest}",
            hint=f"Take a context of at most {longest}",
        )
    step, scored = size, size - 1 - size // 2
    if stride is not None:
        most = size - max(1, len(prefix))
        step = scored = int(Range(1, most, whole=True).check("stride", stride))
    whole = [*prefix, *tokens]
    if len(whole) < size:
        remedy = "longer text or a smaller context" if len(whole) >= SMALLEST else "longer text"
        need = f"at least {size}, a window (take a {remedy})"
        raise ParameterError("tokens of the text", len(whole), need)
    count = (len(whole) - size) // step + 1
    if chunks is not None:
        count = min(count, int(Range(1, whole=True).check("chunks", chunks)))
    return Windows(whole, prefix if bos else (), size, step, scored, count)
