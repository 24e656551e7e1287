"""A cache that keeps everything and masks it by a sparse pattern's rule."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
from naive_cache import NaiveCache, Stored, as_given

from mlxrun.kv_cache.options import SINKS, Blocks, Sparse, Strided


class NaiveSparse(NaiveCache):
    """Picks for every query of every head by itself, from all keys."""

    def __init__(
        self,
        pattern: Sparse,
        prompt: int = 0,
        keys: Stored = as_given,
        values: Stored = as_given,
        shared: bool = False,
    ) -> None:
        super().__init__(keys=keys, values=values)
        self.pattern, self.prompt, self.shared = pattern, prompt, shared

    def visible(self, queries: np.ndarray) -> np.ndarray:
        b, heads, t, _ = queries.shape
        seen = np.zeros((b, heads, t, self.offset), bool)
        for i, at in enumerate(range(self.offset - t, self.offset)):
            if at < self.prompt:
                seen[:, :, i, : at + 1] = True
            elif isinstance(self.pattern, Strided):
                past = np.arange(at + 1)
                near = past > at - self.pattern.last
                seen[:, :, i, : at + 1] = near | (past < SINKS) | (past % self.pattern.stride == 0)
            else:
                for row in range(b):
                    self._blocks(seen[row, :, i], queries[row, :, i], self.keys[row], at)
        return seen

    def _blocks(self, seen: np.ndarray, q: np.ndarray, keys: np.ndarray, at: int) -> None:
        """Mark what queries (heads, D) of one token see, ``seen``: (heads, S)."""
        assert isinstance(self.pattern, Blocks)
        size, last = self.pattern.size, at // self.pattern.size
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
            for block in np.argsort(-bounds)[: self.pattern.count]:
                seen[first : first + group, block * size : min(at + 1, (block + 1) * size)] = True

    @staticmethod
    def _bound(query: np.ndarray, keys: np.ndarray) -> float:
        return float(np.maximum(query * keys.min(0), query * keys.max(0)).sum())

    def fork(self) -> NaiveSparse:
        return deepcopy(self)
