"""The arrays of a cache: rows of tokens in slots, which grow in buckets.

Knows where slots are; knows neither which token lives in which, nor what the arrays mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlxrun.cache.slots import Layout

# Smallest capacity; every further bucket doubles, so that growing costs O(1) copies per token.
BUCKET = 256


def bucket(tokens: int, limit: int | None = None) -> int:
    """The capacity that holds ``tokens``: 256, 512, 1024 ..., at most ``limit``."""
    capacity = BUCKET
    while capacity < tokens:
        capacity *= 2
    return capacity if limit is None else min(capacity, limit)


class Store:
    """Arrays (rows, heads, slots, width), alike but for their widths and dtypes.

    Attributes:
        arrays: what is stored; none before the first token.
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
        for held, new in zip(self.arrays, tokens, strict=True):
            held[:, :, start:end] = new

    def write_each(self, slots: mx.array, tokens: Sequence[mx.array]) -> None:
        """Put T tokens of each row into slots of its own; ``slots``: (rows, 1, T, 1)."""
        self.arrays = [written(a, slots, x) for a, x in zip(self.arrays, tokens, strict=True)]

    def view(self, stop: int) -> list[mx.array]:
        """The first ``stop`` slots of every row."""
        return [array[:, :, :stop] for array in self.arrays]

    def fork(self) -> Store:
        """Other names for the same values: assigning to slices of one leaves the other alone."""
        return Store([mx.array(array) for array in self.arrays])

    def take_rows(self, rows: Sequence[int]) -> None:
        """Keep some rows, in that order."""
        index = mx.array(list(rows))
        self.arrays = [array[index] for array in self.arrays]

    def add_rows(self, count: int) -> None:
        """Empty rows behind those that are there."""
        self.arrays = [
            mx.concatenate([array, _zeros(array, count, array.shape[2])]) for array in self.arrays
        ]

    def put_row(self, row: int, other: Store, used: int) -> None:
        """Copy the first ``used`` slots of another's only row into a row, which has the room."""
        for mine, its in zip(self.arrays, other.arrays, strict=True):
            mine[row : row + 1, :, :used] = its[:, :, :used]


def written(array: mx.array, slots: mx.array, tokens: mx.array) -> mx.array:
    """An array with tokens (rows, H, T, D) in each row's slots, (rows, 1, T, 1)."""
    return mx.put_along_axis(array, mx.broadcast_to(slots, tokens.shape), tokens, axis=2)


def copied(array: mx.array, start: int, stop: int) -> mx.array:
    """Some slots in memory of their own: a slice would hold on to all of the array's."""
    return array[:, :, mx.arange(start, stop)]


def joined(parts: Sequence[dict[str, mx.array]], name: str, used: int, slots: int) -> mx.array:
    """The first ``used`` slots of arrays that lie one behind the other, and empty ones.

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


@lru_cache(maxsize=16)
def positions(offsets: tuple[int, ...]) -> mx.array:
    """One offset for each row, (rows,); layers ask for the same."""
    return mx.array(offsets)


@lru_cache(maxsize=16)
def places(
    layout: Layout, offsets: tuple[int, ...], tokens: int, used: int
) -> tuple[mx.array, mx.array | None]:
    """The slots of T tokens of each row, (rows, 1, T, 1), and the mask over the first ``used``.

    The mask, booleans (rows, 1, T, used), is None where all queries see all of those slots.
    """
    # Made whole by numpy: what MLX has not evaluated yet belongs to one thread.
    queries = np.array(offsets)[:, None, None, None] + np.arange(tokens)[:, None]
    shown = layout.visible(np.arange(used), queries[:, :, -1:], queries)
    return mx.array(layout.slot(queries)), None if shown.all() else mx.array(shown)
