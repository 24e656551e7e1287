"""Recommendations of a model's files apply where a caller sets nothing, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun import SamplingDefaults, SamplingParams
from mlxrun.errors import ParameterError

OURS = SamplingParams()
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
GGUF = {
    "general.sampling.temp": 0.35,
    "general.sampling.top_k": 7,
    "general.sampling.top_p": 0.95,
    "general.sampling.min_p": 0.02,
    "general.sampling.xtc_probability": 0.1,
    "general.sampling.xtc_threshold": 0.2,
    "general.sampling.penalty_last_n": 32,
    "general.sampling.penalty_repeat": 1.15,
    "general.sampling.mirostat": 2,
    "general.sampling.mirostat_tau": 4.5,
    "general.sampling.mirostat_eta": 0.15,
}
CONFIG = {
    "temperature": 0.35,
    "top_k": 7,
    "top_p": 0.95,
    "min_p": 0.02,
    "xtc_probability": 0.1,
    "xtc_threshold": 0.2,
    "penalty_last_n": 32,
    "repetition_penalty": 1.15,
    "mirostat": 2,
    "mirostat_tau": 4.5,
    "mirostat_eta": 0.15,
}


def tiny(path: Path, **general: Any) -> Path:
    recommended = {f"general.sampling.{key}": value for key, value in general.items()}
    return Tiny(template=TEMPLATE, general=recommended).write(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("defaults")


@pytest.fixture(scope="module")
def greedy(folder: Path) -> mlxrun.LLM:
    """A model that recommends the likeliest token."""
    return mlxrun.load(tiny(folder / "greedy.gguf", temp=0.0, top_k=9))


def directory(path: Path, config: object) -> Path:
    """A converted model with that ``generation_config.json``."""
    made = path.parent / f"{path.stem}-mlx"
    mlxrun.convert(tiny(path), made)
    (made / "generation_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("entries", [GGUF, CONFIG], ids=["gguf", "generation_config"])
def test_every_key_becomes_its_parameter(entries: dict[str, Any]) -> None:
    defaults = SamplingDefaults.of("x", entries)
    assert defaults.params == SamplingParams(**CONFIG)
    assert defaults.values == CONFIG and not defaults.problems


def test_float32_reads_as_it_was_written(folder: Path) -> None:
    recommended = {**GGUF, "general.sampling.mirostat": 0}
    llm = mlxrun.load(Tiny(general=recommended).write(folder / "all.gguf"))
    assert llm.defaults.values == CONFIG | {"mirostat": 0}
    assert llm.defaults.source == "all.gguf"


@pytest.mark.parametrize(
    ("entries", "changed"),
    [
        ({}, {}),
        ({"temperature": None, "eos_token_id": 2, "max_new_tokens": 9}, {}),
        ({"typical_p": 0.5}, {"typical_p": 0.5}),
        ({"do_sample": True}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),  # all, to llama.cpp and vLLM
    ],
)
def test_entries_of_a_generation_config(entries: dict[str, Any], changed: dict[str, Any]) -> None:
    defaults = SamplingDefaults.of("x", entries)
    assert defaults.params == SamplingParams(**changed)
    assert defaults.names == frozenset(changed) and not defaults.problems


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("temperature", "hot", "a number between 0 and 100"),
        ("temperature", float("nan"), "a number between 0 and 100"),
        ("top_p", 95, "a number between 0 and 1"),
        ("top_k", 2.5, "a whole number"),
        ("top_k", True, "a whole number"),
        ("repetition_penalty", [1], "a number between 0.01 and 100"),
        ("general.sampling.mirostat", 1, "0 (off) or 2"),
        ("general.sampling.top_k", np.array([1, 2]), "a whole number"),
    ],
)
def test_an_impossible_value_is_named_and_ours_is_used(key: str, value: Any, allowed: str) -> None:
    defaults = SamplingDefaults.of("x.json", {key: value, "min_p": 0.1})
    assert defaults.params == SamplingParams(min_p=0.1)
    (problem,) = defaults.problems
    assert problem.startswith(f"x.json: {key} must be {allowed}")
    assert f"not {value!r}; mlxrun's default" in problem


def test_loading_warns_of_it(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"hot\.gguf: general\.sampling\.temp must be .* not 500"):
        llm = mlxrun.load(tiny(folder / "hot.gguf", temp=500.0))
    assert llm.defaults.params == OURS
    made = directory(folder / "odd.gguf", {"top_p": 3})
    with pytest.warns(UserWarning, match=r"generation_config\.json: top_p must be .* not 3; "):
        assert mlxrun.load(made).defaults.params == OURS


def test_every_way_to_ask_uses_them(greedy: mlxrun.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
    messages = [{"role": "user", "content": "one"}]
    expected = greedy.generate("one", temperature=0, **options).tokens
    asked = greedy.chat(messages, temperature=0, **options).tokens
    assert greedy.generate("one", **options).tokens == expected
    assert greedy.chat(messages, **options).tokens == asked
    streamed = [t for chunk in greedy.stream("one", **options) for t in chunk.tokens]
    assert streamed == list(expected)
    assert [c.tokens for c in greedy.batch(["one"], progress=False, **options)] == [expected]
    with greedy.engine() as engine:
        assert engine.submit("one", **options).result().tokens == expected


def test_a_single_field_leaves_the_others_the_models(greedy: mlxrun.LLM) -> None:
    request = greedy.inputs.request("one", seed=5, top_p=0.5)
    assert request.params == SamplingParams(temperature=0, top_k=9, seed=5, top_p=0.5)


def test_params_are_taken_as_they_are(greedy: mlxrun.LLM) -> None:
    assert greedy.inputs.request("one", params=SamplingParams(seed=5)).params.temperature == 0.8


def test_they_may_be_set(folder: Path) -> None:
    llm = mlxrun.load(tiny(folder / "set.gguf", temp=0.5))
    llm.defaults = SamplingDefaults(SamplingParams(temperature=0, logprobs=1))
    assert llm.generate("one", max_tokens=1).to_dict()["logprobs"]
    llm.defaults = SamplingParams(temperature=0)
    assert llm.defaults == SamplingDefaults(SamplingParams(temperature=0))
    assert not llm.generate("one", max_tokens=1).to_dict()["logprobs"]


@pytest.mark.parametrize("value", [None, {"temperature": 0}, 0.5, SamplingParams])
def test_nothing_else_may_be_set(greedy: mlxrun.LLM, value: Any) -> None:
    before = greedy.defaults
    with pytest.raises(ParameterError, match="defaults must be SamplingDefaults or SamplingPar"):
        greedy.defaults = value
    assert greedy.defaults is before


def test_a_conversion_keeps_them(folder: Path) -> None:
    source = Tiny(template=TEMPLATE, general=GGUF).write(folder / "kept.gguf")
    mlxrun.convert(source, folder / "kept")
    stored = json.loads((folder / "kept" / "generation_config.json").read_text())
    assert CONFIG.items() <= stored.items() and stored["do_sample"] is True
    assert mlxrun.load(folder / "kept").defaults.values == CONFIG
    mlxrun.convert(folder / "kept", folder / "again")
    assert mlxrun.load(folder / "again").defaults.values == CONFIG


def test_a_conversion_writes_greedy_as_transformers_has_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    mlxrun.convert(tiny(folder / "likeliest.gguf", temp=0.0), folder / "likeliest")
    stored = json.loads((folder / "likeliest" / "generation_config.json").read_text())
    assert stored["do_sample"] is False and "temperature" not in stored
    assert mlxrun.load(folder / "likeliest").defaults.params.greedy
    stock = transformers.GenerationConfig.from_pretrained(str(folder / "likeliest"))
    stock.validate(strict=True)


def test_a_conversion_adds_none_of_its_own(folder: Path) -> None:
    mlxrun.convert(tiny(folder / "plain.gguf"), folder / "plain")
    stored = json.loads((folder / "plain" / "generation_config.json").read_text())
    assert not {"do_sample", *CONFIG} & set(stored)
    assert mlxrun.load(folder / "plain").defaults == SamplingDefaults(
        source="generation_config.json"
    )
