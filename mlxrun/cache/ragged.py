"""Several caches behind one forward pass: decoding rows and pieces of prompts side by side.

Tokens go through a model as rows of one token each, whatever they belong to, so that no product is
padded; only attention parts them again. Flattening sequences that way is what Orca calls selective
batching (Yu et al., OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxrun.cache.base import Cache, Product
from mlxrun.cache.passing import Passing
from mlxrun.cache.rows import RowCache


class Part(NamedTuple):
    """Adjacent tokens that go to one cache, row by row.

    Attributes:
        cache: whose rows get them.
        rows: how many rows the cache has.
        tokens: how many each of them gets; the most where ``counts`` differ.
        counts: how many each row gets, at least one; None where all get the same.
    """

    cache: Cache
    rows: int
    tokens: int
    counts: tuple[int, ...] | None = None


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
        for part in self._parts:
            end = start + (part.rows * part.tokens if part.counts is None else sum(part.counts))
            q, k, v = (x[start:end] for x in (queries, keys, values))  # (N, H, 1, D)
            attended.append(_attend(part, q, k, v, product))
            start = end
        return mx.concatenate(attended) if len(attended) > 1 else attended[0]

    @property
    def state(self) -> list[mx.array]:
        return [array for part in self._parts for array in part.cache.state]


def _attend(
    part: Part, queries: mx.array, keys: mx.array, values: mx.array, product: Product
) -> mx.array:
    """Attention of one part's tokens (N, H, 1, D), the same shape."""
    cache, rows, tokens, counts = part
    if tokens == 1:
        return cache.attend(queries, keys, values, product)
    if counts is None:
        shape = (rows, tokens)
        q, k, v = (
            x.reshape(*shape, x.shape[1], -1).swapaxes(1, 2) for x in (queries, keys, values)
        )
        out = cache.attend(q, k, v, product)  # (R, H, T, D)
        return out.swapaxes(1, 2).reshape(rows * tokens, out.shape[1], 1, -1)
    padded, own = _padding(counts)
    q, k, v = (x[padded][:, :, :, 0].swapaxes(1, 2) for x in (queries, keys, values))
    assert isinstance(cache, RowCache)
    out = cache.attend_ragged(q, k, v, product, counts)
    return out.swapaxes(1, 2).reshape(rows * tokens, out.shape[1], 1, -1)[own]


@lru_cache(maxsize=16)
def _padding(counts: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Which token is in each place of (R, T), the last of a row again as its padding; and which of
    the R * T places are tokens, (N,)."""
    step = np.arange(max(counts))
    ends = np.cumsum(counts)[:, None]
    places = np.minimum(ends - np.array(counts)[:, None] + step, ends - 1)
    return mx.array(places), mx.array(np.flatnonzero(step < np.array(counts)[:, None]))
