"""The contract of a KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp

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


@dataclass(frozen=True, eq=False)
class Segment:
    """K/V of successive tokens in all caches of a model.

    Attributes:
        parts: of each cache, arrays (1, H, T, ...) by name; none where it has no such tokens.
    """

    parts: tuple[Arrays, ...]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self.parts for array in part.values()]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)


class StepCache(ABC):
    """A layer's cache as a forward pass sees it: where its tokens are, and attention over them."""

    @property
    @abstractmethod
    def position(self) -> Position:
        """The position of the next token, or of each row's, (R,)."""

    @abstractmethod
    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, op: AttentionOp
    ) -> mx.array:
        """Append T tokens to each row, and attend to those before them and to each other.

        Args:
            queries: (R, heads, T, D).
            keys: (R, H, T, D), already rotated by position.
            values: (R, H, T, D).

        Returns:
            (R, heads, T, D).
        """

    @property
    @abstractmethod
    def state(self) -> list[mx.array]:
        """All arrays of the cache, to be evaluated."""


class KVCache(StepCache):
    """Keys and values, or a recurrent state, of the tokens so far.

    One cache serves one layer and all rows of a batch (:class:`mlxrun.kv_cache.dense.RowCache`);
    for mlx-lm's classes one cache serves a whole model and one sequence.

    *Ownership.* The cache owns its arrays. A sequence owns its caches until it joins a block, which
    then owns them; no one else keeps a reference to either.

    *Changes.* A pass appends k tokens to each row through ``attend``, or through the arrays of a
    compiled step (:class:`mlxrun.kv_cache.batch.DecodeSlots`); k may differ from row to row.
    ``truncate(row, n)`` removes a row's last n tokens and leaves the other rows alone; of the last
    pass, ``rollback`` tokens can always be removed, which is what speculation relies on. Tokens
    that stay are never rewritten: a row after k tokens and a truncation by n has the K/V of one
    that was given k - n tokens.

    *Validity.* Attention gets views in slot order, valid for that pass only. ``fork``
    shares arrays: MLX arrays are values, so the first of the two to append copies what it changes.
    ``slice_tokens`` and ``snapshot`` are copies, valid for ever. All of it is lazy: the next step's
    graph may be built before this one is evaluated.

    Attributes:
        offset: tokens so far; the position of the next one. With several rows, the fewest.
        prompt: prompt length, set before prefill. Sparse caches attend densely up to it.
    """

    offset: int = 0
    prompt: int = 0

    @property
    def position(self) -> Position:
        return self.offset

    @abstractmethod
    def truncate(self, row: int, n: int) -> None:
        """Remove the last ``n`` tokens of a row.

        Raises:
            CacheError: tokens that the next query attends to are no longer stored.
        """

    @property
    def rollback(self) -> int | None:
        """How many of the tokens of the last pass can always be truncated; None: all."""
        return None

    @abstractmethod
    def fork(self) -> Self:
        """A copy that shares arrays until one of the two is appended to."""

    @property
    def reusable_len(self) -> int:
        """Length of the prefix whose K/V can be reused by another sequence."""
        return self.offset

    @property
    @abstractmethod
    def layout_key(self) -> str:
        """Equal for caches that can restore each other's tokens and states; empty: none can."""

    @property
    def batch_key(self) -> Hashable | None:
        """Equal for caches that may be rows of one array; None: never batched."""
        return self.layout_key or None

    @property
    def sliceable(self) -> bool:
        """Whether all of it can be sliced by token, so that there is no state to snapshot."""
        return False

    @abstractmethod
    def slice_tokens(self, start: int, stop: int) -> Arrays:
        """Copies of the tokens' arrays (1, H, stop - start, ...); none if they are in the state."""

    @abstractmethod
    def snapshot(self) -> State | None:
        """The part that cannot be sliced by token, as it is now; None if there is none."""

    @abstractmethod
    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        """Fill this empty cache from another of the same :attr:`layout_key`.

        Args:
            tokens: slices of at least the first ``length`` tokens, one after the other.
            state: at an offset from which truncating to ``length`` works.

        Raises:
            CacheError: it does not work from there.
        """

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(int(array.nbytes) for array in self.state)


def check_rollback(offset: int, n: int) -> None:
    """Refuse to truncate by more tokens than there are.

    Raises:
        CacheError: there are fewer than ``n``.
    """
    if not 0 <= n <= offset:
        raise CacheError(f"cannot truncate {n} of {offset} tokens")
