"""Options and settings: complete, checked, the same on the command line, in /set and in JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import click
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from mlxrun.cli.options import (
    SETTINGS,
    CountList,
    chat_defaults,
    defaults,
    parse,
    parse_settings,
    store_settings,
    take_settings,
    with_settings,
    words_of,
)
from mlxrun.errors import ParameterError
from mlxrun.outputs import SamplingParams

WORDS = st.text(min_size=1).filter(lambda text: text.lower() != "none")
VALUES = {
    "max_tokens": st.none() | st.integers(1, 10**9),
    "stop": st.lists(WORDS).map(tuple),
    "seed": st.none() | st.integers(0, 2**64 - 1),
    "temperature": st.floats(0, 100),
    "top_k": st.integers(0, 2**31 - 1),
    "xtc_threshold": st.floats(0, 1),
    "dry_sequence_breakers": st.lists(WORDS).map(tuple),
    "mirostat": st.sampled_from([0, 2]),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(
        st.integers(0, 10**6), st.floats(-1000, 1000) | st.just(-math.inf)
    ),
}


def test_every_sampling_parameter_has_a_setting():
    assert set(SETTINGS) == {field.name for field in fields(SamplingParams)} | {
        "max_tokens",
        "stop",
    }


def test_defaults_are_those_of_the_owner():
    params = SamplingParams()
    for name, value in defaults().items():
        if name not in ("max_tokens", "stop"):
            assert getattr(params, name) == value
    assert "logprobs" not in chat_defaults()


@pytest.mark.parametrize("name", VALUES)
@examples(data=st.data())
def test_words_and_json_give_the_value_back(name, data):
    value = data.draw(VALUES[name])
    assert parse(name, SETTINGS[name], words_of(value)) == value
    stored = json.loads(json.dumps(store_settings({name: value}), allow_nan=False))
    assert parse_settings(stored, SETTINGS) == {name: value}


@pytest.mark.parametrize(
    ("name", "words", "allowed"),
    [
        ("temperature", ["101"], "between 0 and 100"),
        ("temperature", ["hot"], "between 0 and 100"),
        ("temperature", ["nan"], "between 0 and 100"),
        ("temperature", ["1", "2"], "one value"),
        ("top_k", ["1.5"], "a whole number"),
        ("mirostat", ["1"], "0 (off) or 2"),
        ("seed", ["-1"], "None or a whole number"),
        ("max_tokens", ["0"], "at least 1"),
        ("stop", [""], "none of them empty"),
        ("logit_bias", ["x=1"], "token ids"),
        ("logit_bias", ["5"], "a number"),
    ],
)
def test_wrong_values_name_the_range(name, words, allowed):
    with pytest.raises(ParameterError, match=name) as caught:
        parse(name, SETTINGS[name], words)
    assert allowed in caught.value.allowed


@pytest.mark.parametrize(("written", "count"), [("4k", 4096), ("1e3", 1000), ("2E1", 20)])
def test_numbers_of_tokens(written, count):
    assert parse("max_tokens", SETTINGS["max_tokens"], [written]) == count


def test_unknown_setting_in_json():
    with pytest.raises(ParameterError, match="temprature"):
        parse_settings({"temprature": 1}, SETTINGS)


@pytest.mark.parametrize("stored", [{"top_k": {"a": 1}}, {"stop": 3.5}, {"seed": [1, 2]}])
def test_nonsense_in_json(stored):
    try:
        values = parse_settings(stored, SETTINGS)
    except ParameterError:
        return
    assert values == {"stop": ("3.5",)}


def test_only_what_was_given_counts():
    words = ["--temperature", "0", "--stop", "a", "--stop", "\\n", "--logit-bias", "3=-inf"]
    command = click.command(with_settings(defaults())(lambda **options: take_settings(options)))
    given = command.main([*words, "--seed", "none"], standalone_mode=False)
    assert given == {
        "temperature": 0.0,
        "stop": ("a", "\n"),
        "logit_bias": {3: -math.inf},
        "seed": None,
    }


@pytest.mark.parametrize(
    "args", [["--temp", "-1"], ["--top-p", "2"], ["-n", "0"], ["--logit-bias", "x"]]
)
def test_wrong_options_are_wrong_usage(mlxrun_cli, args):
    """Refused before anything is loaded: there is no such model."""
    result = mlxrun_cli("generate", "nowhere.gguf", "-p", "x", *args)
    assert result.code == 2
    assert f"Invalid value for {args[0]!r}" in result.err.replace("'-n' / ", "'-n', ") or (
        "must be" in result.err
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [("128,512", (128, 512)), ("1k, 4K", (1024, 4096)), ("0", (0,)), ("2,2,1", (2, 1))],
)
def test_lists_of_numbers(text, found):
    assert CountList().convert(text, None, None) == found


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1.5", "1g", "17m", "9" * 40, "１"])
def test_what_is_no_list_of_numbers(text):
    with pytest.raises(click.BadParameter, match="is not numbers from 1"):
        CountList(1).convert(text, None, None)
