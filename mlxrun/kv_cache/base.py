"""The contract of a KV cache.

One cache serves one layer and all rows of a batch; for mlx-lm's classes one cache serves a whole
model. Who owns what, and for how long:

* The cache owns its arrays. ``attend`` and ``update`` append to them; nothing else changes them.
* What ``update`` returns is valid for the forward pass that called it: views of the cache's arrays
  in slot order, which need not be the order of time. Keep nothing from one step to the next.
* ``fork`` shares arrays between two caches. MLX arrays are values: the first of the two to be
  updated copies what it changes, so neither sees the other's tokens.
* All of it is lazy: building the graph of the next step before this one is evaluated is fine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Self

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, Mask

Arrays = dict[str, mx.array]
Position = int | mx.array


def following(position: Position, tokens: int) -> mx.array:
    """The positions of T tokens from one on, (T,), or from each row's, (R, T)."""
    if isinstance(position, int):
        return mx.arange(position, position + tokens)
    return position[:, None] + mx.arange(tokens)


class State(NamedTuple):
    """The part of a cache that cannot be sliced by token, at one offset.

    Attributes:
        arrays: by name; never written to.
        metadata: the rest, as JSON.
    """

    arrays: Arrays
    metadata: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays.values())


class KVCache(ABC):
    """Keys and values, or a recurrent state, of the tokens so far.

    Attributes:
        offset: tokens so far; the position of the next one. With several rows, the fewest.
        prompt: prompt length, set before prefill. Sparse caches attend densely up to it.
    """

    offset: int = 0
    prompt: int = 0

    @property
    def position(self) -> Position:
        """The position of the next token, or of each row's, (R,)."""
        return self.offset

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, op: AttentionOp
    ) -> mx.array:
        """Append T tokens to each row and attend.

        Args:
            queries: (R, heads, T, D).
            keys: (R, H, T, D), already rotated by position.
            values: (R, H, T, D).

        Returns:
            (R, heads, T, D).
        """
        return op(queries, *self.update(keys, values))

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        """Append T tokens; returns the keys, values (R, H, S, D) and mask to attend to."""
        raise CacheError(f"a {type(self).__name__} has no keys in one array: use attend")

    def truncate(self, row: int, n: int) -> None:
        """Remove the last ``n`` tokens of a row.

        Raises:
            CacheError: tokens that the next query attends to are no longer stored.
        """
        raise CacheError(f"a {type(self).__name__} cannot be truncated")

    @property
    def rollback(self) -> int | None:
        """How many of the tokens of the last pass can always be truncated; None: all."""
        return None

    def fork(self) -> Self:
        """A copy that shares arrays until one of the two is updated."""
        raise CacheError(f"a {type(self).__name__} cannot be forked")

    @property
    def reusable_len(self) -> int:
        """Length of the prefix whose K/V can be reused by another sequence."""
        return self.offset

    @property
    def layout_key(self) -> str:
        """Equal for caches that can restore each other's tokens and states; empty: none can."""
        return ""

    @property
    def batch_key(self) -> Hashable | None:
        """Equal for caches that may be rows of one array; None: never batched."""
        return self.layout_key or None

    @property
    def sliceable(self) -> bool:
        """Whether all of it can be sliced by token, so that there is no state to snapshot."""
        return False

    def slice_tokens(self, start: int, stop: int) -> Arrays:
        """Copies of the tokens' arrays (1, H, stop - start, ...); none if they are in the state."""
        raise CacheError("this kind of cache cannot be stored")

    def snapshot(self) -> State | None:
        """The part that cannot be sliced by token, as it is now; None if there is none."""
        raise CacheError("this kind of cache cannot be stored")

    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        """Fill this empty cache with what another of the same :attr:`layout_key` stored.

        Args:
            tokens: slices of at least the first ``length`` tokens, one after the other.
            state: at an offset from which truncating to ``length`` works.

        Raises:
            CacheError: it does not work from there.
        """
        raise CacheError("this kind of cache cannot be stored")

    @property
    @abstractmethod
    def state(self) -> list[mx.array]:
        """All arrays of the cache, to be evaluated."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(int(array.nbytes) for array in self.state)
