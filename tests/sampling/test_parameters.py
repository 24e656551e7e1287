"""Sampling parameters: defaults, normalization, and every wrong value refused by name and range."""

from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.errors import ParameterError
from mlxrun.outputs import SamplingParams

# name: lowest and highest allowed value, and whether it is a whole number
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, False),
    "top_k": (0, 2**31 - 1, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, False),
    "typical_p": (0, 1, False),
    "xtc_probability": (0, 1, False),
    "xtc_threshold": (0, 1, False),
    "dry_multiplier": (0, 100, False),
    "dry_base": (1, 100, False),
    "dry_allowed_length": (1, 2**31 - 1, True),
    "dry_penalty_last_n": (-1, 2**31 - 1, True),
    "mirostat_tau": (0, 100, False),
    "mirostat_eta": (0, 1, False),
    "repetition_penalty": (0.01, 100, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "penalty_last_n": (-1, 2**31 - 1, True),
    "seed": (0, 2**64 - 1, True),
    "logprobs": (0, 2**31 - 1, True),
}
NEVER_NUMBERS: list[Any] = ["0.5", True, [1], b"1", {}, 1j, math.nan, math.inf, -math.inf]


def refused(name: str, value: object) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{caught.value.name} must be ")
    return caught.value


def test_every_number_has_a_range() -> None:
    numbers = {f.name for f in dataclasses.fields(SamplingParams)}
    assert numbers == RANGES.keys() | {"mirostat", "dry_sequence_breakers", "logit_bias"}


@pytest.mark.parametrize("name", RANGES)
def test_bounds(name: str) -> None:
    low, high, whole = RANGES[name]
    below = low - 1 if whole else math.nextafter(low, -math.inf)
    above = high + 1 if whole else math.nextafter(high, math.inf)
    assert getattr(SamplingParams(**{name: low}), name) == low
    error = refused(name, below)
    assert error.name == name
    assert error.value == below
    bounds = f"between {low} and " + ("2**64 - 1" if name == "seed" else f"{high}")
    assert bounds in error.allowed
    assert getattr(SamplingParams(**{name: high}), name) == high
    assert refused(name, above).value == above


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [*NEVER_NUMBERS, None], ids=repr)
def test_what_is_no_number(name: str, value: object) -> None:
    if name == "seed" and value is None:
        assert SamplingParams(seed=None).seed is None
    else:
        assert refused(name, value).name == name


@pytest.mark.parametrize("name", [name for name, (_, _, whole) in RANGES.items() if whole])
def test_whole_numbers_are_not_floats(name: str) -> None:
    assert "whole number" in refused(name, 2.0).allowed


@pytest.mark.parametrize("value", [1, 3, -2, True, "2", None, 2.5])
def test_mirostat_has_two_versions_here(value: object) -> None:
    assert refused("mirostat", value).allowed == "0 (off) or 2"


@pytest.mark.parametrize(
    "value",
    [[1, 2], {"a": 1}, {-1: 0.5}, {True: 1.0}, {1.0: 1.0}]
    + [{1: bad} for bad in [math.nan, math.inf, "1", None, True, 1e9, 10**400]],
    ids=repr,
)
def test_logit_bias_is_refused(value: object) -> None:
    assert refused("logit_bias", value).name.startswith("logit_bias")


@given(st.dictionaries(st.integers(0, 10**6), st.floats(-1000, 1000) | st.just(-math.inf)))
def test_logit_bias_is_copied(bias: dict[int, float]) -> None:
    params = SamplingParams(logit_bias=bias)
    assert params.logit_bias == bias
    bias[1] = 99
    assert params.logit_bias is not bias


@pytest.mark.parametrize("value", [[""], ["a", 1], 5, b"ab", None, {"a": 1}], ids=repr)
def test_sequence_breakers_are_refused(value: object) -> None:
    assert refused("dry_sequence_breakers", value).name == "dry_sequence_breakers"


def test_values_become_plain() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(7),
        top_p=Fraction(1, 2),
        seed=np.uint64(3),
        dry_sequence_breakers=["\n"],
        logit_bias={np.int32(4): np.float32(1.5)},
    )
    assert [type(v) for v in (params.temperature, params.top_k, params.top_p, params.seed)] == [
        float,
        int,
        float,
        int,
    ]
    assert params.dry_sequence_breakers == ("\n",)
    assert {type(token) for token in params.logit_bias} == {int}
    assert SamplingParams(dry_sequence_breakers="ab").dry_sequence_breakers == ("ab",)  # type: ignore[arg-type]


def test_parameters_are_values() -> None:
    params = SamplingParams(top_k=3, logit_bias={1: 2.0})
    assert params == SamplingParams(top_k=3, logit_bias={1: 2.0})
    assert hash(params) == hash(SamplingParams(top_k=3, logit_bias={1: 2.0}))
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, top_k=4).top_k == 4
    with pytest.raises(ParameterError):
        dataclasses.replace(params, top_k=-4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 5  # type: ignore[misc]


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy
