"""Rows of decoding sequences, in blocks of about the same length.

A block's rows lie in one array per layer, as long as the longest of them: every row attends over
that length. So sequences of like lengths share a block, and a long one costs the others nothing.
Those that share one will need the same capacity at their longest: a sequence's memory is its own
affair, and can be planned before it begins.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from mlxrun.kv_cache.batch import DecodeRows
from mlxrun.kv_cache.dense import RowCache, bucket
from mlxrun.kv_cache.prefix_cache import shared_prefix_of

# DecodeRows of a block: fewer attend over less that is not theirs, more need fewer operations.
ROWS = 32
# Of a block's rows, how many may be idle before it is packed, which copies what is cached.
IDLE_SHARE = 4

Kind = tuple[Hashable, ...]


class Placed(Protocol):
    """What has a row: a sequence knows which, and how many tokens it may come to."""

    block: Block | None  # type: ignore[type-arg]
    row: int

    @property
    def longest(self) -> int: ...


S = TypeVar("S", bound=Placed)


class Block(Generic[S]):
    """Rows of one array per layer.

    Attributes:
        kind: what its caches keep and show; rows of other kinds have blocks of their own.
        capacity: slots that each row will need at its longest.
        rows: who is in each; None for an idle row.
        caches: one per layer.
        values: the same as a step takes them that is a pure function, if there can be one.
        coming: sequences that will have rows here, with what they remember.
    """

    def __init__(self, capacity: int, like: Sequence[RowCache]) -> None:
        self.kind = _kind(like)
        self.capacity = capacity
        self.rows: list[S | None] = []
        self.caches = [cache.empty() for cache in like]
        self.values: DecodeRows | None = None
        self.coming: list[tuple[S, Sequence[RowCache]]] = []

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        coming = (caches[0].offsets[0] for _, caches in self.coming)
        return max([*self.caches[0].offsets, *coming])

    @property
    def live(self) -> int:
        """Rows that are not idle, or will not be."""
        return len(self.rows) - self.rows.count(None) + len(self.coming)

    def receive(self) -> None:
        """Give rows to those who come: new ones in one go, as each time copies what is there."""
        coming, self.coming = self.coming, []
        if coming and not self.rows:  # the first one decides on widths and dtypes
            self._place(*coming.pop(0))
        missing = len(coming) - self.rows.count(None)
        if missing > 0:
            self.rows.extend([None] * missing)
            for cache in self.caches:
                cache.add_rows(missing)
        for sequence, caches in coming:
            self._place(sequence, caches)

    def _place(self, sequence: S, caches: Sequence[RowCache]) -> None:
        """Copy what a sequence remembers into an idle row, or a new one."""
        row = self.rows.index(None) if None in self.rows else len(self.rows)
        for cache, own in zip(self.caches, caches, strict=True):
            cache.place(row, own)
        if self.values is None and DecodeRows.possible(self.caches):
            self.values = DecodeRows(self.caches)
        self.rows[row : row + 1] = [sequence]
        sequence.block, sequence.row = self, row

    def clear(self, row: int) -> None:
        """Make a row idle."""
        self.rows[row] = None
        for cache in self.caches:
            cache.clear(row)

    def rest(self) -> None:
        """Let idle rows begin anew: what they compute lands where the next sequence overwrites."""
        for row, sequence in enumerate(self.rows):
            if sequence is None:
                self.clear(row)

    def pack(self) -> None:
        """Drop idle rows where they are too many."""
        kept = [row for row, sequence in enumerate(self.rows) if sequence is not None]
        if not kept or (len(self.rows) - len(kept)) * IDLE_SHARE <= len(self.rows):
            return
        for cache in self.caches:
            cache.take_rows(kept)
        self.rows = [self.rows[row] for row in kept]
        for row, sequence in enumerate(self.rows):
            assert sequence is not None
            sequence.row = row


class Blocks(Generic[S]):
    """All blocks of a batch.

    Args:
        most: rows of a block.
    """

    def __init__(self, most: int = ROWS) -> None:
        self._most = most
        self._blocks: list[Block[S]] = []

    def __iter__(self) -> Iterator[Block[S]]:
        return iter(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, beginnings that they hold together counted once."""
        caches = [cache for block in self._blocks for cache in block.caches]
        beginnings = {shared_prefix_of(block.caches) for block in self._blocks}
        shared = sum(beginning.nbytes for beginning in beginnings if beginning)
        return shared + sum(cache.nbytes for cache in caches)

    def join(self, joining: Iterable[tuple[S, Sequence[RowCache]]]) -> None:
        """Give sequences rows, each in the block whose length is nearest to its own.

        Args:
            joining: sequences and what they remember.
        """
        for sequence, caches in joining:
            self._block(sequence, caches).coming.append((sequence, caches))
        for block in self._blocks:
            block.receive()

    def _block(self, sequence: S, caches: Sequence[RowCache]) -> Block[S]:
        beginning = shared_prefix_of(caches)
        capacity = bucket(sequence.longest - (beginning.length if beginning else 0))
        length = caches[0].offsets[0]
        alike = [b for b in self._alike(capacity, _kind(caches)) if b.live < self._most]
        block = min(alike, key=lambda b: abs(b.length - length), default=None)
        if block is None:
            block = Block(capacity, caches)
            self._blocks.append(block)
        return block

    def settle(self) -> None:
        """Before a pass: no empty blocks, few idle rows, and no more blocks than needed but one."""
        self._blocks = [block for block in self._blocks if block.live]
        for capacity, kind in {(block.capacity, block.kind) for block in self._blocks}:
            alike = self._alike(capacity, kind)
            needed = -(-sum(block.live for block in alike) // self._most)
            if len(alike) > needed + 1:
                self._dissolve(min(alike, key=lambda block: block.live))
        for block in self._blocks:
            block.pack()
            block.rest()

    def _alike(self, capacity: int, kind: Kind) -> list[Block[S]]:
        """Blocks that sequences of a capacity and kind may share."""
        return [b for b in self._blocks if b.capacity == capacity and b.kind == kind]

    def _dissolve(self, block: Block[S]) -> None:
        """Spread a block's rows over the others."""
        self._blocks.remove(block)
        self.join(
            (sequence, [cache.only(sequence.row) for cache in block.caches])
            for sequence in block.rows
            if sequence is not None
        )


def _kind(caches: Sequence[RowCache]) -> Kind:
    return tuple(cache.batch_key for cache in caches)
