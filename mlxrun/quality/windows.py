"""Which tokens of a text are read together, and which of them are scored.

Knows nothing of models or of MLX. The windows are those of llama.cpp's llama-perplexity, so that
figures can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from mlxrun.config import Range
from mlxrun.errors import ContextLengthError, ParameterError

# The window where none is asked for, as llama-perplexity has it.
USUAL = 512
# A smaller window has less than two tokens in its second half.
SMALLEST = 5


class WindowOptions(TypedDict, total=False):
    """Which tokens of a text are scored: see :func:`~mlxrun.quality.measure.perplexity`."""

    context: int | None
    stride: int | None
    chunks: int | None
    bos: bool


@dataclass(frozen=True)
class Windows:
    """A text's windows.

    Attributes:
        tokens: of the text, and what the tokenizer puts before it.
        first: tokens that each window begins with in place of its own.
        context: tokens of a window.
        step: from one window's beginning to the next one's.
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
    before: tuple[int, ...],
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
        before: what the tokenizer puts before a text.
        longest: tokens that the model can see at once.
        context, stride, chunks, bos: as :func:`~mlxrun.quality.measure.perplexity` has them.

    Raises:
        ParameterError: a value outside its range, or a text shorter than a window.
        ContextLengthError: a window longer than the model can see.
    """
    wanted = min(USUAL, longest) if context is None else context
    size = int(Range(SMALLEST, whole=True).check("context", wanted))
    if size > longest:
        raise ContextLengthError(
            f"a window of {size} tokens does not fit the model's context of {longest}",
            hint=f"Take a context of at most {longest}",
        )
    scored = size - 1 - size // 2
    if stride is not None:
        most = size - max(1, len(before))
        scored = int(Range(1, most, whole=True).check("stride", stride))
    if chunks is not None:
        chunks = int(Range(1, whole=True).check("chunks", chunks))
    whole = [*before, *tokens]
    if len(whole) < size:
        ways = "longer text or a smaller context" if len(whole) >= SMALLEST else "longer text"
        need = f"at least {size}, a window (take a {ways})"
        raise ParameterError("tokens of the text", len(whole), need)
    step = size if stride is None else scored
    count = (len(whole) - size) // step + 1
    count = count if chunks is None else min(count, chunks)
    return Windows(whole, before if bos else (), size, step, scored, count)
