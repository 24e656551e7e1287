"""A pass with a different number of tokens for each row, and a rollback of each row by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.cache.base import Product
from mlxrun.cache.branch import Beginning, BranchCache
from mlxrun.cache.by_channel import ByChannel
from mlxrun.cache.channels import ChannelCache
from mlxrun.cache.dense import DenseCache
from mlxrun.cache.formats import AcrossHeads, Plain, Quantised
from mlxrun.cache.functional import Rows, Slots
from mlxrun.cache.products import falling, latent, product
from mlxrun.cache.ragged import Part, Ragged
from mlxrun.cache.rotating import SLACK, RotatingCache
from mlxrun.cache.rows import RowCache
from mlxrun.cache.sparse import BlockCache, StridedCache
from mlxrun.cache.sparsity import Blocks, Strided

HEADS, KV_HEADS, WIDTH, FIRST = 4, 2, 32, 5
PLAIN = product(0.2, None, None)
Q8, Q4 = Quantised(8, 32), Quantised(4, 32)

FIRST_TOKENS = [
    mx.array(np.random.default_rng(9).standard_normal((1, KV_HEADS, FIRST, WIDTH)).astype("f4"))
    for _ in range(2)
]


def branch() -> BranchCache:
    """A cache that holds its first tokens together with others."""
    whole = DenseCache()
    whole.update(*FIRST_TOKENS)
    return BranchCache(Beginning(FIRST, [whole.cut(0, FIRST)]), 0)


KINDS: dict[str, tuple[Callable[[], RowCache], Product]] = {
    "dense": (DenseCache, PLAIN),
    "bounded": (DenseCache, product(0.2, 2.0, None)),
    "sinks": (DenseCache, product(0.2, None, mx.array([0.5, -1.0, 3.0, 0.0]))),
    "alibi": (DenseCache, falling(0.2, HEADS, 8.0)),
    "f16": (lambda: DenseCache(Plain(mx.float16), Plain(mx.float16)), PLAIN),
    "q8": (lambda: DenseCache(Q8, Q8), PLAIN),
    "q4": (lambda: DenseCache(Q4, Q8), PLAIN),
    "mxfp8": (lambda: DenseCache(Quantised(8, 32, "mxfp8"), Q8), PLAIN),
    "across heads": (lambda: DenseCache(AcrossHeads(Quantised(8, 64), KV_HEADS)), PLAIN),
    "window": (lambda: RotatingCache(6), PLAIN),
    "window that keeps": (lambda: RotatingCache(6, keep=3), PLAIN),
    "window q8": (lambda: RotatingCache(20, keep=4, keys=Q8, values=Q4), PLAIN),
    "shared prefix": (branch, PLAIN),
    "by channel": (lambda: ChannelCache(ByChannel(4, 32), Q8), PLAIN),
    "strided": (lambda: StridedCache(Strided(8, 4)), PLAIN),
    "blocks": (lambda: BlockCache(Blocks(3, 4)), PLAIN),
}
FUNCTIONAL = [name for name, (make, _) in KINDS.items() if make().functional]


def tokens(rng: np.random.Generator, n: int) -> list[mx.array]:
    """Queries, keys and values of n tokens, (n, heads, 1, width)."""
    return [
        mx.array(rng.standard_normal((n, heads, 1, WIDTH)).astype(np.float32))
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def whole(parts: Sequence[list[mx.array]]) -> list[mx.array]:
    """The tokens of one row, (1, heads, n, width)."""
    return [mx.concatenate(list(each)).transpose(2, 1, 0, 3) for each in zip(*parts, strict=True)]


def fed(make: Callable[[], RowCache], parts: Sequence[list[mx.array]], dot: Product) -> RowCache:
    """A cache that one sequence's tokens went through, at once."""
    cache = make()
    if sum(part[0].shape[0] for part in parts):
        cache.attend(*whole(parts), dot)
    return cache


def joined(make: Callable[[], RowCache], rows: Sequence[RowCache]) -> RowCache:
    cache = make().empty()
    for row, own in enumerate(rows):
        cache.place(row, own)
    return cache


def head(part: list[mx.array], n: int) -> list[mx.array]:
    return [x[:n] for x in part]


@pytest.mark.parametrize("kind", KINDS)
@given(
    lengths=st.tuples(*[st.integers(1, 70)] * 3),
    counts=st.permutations([1, 3, 7]),
    back=st.tuples(*[st.integers(0, 7)] * 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_rows_equal_caches_built_afresh(
    kind: str,
    lengths: tuple[int, ...],
    counts: list[int],
    back: tuple[int, ...],
    seed: int,
) -> None:
    make, dot = KINDS[kind]
    rng = np.random.default_rng(seed)
    before = [tokens(rng, n) for n in lengths]
    new = [tokens(rng, n) for n in counts]
    cache = joined(make, [fed(make, [part], dot) for part in before])
    shared = cache.offsets[0] - lengths[0]

    part = Part(cache, 3, max(counts), tuple(counts))
    flat = [mx.concatenate(list(each)) for each in zip(*new, strict=True)]
    got = Ragged([part], mx.zeros(0)).attend(*flat, dot)  # (11, heads, 1, width)
    expected = [
        fed(make, [one], dot).attend(*whole([two]), dot).transpose(2, 1, 0, 3)
        for one, two in zip(before, new, strict=True)
    ]
    np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(expected)), atol=2e-5)
    assert cache.offsets == [shared + a + b for a, b in zip(lengths, counts, strict=True)]

    left = [min(a, b) for a, b in zip(back, counts, strict=True)]  # rolled back, each by its own
    for row, n in enumerate(left):
        cache.truncate(row, n)
    kept = [head(two, count - n) for two, count, n in zip(new, counts, left, strict=True)]
    last = [tokens(rng, 1) for _ in counts]
    got = cache.attend(*(mx.concatenate(list(each)) for each in zip(*last, strict=True)), dot)
    for row, parts in enumerate(zip(before, kept, strict=True)):
        alone = fed(make, parts, dot).attend(*last[row], dot)
        np.testing.assert_allclose(np.array(got[row : row + 1]), np.array(alone), atol=2e-5)


@pytest.mark.parametrize("kind", FUNCTIONAL)
@given(
    lengths=st.tuples(*[st.integers(1, 70)] * 3),
    count=st.integers(1, SLACK),
    back=st.tuples(*[st.integers(0, SLACK)] * 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8)
def test_a_step_of_several_tokens_is_a_function_of_arrays(
    kind: str, lengths: tuple[int, ...], count: int, back: tuple[int, ...], seed: int
) -> None:
    make, dot = KINDS[kind]
    rng = np.random.default_rng(seed)
    alone = [fed(make, [tokens(rng, n)], dot) for n in lengths]
    step, other = joined(make, alone), joined(make, alone)
    for n in (count, 1):
        new = [mx.concatenate([whole([tokens(rng, n)])[i] for _ in lengths]) for i in range(3)]
        rows = Rows([step])
        rows.prepare(n)
        slots = Slots(
            step, *rows.arrays, *rows.fixed, rows.offsets, rows.views[step.layout], {}, {}
        )
        got = slots.attend(*new, dot)
        rows.advance([slots.arrays], n)
        expected = other.attend(*new, dot)
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-5)
        for row, length in enumerate(back):
            for cache in (step, other):
                cache.truncate(row, min(length, n))
        assert step.offsets == other.offsets


def test_latent_values_are_keys_as_well() -> None:
    dot = latent(0.3, 8)
    rng = np.random.default_rng(3)

    def some(rows: int, n: int) -> list[mx.array]:
        shapes = (rows, 4, n, 40), (rows, 1, n, 8), (rows, 1, n, 32)
        return [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]

    before, new = [some(1, n) for n in (9, 2)], [some(1, n) for n in (1, 3)]
    alone = []
    for first in before:
        alone.append(DenseCache())
        alone[-1].attend(*first, dot)
    cache = joined(DenseCache, alone)
    flat = [
        mx.concatenate([x.transpose(2, 1, 0, 3) for x in each]) for each in zip(*new, strict=True)
    ]
    got = Ragged([Part(cache, 2, 3, (1, 3))], mx.zeros(0)).attend(*flat, dot)
    expected = [own.attend(*two, dot) for own, two in zip(alone, new, strict=True)]
    flat_expected = mx.concatenate([x.transpose(2, 1, 0, 3) for x in expected])
    np.testing.assert_allclose(np.array(got), np.array(flat_expected), atol=2e-5)
