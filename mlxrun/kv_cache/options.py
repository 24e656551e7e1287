"""Names of cache types (``q8``, ``q4/32``) and of attention patterns (``blocks:32x64``).

Standard library only. Which groups fit a model's heads is decided in :mod:`.formats`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mlxrun.errors import ParameterError

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (128, 64, 32)
# Groups tried where none is named, the best first: fewer scales to store and to read.
USUAL_GROUPS = (64, 32)
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# llama.cpp's blocks of 32; ours have a scale and a smallest value each, as its _1 types.
SYNONYMS = {"q8_0": "q8/32", "q5_0": "q5/32", "q5_1": "q5/32", "q4_0": "q4/32", "q4_1": "q4/32"}
NAMES = (*FLOATS, *(f"q{bits}" for bits in BITS), "mxfp8")
PER_CHANNEL = tuple(f"q{bits}c" for bits in (4, 3, 2))
TYPES_ALLOWED = (
    f"one of {', '.join(NAMES)}, where q4/32 is q4 in groups of 32; for keys also q4c, by channel"
)
_PACKED = re.compile(r"q([234568])(c?)(?:/(32|64|128))?")

# Attention collapses without the first tokens (Xiao et al., 2023, arXiv:2309.17453).
SINKS = 4
LONGEST = 2**24
PATTERNS_ALLOWED = (
    "dense, window:1024+4 (the last 1024 tokens and the first 4), strided:512/8 (the last 512 and "
    "every 8th) or blocks:32x64 (the best 32 blocks of 64 tokens, at least 3)"
)


class Shape(NamedTuple):
    """Keys and values of one token in one layer.

    Attributes:
        heads: H of keys and of values.
        key, value: channels of a head.
        latent: queries are scored against values as well as keys.
    """

    heads: int
    key: int
    value: int
    latent: bool = False


@dataclass(frozen=True)
class CacheType:
    """How keys or values are stored.

    Attributes:
        dtype: of unpacked arrays, or None.
        bits: of a packed code, or None.
        groups: sizes of groups that share a scale, the preferred one first.
        mode: MLX's mode of quantization.
        per_channel: a group is successive tokens of one channel, not channels of one token.
    """

    name: str
    dtype: str | None = None
    bits: int | None = None
    groups: tuple[int, ...] = USUAL_GROUPS
    mode: str = "affine"
    per_channel: bool = False


def cache_type(name: object, parameter: str) -> CacheType | None:
    """The type of a name; None, the dtype of activations, stays None.

    Args:
        parameter: the option's name, for the error.

    Raises:
        ParameterError: no such type.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise ParameterError(parameter, name, TYPES_ALLOWED)
    canonical = SYNONYMS.get(name.lower(), name.lower())
    if canonical in FLOATS:
        return CacheType(name, dtype=FLOATS[canonical])
    if canonical in ("mxfp8", "mxfp8/32"):
        return CacheType(name, bits=8, groups=(32,), mode="mxfp8")
    match = _PACKED.fullmatch(canonical)
    if match is None:
        raise ParameterError(parameter, name, TYPES_ALLOWED)
    bits, per_channel, group = match.groups()
    groups = (int(group),) if group else USUAL_GROUPS
    return CacheType(name, bits=int(bits), groups=groups, per_channel=bool(per_channel))


@dataclass(frozen=True)
class Window:
    """The last ``window`` tokens and the first ``keep``; the rest is evicted."""

    window: int
    keep: int

    def tokens(self, length: int) -> int:
        """Tokens that the last of ``length`` attends to, itself included."""
        return min(length, self.window + self.keep)

    def bounds(self, length: int) -> int:
        """Blocks whose bounds are read to choose among them."""
        return 0


@dataclass(frozen=True)
class Strided:
    """The last ``last`` tokens, every ``stride``-th before them, and the first few.

    All tokens stay cached, and those at multiples of the stride are attended to: what one step
    attends to, the next one does as well, but for the token that leaves the last ones.
    """

    last: int
    stride: int

    def tokens(self, length: int) -> int:
        before = max(0, length - self.last)
        multiples = -(-before // self.stride)
        in_first = -(-min(SINKS, before) // self.stride)
        return length - before + multiples + min(SINKS, before) - in_first

    def bounds(self, length: int) -> int:
        return 0


@dataclass(frozen=True)
class Blocks:
    """The ``count`` best blocks of ``size`` tokens; see :class:`BlockCache`."""

    count: int
    size: int

    def tokens(self, length: int) -> int:
        if length <= self.count * self.size:
            return length
        return (self.count - 1) * self.size + (length - 1) % self.size + 1

    def bounds(self, length: int) -> int:
        return -(-length // self.size) if length > self.count * self.size else 0


Sparse = Strided | Blocks
Pattern = Window | Sparse

# Three blocks are always attended to: the first, the newest token's, and the one before it.
_LEAST = {"window": (1, 0), "strided": (1, 1), "blocks": (3, 1)}
_FORMS: dict[str, tuple[re.Pattern[str], Callable[[int, int], Pattern]]] = {
    "window": (re.compile(r"(\d+)(?:\+(\d+))?"), Window),
    "strided": (re.compile(r"(\d+)/(\d+)"), Strided),
    "blocks": (re.compile(r"(\d+)x(\d+)"), Blocks),
}


def pattern(name: object, parameter: str = "attention") -> Pattern | None:
    """The pattern of a name such as ``blocks:32x64``; None for ``dense`` and None.

    Args:
        parameter: the option's name, for the error.

    Raises:
        ParameterError: no such pattern.
    """
    if name is None or name == "dense":
        return None
    kind, _, numbers = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in _FORMS:
        raise ParameterError(parameter, name, PATTERNS_ALLOWED)
    form, make = _FORMS[kind]
    match = form.fullmatch(numbers)
    if match is None:
        raise ParameterError(parameter, name, PATTERNS_ALLOWED)
    given = int(match[1]), int(SINKS if match[2] is None else match[2])
    if any(not low <= n <= LONGEST for n, low in zip(given, _LEAST[kind], strict=True)):
        raise ParameterError(parameter, name, PATTERNS_ALLOWED)
    return make(*given)
