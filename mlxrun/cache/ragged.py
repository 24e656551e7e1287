"""Several caches behind one forward pass: decoding rows and pieces of prompts side by side.

Tokens go through a model as rows of one token each, whatever they belong to, so that no product is
padded; only attention parts them again. Flattening sequences that way is what Orca calls selective
batching (Yu et al., OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxrun.cache.base import Cache, Product
from mlxrun.cache.passing import Passing


class Part(NamedTuple):
    """Neighbouring tokens that go to one cache.

    Attributes:
        cache: whose rows get one token each, or whose only row gets all.
        rows: how many rows the cache has.
        tokens: how many each of them gets.
    """

    cache: Cache
    rows: int
    tokens: int


class Ragged(Passing):
    """One layer's caches for one forward pass over tokens (N, 1).

    Args:
        parts: in the order of the tokens.
        position: of each token, (N,).
    """

    def __init__(self, parts: Sequence[Part], position: mx.array) -> None:
        self._parts, self._position = parts, position

    @property
    def position(self) -> mx.array:
        return self._position

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        if len(self._parts) == 1 and self._parts[0].tokens == 1:
            return self._parts[0].cache.attend(queries, keys, values, product)
        attended, start = [], 0
        for cache, rows, tokens in self._parts:
            end = start + rows * tokens
            q, k, v = (x[start:end] for x in (queries, keys, values))  # (rows * T, H, 1, D)
            if tokens > 1:
                q, k, v = (x.transpose(2, 1, 0, 3) for x in (q, k, v))  # (1, H, T, D)
            out = cache.attend(q, k, v, product)
            attended.append(out.transpose(2, 1, 0, 3) if tokens > 1 else out)
            start = end
        return mx.concatenate(attended) if len(attended) > 1 else attended[0]

    @property
    def state(self) -> list[mx.array]:
        return [array for part in self._parts for array in part.cache.state]
