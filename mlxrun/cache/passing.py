"""What a layer sees of caches for the time of one forward pass."""

from __future__ import annotations

from typing import Self

import mlx.core as mx

from mlxrun.cache.base import Cache, Mask
from mlxrun.errors import CacheError


class Passing(Cache):
    """A cache that stands for others during a pass: all it can do is attend."""

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        raise CacheError("what lasts for a forward pass shows no keys: use attend")

    def trim(self, n: int) -> int:
        raise CacheError("a forward pass cannot go back; its sequences can")

    def fork(self) -> Self:
        raise CacheError("a forward pass cannot fork; its sequences can")
