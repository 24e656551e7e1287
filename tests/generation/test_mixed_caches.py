"""Sequences whose caches differ go through a model together, each with the tokens it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.cache import sparsity
from mlxrun.cache.choice import Wanted
from mlxrun.cache.products import Scaled
from mlxrun.cache.rows import RowCache
from mlxrun.cache.types import Shape
from mlxrun.errors import ParameterError
from mlxrun.generation.blocks import Block, Blocks

#: Types of keys and values, and a pattern of attention.
CHOICES: tuple[dict[str, str], ...] = (
    {},
    {"cache_type_k": "q8", "cache_type_v": "q4"},
    {"attention": "window:24+4"},
    {"attention": "strided:16/4"},
    {"attention": "blocks:4x8"},
    {"attention": "blocks:3x8", "cache_type_k": "q8", "cache_type_v": "q8"},
    {"cache_type_k": "q4c", "cache_type_v": "q8"},
    {"cache_type_k": "f16", "cache_type_v": "f32"},
)


@dataclass
class Row:
    longest: int
    block: Block[Row] | None = None
    row: int = 0


def made(choice: dict[str, str]) -> RowCache:
    window, keep, sparse = sparsity.options(choice.get("attention"))
    wanted = Wanted(window, keep, choice.get("cache_type_k"), choice.get("cache_type_v"), sparse)
    cache = wanted.cache(Shape(2, 64, 64), None)
    assert isinstance(cache, RowCache)
    x = mx.zeros((1, 2, 5, 64))
    cache.attend(x, x, x, Scaled(1.0))
    return cache


def test_rows_of_a_block_are_of_one_kind() -> None:
    blocks: Blocks[Row] = Blocks()
    rows = [[Row(40) for _ in range(3)] for _ in CHOICES]
    for copy in range(3):
        for own, choice in zip(rows, CHOICES, strict=True):
            blocks.join(own[copy], [made(choice)])
    assert len(list(blocks)) == len(CHOICES)
    for own in rows:
        assert len({id(row.block) for row in own}) == 1
    for own in rows:  # nothing is spread over blocks of another kind
        for row in own[1:]:
            assert row.block is not None
            row.block.clear(row.row)
    blocks.settle()
    assert [block.live for block in blocks] == [1] * len(CHOICES)
