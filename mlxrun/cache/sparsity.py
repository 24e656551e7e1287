"""Which tokens a drawn one attends to: what users write, and how much a step then reads.

Knows neither MLX nor caches; ``sparse`` and ``rotating`` do what is said here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlxrun.errors import ParameterError

# Attention collapses without the first tokens (Xiao et al., 2023, arXiv:2309.17453).
SINKS = 4
LONGEST = 2**24
ALLOWED = (
    "dense, window:1024+4 (the last 1024 tokens and the first 4), strided:512/8 (the last 512 and "
    "every 8th) or blocks:32x64 (the best 32 blocks of 64 tokens, at least 3)"
)


@dataclass(frozen=True)
class Window:
    """The last ``window`` tokens and the first ``keep``; the rest is forgotten."""

    window: int
    keep: int

    def tokens(self, length: int) -> int:
        """Tokens that the last of ``length`` attends to, itself included."""
        return min(length, self.window + self.keep)

    def bounds(self, length: int) -> int:
        """Blocks whose bounds are read to choose them."""
        return 0


@dataclass(frozen=True)
class Strided:
    """The last ``last`` tokens, every ``stride``-th before them, and the first few.

    All are kept, and positions that are multiples of the stride are seen: what one step attends to,
    the next one does as well, but for the token that leaves the last ones.
    """

    last: int
    stride: int

    def tokens(self, length: int) -> int:
        """Tokens that the last of ``length`` attends to, itself included."""
        before = max(0, length - self.last)
        multiples = -(-before // self.stride)
        in_first = -(-min(SINKS, before) // self.stride)
        return length - before + multiples + min(SINKS, before) - in_first

    def bounds(self, length: int) -> int:
        """Blocks whose bounds are read to choose them."""
        return 0


@dataclass(frozen=True)
class Blocks:
    """The ``count`` best blocks of ``size`` tokens; see :class:`mlxrun.cache.sparse.BlockCache`."""

    count: int
    size: int

    def tokens(self, length: int) -> int:
        """Tokens that the last of ``length`` attends to, itself included."""
        if length <= self.count * self.size:
            return length
        return (self.count - 1) * self.size + (length - 1) % self.size + 1

    def bounds(self, length: int) -> int:
        """Blocks whose bounds are read to choose them."""
        return -(-length // self.size) if length > self.count * self.size else 0


Sparse = Strided | Blocks
Pattern = Window | Sparse

# Of blocks three are always attended to: the first, the one of the newest token, the one before it.
LEAST = {"window": (1, 0), "strided": (1, 1), "blocks": (3, 1)}
_FORMS: dict[str, tuple[re.Pattern[str], Callable[[int, int], Pattern]]] = {
    "window": (re.compile(r"(\d+)(?:\+(\d+))?"), Window),
    "strided": (re.compile(r"(\d+)/(\d+)"), Strided),
    "blocks": (re.compile(r"(\d+)x(\d+)"), Blocks),
}


def pattern(written: object, parameter: str = "attention") -> Pattern | None:
    """What ``blocks:32x64`` and its like mean; None and ``dense`` mean all tokens, None.

    Args:
        parameter: whose value it is, for the error.

    Raises:
        ParameterError: no such pattern.
    """
    if written is None or written == "dense":
        return None
    kind, _, numbers = written.partition(":") if isinstance(written, str) else ("", "", "")
    if kind not in _FORMS:
        raise ParameterError(parameter, written, ALLOWED)
    form, make = _FORMS[kind]
    match = form.fullmatch(numbers)
    if match is None:
        raise ParameterError(parameter, written, ALLOWED)
    given = int(match[1]), int(SINKS if match[2] is None else match[2])
    least = LEAST[kind]
    if any(not low <= number <= LONGEST for number, low in zip(given, least, strict=True)):
        raise ParameterError(parameter, written, ALLOWED)
    return make(*given)
