"""Bytes and operations of passes, against counting by hand and against simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.analysis.costs import (
    AttentionCost,
    ExpertCost,
    ModelCost,
    Roof,
    WeightCost,
    attended_keys,
    decode_cost,
    expected_experts,
    limit,
    prefill_cost,
)

small = st.integers(0, 60)
windows = st.none() | st.integers(1, 50)
layers = st.builds(
    AttentionCost,
    token=st.integers(1, 100),
    fixed=st.integers(0, 50),
    window=windows,
    pair=st.integers(0, 100),
)
routed = st.integers(1, 16).flatmap(
    lambda count: st.builds(
        ExpertCost, st.just(count), st.integers(1, count), st.floats(0, 1e6, allow_subnormal=False)
    )
)
weights = st.builds(
    WeightCost,
    always=st.floats(1, 1e6),
    head=st.floats(0, 1e6),
    row=st.floats(0, 1e3),
    table=st.floats(0, 1e6),
    experts=st.lists(routed, max_size=3).map(tuple),
)
counts = st.builds(
    ModelCost,
    weights=weights,
    layers=st.lists(layers, min_size=1, max_size=3).map(tuple),
    active=st.integers(1, 10**6),
    head=st.integers(1, 10**6),
)


@given(small, small, windows)
def test_keys_are_those_of_each_token_in_turn(before: int, tokens: int, window: int | None) -> None:
    each = [min(before + i, window or 10**9) for i in range(1, tokens + 1)]
    assert attended_keys(before, tokens, window) == sum(each)


@pytest.mark.parametrize(
    ("count", "used", "tokens"), [(8, 2, 1), (8, 2, 5), (64, 6, 20), (4, 4, 3)]
)
def test_distinct_experts_are_those_of_a_simulation(count: int, used: int, tokens: int) -> None:
    rng = np.random.default_rng(7)
    trials = [
        len({int(e) for _ in range(tokens) for e in rng.permutation(count)[:used]})
        for _ in range(2000)
    ]
    assert np.mean(trials) == pytest.approx(expected_experts(count, used, tokens), rel=0.02)


def test_experts_from_one_token_to_many() -> None:
    assert expected_experts(128, 4, 1) == pytest.approx(4)
    assert expected_experts(128, 4, 10**5) == pytest.approx(128)
    assert ExpertCost(8, 2, nbytes=800).read(1) == pytest.approx(200)


ONE = ModelCost(
    WeightCost(always=1000, head=300, row=10, table=50),
    (AttentionCost(token=4, pair=7), AttentionCost(token=6, window=8, pair=5)),
    active=400,
    head=90,
)


def test_a_decode_step_by_hand() -> None:
    work = decode_cost(ONE, context=20, rows=3)
    assert (
        work.weights_read == 1000 + 300 + 3 * 10
    )  # read once for all rows, a row of the table each
    assert work.cache_read == 3 * (4 * 21 + 6 * 8)
    assert work.cache_written == 3 * (4 + 6)
    assert work.operations == 2 * 3 * (400 + 90 + 7 * 21 + 5 * 8)
    assert (work.tokens, work.passes) == (3, 1)
    assert work.nbytes == work.weights_read + work.cache_read + work.cache_written


def test_sequences_that_share_no_pass_read_the_weights_each() -> None:
    alone = replace(ONE, batched=False)
    work, together = (
        decode_cost(alone, 20, tokens=2, rows=3),
        decode_cost(ONE, 20, tokens=2, rows=3),
    )
    assert (work.passes, together.passes) == (6, 2)
    assert work.weights_read == 3 * decode_cost(ONE, 20, tokens=2).weights_read
    assert (work.cache_read, work.operations) == (together.cache_read, together.operations)


def test_a_prompt_in_two_chunks_by_hand() -> None:
    work = prefill_cost(ONE, prompt=10, context=2, chunk=6)
    assert work.weights_read == 2 * 1000 + 300 + 10 * 10  # the head is read for the last token only
    # Keys in reach of a pass, each read once: 2+6 and 2+10; with the window 8, and 8+4-1.
    assert work.cache_read == 4 * (8 + 12) + 6 * (8 + 11)
    assert work.cache_written == 10 * (4 + 6)
    all_seen, in_window = sum(range(3, 13)), sum(min(8, n) for n in range(3, 13))
    assert work.operations == 2 * (10 * 400 + 90 + 7 * all_seen + 5 * in_window)
    assert (work.tokens, work.passes) == (10, 2)


def test_a_state_is_read_and_written_whatever_the_tokens() -> None:
    counts = replace(ONE, layers=(AttentionCost(token=0, fixed=100, state=True),))
    work = decode_cost(counts, context=10**6, tokens=5, rows=2)
    assert (work.cache_read, work.cache_written) == (2 * 5 * 100, 2 * 5 * 100)
    assert prefill_cost(counts, 10, chunk=4).cache_written == 3 * 100


@given(counts, small, st.integers(1, 30), st.integers(1, 8))
def test_steps_are_the_sum_of_single_ones(
    counts: ModelCost, context: int, tokens: int, rows: int
) -> None:
    whole = decode_cost(counts, context, tokens, rows)
    steps = [decode_cost(counts, context + i, 1, rows) for i in range(tokens)]
    assert whole.operations == sum(step.operations or 0 for step in steps)
    assert whole.cache_read == sum(step.cache_read for step in steps)
    assert whole.nbytes == pytest.approx(sum(step.nbytes for step in steps))


@given(counts, small, st.integers(1, 60), st.integers(1, 60))
def test_chunks_change_bytes_and_not_operations(
    counts: ModelCost, context: int, prompt: int, chunk: int
) -> None:
    whole, parts = (prefill_cost(counts, prompt, context, chunk=p) for p in (prompt, chunk))
    assert parts.operations == whole.operations
    assert parts.cache_read >= whole.cache_read
    assert parts.nbytes >= whole.nbytes * (1 - 1e-12)


@given(counts, small, st.integers(1, 60), st.integers(1, 60))
def test_a_prompt_is_what_its_passes_read(
    counts: ModelCost, context: int, prompt: int, chunk: int
) -> None:
    weights = cache = 0.0
    for start in range(context, context + prompt, chunk):
        end = min(start + chunk, context + prompt)
        weights += counts.weights.read(end - start) - counts.weights.head
        for layer in counts.layers:
            first = 0 if layer.window is None else max(0, start + 1 - layer.window)
            cache += layer.token * (end - first) + layer.fixed
    work = prefill_cost(counts, prompt, context, chunk=chunk)
    assert work.weights_read == pytest.approx(weights + counts.weights.head)
    assert work.cache_read == cache


@given(counts, small, st.integers(1, 20), st.integers(1, 8))
def test_one_token_is_a_step(counts: ModelCost, context: int, chunk: int, rows: int) -> None:
    prefill, decode = prefill_cost(counts, 1, context, chunk=chunk), decode_cost(counts, context)
    assert (prefill.operations, prefill.cache_read) == (decode.operations, decode.cache_read)
    assert prefill.nbytes == pytest.approx(decode.nbytes)


@given(counts, small, st.integers(1, 20), st.integers(1, 16))
def test_more_is_never_less(counts: ModelCost, context: int, tokens: int, rows: int) -> None:
    work = decode_cost(counts, context, tokens, rows)
    for more in (
        decode_cost(counts, context + 1, tokens, rows),
        decode_cost(counts, context, tokens + 1, rows),
        decode_cost(counts, context, tokens, rows + 1),
    ):
        assert more.nbytes >= work.nbytes * (1 - 1e-12)
        assert (more.operations or 0) >= (work.operations or 0)
    together = decode_cost(counts, context, tokens, rows + 1)
    assert together.nbytes / together.tokens <= work.nbytes / work.tokens * (1 + 1e-12)


@given(counts, st.integers(1, 10**6))
def test_no_pass_reads_more_than_all_weights(counts: ModelCost, tokens: int) -> None:
    weights = counts.weights
    assert weights.read(tokens) <= (weights.total + weights.row * tokens) * (1 + 1e-12)


@given(counts, small, st.floats(1, 1e12), st.floats(1, 1e15))
def test_the_slower_of_both_binds(
    counts: ModelCost, context: int, bandwidth: float, throughput: float
) -> None:
    work = decode_cost(counts, context)
    most = limit(work, Roof(bandwidth, throughput))
    moving = work.nbytes / bandwidth
    computing = (work.operations or 0) / throughput
    assert most.seconds == max(moving, computing)
    assert most.rate == pytest.approx(1 / most.seconds)
    assert most.binds == ("bandwidth" if moving >= computing else "compute")
    assert most.whole


def test_huge_numbers() -> None:
    work = prefill_cost(ONE, 10**18, chunk=512)
    assert work.passes == -(-(10**18) // 512)
    assert decode_cost(ONE, 10**18, 10**18, 10**18).nbytes > 10**54


def test_unknown_terms_stay_unknown() -> None:
    work = decode_cost(replace(ONE, active=None), 5)
    assert work.operations is None
    assert work.intensity is None
    for roof, some in ((Roof(1e9, 1e12), work), (Roof(1e9, None), decode_cost(ONE, 5))):
        most = limit(some, roof)
        assert not most.whole
        assert (most.binds, most.seconds) == ("bandwidth", some.nbytes / 1e9)
