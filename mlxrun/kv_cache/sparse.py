"""Caches that keep every token and attend to some of them as they decode.

Decoding a long context is bound by the bytes of keys and values that every token reads. Prefill is
bound by arithmetic instead: queries of a prompt attend densely. What a later query attends to
depends on positions (:class:`StridedCache`) or on the query and the keys (:class:`BlockCache`), not
on how tokens were divided into passes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Self

import mlx.core as mx
import numpy as np

from mlxrun.kv_cache.attention import AttentionOp, Mask, attend
from mlxrun.kv_cache.base import Arrays, State
from mlxrun.kv_cache.dense import DenseCache, Store, bucket
from mlxrun.kv_cache.formats import PLAIN, Format, StoredKV
from mlxrun.kv_cache.options import SINKS, Blocks, Sparse, Strided


class SparseCache(DenseCache):
    """Tokens lie in runs of ``run``, and a query attends to some of the runs.

    Attributes:
        pattern: which of them.
    """

    functional = False

    pattern: Sparse
    run = 1
    _dense_len = 0  # length of the prefix whose tokens attended to everything

    @property
    @abstractmethod
    def reach(self) -> int:
        """The longest context that is attended to as a whole."""

    @abstractmethod
    def _select(self, queries: mx.array) -> tuple[mx.array, tuple[int, ...]]:
        """The runs that the newest token of each row attends to, once it is stored.

        Returns:
            Numbers of runs (R or 1, H or 1, N), ascending, and how many of each row's N * run
            tokens to attend to: the first so many.
        """

    def _after_store(self, before: Sequence[int], dtype: mx.Dtype, op: AttentionOp) -> None:
        """Called when tokens of a dtype were stored, with each row's offset before."""

    @property
    def tokens_at_once(self) -> int:
        return 1

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        op: AttentionOp,
        counts: Sequence[int] | None,
    ) -> mx.array:
        tokens = keys.shape[2]
        # Tokens that attend to everything: those of a prompt, and those within reach.
        dense = min(tokens, max(0, max(self.prompt, self.reach) - max(self.offsets)))
        self._note_dense(dense, tokens)
        parts = [(0, dense)] if dense else []
        parts += [(at, at + 1) for at in range(dense, tokens)]
        outputs = []
        for first, last in parts:
            q, k, v = (x[:, :, first:last] for x in (queries, keys, values))
            before = list(self.offsets)
            stored = self._store_tokens(k, v, counts)
            self._after_store(before, keys.dtype, op)
            if first >= dense:
                stored = self._selected(op.ranking(q), *stored[:2])
            outputs.append(attend(op, q, *stored))
        return mx.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]

    def _selected(
        self, queries: mx.array, keys: StoredKV, values: StoredKV
    ) -> tuple[StoredKV, StoredKV, Mask]:
        runs, valid = self._select(queries)
        stop = max(valid)
        arrays = tuple(_gather(x, runs, self.run)[:, :, :stop] for x in self._store.arrays)
        return (
            keys._replace(arrays=arrays[: self._split]),
            values._replace(arrays=arrays[self._split :]),
            _first(valid),
        )

    def _note_dense(self, dense: int, tokens: int) -> None:
        before = self.offset
        if dense and before <= self._dense_len:
            self._dense_len = before + dense
        if dense < tokens:
            self._dense_len = min(self._dense_len, before + dense)

    @property
    def reusable_len(self) -> int:
        return min(self._dense_len, self.offset)

    @property
    def layout_key(self) -> str:
        return f"DenseCache {self.keys} {self.values}"  # a prompt's K/V are those of a dense cache

    @property
    def batch_key(self) -> Hashable:
        return self.layout_key, self.pattern

    def snapshot(self) -> State | None:
        dense = self.reusable_len
        return None if dense == self.offset else State({}, {"settled": dense})

    def restore(self, tokens: Sequence[Arrays], state: State | None, length: int) -> None:
        super().restore(tokens, None, length)
        self._dense_len = length if state is None else int(state.metadata["settled"])

    def fork(self) -> Self:
        other = super().fork()
        other.prompt, other._dense_len = self.prompt, self._dense_len
        return other


class StridedCache(SparseCache):
    """Attends to the last tokens and every so many-th before them; see :class:`Strided`."""

    pattern: Strided

    def __init__(self, pattern: Strided, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self.pattern = pattern

    def empty(self) -> Self:
        return type(self)(self.pattern, self.keys, self.values)

    @property
    def reach(self) -> int:
        return self.pattern.last + SINKS

    def _select(self, queries: mx.array) -> tuple[mx.array, tuple[int, ...]]:
        return _strides(self.pattern, tuple(self.offsets))


class BlockCache(SparseCache):
    """Attends to the blocks whose keys may have the largest products with a query.

    The largest and the smallest key of every block are stored per channel. They bound the product
    of a query with any key of the block, and the query attends to the blocks of the largest bounds,
    in each key head by the largest bound among the queries of its group (Quest: Tang et al., 2024,
    arXiv:2406.10774). The first block, the newest token's and the one before it are always attended
    to, so bounds are those of full blocks, computed once.
    """

    pattern: Blocks

    def __init__(self, pattern: Blocks, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self.pattern, self.run = pattern, pattern.size
        self._bounds = Store()  # (R, H, blocks, 2 D): largest, then smallest
        self._full = [0]  # blocks of each row that have bounds

    @property
    def _stores(self) -> list[Store]:
        return [self._store, self._bounds]

    def empty(self) -> Self:
        return type(self)(self.pattern, self.keys, self.values)

    @property
    def reach(self) -> int:
        return self.pattern.count * self.pattern.size

    def _capacity(self, slots: int) -> int:
        return -(-bucket(slots) // self.run) * self.run

    def _select(self, queries: mx.array) -> tuple[mx.array, tuple[int, ...]]:
        newest = tuple((offset - 1) // self.run for offset in self.offsets)
        forced, present = _forced(newest)
        bounds = self._bounds.view(max(newest) + 1)[0]  # (R, H, C, 2 D)
        largest = _upper_bounds(queries, bounds)  # (R, H, heads/H, C)
        heads = min(x.shape[1] for x in self._store.arrays)  # one where groups run across heads
        best = largest.reshape(largest.shape[0], heads, -1, largest.shape[3]).max(axis=2)
        best = mx.where(forced, mx.inf, mx.where(present, best, -mx.inf))
        count = self.pattern.count
        order = mx.argpartition(-best, count - 1, axis=-1)[..., :count]
        valid = tuple(self.pattern.tokens(offset) for offset in self.offsets)
        return mx.sort(order, axis=-1), valid

    def _after_store(self, before: Sequence[int], dtype: mx.Dtype, op: AttentionOp) -> None:
        blocks = zip(self._full, before, self.offsets, strict=True)
        for row, (full, start, end) in enumerate(blocks):
            known, self._full[row] = min(full, start // self.run), end // self.run
            if self._full[row] > known:
                rows = slice(None) if len(before) == 1 else slice(row, row + 1)
                tokens = slice(known * self.run, self._full[row] * self.run)
                arrays = tuple(x[rows, :, tokens] for x in self._store.arrays)
                keys = self.keys.unpack(arrays[: self._split], dtype)
                if op.latent:
                    values = self.values.unpack(arrays[self._split :], dtype)
                    keys = mx.concatenate([keys, values], axis=-1)
                self._store_bounds(rows, known, keys)
        self._reserve_bounds()

    def _store_bounds(self, rows: slice, start: int, keys: mx.array) -> None:
        """Store the bounds of full blocks of keys (R, H, n * run, D), from block ``start`` on."""
        b, h, _, width = keys.shape
        blocks = keys.reshape(b, h, -1, self.run, width)
        if not self._bounds.arrays:
            every = self._store.arrays[0].shape[0]
            self._bounds = Store([mx.zeros((every, h, 0, 2 * width), keys.dtype)])
        self._reserve_bounds()
        bounds = mx.concatenate([blocks.max(axis=3), blocks.min(axis=3)], axis=-1)
        self._bounds.arrays[0][rows, :, start : start + bounds.shape[2]] = bounds

    def _reserve_bounds(self) -> None:
        bounds = self._bounds
        bounds.reserve(bounds.arrays, bounds.slots, self._store.slots // self.run)

    def _copy(self, rows: slice, array: Callable[[mx.array], mx.array]) -> Self:
        other = super()._copy(rows, array)
        other._full = self._full[rows]
        return other

    def place(self, row: int, other: Self) -> None:
        if not self._store.arrays:
            self._full = []
        super().place(row, other)
        self._full[row] = 0  # bounds are computed again with its next token

    def add_rows(self, count: int) -> None:
        super().add_rows(count)
        self._full.extend([0] * count)

    def take_rows(self, rows: Sequence[int]) -> None:
        super().take_rows(rows)
        self._full = [self._full[row] for row in rows]


def _upper_bounds(queries: mx.array, bounds: mx.array) -> mx.array:
    """Upper bounds of products with the keys of each block.

    Args:
        queries: (R, heads, 1, D).
        bounds: the largest and the smallest key of each channel, (R, H, C, 2 D).

    Returns:
        (R, H, heads/H, C): a channel counts by its largest key where the query is positive there,
        else by its smallest.
    """
    grouped = queries.reshape(*bounds.shape[:2], -1, queries.shape[3])
    parts = mx.concatenate([mx.maximum(grouped, 0), mx.minimum(grouped, 0)], axis=-1)
    return parts @ bounds.swapaxes(-1, -2)


def _gather(x: mx.array, runs: mx.array, run: int) -> mx.array:
    """Runs of ``run`` tokens (R or 1, H or 1, N) of an array (R, H, S, W): (R, H, N * run, W)."""
    b, h, slots, width = x.shape
    each = slots // run
    rows = runs + (mx.arange(b * h) * each).reshape(b, h, 1)
    return x.reshape(-1, run * width)[rows].reshape(b, h, -1, width)


# Made once for all layers, by numpy: an MLX array that is not evaluated yet belongs to one thread.


@lru_cache(maxsize=16)
def _strides(pattern: Strided, offsets: tuple[int, ...]) -> tuple[mx.array, tuple[int, ...]]:
    """Positions that the newest token of each row attends to, (R, 1, N), and how many they are."""
    each = []
    for offset in offsets:
        at = np.arange(offset)
        near = at >= offset - pattern.last
        each.append(at[near | (at < SINKS) | (at % pattern.stride == 0)])
    longest = max(map(len, each))
    rows = [np.pad(one, (0, longest - len(one))) for one in each]
    return mx.array(np.stack(rows)[:, None]), tuple(map(len, each))


@lru_cache(maxsize=16)
def _forced(newest: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Of blocks up to any row's newest: always attended to, and existing; booleans (R, 1, C)."""
    blocks, last = np.arange(max(newest) + 1), np.array(newest).reshape(-1, 1, 1)
    present = blocks <= last
    return mx.array(present & ((blocks == 0) | (blocks >= last - 1))), mx.array(present)


@lru_cache(maxsize=16)
def _first(valid: tuple[int, ...]) -> mx.array | None:
    """The mask (R, 1, 1, S) of each row's first so many; None if they are all of them."""
    if min(valid) == max(valid):
        return None
    return mx.array(np.arange(max(valid)) < np.array(valid).reshape(-1, 1, 1, 1))
