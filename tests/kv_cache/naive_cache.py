"""A cache that keeps everything and masks: what every other cache has to agree with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Stored = Callable[[np.ndarray], np.ndarray]


def as_given(x: np.ndarray) -> np.ndarray:
    return x


class NaiveCache:
    """All keys and values ever given, by position; a query sees by the rule alone.

    Args:
        keys, values: what storing one token's makes of them, (B, H, 1, D).
    """

    def __init__(
        self,
        window: int | None = None,
        keep: int = 0,
        keys: Stored = as_given,
        values: Stored = as_given,
    ) -> None:
        self.window, self.keep = window, keep
        self.slack, self.longest = 16, 0  # tokens to go back at least, from the longest it has been
        self._stored = keys, values
        self.keys = self.values = np.zeros((0, 0, 0, 0), np.float32)
        self.offset = 0

    def update(self, keys: np.ndarray, values: np.ndarray) -> None:
        keys, values = (
            np.concatenate([stored(x[:, :, i : i + 1]) for i in range(x.shape[2])], axis=2)
            for stored, x in zip(self._stored, (keys, values), strict=True)
        )
        if self.offset:
            keys = np.concatenate([self.keys[:, :, : self.offset], keys], axis=2)
            values = np.concatenate([self.values[:, :, : self.offset], values], axis=2)
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        self.longest = max(self.longest, self.offset)

    def attend(self, queries: np.ndarray) -> np.ndarray:
        """Attention of the last T tokens' queries (B, Hq, T, D), float64."""
        group = queries.shape[1] // self.keys.shape[1]
        keys = np.repeat(self.keys, group, axis=1).astype(np.float64)
        values = np.repeat(self.values, group, axis=1).astype(np.float64)
        scores = queries.astype(np.float64) @ keys.swapaxes(2, 3)
        scores = np.where(self.visible(queries), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True) @ values

    def visible(self, queries: np.ndarray) -> np.ndarray:
        """Which positions the last T tokens' queries see, booleans (T, S) or (B, Hq, T, S)."""
        t = queries.shape[2]
        now, past = np.arange(self.offset - t, self.offset)[:, None], np.arange(self.offset)
        visible: np.ndarray = past <= now
        if self.window is not None:
            visible &= (past < self.keep) | (past > now - self.window)
        return visible

    def may_refuse(self, n: int) -> bool:
        """Whether a cache with this much room may be unable to go back n tokens."""
        if self.window is None or n <= 0:
            return False
        return (
            self.offset > self.window + self.keep and self.longest - (self.offset - n) > self.slack
        )

    def trim(self, n: int) -> None:
        self.offset -= n

    def fork(self) -> NaiveCache:
        other = NaiveCache(self.window, self.keep, *self._stored)
        other.longest = self.longest
        other.keys, other.values, other.offset = self.keys.copy(), self.values.copy(), self.offset
        return other
