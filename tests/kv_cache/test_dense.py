"""The dense cache against one that keeps everything, and its cost."""

from __future__ import annotations

import mlx.core as mx
import pytest
from agreement import Life, lives, run
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import NaiveCache
from stored import append

from mlxrun.errors import CacheError
from mlxrun.kv_cache.dense import BUCKET, DenseCache, bucket


def tokens(n: int, value: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.full((1, 2, n, 4), value, dtype)


@given(life=lives(), seed=st.integers(0, 1000), batch=st.integers(1, 2))
@settings(max_examples=40)
def test_agrees_with_a_cache_that_keeps_everything(life: Life, seed: int, batch: int) -> None:
    run(DenseCache, NaiveCache(), life, seed, batch)


@given(life=lives(longest=300), seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_agrees_across_buckets(life: Life, seed: int) -> None:
    run(DenseCache, NaiveCache(), life, seed, batch=1)


def test_grows_in_doubling_buckets() -> None:
    assert [bucket(n) for n in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1024]
    assert bucket(5000, limit=600) == 600
    cache, sizes = DenseCache(), set()
    for _ in range(2 * BUCKET + 1):
        append(cache, tokens(1), tokens(1))
        sizes.add(cache.state[0].shape[2])
    assert sizes == {256, 512, 1024}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_keeps_the_dtype_it_is_given(dtype: mx.Dtype) -> None:
    cache = DenseCache()
    for n in (3, 1, 300):
        keys, values, _ = append(cache, tokens(n, dtype=dtype), tokens(n, dtype=dtype))
        assert keys.dtype == values.dtype == dtype
    assert cache.nbytes == 2 * 2 * 512 * 4 * dtype.size


@pytest.mark.parametrize("n", [-1, 4])
def test_truncating_more_tokens_than_there_are_is_an_error(n: int) -> None:
    cache = DenseCache()
    append(cache, tokens(3), tokens(3))
    with pytest.raises(CacheError, match=f"cannot truncate {n} of 3"):
        cache.truncate(0, n)
    assert cache.offset == 3


def test_an_empty_cache_forks_and_trims() -> None:
    cache = DenseCache()
    cache.truncate(0, 0)
    assert cache.state == []
    assert cache.fork().offset == 0


def peak_of_a_step(cache: DenseCache) -> int:
    """Bytes that one decode step allocates."""
    key = mx.random.normal((1, 2, 1, 4))
    mx.eval(key, cache.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    keys, values, _ = append(cache, key, key)
    seen = keys.sum() + values.sum()
    mx.eval(seen, cache.state)
    return mx.get_peak_memory() - before


def test_a_step_writes_one_token_and_copies_nothing() -> None:
    cache = DenseCache()
    append(cache, tokens(100_000), tokens(100_000))
    assert cache.nbytes > 8_000_000
    for _ in range(5):
        assert peak_of_a_step(cache) < cache.nbytes / 10


def test_a_fork_copies_once_and_then_no_more() -> None:
    cache = DenseCache()
    append(cache, tokens(100_000), tokens(100_000))
    mx.eval(cache.state)
    fork = cache.fork()
    before = mx.get_active_memory()
    for one in (fork, cache):
        peak_of_a_step(one)
    assert mx.get_active_memory() - before < 1.1 * cache.nbytes
    for one in (fork, cache, fork, cache):
        assert peak_of_a_step(one) < cache.nbytes / 10
