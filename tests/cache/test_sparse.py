"""Sparse caches against one that keeps everything and masks by the pattern's rule alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest
from agreement import HEADS, KV_HEADS, PRODUCT, Life, lives, run
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import NaiveCache, Stored, as_given
from stored import packed

from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import PLAIN, AcrossHeads, Format, Quantised
from mlxrun.cache.sparse import BlockCache, SparseCache, StridedCache
from mlxrun.cache.sparsity import SINKS, Blocks, Sparse, Strided


class NaiveSparse(NaiveCache):
    """Picks for every query of every head by itself, from all keys."""

    def __init__(
        self,
        wanted: Sparse,
        prompt: int = 0,
        keys: Stored = as_given,
        values: Stored = as_given,
        shared: bool = False,
    ) -> None:
        super().__init__(keys=keys, values=values)
        self.wanted, self.prompt, self.shared = wanted, prompt, shared

    def visible(self, queries: np.ndarray) -> np.ndarray:
        b, heads, t, _ = queries.shape
        seen = np.zeros((b, heads, t, self.offset), bool)
        for i, at in enumerate(range(self.offset - t, self.offset)):
            if at < self.prompt:
                seen[:, :, i, : at + 1] = True
            elif isinstance(self.wanted, Strided):
                past = np.arange(at + 1)
                near = past > at - self.wanted.last
                seen[:, :, i, : at + 1] = near | (past < SINKS) | (past % self.wanted.stride == 0)
            else:
                for row in range(b):
                    self._blocks(seen[row, :, i], queries[row, :, i], self.keys[row], at)
        return seen

    def _blocks(self, seen: np.ndarray, q: np.ndarray, keys: np.ndarray, at: int) -> None:
        """Mark what queries (heads, D) of one token see, ``seen``: (heads, S)."""
        assert isinstance(self.wanted, Blocks)
        size, last = self.wanted.size, at // self.wanted.size
        group = q.shape[0] // (1 if self.shared else keys.shape[0])
        for first in range(0, q.shape[0], group):
            bounds = np.zeros(last + 1)
            for block in range(last + 1):
                span = slice(block * size, min(at + 1, (block + 1) * size))
                bounds[block] = max(
                    self._bound(q[h], keys[h * keys.shape[0] // q.shape[0], span])
                    for h in range(first, first + group)
                )
            bounds[[0, last, max(0, last - 1)]] = np.inf
            for block in np.argsort(-bounds)[: self.wanted.count]:
                seen[first : first + group, block * size : min(at + 1, (block + 1) * size)] = True

    @staticmethod
    def _bound(query: np.ndarray, keys: np.ndarray) -> float:
        return float(np.maximum(query * keys.min(0), query * keys.max(0)).sum())

    def fork(self) -> NaiveSparse:
        return deepcopy(self)


def made(
    wanted: Sparse, prompt: int = 0, keys: Format = PLAIN, values: Format = PLAIN
) -> Callable[[], SparseCache]:
    def make() -> SparseCache:
        strided = isinstance(wanted, Strided)
        cache: SparseCache = (
            StridedCache(wanted, keys, values) if strided else BlockCache(wanted, keys, values)
        )
        cache.prompt = prompt
        return cache

    return make


def random(rng: np.random.Generator, n: int, heads: int = KV_HEADS, rows: int = 1) -> mx.array:
    return mx.array(rng.standard_normal((rows, heads, n, 4)).astype(np.float32))


patterns = st.one_of(
    st.builds(Strided, st.integers(1, 20), st.integers(1, 7)),
    st.builds(Blocks, st.integers(3, 6), st.integers(1, 6)),
)


@given(
    life=lives(),
    wanted=patterns,
    prompt=st.integers(0, 40),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
)
@settings(max_examples=120)
def test_agrees_with_a_cache_that_picks_by_the_rule(
    life: Life, wanted: Sparse, prompt: int, seed: int, batch: int
) -> None:
    run(made(wanted, prompt), NaiveSparse(wanted, prompt), life, seed, batch)
