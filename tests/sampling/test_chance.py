"""Random numbers: samples follow the distribution; noise depends on seed, step and token."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import naive_sampling as naive
import numpy as np
import pytest

from mlxrun.outputs import SamplingParams
from mlxrun.sampling import rng
from mlxrun.sampling.sampler import Sampler, SamplerState, SamplingTensors, next_token

OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # every stage off


def random_logits(seed: int, size: int) -> mx.array:
    values = np.random.default_rng(seed).normal(size=(1, size)) * 3
    return mx.array(values.astype(np.float32))


def draw(sampler: Sampler, logits: list[mx.array]) -> list[int]:
    return mx.concatenate([sampler.sample(each).token for each in logits]).tolist()


@pytest.mark.parametrize("params", [OPEN, OPEN | {"top_k": 5}, OPEN | {"temperature": 0.6}])
def test_samples_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 4,000 steps: below the 99.9% quantile of 4 degrees of freedom."""
    row, steps = [1.0, 0.0, -0.5, 2.0, 0.7], 4000
    sampler = Sampler(SamplingParams(**params, seed=7), len(row))
    tensors = SamplingTensors(*(mx.repeat(each, steps, axis=0) for each in sampler.tensors))
    state = SamplerState(*(mx.repeat(each, steps, axis=0) for each in sampler.state))
    state = state._replace(step=mx.arange(steps, dtype=mx.uint32))
    sampled, _ = next_token(sampler.spec, tensors, state, mx.repeat(mx.array([row]), steps, axis=0))
    counts = np.bincount(np.array(sampled.token), minlength=len(row))
    expected = np.array(naive.softmax([value / params["temperature"] for value in row])) * steps
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.47


def test_steps_differ() -> None:
    """The same logits again and again do not give the same token again and again."""
    sampler = Sampler(SamplingParams(**OPEN, seed=0), 12)
    assert len(set(draw(sampler, [mx.zeros((1, 12))] * 200))) == 12


def test_the_seed_decides() -> None:
    logits = [random_logits(i, size=100) for i in range(30)]

    def tokens(seed: int | None) -> list[int]:
        return draw(Sampler(SamplingParams(temperature=1.5, seed=seed), 100), logits)

    assert tokens(5) == tokens(5)
    assert len({tuple(tokens(seed)) for seed in (0, 1, 2, 2**32, 2**64 - 1)}) == 5
    assert tokens(None) != tokens(None)
    chosen = Sampler(SamplingParams(temperature=1.5), 100)
    assert draw(chosen, logits) == tokens(chosen.seed)


def test_the_global_generator_is_left_alone() -> None:
    logits = random_logits(0, size=12)
    mx.random.seed(1)
    expected = mx.random.uniform().item()
    first = draw(Sampler(SamplingParams(seed=3), 12), [logits] * 5)
    mx.random.seed(1)
    assert draw(Sampler(SamplingParams(seed=3), 12), [logits] * 5) == first
    assert mx.random.uniform().item() == expected


def test_a_token_that_is_no_candidate_does_not_change_the_draw() -> None:
    """Noise belongs to token ids: dropping losers, or ranking them, leaves the winner."""
    logits = [random_logits(i, size=50) for i in range(40)]
    everyone = draw(Sampler(SamplingParams(**OPEN, seed=1), 50), logits)
    ranked = draw(Sampler(SamplingParams(**OPEN | {"top_p": 0.999999}, seed=1), 50), logits)
    assert everyone == ranked


def test_noise_is_gumbel_and_independent() -> None:
    """Mean and variance of the standard Gumbel distribution, and no correlation between steps."""
    ids = mx.arange(20_000, dtype=mx.uint32)[None]
    key = rng.request_key(0)
    rows = [np.array(rng.gumbel(key, mx.array([step], dtype=mx.uint32), ids))[0] for step in (0, 1)]
    rows.append(np.array(rng.gumbel(rng.request_key(1), mx.array([0], dtype=mx.uint32), ids))[0])
    for row in rows:
        assert np.isfinite(row).all()
        assert row.mean() == pytest.approx(np.euler_gamma, abs=0.04)
        assert row.var() == pytest.approx(math.pi**2 / 6, abs=0.08)
    assert np.abs(np.corrcoef(rows) - np.eye(3)).max() < 0.03


def test_uniform_is_uniform() -> None:
    key = rng.request_key(0)
    numbers = [rng.uniform(key, mx.array([step], dtype=mx.uint32)) for step in range(2000)]
    values = np.array(mx.concatenate(numbers))
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    assert np.histogram(values, bins=4)[0].min() > 400
