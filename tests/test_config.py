"""Options: declared once, typed, and refused by name with the nearest one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import mlxrun
from converters.quantize import policy
from mlxrun import loader
from mlxrun.config import (
    DTYPES,
    POLICIES,
    CacheConfig,
    CacheOptions,
    EngineConfig,
    EngineOptions,
    LoadConfig,
    LoadOptions,
    StorageConfig,
    StorageOptions,
    options_of,
)
from mlxrun.errors import ParameterError
from mlxrun.outputs import BatchOptions, Request, RequestOptions
from mlxrun.sampling_params import SamplingOptions, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
# Fields that are stored as another type than callers may give.
WIDER = {"stop", "dry_sequence_breakers"}


def hints(cls: type, *without: str) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(cls).items() if name not in without}


def declared(cls: type) -> dict[str, Any]:
    return {name: hint for name, hint in hints(cls).items() if name in options_of(cls)}


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (LoadOptions, declared(LoadConfig)),
        (StorageOptions, declared(StorageConfig)),
        (CacheOptions, declared(CacheConfig)),
        (EngineOptions, declared(EngineConfig) | declared(StorageConfig)),
        (SamplingOptions, declared(SamplingParams)),
    ],
)
def test_typed_dicts_are_the_fields(options: type, fields: dict[str, Any]) -> None:
    keys = hints(options)
    assert keys.keys() == fields.keys()
    for name in keys.keys() - WIDER:
        assert keys[name] == fields[name], name


def test_options_of_requests_are_the_fields_of_requests() -> None:
    rest = {"params", "parse_special", "template"}
    fields = declared(Request) | declared(SamplingParams)
    keys = hints(RequestOptions)
    assert keys.keys() - rest == fields.keys()
    for name in fields.keys() - WIDER:
        assert keys[name] == fields[name], name


def test_options_of_batches_are_those_of_requests_and_engines_some_of_them_in_lists() -> None:
    batch, shared = hints(BatchOptions), hints(EngineOptions, "queue")
    single = hints(RequestOptions)
    assert batch.keys() == single.keys() | shared.keys()
    for name, hint in batch.items():
        parts = set(get_args(hint)) if get_origin(hint) is not get_origin(list[int]) else {hint}
        of = single.get(name, shared.get(name))
        assert hint == of or parts >= (set(get_args(of)) or {of}), name


@pytest.mark.parametrize("cls", [LoadConfig, CacheConfig, EngineConfig, SamplingParams])
def test_configs_are_immutable_and_documented(cls: Any) -> None:
    config = cls()
    for name, option in options_of(cls).items():
        assert option.help.endswith("."), name
        assert f"{name}: {option.help}" in cls.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)


def test_patterns_and_windows_are_one_config() -> None:
    assert CacheConfig(attention="window:100+2") == CacheConfig(window=100, keep=2)
    assert CacheConfig(attention="dense") == CacheConfig()
    with pytest.raises(ParameterError, match="left out where a window is given"):
        CacheConfig(attention="strided:8/4", window=3)


def test_a_request_overrides_the_engine() -> None:
    engine = CacheConfig(window=100, cache_type_k="q8", cache_type_v="q8")
    assert engine.overridden(Request([1])) is engine
    own = Request([1], attention="dense", cache_type_k="f16")
    assert engine.overridden(own) == CacheConfig(cache_type_k="f16", cache_type_v="q8")
    longer = Request([1], attention="window:200")
    assert engine.overridden(longer).window == 200


def test_names_are_those_of_the_loader() -> None:
    assert tuple(policy.POLICIES) == POLICIES
    assert tuple(loader.DTYPES) == DTYPES


DEMO = Path(mlxrun.__file__).parent / "assets" / "demo.gguf"


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: mlxrun.load(DEMO, dtpye="float32"),
        lambda llm: llm.generate("a", dtpye=1, temprature=0.5),
        lambda llm: llm.stream("a", temprature=0.5),
        lambda llm: llm.chat([{"role": "user", "content": "a"}], temprature=0),
        lambda llm: llm.batch(["a"], temprature=0),
        lambda llm: llm.session(windw=3),
        lambda llm: llm.load_session("x", windw=3),
        lambda llm: llm.engine(paralel=3),
        lambda llm: llm.room(paralel=3),
        lambda llm: llm.perplexity("a", contxt=3),
        lambda llm: mlxrun.compare(llm, llm, "a", contxt=3),
    ],
)
def test_a_misspelt_option_is_refused_with_the_nearest(call: Any) -> None:
    llm = mlxrun.load(DEMO)
    with pytest.raises(ParameterError, match=r"dtype|temperature|window|parallel|context"):
        call(llm)


# A line each, and whether mypy accepts it.
SNIPPET = """\
import mlxrun
llm = mlxrun.load("m.gguf", dtype="float32", adapter=["a", ("b", 0.5)], wired=True)
mlxrun.load("m.gguf", dytpe="float32")  # wrong
mlxrun.load("m.gguf", dtype=32)  # wrong
llm.generate("a", max_tokens=3, temperature=0.5, stop="x", cache_type_k="q8", session=llm.session())
llm.generate("a", temprature=0.5)  # wrong
llm.generate("a", temperature="0.5")  # wrong
llm.stream("a", top_k=0.5)  # wrong
llm.chat([{"role": "user", "content": "a"}], progress=3)  # wrong
llm.batch(["a", "b"], temperature=[0, 1], max_tokens=[3, None], parallel=2)
llm.batch(["a"], top_k=[1])  # wrong
llm.session(window=8, keep=2, cache_type_v="q4")
llm.session(widow=8)  # wrong
llm.load_session("f", window="8")  # wrong
engine = llm.engine(parallel=3, queue=8, stall=0.5, attention="window:64")
llm.engine(paralel=3)  # wrong
engine.submit("a", priority=2, deadline=1.5)
engine.submit("a", deadlin=1)  # wrong
llm.room(context="4k")  # wrong
llm.perplexity("a", context=64, stride=8)
llm.perplexity("a", contxt=64)  # wrong
mlxrun.compare(llm, llm, "a", b_cache_type_k="q8")
mlxrun.compare(llm, llm, "a", cache_type_k="q8")  # wrong
mlxrun.convert("m.gguf", "out", policy="near")
mlxrun.convert("m.gguf", "out", polcy="near")  # wrong
mlxrun.SamplingParams(top_k="3")  # wrong
"""


def test_a_misspelt_or_mistyped_option_fails_in_mypy(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    lines = {int(line.split(":")[1]) for line in found.splitlines() if ": error:" in line}
    wrong = {i for i, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith("# wrong")}
    assert lines == wrong, found


def test_cache_types_travel_as_one_value() -> None:
    files = [path for path in (ROOT / "mlxrun").rglob("*.py") if "cache_type_k" in path.read_text()]
    assert len(files) <= 4
