"""The rotating cache against one that keeps everything and masks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from agreement import PRODUCT, Life, lives, run
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import NaiveCache
from stored import append

from mlxrun.errors import CacheError, ParameterError
from mlxrun.kv_cache.base import State
from mlxrun.kv_cache.sliding_window import SLACK, RotatingCache


def tokens(n: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.ones((1, 2, n, 4), dtype)


@given(
    life=lives(longest=40),
    window=st.integers(1, 12),
    keep=st.integers(0, 6),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
)
@settings(max_examples=120)
def test_agrees_with_a_cache_that_keeps_everything(
    life: Life, window: int, keep: int, seed: int, batch: int
) -> None:
    run(lambda: RotatingCache(window, keep=keep), NaiveCache(window, keep), life, seed, batch)


@given(
    life=lives(longest=400),
    window=st.sampled_from([250, 256, 300, 520]),
    keep=st.sampled_from([0, 4, 256]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_agrees_across_buckets(life: Life, window: int, keep: int, seed: int) -> None:
    run(lambda: RotatingCache(window, keep=keep), NaiveCache(window, keep), life, seed, batch=1)


@pytest.mark.parametrize(("window", "keep"), [(1, 0), (5, 0), (4, 3), (300, 7)])
def test_never_holds_more_than_it_may(window: int, keep: int) -> None:
    cache = RotatingCache(window, keep=keep)
    for n in (1, 1, 7, 400, 1, 1, 3, 1):
        append(cache, tokens(n), tokens(n))
        assert all(array.shape[2] <= window + keep + SLACK for array in cache.state)
        assert cache.size <= window + keep + SLACK
    assert cache.offset == 415


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_keeps_the_dtype_it_is_given(dtype: mx.Dtype) -> None:
    cache = RotatingCache(8, keep=2)
    for n in (3, 1, 30, 1, 5):
        keys, values, mask = append(cache, tokens(n, dtype), tokens(n, dtype))
        assert keys.dtype == values.dtype == dtype
        assert not isinstance(mask, mx.array) or mask.dtype == mx.bool_
        assert {array.dtype for array in cache.state} == {dtype}


def test_a_decode_step_needs_no_mask_before_anything_is_out_of_sight() -> None:
    cache = RotatingCache(4, keep=1)
    for position in range(12):
        mask = append(cache, tokens(1), tokens(1))[2]
        assert (mask is None) == (position < 5)


def test_the_slack_can_be_forgotten_and_no_more() -> None:
    cache = RotatingCache(4, keep=1)
    append(cache, tokens(60), tokens(60))
    cache.truncate(0, SLACK)
    cache.truncate(0, 0)
    with pytest.raises(CacheError, match="window of 4 has dropped"):
        cache.truncate(0, 2)
    append(cache, tokens(1), tokens(1))
    cache.truncate(0, 1)
    with pytest.raises(CacheError, match=f"cannot truncate 61 of {60 - SLACK}"):
        cache.truncate(0, 61)
    cache.truncate(0, 60 - SLACK)


def test_a_row_that_is_used_again_can_be_truncated_as_a_new_one() -> None:
    rows = RotatingCache(4, keep=1)
    for row, length in enumerate((3, 30)):
        alone = rows.empty()
        append(alone, tokens(length), tokens(length))
        rows.place(row, alone)
    rows.truncate(1, SLACK)
    with pytest.raises(CacheError, match="window of 4 has dropped"):
        rows.truncate(1, 2)
    assert rows.offsets == [3, 30 - SLACK]
    rows.clear(1)
    rows.truncate(1, 0)
    short = rows.empty()
    append(short, tokens(5), tokens(5))
    rows.place(1, short)
    rows.truncate(0, 2)
    rows.truncate(1, 2)
    assert rows.offsets == [1, 3]


@given(
    before=st.integers(1, 60),
    back=st.integers(0, 5),
    slacks=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_state_is_restored_into_a_ring_of_another_slack(
    before: int, back: int, slacks: tuple[int, int], seed: int
) -> None:
    """Files of version 1 are of rings without slack, and do not say so."""
    rng, length = np.random.default_rng(seed), before - min(back, before - 1, *slacks)

    def random(n: int) -> mx.array:
        return mx.array(rng.standard_normal((1, 2, n, 4)).astype(np.float32))

    cache, other = (RotatingCache(6, keep=2, slack=slack) for slack in slacks)
    for n in (before - before // 3, *[1] * (before // 3)):
        append(cache, random(n), random(n))
    state = cache.snapshot()
    assert state is not None
    if not slacks[0]:
        state = State(state.arrays, {"offset": before})
    other.restore([], state, length)
    cache.truncate(0, before - length)
    for n in (1, 3, 1, 20, 1):
        q, k, v = random(n), random(n), random(n)
        got, expected = (np.array(one.attend(q, k, v, PRODUCT)) for one in (other, cache))
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ParameterError, match="window must be at least 1"):
        RotatingCache(0)
    with pytest.raises(ParameterError, match="keep must be at least 0"):
        RotatingCache(4, keep=-1)


def test_a_step_writes_one_slot_and_copies_nothing() -> None:
    cache = RotatingCache(100_000, keep=4)
    append(cache, tokens(99_990), tokens(99_990))
    for _ in range(30):  # up to the edge of the window, around it and on
        key = mx.random.normal((1, 2, 1, 4))
        mx.eval(key, cache.state)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        keys, values, _ = append(cache, key, key)
        mx.eval(keys.sum() + values.sum(), cache.state)
        assert mx.get_peak_memory() - before < cache.nbytes / 10
    assert cache.offset == 100_020
