"""Sparse caches against one that keeps everything and masks by the pattern's rule alone."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from agreement import HEADS, KV_HEADS, PRODUCT, Life, lives, run
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import Stored
from naive_sparse import NaiveSparse

from mlxrun.kv_cache.attention import LatentOp
from mlxrun.kv_cache.dense import DenseCache
from mlxrun.kv_cache.formats import PLAIN, AcrossHeads, Format, Quantized
from mlxrun.kv_cache.options import Blocks, Sparse, Strided
from mlxrun.kv_cache.sparse import BlockCache, SparseCache, StridedCache


def made(
    pattern: Sparse, prompt: int = 0, keys: Format = PLAIN, values: Format = PLAIN
) -> Callable[[], SparseCache]:
    def make() -> SparseCache:
        strided = isinstance(pattern, Strided)
        cache: SparseCache = (
            StridedCache(pattern, keys, values) if strided else BlockCache(pattern, keys, values)
        )
        cache.prompt = prompt
        return cache

    return make


def random(rng: np.random.Generator, n: int, heads: int = KV_HEADS, rows: int = 1) -> mx.array:
    return mx.array(rng.standard_normal((rows, heads, n, 4)).astype(np.float32))


def fresh(rng: np.random.Generator, n: int, rows: int = 1) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of n tokens."""
    return random(rng, n, HEADS, rows), random(rng, n, rows=rows), random(rng, n, rows=rows)


patterns = st.one_of(
    st.builds(Strided, st.integers(1, 20), st.integers(1, 7)),
    st.builds(Blocks, st.integers(3, 6), st.integers(1, 6)),
)


@given(
    life=lives(),
    pattern=patterns,
    prompt=st.integers(0, 40),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
)
@settings(max_examples=120)
def test_agrees_with_a_cache_that_picks_by_the_rule(
    life: Life, pattern: Sparse, prompt: int, seed: int, batch: int
) -> None:
    run(made(pattern, prompt), NaiveSparse(pattern, prompt), life, seed, batch)


@given(
    life=lives(longest=300),
    pattern=st.sampled_from([Strided(100, 16), Blocks(5, 48), Blocks(3, 256), Blocks(4, 300)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_agrees_across_buckets(life: Life, pattern: Sparse, seed: int) -> None:
    run(made(pattern, prompt=400), NaiveSparse(pattern, 400), life, seed, batch=1)


@pytest.mark.parametrize("pattern", [Strided(30, 7), Blocks(4, 16), Blocks(3, 60)])
def test_agrees_at_every_step_past_a_bucket(pattern: Sparse) -> None:
    life = [("update", 0, 245), *[("update", 0, 1)] * 30]
    run(made(pattern, 245), NaiveSparse(pattern, 245), life, seed=0, batch=1)


@pytest.mark.parametrize(
    ("keys", "values", "across"),
    [
        (Quantized(8, 32), Quantized(4, 32), False),
        (Quantized(8, 32, "mxfp8"), PLAIN, False),
        (AcrossHeads(Quantized(8, 32), KV_HEADS), PLAIN, True),
    ],
)
@given(life=lives(), pattern=patterns, seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_agrees_over_packed_keys_and_values(
    life: Life, pattern: Sparse, seed: int, keys: Format, values: Format, across: bool
) -> None:
    def stored(form: Format) -> Stored:
        def there_and_back(x: np.ndarray) -> np.ndarray:
            return np.array(form.unpack(form.pack(mx.array(x)), mx.float32))

        return there_and_back

    naive = NaiveSparse(pattern, 10, stored(keys), stored(values), shared=across)
    run(made(pattern, 10, keys, values), naive, life, seed, batch=1, width=16 if across else 32)


@pytest.mark.parametrize("pattern", [Strided(40, 9), Blocks(5, 8), Blocks(10, 4)])
def test_a_short_context_equals_a_dense_cache_to_the_bit(pattern: Sparse) -> None:
    rng = np.random.default_rng(0)
    sparse, dense = made(pattern)(), DenseCache()
    for n in (7, 1, 1, 20, *[1] * (sparse.reach - 29)):
        q, k, v = fresh(rng, n)
        assert mx.array_equal(sparse.attend(q, k, v, PRODUCT), dense.attend(q, k, v, PRODUCT))
    assert sparse.offset == sparse.reach >= 40
    q, k, v = fresh(rng, 1)
    assert not mx.array_equal(sparse.attend(q, k, v, PRODUCT), dense.attend(q, k, v, PRODUCT))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("pattern", [Strided(12, 5), Blocks(4, 4)])
def test_keeps_the_dtype_it_is_given(pattern: Sparse, dtype: mx.Dtype) -> None:
    cache, rng = made(pattern, 30)(), np.random.default_rng(0)
    for n in (40, 1, 3):
        q, k, v = (random(rng, n, h).astype(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        assert cache.attend(q, k, v, PRODUCT).dtype == dtype
    assert {array.dtype for array in cache.state} == {dtype}


@given(
    pattern=patterns,
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    steps=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_rows_of_a_batch_equal_rows_alone(
    pattern: Sparse, lengths: list[int], steps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    alone = [made(pattern, length)() for length in lengths]
    rows: SparseCache | None = None
    for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
        q, k, v = fresh(rng, length)
        cache.attend(q, k, v, PRODUCT)
        rows = rows or cache.empty()
        rows.place(row, cache.fork())
    assert rows is not None
    for step in range(steps):
        if step == steps // 2:  # a row leaves, and its place is taken by a younger one
            alone[0] = made(pattern)()
            rows.clear(0)
        if step == steps - 1 and len(alone) > 2:
            alone = [alone[2], alone[0]]
            rows.take_rows([2, 0])
        size = len(alone)
        q, k, v = fresh(rng, 1, size)
        got = rows.attend(q, k, v, PRODUCT)
        each = [
            cache.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], PRODUCT)
            for i, cache in enumerate(alone)
        ]
        np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(each)), atol=2e-5)


def test_tokens_after_a_shorter_prompt_are_not_reusable() -> None:
    """The end of a longer one was prefilled densely, truncated, and is decoded this time."""
    cache, rng = made(Strided(4, 3), prompt=30)(), np.random.default_rng(0)
    cache.attend(*fresh(rng, 30), PRODUCT)
    assert cache.reusable_len == 30
    cache.truncate(0, 10)
    cache.prompt = 20
    for n in (1, 1, 12):
        cache.attend(*fresh(rng, n), PRODUCT)
        assert cache.reusable_len == 20


def test_a_reused_row_has_no_blocks_of_its_predecessor() -> None:
    rng, pattern = np.random.default_rng(0), Blocks(6, 4)
    rows = made(pattern)().empty()
    for length in (90, 120):  # the second has all blocks of the first, with keys of its own
        alone = made(pattern, prompt=length)()
        alone.attend(*fresh(rng, length), PRODUCT)
        rows.place(0, alone.fork())
        for _ in range(6):
            q, k, v = fresh(rng, 1)
            got, expected = (cache.attend(q, k, v, PRODUCT) for cache in (rows, alone))
            np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-5)
        rows.clear(0)


@pytest.mark.parametrize("pattern", [Strided(30, 4), Blocks(4, 8)])
def test_the_split_of_tokens_into_passes_makes_no_difference(pattern: Sparse) -> None:
    """A token of the prompt sees all, a later one its choice, in passes of any length."""
    answers = []
    for chunks in ([120], [60, 60], [49, 1, 1, 69], [1] * 120):
        rng = np.random.default_rng(3)
        q, k, v = fresh(rng, 120)
        cache, start, parts = made(pattern, prompt=50)(), 0, []
        for n in chunks:
            now = slice(start, start + n)
            parts.append(cache.attend(q[:, :, now], k[:, :, now], v[:, :, now], PRODUCT))
            start += n
        answers.append(np.array(mx.concatenate(parts, axis=2)))
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=2e-5)


@pytest.mark.parametrize("pattern", [Strided(512, 8), Blocks(32, 64), Blocks(3, 1000)])
def test_32_thousand_tokens(pattern: Sparse) -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 1, KV_HEADS, 32_768, 4)).astype(np.float32)
    cache, naive = made(pattern)(), NaiveSparse(pattern)
    cache.restore([{"0": mx.array(keys), "1": mx.array(values)}], None, keys.shape[2])
    naive.keys, naive.values, naive.offset = keys, values, 32_768
    for n in (1, 1, 3):
        q, k, v = fresh(rng, n)
        naive.keys = np.concatenate([naive.keys, np.array(k)], axis=2)
        naive.values = np.concatenate([naive.values, np.array(v)], axis=2)
        naive.offset += n
        got = cache.attend(q, k, v, PRODUCT)
        np.testing.assert_allclose(np.array(got), naive.attend(np.array(q)), atol=2e-5)


@given(
    pattern=st.builds(Blocks, st.integers(3, 6), st.integers(1, 6)),
    length=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_latents_are_selected_by_their_scores(pattern: Blocks, length: int, seed: int) -> None:
    """Values are keys as well: the naive rule over both, side by side."""
    rng = np.random.default_rng(seed)
    turning, width, scale = 4, 6, 0.5
    cache = made(pattern, prompt=length)()
    k, v = (rng.standard_normal((1, 1, length + 1, n)).astype(np.float32) for n in (turning, width))
    q = rng.standard_normal((1, HEADS, length + 1, turning + width)).astype(np.float32)
    for now in (slice(0, length), slice(length, length + 1)):
        parts = (mx.array(x[:, :, now]) for x in (q, k, v))
        got = np.array(cache.attend(*parts, LatentOp(scale, turning)))
    ranked = np.concatenate([q[..., :turning], q[..., turning:] * scale], axis=-1)
    naive = NaiveSparse(pattern, prompt=length)
    naive.update(np.concatenate([k, v], axis=-1), np.concatenate([v, v], axis=-1))
    naive.values = v
    np.testing.assert_allclose(got, naive.attend(ranked[:, :, -1:]), atol=2e-5)


@given(pattern=patterns, length=st.integers(1, 60))
def test_counts_the_tokens_that_are_attended_to(pattern: Sparse, length: int) -> None:
    rng = np.random.default_rng(length)
    cache, naive = made(pattern)(), NaiveSparse(pattern)
    q, k, v = fresh(rng, length)
    cache.attend(q, k, v, PRODUCT)
    naive.update(np.array(k), np.array(v))
    seen = naive.visible(np.array(q))[:, :, -1].sum(axis=-1)
    assert (seen == pattern.tokens(length)).all()


@given(life=lives(), pattern=patterns, prompt=st.integers(0, 40))
def test_tokens_are_settled_up_to_the_first_that_did_not_see_everything(
    life: Life, pattern: Sparse, prompt: int
) -> None:
    cache = made(pattern, prompt)()
    saw_all: list[bool] = []
    rng = np.random.default_rng(0)
    for what, _, n in life:
        if what == "update":
            saw_all += [
                at < max(prompt, cache.reach) for at in range(len(saw_all), len(saw_all) + n)
            ]
            cache.attend(*fresh(rng, n), PRODUCT)
        elif what == "trim" and n <= len(saw_all):
            cache.truncate(0, n)
            saw_all = saw_all[: len(saw_all) - n]
        assert cache.reusable_len == [*saw_all, False].index(False)


def test_a_needle_is_found_that_windows_and_strides_miss() -> None:
    """One key among 8,192 that the query is after: blocks see it wherever it is."""
    rng = np.random.default_rng(4)
    keys, values = rng.standard_normal((2, 1, KV_HEADS, 8192, 4)).astype(np.float32)
    query = mx.array(np.full((1, HEADS, 1, 4), 3, np.float32))
    keys[:, :, 3001] = 4
    newest = random(rng, 1), random(rng, 1)
    got = {}
    for name, cache in {
        "dense": DenseCache(),
        "blocks": made(Blocks(8, 16))(),
        "strided": made(Strided(128, 8))(),
    }.items():
        cache.restore([{"0": mx.array(keys), "1": mx.array(values)}], None, keys.shape[2])
        got[name] = np.array(cache.attend(query, *newest, PRODUCT))
    needle = np.repeat(values[:, :, 3001:3002], HEADS // KV_HEADS, axis=1)
    for name, found in (("dense", True), ("blocks", True), ("strided", False)):
        assert np.allclose(got[name], needle, atol=0.02) == found
