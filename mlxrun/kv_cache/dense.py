"""Caches whose rows lie in slots of one array per layer, and the one that keeps every token."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self

import mlx.core as mx
import numpy as np

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, Mask, attend
from mlxrun.kv_cache.base import Arrays, KVCache, Position, State, check_rollback
from mlxrun.kv_cache.formats import PLAIN, Format, StoredKV

# Smallest capacity; every further bucket doubles, so that growing costs O(1) copies per token.
BUCKET = 256


def bucket(tokens: int, limit: int | None = None) -> int:
    """The capacity for ``tokens``: 256, 512, 1024 ..., at most ``limit``."""
    capacity = BUCKET
    while capacity < tokens:
        capacity *= 2
    return capacity if limit is None else min(capacity, limit)


class Layout(Protocol):
    """Which slot has the token at a position, and which slots a query attends to.

    Equal for caches whose tokens lie in the same slots. The arithmetic is the same for Python
    integers, numpy arrays (masks made by the host) and MLX arrays (within a compiled step).
    """

    def __hash__(self) -> int: ...

    def slot(self, positions: Any) -> Any:
        """The slots of tokens at some positions."""

    def used(self, offset: int) -> int:
        """Slots in use after ``offset`` tokens."""

    def visible(self, slots: Any, last: Any, queries: Any) -> Any:
        """Which slots queries attend to, booleans by broadcasting.

        Args:
            slots: numbers of slots.
            last: position of the newest stored token.
            queries: positions of the queries, at most ``last``.
        """


@dataclass(frozen=True)
class Line:
    """Tokens in order of position, from position ``start`` in slot 0 on."""

    start: int = 0

    def slot(self, positions: Any) -> Any:
        return positions - self.start if self.start else positions

    def used(self, offset: int) -> int:
        return max(0, offset - self.start)

    def visible(self, slots: Any, last: Any, queries: Any) -> Any:
        return slots <= self.slot(queries)


@lru_cache(maxsize=16)
def positions(offsets: tuple[int, ...]) -> mx.array:
    """One offset per row, (R,), made once for all layers."""
    return mx.array(offsets)


class Places(NamedTuple):
    """Where the next T tokens of each row go, and which slots they attend to.

    Attributes:
        slots: (R, 1, T, 1).
        mask: booleans (R, 1, T, view); None where all queries attend to all of those slots.
        view: slots to attend over, from the first on.
    """

    slots: mx.array
    mask: mx.array | None
    view: int


@lru_cache(maxsize=16)
def places(
    layout: Layout, offsets: tuple[int, ...], counts: tuple[int, ...], tokens: int
) -> Places:
    """Places of the next tokens of each row, made once for all layers of a layout.

    Args:
        counts: how many of the ``tokens`` are each row's. The rest is padding, which goes to the
            slot that the row's next token overwrites.
    """
    # Made by numpy: an MLX array that is not evaluated yet belongs to one thread.
    offset, count = (np.array(x)[:, None, None, None] for x in (offsets, counts))
    queries = offset + np.minimum(np.arange(tokens)[:, None], count)  # (R, 1, T, 1)
    view = max(layout.used(int(last) + 1) for last in queries[:, 0, -1, 0])
    last = np.maximum(offset + count - 1, queries)
    visible = layout.visible(np.arange(view), last, queries)
    return Places(
        mx.array(layout.slot(queries)), None if visible.all() else mx.array(visible), view
    )


class Store:
    """Arrays (R, heads, slots, width), that differ only in width and dtype.

    Attributes:
        arrays: none before the first token.
    """

    def __init__(self, arrays: Sequence[mx.array] = ()) -> None:
        self.arrays = list(arrays)

    @property
    def slots(self) -> int:
        """Capacity of a row."""
        return int(self.arrays[0].shape[2]) if self.arrays else 0

    def reserve(self, like: Sequence[mx.array], used: int, capacity: int) -> None:
        """Make room for ``capacity`` slots, of which the first ``used`` stay as they are."""
        if self.arrays and capacity <= self.slots:
            return
        if not self.arrays or not used:
            self.arrays = [_zeros(x, x.shape[0], capacity) for x in like]
            return
        more = [_zeros(x, x.shape[0], capacity - used) for x in self.arrays]
        self.arrays = [
            mx.concatenate([old[:, :, :used], new], axis=2)
            for old, new in zip(self.arrays, more, strict=True)
        ]

    def write(self, start: int, tokens: Sequence[mx.array]) -> None:
        """Put T tokens of every row into the slots from ``start`` on."""
        end = start + tokens[0].shape[2]
        for array, new in zip(self.arrays, tokens, strict=True):
            array[:, :, start:end] = new

    def write_each(self, slots: mx.array, tokens: Sequence[mx.array]) -> None:
        """Put T tokens of each row into slots of its own, (R, 1, T, 1)."""
        self.arrays = [
            put_tokens(array, mx.broadcast_to(slots, x.shape), x)
            for array, x in zip(self.arrays, tokens, strict=True)
        ]

    def view(self, stop: int) -> list[mx.array]:
        """The first ``stop`` slots of every row."""
        return [array[:, :, :stop] for array in self.arrays]

    def take_rows(self, rows: Sequence[int]) -> None:
        index = mx.array(list(rows))
        self.arrays = [array[index] for array in self.arrays]

    def add_rows(self, count: int) -> None:
        self.arrays = [
            mx.concatenate([array, _zeros(array, count, array.shape[2])]) for array in self.arrays
        ]

    def put_row(self, row: int, other: Store, used: int) -> None:
        """Copy the first ``used`` slots of another's only row."""
        for mine, its in zip(self.arrays, other.arrays, strict=True):
            mine[row : row + 1, :, :used] = its[:, :, :used]


def put_tokens(array: mx.array, slots: mx.array, tokens: mx.array) -> mx.array:
    """An array with tokens (R, H, T, D) put into slots of the same shape."""
    return mx.put_along_axis(array, slots, tokens, axis=2)


def copied(array: mx.array, start: int, stop: int) -> mx.array:
    """Some slots in memory of their own: a slice would keep the whole array alive."""
    return array[:, :, mx.arange(start, stop)]


def joined(parts: Sequence[Arrays], name: str, used: int, slots: int) -> mx.array:
    """The first ``used`` slots of successive arrays, and empty ones up to ``slots``.

    Raises:
        ValueError: they have fewer slots.
    """
    arrays, left = [], used
    for part in parts:
        count = min(left, part[name].shape[2])
        arrays.append(part[name][:, :, :count])
        left -= count
    if left:
        raise ValueError(f"they hold {used - left} of {used} tokens")
    arrays.append(_zeros(arrays[0], arrays[0].shape[0], slots - used))
    return mx.concatenate(arrays, axis=2)


def _zeros(like: mx.array, rows: int, slots: int) -> mx.array:
    return mx.zeros((rows, like.shape[1], slots, like.shape[3]), like.dtype)


class RowCache(KVCache):
    """Keys and values of R rows in slots; rows join and leave without disturbing the others.

    Args:
        layout: which slot has which token.
        keys, values: how each is stored.

    Attributes:
        offsets: tokens so far of each row, or one number for rows of the same length.
        high_water: the most tokens that each row had before it was truncated, or slots that padding
            was written to; see :meth:`longest`.
        functional: whether a step can be a pure function of its arrays; see
            :class:`mlxrun.kv_cache.batch.DecodeSlots`.
    """

    functional = False

    def __init__(self, layout: Layout, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        self.layout, self.keys, self.values = layout, keys, values
        self.offsets: list[int] = [0]
        self.high_water: list[int] = [0]
        self._store = Store()
        self._split = 0  # how many of the arrays are of keys

    @property
    def _stores(self) -> list[Store]:
        """All of its arrays; those of keys and values first."""
        return [self._store]

    @abstractmethod
    def empty(self) -> Self:
        """A cache of the same kind without tokens."""

    @abstractmethod
    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        """Store tokens of a single row (or of rows of one length)."""

    def _capacity(self, slots: int) -> int:
        """How many slots to allocate if ``slots`` are needed."""
        return bucket(slots)

    @property
    def tokens_at_once(self) -> int:
        """The most tokens that one operation appends to each of several rows."""
        return sys.maxsize

    @property
    def fixed(self) -> list[mx.array]:
        """Arrays that are attended to in addition to :attr:`state`, and never change."""
        return []

    def template(self) -> Self:
        """A cache of the same kind without tokens or ``fixed`` arrays."""
        return self.empty()

    @property
    def offset(self) -> int:  # type: ignore[override]
        return min(self.offsets)

    @property
    def position(self) -> Position:
        return self.offsets[0] if len(self.offsets) == 1 else positions(tuple(self.offsets))

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self._store.slots

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays of keys, then of values, each with a row's slots along its third axis."""
        return self._store.arrays

    def slots_after(self, tokens: int) -> int:
        """Slots in use once each row has so many more tokens."""
        return self.layout.used(max(self.offsets) + tokens)

    def make_room(self, tokens: int = 1) -> None:
        """Allocate slots for so many more tokens of each row."""
        need = self._capacity(self.slots_after(tokens))
        self._store.reserve(self._store.arrays, self.slots_after(0), need)

    def advance(self, arrays: Sequence[mx.array], offsets: Sequence[int]) -> None:
        """Replace the arrays by those to which a step has written more tokens of each row."""
        self._store.arrays, self.offsets = list(arrays), list(offsets)

    def longest(self, row: int) -> int:
        """The most tokens that a row has had since it was empty, truncated ones included."""
        return max(self.high_water[row], self.offsets[row])

    def _advance(self, counts: Sequence[int], tokens: int) -> None:
        for row, n in enumerate(counts):
            if n < tokens:  # the first token of the padding was written to the next slot
                self.high_water[row] = max(self.high_water[row], self.offsets[row] + n + 1)
        self.offsets = [offset + n for offset, n in zip(self.offsets, counts, strict=True)]

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        op: AttentionOp,
        counts: Sequence[int] | None = None,
    ) -> mx.array:
        """As :meth:`KVCache.attend`, with a number of tokens for each row.

        Args:
            counts: how many of the T tokens are appended to each row. The rest is padding, and its
                output undefined. None: all.
        """
        tokens, most = keys.shape[2], self.tokens_at_once
        if len(self.offsets) == 1 or tokens <= most:
            return self._attend(queries, keys, values, op, counts)
        counts = counts or [tokens] * len(self.offsets)
        parts = []
        for start in range(0, tokens, most):
            q, k, v = (x[:, :, start : start + most] for x in (queries, keys, values))
            part = [min(max(n - start, 0), k.shape[2]) for n in counts]
            parts.append(self._attend(q, k, v, op, part))
        return mx.concatenate(parts, axis=2)

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        op: AttentionOp,
        counts: Sequence[int] | None,
    ) -> mx.array:
        k, v, mask = self._store_tokens(keys, values, counts)
        return self.attend_stored(op, queries, k, v, mask, self.fixed)

    def attend_stored(
        self,
        op: AttentionOp,
        queries: mx.array,
        keys: StoredKV,
        values: StoredKV,
        mask: Mask,
        fixed: Sequence[mx.array],
    ) -> mx.array:
        """Attention over tokens of the rows, and over ``fixed`` arrays."""
        return attend(op, queries, keys, values, mask)

    def _store_tokens(
        self, keys: mx.array, values: mx.array, counts: Sequence[int] | None = None
    ) -> tuple[StoredKV, StoredKV, Mask]:
        packed, count = self.keys.pack(keys), keys.shape[2]
        self._split = len(packed)
        tokens = [*packed, *self.values.pack(values)]
        if len(self.offsets) == 1:
            counts = [count]
            view, mask = self._append(tokens)
        else:
            counts = counts or [count] * len(self.offsets)
            view, mask = self._append_each(tokens, counts)
        self._advance(counts, count)
        return (
            StoredKV(self.keys, tuple(view[: self._split]), keys.shape[1], keys.dtype),
            StoredKV(self.values, tuple(view[self._split :]), values.shape[1], values.dtype),
            mask,
        )

    def _append_each(
        self, tokens: Sequence[mx.array], counts: Sequence[int]
    ) -> tuple[list[mx.array], Mask]:
        """Store tokens of each row in slots of its own."""
        at = places(self.layout, tuple(self.offsets), tuple(counts), tokens[0].shape[2])
        self._store.reserve(tokens, self.slots_after(0), self._capacity(at.view))
        self._store.write_each(at.slots, tokens)
        return self._store.view(at.view), at.mask

    def truncate(self, row: int, n: int) -> None:
        check_rollback(self.offsets[row], n)
        length = self.offsets[row] - n
        if n:
            self._check_truncation(row, length)
            self.high_water[row] = self.longest(row)
        self.offsets[row] = length
        if not length:
            self.high_water[row] = 0

    def _check_truncation(self, row: int, length: int) -> None:
        """Raise CacheError where a row cannot be truncated to a length."""

    @property
    def layout_key(self) -> str:
        return f"{type(self).__name__} {self.keys} {self.values}"

    def slice_tokens(self, start: int, stop: int) -> Arrays:
        return {}

    def _fill(self, parts: Sequence[Arrays], slots: int) -> None:
        """Take the first slots of successive arrays."""
        capacity = self._capacity(slots)
        self._store = Store([joined(parts, str(i), slots, capacity) for i in range(len(parts[0]))])

    def only(self, row: int) -> Self:
        """A cache of one of the rows, for reading."""
        return self._copy(slice(row, row + 1), lambda array: array[row : row + 1])

    def fork(self) -> Self:
        # New handles to the same values: assigning to slices of one leaves the other alone.
        return self._copy(slice(None), mx.array)

    def _copy(self, rows: slice, array: Callable[[mx.array], mx.array]) -> Self:
        other = self.empty()
        other.offsets, other.high_water = self.offsets[rows], self.high_water[rows]
        other._split = self._split
        for its, own in zip(other._stores, self._stores, strict=True):
            its.arrays = [array(each) for each in own.arrays]
        return other

    @property
    def state(self) -> list[mx.array]:
        return [array for store in self._stores for array in store.arrays]

    def place(self, row: int, other: Self) -> None:
        """Copy another cache's only row into an existing row, or into the next one."""
        if not self._store.arrays:  # the first row decides on heads, widths and dtypes
            self.offsets, self.high_water, self._split = [], [], other._split
            for mine, its in zip(self._stores, other._stores, strict=True):
                mine.arrays = [array[:0] for array in its.arrays]
        if row == len(self.offsets):
            self.add_rows(1)
        used, need = self.slots_after(0), other.slots_after(0)
        self._store.reserve(self._store.arrays, used, self._capacity(need))
        self._store.put_row(row, other._store, need)
        self.offsets[row], self.high_water[row] = other.offsets[0], other.high_water[0]

    def add_rows(self, count: int) -> None:
        """Add empty rows; there is at least one row already."""
        self.offsets.extend([0] * count)
        self.high_water.extend([0] * count)
        for store in self._stores:
            store.add_rows(count)

    def clear(self, row: int) -> None:
        """Remove a row's tokens; the row stays, to be used again."""
        self.offsets[row] = self.high_water[row] = 0

    def take_rows(self, rows: Sequence[int]) -> None:
        """Keep some rows, in that order."""
        self.offsets = [self.offsets[row] for row in rows]
        self.high_water = [self.high_water[row] for row in rows]
        for store in self._stores:
            store.take_rows(rows)


class DenseCache(RowCache):
    """Every token since the start; the token at position p lies in slot p."""

    functional = True

    def __init__(
        self,
        keys: Format = PLAIN,
        values: Format = PLAIN,
        layout: Layout = Line(),
    ) -> None:
        super().__init__(layout, keys, values)

    def empty(self) -> Self:
        return type(self)(self.keys, self.values)

    def _append(self, tokens: Sequence[mx.array]) -> tuple[list[mx.array], Mask]:
        start = self.layout.used(self.offsets[0])
        end = start + tokens[0].shape[2]
        self._store.reserve(tokens, start, self._capacity(end))
        self._store.write(start, tokens)
        return self._store.view(end), "causal" if end - start > 1 else None

    @property
    def sliceable(self) -> bool:
        return True

    def slice_tokens(self, start: int, stop: int) -> Arrays:
        return {str(i): copied(a, start, stop) for i, a in enumerate(self._store.arrays)}

    def snapshot(self) -> State | None:
        return None

    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        if state is not None:
            raise CacheError("some of its tokens attended to only a part of those before them")
        self.offsets, self.high_water = [length], [length]
        self._fill(tokens, length)
