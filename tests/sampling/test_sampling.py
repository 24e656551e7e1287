"""The sampler as a whole: order of stages, chance, batches, laziness, log-probabilities."""

from __future__ import annotations

import copy
import math
from typing import Any

import mlx.core as mx
import naive_sampling as naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlxrun.errors import ParameterError
from mlxrun.outputs import SamplingParams
from mlxrun.sampling import rng
from mlxrun.sampling import sampler as sampling
from mlxrun.sampling.sampler import Sampler, SamplerState, SamplingSpec, SamplingTensors

VOCABULARY = 12
OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # every stage off


def random_logits(seed: int, rows: int = 1, size: int = VOCABULARY) -> mx.array:
    values = np.random.default_rng(seed).normal(size=(rows, size)) * 3
    return mx.array(values.astype(np.float32))


def draw(sampler: Sampler, logits: list[mx.array]) -> list[int]:
    return mx.concatenate([sampler.sample(each).token for each in logits]).tolist()


@st.composite
def parameters(draw: st.DrawFn) -> SamplingParams:
    """Parameters with a random choice of stages on."""

    def maybe(strategy: st.SearchStrategy[Any], off: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else off

    return SamplingParams(
        temperature=draw(st.sampled_from([0, 0.3, 1, 1.7])),
        top_k=maybe(st.integers(1, VOCABULARY + 3), 0),
        top_p=maybe(st.floats(0, 0.999), 1),
        min_p=maybe(st.floats(0.001, 1), 0),
        typical_p=maybe(st.floats(0, 0.999), 1),
        xtc_probability=maybe(st.floats(0.2, 1), 0),
        xtc_threshold=draw(st.floats(0.01, 0.6)),
        dry_multiplier=maybe(st.floats(0.1, 3), 0),
        dry_base=draw(st.floats(1, 2)),
        dry_allowed_length=draw(st.integers(1, 3)),
        dry_penalty_last_n=draw(st.sampled_from([-1, 0, 1, 2, 9, 100])),
        mirostat=draw(st.sampled_from([0, 0, 0, 2])),
        mirostat_tau=draw(st.floats(0.1, 4)),
        repetition_penalty=maybe(st.floats(0.5, 2), 1),
        presence_penalty=maybe(st.floats(-2, 2), 0),
        frequency_penalty=maybe(st.floats(-2, 2), 0),
        penalty_last_n=draw(st.sampled_from([-1, 0, 1, 5, 100])),
        logit_bias=maybe(
            st.dictionaries(
                st.integers(0, VOCABULARY - 2), st.floats(-5, 5) | st.just(-math.inf), max_size=4
            ),
            {},
        ),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@settings(max_examples=400)
@given(
    parameters(),
    naive.pasts(5),
    naive.breakers(5),
    st.integers(0, 2**32 - 1),
)
def test_the_stages_act_in_the_documented_order(
    params: SamplingParams, past: list[int], breakers: set[tuple[int, ...]], seed: int
) -> None:
    logits = random_logits(seed)
    naive.CLOSE.clear()
    sampler = Sampler(params, VOCABULARY, context_tokens=past, dry_breakers=breakers)
    chance = rng.uniform(sampler.tensors.key, sampler.state.step).item()
    expected = dict(naive.pipeline(logits[0].tolist(), params, past, breakers, chance))
    assume(all(distance > 1e-5 for distance in naive.CLOSE))
    left, ids = sampling.distribution(sampler.spec, sampler.tensors, sampler.state, logits)
    values = np.array(left)[0]
    found = {
        int(token): float(value)
        for token, value in zip(np.array(mx.broadcast_to(ids, left.shape))[0], values, strict=True)
        if value > -math.inf
    }
    expected = {token: value for token, value in expected.items() if value > -math.inf}
    assert found.keys() == expected.keys()
    peak = max(expected.values()) - max(found.values())
    for token, value in expected.items():
        assert found[token] == pytest.approx(value - peak, rel=1e-4, abs=2e-3)
    assert sampler.sample(logits).token.item() in expected


def test_off_stages_are_not_planned() -> None:
    spec = SamplingSpec.of(SamplingParams(**OPEN), VOCABULARY)
    assert spec == SamplingSpec(False, False, 0, 0, 0, False, False, False, False, 0)
    assert not spec.ranks
    greedy = SamplingSpec.of(
        SamplingParams(temperature=0, mirostat=2, xtc_probability=1), VOCABULARY
    )
    assert greedy == SamplingSpec(True, False, 0, 0, 0, False, False, False, False, 0)


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0, 2.5]), min_size=1, max_size=9))
def test_greedy_takes_the_lowest_id_of_equals(row: list[float]) -> None:
    sampler = Sampler(SamplingParams(temperature=0), len(row))
    assert sampler.sample(mx.array([row])).token.tolist() == [row.index(max(row))]


STAGES: list[dict[str, Any]] = [
    {},
    OPEN,
    {"mirostat": 2},
    {"typical_p": 0.9, "xtc_probability": 0.5},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "penalty_last_n": 4},
    {"dry_multiplier": 0.8, "dry_penalty_last_n": 8, "temperature": 2.0, "logprobs": 3},
]


@pytest.mark.parametrize("params", STAGES)
def test_rows_of_a_batch_sample_the_same_tokens_as_alone(params: dict[str, Any]) -> None:
    samplers = [
        Sampler(
            SamplingParams(**{"temperature": 0.5 + i, **params}, seed=i),
            VOCABULARY,
            context_tokens=[i, i + 1, i, i + 1],
            dry_breakers=[(3,), (4, 5)],
        )
        for i in range(4)
    ]
    tensors = SamplingTensors(*map(mx.concatenate, zip(*(each.tensors for each in samplers))))  # noqa: B905
    state = SamplerState(*map(mx.concatenate, zip(*(each.state for each in samplers))))  # noqa: B905
    for step in range(12):
        logits = random_logits(step, rows=4)
        together, state = sampling.next_token(samplers[0].spec, tensors, state, logits)
        alone = [each.sample(logits[i : i + 1]) for i, each in enumerate(samplers)]
        assert together.token.tolist() == [each.token.item() for each in alone]
        if together.logprob is not None:
            expected = [each.logprob.item() for each in alone if each.logprob is not None]
            assert together.logprob.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("params", STAGES)
def test_steps_need_no_evaluation(params: dict[str, Any]) -> None:
    """Thirty steps queued at once sample the same as thirty evaluated ones."""
    logits = [random_logits(i) for i in range(30)]
    params = SamplingParams(**params, seed=9)
    queued = draw(Sampler(params, VOCABULARY, context_tokens=[1, 2, 1]), logits)
    waiting = Sampler(params, VOCABULARY, context_tokens=[1, 2, 1])
    assert queued == [waiting.sample(each).token.item() for each in logits]


def test_a_step_can_be_compiled() -> None:
    params = SamplingParams(
        seed=4, repetition_penalty=1.1, dry_multiplier=0.5, penalty_last_n=8, dry_penalty_last_n=8
    )
    sampler = Sampler(params, VOCABULARY, context_tokens=[1, 2, 1], dry_breakers=[(0,)])
    spec, tensors = sampler.spec, sampler.tensors
    step = mx.compile(lambda state, x: sampling.next_token(spec, tensors, SamplerState(*state), x))
    state = sampler.state
    for i in range(10):
        sampled, state = step(state, random_logits(i))
        assert sampled[0].tolist() == sampler.sample(random_logits(i)).token.tolist()


@pytest.mark.parametrize(
    "stages",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 0.1, "penalty_last_n": -1},
        {"dry_multiplier": 0.1, "dry_penalty_last_n": -1, "dry_base": 1.1},
        {"presence_penalty": 1.0, "penalty_last_n": 7, "dry_multiplier": 0.1},
        {"frequency_penalty": 0.01, "penalty_last_n": 500},
        {"dry_multiplier": 0.1, "dry_penalty_last_n": 300, "dry_base": 1.1},
        {"dry_multiplier": 0.1, "dry_penalty_last_n": 2**31 - 1, "dry_base": 1.1},
        {"dry_multiplier": 0.1, "dry_penalty_last_n": 2, "dry_allowed_length": 1},
    ],
)
def test_carried_state_equals_state_from_scratch(stages: dict[str, Any]) -> None:
    """After many steps, past every widening of the window, as after a prompt of the same tokens."""
    breakers = [(0,), (1, 2), (3, 4, 3)]
    params = SamplingParams(**OPEN | {"temperature": 3.0} | stages, seed=3)
    past = [1, 2, 3, 2, 3]
    logits = random_logits(0, size=6)
    carried = Sampler(params, 6, context_tokens=past, dry_breakers=breakers)
    past = past + draw(carried, [logits] * 580)
    for _ in range(20):
        past = past + draw(carried, [logits])
        fresh = Sampler(params, 6, context_tokens=past, dry_breakers=breakers)
        left, right = (
            sampling.distribution(each.spec, each.tensors, each.state, logits)[0]
            for each in (carried, fresh)
        )
        assert mx.array_equal(left, right)
    expected = naive.pipeline(logits[0].tolist(), params, past, set(breakers), chance=1.0)
    by_id = [value - expected[0][1] for _, value in sorted(expected)]
    np.testing.assert_allclose(np.array(left)[0], by_id, rtol=1e-4, atol=1e-3)


def test_a_copy_continues_independently() -> None:
    logits = [random_logits(i) for i in range(20)]
    sampler = Sampler(SamplingParams(seed=2, mirostat=2, dry_multiplier=1.0), VOCABULARY)
    draw(sampler, logits[:10])
    snapshot = copy.copy(sampler)
    assert draw(sampler, logits[10:]) == draw(snapshot, logits[10:])


def test_mirostat_steers_to_its_target() -> None:
    """The observed surprise averages tau where the distribution allows it."""
    size, tau = 1000, 3.0
    sampler = Sampler(SamplingParams(seed=0, temperature=1, mirostat=2, mirostat_tau=tau), size)
    logits = -1.1 * mx.log(mx.arange(1, size + 1).astype(mx.float32))[None]
    surprises = []
    for _ in range(300):
        kept, _ = sampling.distribution(sampler.spec, sampler.tensors, sampler.state, logits)
        token = sampler.sample(logits).token
        chosen = kept[0, token] - mx.logsumexp(kept)
        surprises.append(-chosen.item() / math.log(2))
    assert np.mean(surprises[50:]) == pytest.approx(tau, abs=0.3)


def test_mirostat_moves_mu_by_the_error() -> None:
    params = SamplingParams(seed=0, temperature=1, mirostat=2, mirostat_tau=0.5, mirostat_eta=0.3)
    sampler = Sampler(params, 3)
    row = [0.0, 0.5, 1.0]
    token = sampler.sample(mx.array([row])).token.item()
    kept = naive.mirostat(naive.rank(row), 1.0)
    likelihood = dict(zip((t for t, _ in kept), naive.probabilities(kept), strict=True))
    expected = 1.0 - 0.3 * (-math.log2(likelihood[token]) - 0.5)
    assert sampler.state.mu.item() == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, VOCABULARY + 2))
def test_logprobs_are_the_models_own(seed: int, count: int) -> None:
    logits = random_logits(seed)
    params = SamplingParams(
        logprobs=count, temperature=0.5, top_k=2, logit_bias={3: 9.0}, repetition_penalty=2, seed=1
    )
    sampled = Sampler(params, VOCABULARY, context_tokens=[1, 2]).sample(logits)
    expected = np.log(naive.softmax(logits[0].tolist()))
    assert sampled.logprob is not None
    assert sampled.top_tokens is not None
    assert sampled.top_logprobs is not None
    assert sampled.logprob.item() == pytest.approx(expected[sampled.token.item()], abs=1e-5)
    order = np.argsort(-expected, kind="stable")[:count]
    assert sampled.top_tokens[0].tolist() == order.tolist()
    np.testing.assert_allclose(np.array(sampled.top_logprobs)[0], expected[order], atol=1e-5)


@pytest.mark.parametrize("size", [49_152, 262_144])
def test_logprobs_and_surprise_over_a_large_vocabulary(size: int) -> None:
    logits = random_logits(5, size=size)
    exact = np.array(logits[0], dtype=np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    mirostat = {"mirostat": 2, "mirostat_tau": 50.0, "mirostat_eta": 1.0}  # drops nothing
    sampler = Sampler(SamplingParams(**OPEN | mirostat, logprobs=5, seed=1), size)
    sampled = sampler.sample(logits)
    assert sampled.logprob is not None
    assert sampled.top_logprobs is not None
    token = sampled.token.item()
    assert sampled.logprob.item() == pytest.approx(exact[token], abs=2e-6)
    highest = np.sort(exact)[::-1][:5]
    np.testing.assert_allclose(np.array(sampled.top_logprobs)[0], highest, atol=2e-6)
    surprise = 100 + 50 - sampler.state.mu.item()
    assert surprise == pytest.approx(-exact[token] / math.log(2), abs=2e-5), "float32 near 130"


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100])
def test_extreme_temperatures_stay_sound(temperature: float) -> None:
    logits = mx.array([[-1e30, 50.0, 80.0, -math.inf]])
    sampler = Sampler(SamplingParams(**OPEN | {"temperature": temperature}, seed=0), 4)
    tokens = set(draw(sampler, [logits] * 20))
    assert tokens <= {1, 2}
    assert tokens == {2} or temperature == 100


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_will_do(dtype: mx.Dtype) -> None:
    logits = random_logits(0).astype(dtype)
    half = draw(Sampler(SamplingParams(seed=1, logprobs=1), VOCABULARY), [logits] * 10)
    full = [logits.astype(mx.float32)] * 10
    assert half == draw(Sampler(SamplingParams(seed=1), VOCABULARY), full)


def test_a_vocabulary_of_one() -> None:
    params = SamplingParams(seed=0, typical_p=0.5, xtc_probability=1, dry_multiplier=1, logprobs=5)
    sampler = Sampler(params, 1, context_tokens=[0, 0, 0])
    sampled = sampler.sample(mx.array([[0.3]]))
    assert sampled.token.tolist() == [0]
    assert sampled.logprob is not None
    assert sampled.logprob.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "params", "given"),
    [
        ("logit_bias", {"logit_bias": {12: 1.0}}, {}),
        ("dry_breakers", {"dry_multiplier": 1}, {"dry_breakers": [(1, 99)]}),
    ],
)
def test_ids_that_the_vocabulary_lacks_are_refused(
    name: str, params: dict[str, Any], given: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError, match="token ids from 0 to 11") as caught:
        Sampler(SamplingParams(**params), VOCABULARY, **given)
    assert caught.value.name == name
