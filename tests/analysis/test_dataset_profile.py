"""Recommendations for a data set cover as much as they say, and follow their rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.analysis.dataset import (
    INTERACTIVE,
    LEVELS,
    OFFLINE,
    SHORTEST,
    Advice,
    Lengths,
    Size,
    Workers,
    advise,
    benchmark_length,
    profile_facts,
    sizes,
    trials,
    workers,
)
from mlxrun.bench.workloads import Decode, Prefill

pairs = st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 9000)), min_size=1, max_size=80)
# Rates of 1, 2, 4 ... sequences.
rates = st.lists(st.floats(0.1, 1000), min_size=1, max_size=6).map(
    lambda found: {1 << i: rate for i, rate in enumerate(found)}
)


@given(st.integers(0, 1 << 20))
def test_lengths_are_rounded_up_to_powers_of_two(length):
    made = benchmark_length(length)
    assert made.bit_count() == 1
    assert made >= max(length, SHORTEST)
    assert made == SHORTEST or made < 2 * length


@given(pairs)
def test_each_level_covers_what_it_says(found):
    prompts, outputs = [p for p, _ in found], [o for _, o in found]
    made = sizes(Lengths(prompts, outputs))
    assert [(size.level, size.percent) for size in made] == list(LEVELS.items())
    for size in made:
        for lengths, length in ((prompts, size.prompt), (outputs, size.predict)):
            assert 100 * sum(n <= length for n in lengths) >= size.percent * len(found)
        both = sum(p <= size.prompt and o <= size.predict for p, o in found)
        assert size.both == pytest.approx(both / len(found))
    assert made == sorted(made, key=lambda size: (size.prompt, size.predict))


def test_a_known_set():
    """128 and 2048 tokens for nine of ten, 4096 for all but one of a hundred."""
    outputs = [300] * 50 + [1900] * 40 + [3500] * 9 + [30_000]
    conservative, recommended, comprehensive = sizes(Lengths([100] * 100, outputs))
    assert (recommended.prompt, recommended.predict) == (128, 2048)
    assert (comprehensive.prompt, comprehensive.predict) == (128, 4096)
    assert conservative.predict == 2048
    assert recommended.both == 0.9
    assert recommended.length == 128 + 2048


@given(rates, st.integers(0, 64))
def test_workers_follow_their_rules(found, most):
    made = workers(found, most)
    if not most:
        assert made is None
        return
    fitting = {n: rate for n, rate in found.items() if n <= most}
    best = max(fitting.values())
    assert fitting[made.offline] >= OFFLINE * best
    assert all(fitting[n] < OFFLINE * best for n in fitting if n < made.offline)
    assert made.interactive <= made.offline
    assert fitting[made.interactive] / made.interactive >= INTERACTIVE * fitting[1]
    between = [n for n in fitting if made.interactive < n <= made.offline]
    assert all(fitting[n] / n < INTERACTIVE * fitting[1] for n in between)


def test_more_sequences_than_help_are_not_recommended():
    found = {1: 10.0, 2: 18.0, 4: 30.0, 8: 39.0, 16: 40.0}
    assert workers(found, 99) == Workers(interactive=4, offline=8)
    assert workers(found, 3) == Workers(interactive=2, offline=2)
    assert workers({2: 18.0}, 99) is None


def test_advice_fits_in_memory():
    small, large = Size("small", 75, 16, 32, 1.0), Size("large", 99, 64, 128, 1.0)
    found = advise([small, large], {1: 1.0, 2: 2.0, 4: 3.9}, lambda length: 192 // length)
    assert found == [
        Advice(small, 4, Workers(4, 4)),
        Advice(large, 1, Workers(1, 1)),
    ]
    assert found[0].workloads == [Prefill(16), Decode(32, 16), Decode(32, 16, 4)]
    assert Advice(small, 0, None).workloads == [Prefill(16), Decode(32, 16)]
    lengths = Lengths([1, 2], [3, None])
    facts = profile_facts(Path("data.jsonl"), 2, lengths, found, [], 192)
    facts = json.loads(json.dumps(facts))
    assert facts["levels"]["small"]["workers"] == {"interactive": 4, "offline": 4}
    assert (facts["prompts"]["count"], facts["outputs"]["count"]) == (2, 1)


@given(st.integers(1, 5000), st.integers(2, 5000))
def test_trials_fit_the_context(prompt, context):
    made = trials(Size("any", 90, prompt, 7, 1.0), [4, 2], context)
    assert [workload.parallel for workload in made] == [1, 2, 4]
    assert all(workload.length <= context for workload in made)
    assert made[0].context == prompt or made[0].length >= context - 1
