"""Rows of one cache take different numbers of tokens in a pass, and are truncated one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.errors import CacheError
from mlxrun.kv_cache.attention import AttentionOp, LatentOp, alibi, scaled
from mlxrun.kv_cache.batch import BatchCache, DecodeRows, DecodeSlots, Part
from mlxrun.kv_cache.dense import DenseCache, RowCache
from mlxrun.kv_cache.formats import AcrossHeads, Format, Plain, Quantized
from mlxrun.kv_cache.options import Blocks, Strided
from mlxrun.kv_cache.per_channel import PerChannel, PerChannelCache
from mlxrun.kv_cache.shared_prefix import SharedPrefix, SharedPrefixCache
from mlxrun.kv_cache.sliding_window import SLACK, RotatingCache
from mlxrun.kv_cache.sparse import BlockCache, StridedCache

WIDTH, SHARED = 32, 5
SCALED, LATENT = scaled(0.5, None, None), LatentOp(0.5, WIDTH)


class Kind(NamedTuple):
    make: Callable[[], RowCache]
    op: AttentionOp = SCALED
    heads: int = 2  # of keys


PLAIN_KIND = Kind(DenseCache)


def shared_prefix() -> RowCache:
    x = tokens(np.random.default_rng(5), SHARED)
    return SharedPrefixCache(SharedPrefix(({"0": x[1], "1": x[2]},), SHARED), 0)


def dense(keys: Format, values: Format) -> Kind:
    return Kind(lambda: DenseCache(keys, values))


KINDS = {
    "dense": PLAIN_KIND,
    "f16": dense(Plain(mx.float16), Plain(mx.float16)),
    **{f"q{bits}": dense(Quantized(bits, 32), Quantized(bits, 32)) for bits in (8, 6, 5, 4, 3, 2)},
    "mxfp8": dense(Quantized(8, 32, "mxfp8"), Quantized(8, 32, "mxfp8")),
    "across heads": dense(AcrossHeads(Quantized(8, 64), 2), AcrossHeads(Quantized(4, 64), 2)),
    "bounded": Kind(DenseCache, scaled(0.5, 2.0, None)),
    "sinks": Kind(DenseCache, scaled(0.5, None, mx.array([0.5, -1.0, 3.0, 0.0]))),
    "alibi": Kind(DenseCache, alibi(0.5, 4, 8.0)),
    "latent": Kind(DenseCache, LATENT, 1),
    "rotating": Kind(lambda: RotatingCache(9, keep=2)),
    "rotating, one slot of slack": Kind(lambda: RotatingCache(6, slack=1)),
    "rotating, no slack": Kind(lambda: RotatingCache(6, keep=1, slack=0)),
    "rotating q8": Kind(lambda: RotatingCache(9, keys=Quantized(8, 32), values=Quantized(4, 32))),
    "by channel": Kind(lambda: PerChannelCache(PerChannel(4, 32), Quantized(8, 32))),
    "strided": Kind(lambda: StridedCache(Strided(8, 4))),
    "blocks": Kind(lambda: BlockCache(Blocks(3, 4))),
    "blocks, latent": Kind(lambda: BlockCache(Blocks(3, 4)), LATENT, 1),
    "shared prefix": Kind(shared_prefix),
}
Triple = tuple[mx.array, mx.array, mx.array]
Step = Callable[..., tuple[mx.array, list[mx.array]]]


def tokens(rng: np.random.Generator, count: int, kind: Kind = PLAIN_KIND) -> Triple:
    """Queries, keys and values of one row."""
    queries = 2 * WIDTH if kind.op.latent else WIDTH
    q, k, v = (
        mx.array(rng.standard_normal((1, heads, count, width)).astype(np.float32))
        for heads, width in ((4, queries), (kind.heads, WIDTH), (kind.heads, WIDTH))
    )
    return q, k, v


def first(x: Triple, count: int) -> Triple:
    q, k, v = (a[:, :, :count] for a in x)
    return q, k, v


def joined(*parts: Triple) -> Triple:
    q, k, v = (mx.concatenate(list(arrays), axis=2) for arrays in zip(*parts, strict=True))
    return q, k, v


def afresh(kind: Kind, history: Triple, step: Triple) -> tuple[RowCache, np.ndarray]:
    """A cache after a prefill in one pass, and the output of the tokens of a step after it."""
    cache = kind.make()
    cache.attend(*history, kind.op)
    return cache, np.array(cache.attend(*step, kind.op))


def flat(parts: list[Triple]) -> Triple:
    """Tokens of rows as (N, H, 1, D)."""
    q, k, v = joined(*parts)
    q, k, v = (x.transpose(2, 1, 0, 3) for x in (q, k, v))
    return q, k, v


def together(cache: RowCache, kind: Kind, parts: list[Triple]) -> list[np.ndarray]:
    """One pass over the tokens of all rows: the output of each, (1, H, T, D)."""
    counts = [x[0].shape[2] for x in parts]
    ragged = BatchCache(
        [Part(cache, len(parts), max(counts), tuple(counts))], mx.zeros(sum(counts))
    )
    out = ragged.attend(*flat(parts), kind.op)
    ends = np.cumsum(counts)
    return [
        np.array(out[end - n : end].transpose(2, 1, 0, 3))
        for n, end in zip(counts, ends, strict=True)
    ]


@pytest.mark.parametrize("name", KINDS)
@given(
    lengths=st.lists(st.integers(1, 110), min_size=3, max_size=3),
    counts=st.one_of(
        st.just([1, 3, 7]),
        st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    ),
    back=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8)
def test_a_pass_and_a_truncation_of_each_row_equal_caches_built_afresh(
    name: str, lengths: list[int], counts: list[int], back: list[int], seed: int
) -> None:
    kind, rng = KINDS[name], np.random.default_rng(seed)
    rows, histories = kind.make().empty(), [tokens(rng, n, kind) for n in lengths]
    for row, history in enumerate(histories):
        cache = kind.make()
        if isinstance(cache, SharedPrefixCache):  # rows of one cache have the same prefix
            cache = rows.empty()
        cache.attend(*history, kind.op)
        rows.place(row, cache)
    for _ in range(2):
        step = [tokens(rng, n, kind) for n in counts]
        got = together(rows, kind, step)
        for history, own, out in zip(histories, step, got, strict=True):
            if own[0].shape[2]:
                np.testing.assert_allclose(out, afresh(kind, history, own)[1], atol=3e-5)
        histories = [joined(*pair) for pair in zip(histories, step, strict=True)]
        for row, n in enumerate(back):
            n = min(n, counts[row])
            if rows.rollback is not None:
                n = min(n, rows.rollback)
            rows.truncate(row, n)
            length = histories[row][0].shape[2] - n
            histories[row] = first(histories[row], length)
            start = SHARED if name == "shared prefix" else 0
            assert rows.offsets[row] == length + start
    step = [tokens(rng, 1, kind) for _ in lengths]
    for row, out in enumerate(together(rows, kind, step)):
        np.testing.assert_allclose(out, afresh(kind, histories[row], step[row])[1], atol=3e-5)
        one = rows.only(row)
        more = tokens(rng, 4, kind)
        expected = afresh(kind, joined(histories[row], step[row]), more)[1]
        np.testing.assert_allclose(np.array(one.attend(*more, kind.op)), expected, atol=3e-5)


@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if kind.make().functional])
@given(
    lengths=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    count=st.integers(1, SLACK),
    back=st.lists(st.integers(0, SLACK), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=4)
def test_a_compiled_step_of_several_tokens_does_the_same(
    name: str, lengths: list[int], count: int, back: list[int], seed: int
) -> None:
    kind, rng = KINDS[name], np.random.default_rng(seed)
    rows = kind.make().empty()
    for row, length in enumerate(lengths):
        alone = rows.empty()
        alone.attend(*tokens(rng, length, kind), kind.op)
        rows.place(row, alone)
    built, values = rows.fork(), DecodeRows([rows])
    if count > rows.tokens_at_once:
        with pytest.raises(CacheError, match=f"take {rows.tokens_at_once} tokens of a row"):
            values.prepare(count)
        return

    def step(view: int) -> Step:
        def step(
            arrays: list[mx.array], fixed: list[mx.array], at: mx.array, *x: mx.array
        ) -> tuple[mx.array, list[mx.array]]:
            slots = DecodeSlots(rows.template(), arrays, fixed, at, view, {}, {})
            return slots.attend(*x, kind.op), slots.arrays

        return step

    compiled: dict[Hashable, Step] = {}
    for n in (count, count, 1):
        values.prepare(n)
        parts = [tokens(rng, n, kind) for _ in lengths]
        q, k, v = (mx.concatenate(list(x)) for x in zip(*parts, strict=True))
        run = compiled.setdefault(values.key, mx.compile(step(values.views[rows.layout])))
        out, arrays = run(values.arrays[0], values.fixed[0], values.offsets, q, k, v)
        values.advance([arrays], n)
        expected = built.attend(q, k, v, kind.op)
        np.testing.assert_allclose(np.array(out), np.array(expected), atol=3e-5)
        for row, length in enumerate(back):
            for cache in (rows, built):
                cache.truncate(row, min(length, n, n if cache.rollback is None else cache.rollback))
        assert rows.offsets == built.offsets
        each = range(len(rows.offsets))
        assert [rows.longest(row) for row in each] == [built.longest(row) for row in each]


def test_truncation_that_cannot_be_leaves_a_row_as_it_is() -> None:
    rows = RotatingCache(4, keep=1, slack=2)
    for row, length in enumerate((3, 9)):
        alone = rows.empty()
        alone.attend(*tokens(np.random.default_rng(0), length), SCALED)
        rows.place(row, alone)
    rows.truncate(0, 3)
    with pytest.raises(CacheError, match="window of 4 has dropped"):
        rows.truncate(1, 4)
    with pytest.raises(CacheError, match="cannot truncate 1 of 0"):
        rows.truncate(0, 1)
    rows.truncate(1, 2)
    assert rows.offsets == [0, 7]
