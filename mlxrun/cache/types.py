"""Names of how keys and values are stored, such as ``q8`` or ``q4/32``: what users write.

Knows neither MLX nor models: which groups fit a model's heads is settled in ``formats``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from mlxrun.errors import ParameterError

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (128, 64, 32)
# Groups tried where none is named, the best first: fewer scales to store and to read.
USUAL_GROUPS = (64, 32)
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# llama.cpp's blocks of 32; those of ours have a scale and a smallest value each, as its _1 types.
SYNONYMS = {"q8_0": "q8/32", "q5_0": "q5/32", "q5_1": "q5/32", "q4_0": "q4/32", "q4_1": "q4/32"}
NAMES = (*FLOATS, *(f"q{bits}" for bits in BITS), "mxfp8")
BY_CHANNEL = tuple(f"q{bits}c" for bits in (4, 3, 2))  # those that people use
ALLOWED = (
    f"one of {', '.join(NAMES)}, where q4/32 is q4 in groups of 32; for keys also q4c, by channel"
)

_PACKED = re.compile(r"q([234568])(c?)(?:/(32|64|128))?")


@dataclass(frozen=True)
class CacheType:
    """How keys or values are stored.

    Attributes:
        name: as it is written.
        dtype: of plain arrays, or None.
        bits: of a packed code, or None.
        groups: how many neighbours may share a scale, the best number first.
        mode: MLX's mode of packing.
        by_channel: neighbours are successive tokens of one channel, not channels of one token.
    """

    name: str
    dtype: str | None = None
    bits: int | None = None
    groups: tuple[int, ...] = USUAL_GROUPS
    mode: str = "affine"
    by_channel: bool = False


class Shape(NamedTuple):
    """What one token leaves in the cache of a layer.

    Attributes:
        heads: of keys and of values.
        key, value: widths of a head.
        latent: queries meet values as well as keys.
    """

    heads: int
    key: int
    value: int
    latent: bool = False


def cache_type(name: object, parameter: str) -> CacheType | None:
    """What a name means; None, which stores what comes as it is, stays None.

    Args:
        parameter: whose value the name is, for the error.

    Raises:
        ParameterError: no such type.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise ParameterError(parameter, name, ALLOWED)
    written = SYNONYMS.get(name.lower(), name.lower())
    if written in FLOATS:
        return CacheType(name, dtype=FLOATS[written])
    if written in ("mxfp8", "mxfp8/32"):
        return CacheType(name, bits=8, groups=(32,), mode="mxfp8")
    match = _PACKED.fullmatch(written)
    if match is None:
        raise ParameterError(parameter, name, ALLOWED)
    bits, by_channel, group = match.groups()
    groups = (int(group),) if group else USUAL_GROUPS
    return CacheType(name, bits=int(bits), groups=groups, by_channel=bool(by_channel))
