"""Caches that keep every token and show a drawn one some of them.

Decoding a long context is bound by the bytes of keys and values that every token reads. Prompts are
bound by arithmetic instead: their queries see everything. What a later query sees depends on
positions (:class:`StridedCache`) or on the query and the keys (:class:`BlockCache`), not on how
tokens were fed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Self

import mlx.core as mx
import numpy as np

from mlxrun.cache.base import Mask, Named, Product, State
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import PLAIN, Format, Seen
from mlxrun.cache.rows import meet
from mlxrun.cache.sparsity import SINKS, Blocks, Sparse, Strided
from mlxrun.cache.store import Store, bucket


class SparseCache(DenseCache):
    """What the patterns share. Tokens lie in runs of ``run``, and a query sees some of the runs."""

    functional = False

    wanted: Sparse
    run = 1
    _settled = 0

    @property
    @abstractmethod
    def reach(self) -> int:
        """The longest context of which everything is seen."""

    @abstractmethod
    def _chosen(self, queries: mx.array) -> tuple[mx.array, tuple[int, ...]]:
        """The runs that the newest token of each row sees, once it is stored.

        Returns:
            Numbers of runs (B or 1, H or 1, N), ascending, and how many of each row's N * run
            tokens it sees: the first so many.
        """

    def _stored(self, before: Sequence[int], dtype: mx.Dtype, product: Product) -> None:
        """Told when tokens of a dtype were stored, with each row's offset before."""

    @property
    def tokens_at_once(self) -> int:
        return 1

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        tokens = keys.shape[2]
        # Tokens that see everything: those of a prompt, and those before the reach.
        whole = min(tokens, max(0, max(self.prompt, self.reach) - max(self.offsets)))
        self._settle(whole, tokens)
        parts = [(0, whole)] if whole else []
        parts += [(at, at + 1) for at in range(whole, tokens)]
        attended = []
        for first, last in parts:
            q, k, v = (x[:, :, first:last] for x in (queries, keys, values))
            before = list(self.offsets)
            seen = self._remember(k, v)
            self._stored(before, keys.dtype, product)
            if first >= whole:
                seen = self._shown(product.ranking(q), *seen[:2])
            attended.append(meet(product, q, *seen))
        return mx.concatenate(attended, axis=2) if len(attended) > 1 else attended[0]

    def _shown(self, queries: mx.array, keys: Seen, values: Seen) -> tuple[Seen, Seen, Mask]:
        """What is seen of what is stored."""
        runs, valid = self._chosen(queries)
        stop = max(valid)
        shown = tuple(_taken(x, runs, self.run)[:, :, :stop] for x in self._store.arrays)
        return (
            keys._replace(arrays=shown[: self._split]),
            values._replace(arrays=shown[self._split :]),
            _seen_first(valid),
        )

    def _settle(self, whole: int, tokens: int) -> None:
        """Note up to where every token saw everything, before more come."""
        before = self.offset
        if whole and before <= self._settled:
            self._settled = before + whole
        if whole < tokens:
            self._settled = min(self._settled, before + whole)

    @property
    def settled(self) -> int:
        return min(self._settled, self.offset)

    @property
    def kind(self) -> str:
        return f"DenseCache {self.keys} {self.values}"  # prompts leave the same in both

    @property
    def row_kind(self) -> Hashable:
        return self.kind, self.wanted

    def snapshot(self) -> State | None:
        return None if self.settled == self.offset else State({}, {"settled": self.settled})

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        super().restore(tokens, None, length)
        self._settled = length if state is None else int(state.about["settled"])

    def fork(self) -> Self:
        other = super().fork()
        other.prompt, other._settled = self.prompt, self._settled
        return other


class StridedCache(SparseCache):
    """Shows the last tokens and every so many-th before them; see :class:`Strided`."""

    wanted: Strided

    def __init__(self, wanted: Strided, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self.wanted = wanted

    @property
    def reach(self) -> int:
        return self.wanted.last + SINKS

    def _chosen(self, queries: mx.array) -> tuple[mx.array, tuple[int, ...]]:
        return _strides(self.wanted, tuple(self.offsets))

    def empty(self) -> Self:
        return type(self)(self.wanted, self.keys, self.values)


class BlockCache(SparseCache):
    """Shows the blocks whose keys a query may like best.

    For every block of tokens the largest and the smallest key in each channel are kept. With them a
    query's product with any key of the block is bounded from above, and it attends to the blocks of
    the largest bounds, in each head of keys by the largest bound among the queries of its group
    (Quest: Tang et al., 2024, arXiv:2406.10774). The first block, the one of the newest token and
    the one before it are always seen, so bounds are those of whole blocks, computed once.
    """

    wanted: Blocks

    def __init__(self, wanted: Blocks, keys: Format = PLAIN, values: Format = PLAIN) -> None:
        super().__init__(keys, values)
        self.wanted, self.run = wanted, wanted.size
        self._bounds = Store()  # (B, H, blocks, 2 D): largest, then smallest
        self._whole = [0]  # blocks of each row that have bounds

    @property
    def reach(self) -> int:
        return self.wanted.count * self.wanted.size

    def _capacity(self, slots: int) -> int:
        return -(-bucket(slots) // self.run) * self.run

    def _chosen(self, queries: mx.array) -> tuple[mx.array, tuple[int, ...]]:
        newest = tuple((offset - 1) // self.run for offset in self.offsets)
        forced, present = _standing(newest)
        bounds = self._bounds.view(max(newest) + 1)[0]  # (B, H, C, 2 D)
        likes = _bounded(queries, bounds)  # (B, H, group, C)
        shared = min(x.shape[1] for x in self._store.arrays)  # one where groups run across heads
        best = likes.reshape(likes.shape[0], shared, -1, likes.shape[3]).max(axis=2)
        best = mx.where(forced, mx.inf, mx.where(present, best, -mx.inf))
        count = self.wanted.count
        order = mx.argpartition(-best, count - 1, axis=-1)[..., :count]
        valid = tuple(self.wanted.tokens(offset) for offset in self.offsets)
        return mx.sort(order, axis=-1), valid

    def _stored(self, before: Sequence[int], dtype: mx.Dtype, product: Product) -> None:
        blocks = zip(self._whole, before, self.offsets, strict=True)
        for row, (whole, start, end) in enumerate(blocks):
            known, self._whole[row] = min(whole, start // self.run), end // self.run
            if self._whole[row] > known:
                rows = slice(None) if len(before) == 1 else slice(row, row + 1)
                tokens = slice(known * self.run, self._whole[row] * self.run)
                arrays = tuple(x[rows, :, tokens] for x in self._store.arrays)
                keys = self.keys.unpack(arrays[: self._split], dtype)
                if product.latent:
                    values = self.values.unpack(arrays[self._split :], dtype)
                    keys = mx.concatenate([keys, values], axis=-1)
                self._bound(rows, known, keys)
        self._make_room()

    def _bound(self, rows: slice, start: int, keys: mx.array) -> None:
        """Note the bounds of whole blocks of keys (B, H, n * run, D), from one on."""
        b, h, _, width = keys.shape
        blocks = keys.reshape(b, h, -1, self.run, width)
        if not self._bounds.arrays:
            every = self._store.arrays[0].shape[0]
            self._bounds = Store([mx.zeros((every, h, 0, 2 * width), keys.dtype)])
        self._make_room()
        bounds = mx.concatenate([blocks.max(axis=3), blocks.min(axis=3)], axis=-1)
        self._bounds.arrays[0][rows, :, start : start + bounds.shape[2]] = bounds

    def _make_room(self) -> None:
        """Let there be bounds of as many blocks as tokens have room in."""
        held = self._bounds
        held.reserve(held.arrays, held.slots, self._store.slots // self.run)

    def fork(self) -> Self:
        other = super().fork()
        other._bounds, other._whole = self._bounds.fork(), list(self._whole)
        return other

    def empty(self) -> Self:
        return type(self)(self.wanted, self.keys, self.values)

    @property
    def state(self) -> list[mx.array]:
        return [*super().state, *self._bounds.arrays]

    def place(self, row: int, other: Self) -> None:
        if not self._store.arrays:
            self._whole = []
        super().place(row, other)
        self._whole[row] = 0  # found again with its next token

    def add_rows(self, count: int) -> None:
        super().add_rows(count)
        self._bounds.add_rows(count)
        self._whole.extend([0] * count)

    def take_rows(self, rows: Sequence[int]) -> None:
        super().take_rows(rows)
        self._bounds.take_rows(rows)
        self._whole = [self._whole[row] for row in rows]


def _bounded(queries: mx.array, bounds: mx.array) -> mx.array:
    """What products with the keys of each block cannot exceed.

    Args:
        queries: (B, heads, 1, D).
        bounds: the largest and the smallest key of each channel, (B, H, C, 2 D).

    Returns:
        (B, H, heads/H, C): a channel counts by its largest key where the query is positive there,
        else by its smallest.
    """
    grouped = queries.reshape(*bounds.shape[:2], -1, queries.shape[3])
    parts = mx.concatenate([mx.maximum(grouped, 0), mx.minimum(grouped, 0)], axis=-1)
    return parts @ bounds.swapaxes(-1, -2)


def _taken(x: mx.array, runs: mx.array, run: int) -> mx.array:
    """Runs of ``run`` tokens (B or 1, H or 1, N) of an array (B, H, S, W): (B, H, N * run, W)."""
    b, h, slots, width = x.shape
    each = slots // run
    rows = runs + (mx.arange(b * h) * each).reshape(b, h, 1)
    return x.reshape(-1, run * width)[rows].reshape(b, h, -1, width)


# Layers ask for the same; made whole by numpy, as what MLX has yet to evaluate is one thread's own.


@lru_cache(maxsize=16)
def _strides(wanted: Strided, offsets: tuple[int, ...]) -> tuple[mx.array, tuple[int, ...]]:
    """The positions that the newest token of each row sees, (B, 1, N), and how many."""
    each = []
    for offset in offsets:
        at = np.arange(offset)
        near = at >= offset - wanted.last
        each.append(at[near | (at < SINKS) | (at % wanted.stride == 0)])
    longest = max(map(len, each))
    rows = [np.pad(one, (0, longest - len(one))) for one in each]
    return mx.array(np.stack(rows)[:, None]), tuple(map(len, each))


@lru_cache(maxsize=16)
def _standing(newest: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Of blocks up to the newest one of any row: always seen, and there; booleans (B, 1, C)."""
    blocks, last = np.arange(max(newest) + 1), np.array(newest).reshape(-1, 1, 1)
    present = blocks <= last
    return mx.array(present & ((blocks == 0) | (blocks >= last - 1))), mx.array(present)


@lru_cache(maxsize=16)
def _seen_first(valid: tuple[int, ...]) -> mx.array | None:
    """The mask (B, 1, 1, S) of rows that see the first so many; None where all see all."""
    if min(valid) == max(valid):
        return None
    return mx.array(np.arange(max(valid)) < np.array(valid).reshape(-1, 1, 1, 1))
