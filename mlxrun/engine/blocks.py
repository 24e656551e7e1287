"""Rows of KV caches: a block has one array per layer, and each of its sequences a row of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Protocol

from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.batch import DecodeRows
from mlxrun.kv_cache.dense import RowCache, bucket
from mlxrun.kv_cache.shared_prefix import shared_prefix_of
from mlxrun.sampling.sampler import SamplerBatch

# Rows of a block: fewer attend over less that is not theirs, more need fewer operations.
BLOCK_ROWS = 32
# The share of a block's rows that may be idle before it is packed, which copies the others' caches.
MAX_IDLE = 1 / 4

Kind = tuple[Hashable, ...]


class HasRow(Protocol):
    """A sequence, as far as its row is concerned."""

    block: Block | None
    row: int

    @property
    def longest(self) -> int: ...

    @property
    def caches(self) -> list[KVCache]: ...

    @caches.setter
    def caches(self, caches: list[KVCache]) -> None: ...


class Block:
    """Rows of one array per layer, as long as the longest of them.

    Its first sequence brings the caches, which later ones are copied into.

    Attributes:
        kind: of the caches; rows of another kind have blocks of their own.
        capacity: slots that each row will need at its longest.
        rows: the sequence of each row; None for an idle one.
        caches: one per layer.
        decode_rows: the same for a compiled step; None where there cannot be one.
        length: tokens of the longest row.
        steps_unchanged: steps since its rows have changed.
        samplers: of its rows, where blocks have forward passes of their own.
    """

    def __init__(self, capacity: int, kind: Kind) -> None:
        self.capacity, self.kind = capacity, kind
        self.rows: list[Any] = []
        self.caches: list[Any] = []
        self.decode_rows: DecodeRows | None = None
        self.length = self.steps_unchanged = 0
        self.samplers = SamplerBatch()
        self._joining: list[Any] = []

    @property
    def num_occupied(self) -> int:
        """Rows that have a sequence, or will."""
        return len(self.rows) - self.rows.count(None) + len(self._joining)

    def join(self, sequence: HasRow) -> None:
        """Give a sequence a row when :meth:`receive` is called."""
        self._joining.append(sequence)
        self.length = max(self.length, sequence.caches[0].offset)

    def receive(self) -> None:
        """Place the sequences that join: new rows in one go, as each time copies the others."""
        joining, self._joining = self._joining, []
        if joining and not any(self.rows):
            self._adopt(joining.pop(0))
        missing = len(joining) - self.rows.count(None)
        if missing > 0:
            self.rows.extend([None] * missing)
            for cache in self.caches:
                cache.prompt = 0  # was that of its first sequence, which has been prefilled
                cache.add_rows(missing)
        for sequence in joining:
            row = self.rows.index(None)
            for cache, own in zip(self.caches, sequence.caches, strict=True):
                cache.place(row, own)
            self._give(sequence, row)
        if joining:
            self._measure()

    def _adopt(self, sequence: Any) -> None:
        self.caches, self.rows = sequence.caches, [None]
        if DecodeRows.possible(self.caches):
            self.decode_rows = DecodeRows(self.caches)
        self._give(sequence, 0)
        self._measure()

    def _give(self, sequence: Any, row: int) -> None:
        self.rows[row] = sequence
        sequence.block, sequence.row, sequence.caches = self, row, []
        self.steps_unchanged = 0

    def clear(self, row: int) -> None:
        """Make a row idle."""
        self.rows[row], self.steps_unchanged = None, 0
        if len(self.rows) > 1:
            for cache in self.caches:
                cache.clear(row)
        self._measure()

    def advance(self) -> None:
        """Note a step of all rows; idle ones compute tokens that the next sequence overwrites."""
        self.length += 1
        self.steps_unchanged += 1
        if None in self.rows:
            for row in [i for i, sequence in enumerate(self.rows) if sequence is None]:
                for cache in self.caches:
                    cache.clear(row)

    def caches_of(self, row: int) -> list[Any]:
        """The caches of one row, which are handed back if it is the only one."""
        if len(self.rows) == 1:
            return list(self.caches)
        return [cache.only(row) for cache in self.caches]

    def pack(self) -> None:
        """Drop idle rows where they are many."""
        kept = [row for row, sequence in enumerate(self.rows) if sequence is not None]
        if not kept or len(self.rows) - len(kept) <= MAX_IDLE * len(self.rows):
            return
        for cache in self.caches:
            cache.take_rows(kept)
        self.rows = [self.rows[row] for row in kept]
        for row, sequence in enumerate(self.rows):
            sequence.row = row
        self._measure()

    def _measure(self) -> None:
        self.steps_unchanged = 0
        self.length = max(_offsets(self.caches[0]), default=0)


class Blocks:
    """All blocks of a runner.

    Args:
        most: rows of a block.
    """

    def __init__(self, most: int = BLOCK_ROWS) -> None:
        self._max_rows = most
        self._blocks: list[Block] = []

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, shared prefixes counted once."""
        caches = [cache for block in self._blocks for cache in block.caches]
        prefixes = {shared_prefix_of(block.caches) for block in self._blocks}
        common = sum(prefix.nbytes for prefix in prefixes if prefix)
        return common + sum(int(cache.nbytes) for cache in caches)

    def join(self, sequences: Iterable[HasRow]) -> None:
        """Give sequences rows, each in the block whose length is nearest to its own."""
        for sequence in sequences:
            self._block_for(sequence).join(sequence)
        for block in self._blocks:
            block.receive()

    def _block_for(self, sequence: HasRow) -> Block:
        # Rows of a block will need the same capacity at their longest, so that a sequence's
        # memory is its own affair.
        prefix = shared_prefix_of(sequence.caches)
        capacity = bucket(sequence.longest - (prefix.length if prefix else 0))
        kind = tuple(cache.batch_key for cache in sequence.caches)
        length = sequence.caches[0].offset
        open_blocks = [b for b in self._same(capacity, kind) if b.num_occupied < self._max_rows]
        block = min(open_blocks, key=lambda b: abs(b.length - length), default=None)
        if block is None:
            block = Block(capacity, kind)
            self._blocks.append(block)
        return block

    def compact(self) -> None:
        """Before a pass: no empty blocks, few idle rows, and no more blocks than needed but one."""
        if all(block.steps_unchanged for block in self._blocks):
            return
        self._blocks = [block for block in self._blocks if block.num_occupied]
        if len(self._blocks) > 1 and self._max_rows > 1:
            for capacity, kind in {(block.capacity, block.kind) for block in self._blocks}:
                same = self._same(capacity, kind)
                needed = -(-sum(block.num_occupied for block in same) // self._max_rows)
                if len(same) > needed + 1:
                    self._dissolve(min(same, key=lambda block: block.num_occupied))
        for block in self._blocks:
            block.pack()

    def _same(self, capacity: int, kind: Kind) -> list[Block]:
        return [b for b in self._blocks if b.capacity == capacity and b.kind == kind]

    def _dissolve(self, block: Block) -> None:
        """Spread a block's rows over the others."""
        self._blocks.remove(block)
        moving = [sequence for sequence in block.rows if sequence is not None]
        for sequence in moving:
            sequence.caches = block.caches_of(sequence.row)
        self.join(moving)


def _offsets(cache: KVCache) -> list[int]:
    return cache.offsets if isinstance(cache, RowCache) else [cache.offset]
