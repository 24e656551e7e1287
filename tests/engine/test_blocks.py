"""Blocks of rows: idle rows and unneeded blocks are dropped, and no row loses its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxrun.engine.blocks import Block, Blocks
from mlxrun.kv_cache.attention import scaled
from mlxrun.kv_cache.dense import DenseCache, Store


@dataclass(eq=False)
class Row:
    """Stands for a sequence, whose keys are all its own number."""

    number: int
    longest: int = 40
    block: Block | None = None
    row: int = 0
    caches: list[Any] = field(default_factory=list)

    def cache(self) -> DenseCache:
        cache = DenseCache()
        x = mx.full((1, 2, 3 + self.number, 4), float(self.number))
        cache.attend(x, x, x, scaled(1.0, None, None))
        return cache

    def check(self) -> None:
        """It has a row, with the tokens of its caches."""
        assert self.block is not None
        assert self.block.rows[self.row] is self
        for cache in self.block.caches:
            own = cache.only(self.row)
            assert own.offset == 3 + self.number
            for array in own.state:
                assert (np.array(array[:, :, : own.offset]) == self.number).all()


def joined(blocks: Blocks, count: int) -> list[Row]:
    rows = [Row(number) for number in range(count)]
    come(blocks, rows)
    return rows


def come(blocks: Blocks, rows: Sequence[Row]) -> None:
    for row in rows:
        row.caches = [row.cache(), row.cache()]
    blocks.join(rows)


def leave(rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.block is not None
        row.block.clear(row.row)


def test_more_blocks_than_needed_but_one_are_spread_over_the_others() -> None:
    blocks: Blocks = Blocks(most=2)
    rows = joined(blocks, 8)
    assert [len(block.rows) for block in blocks] == [2, 2, 2, 2]
    leave(rows[::2])
    blocks.compact()
    assert sorted(block.num_occupied for block in blocks) == [1, 1, 2]
    blocks.compact()
    assert sum(block.num_occupied for block in blocks) == 4
    for row in rows[1::2]:
        row.check()


def test_idle_rows_go_where_they_are_many() -> None:
    blocks: Blocks = Blocks()
    rows = joined(blocks, 8)
    (block,) = blocks
    leave(rows[:2])
    blocks.compact()
    assert len(block.rows) == 8, "two of eight are too few for a copy of the others"
    before = blocks.nbytes
    leave(rows[4:6])
    blocks.compact()
    assert block.rows == [*rows[2:4], *rows[6:]]
    assert blocks.nbytes == before // 2
    for row in (*rows[2:4], *rows[6:]):
        row.check()


def test_rows_that_come_together_are_made_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    before = Store.add_rows

    def counted(self: Store, count: int) -> None:
        made.append(count)
        before(self, count)

    monkeypatch.setattr(Store, "add_rows", counted)
    blocks: Blocks = Blocks(most=16)
    rows = joined(blocks, 8)
    (block,) = blocks
    assert made == [7, 7], "the first one's caches are taken over"
    leave(rows[:2])
    blocks.compact()
    made.clear()
    later = [Row(number) for number in range(20, 25)]
    come(blocks, later)
    assert made == [3, 3], "two rows were idle"
    assert list(blocks) == [block] and block.length == 3 + 24
    for row in (*rows[2:], *later):
        row.check()


def test_rows_that_come_together_fill_blocks() -> None:
    blocks: Blocks = Blocks(most=3)
    rows = [*joined(blocks, 2), *joined(blocks, 6)]
    assert [len(block.rows) for block in blocks] == [3, 3, 2]
    for row in rows:
        row.check()


def test_a_block_without_sequences_is_dropped() -> None:
    blocks: Blocks = Blocks()
    leave(joined(blocks, 3))
    blocks.compact()
    assert list(blocks) == [] and blocks.nbytes == 0
