"""Choices are printed and follow the options; a slow BLAS is mentioned once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.cli.main import run
from mlxrun.errors import ParameterError
from mlxrun.kernels import blas
from mlxrun.kernels import dispatch as kernels
from mlxrun.loader import expands
from mlxrun.memory import device as memory

NAMES = [
    "device",
    "blas",
    "dtype",
    "weights",
    "products",
    "projections",
    "cache",
    "decode",
    "prefill",
    "sampling",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = Tiny(kinds={"*": "Q4_0"}, keys={"context_length": 256})
    return tiny.write(tmp_path_factory.mktemp("choices") / "tiny.gguf")


def test_choices_are_lines_of_names_and_values(file: Path) -> None:
    choices = mlxrun.load(file).choices
    assert [line.split(": ")[0] for line in str(choices).splitlines()] == NAMES
    assert choices.dtype.startswith("float32")


def test_without_kernels_the_share_of_memory_decides_the_form(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "available", lambda *_: kernels.Missing("there is no compiler"))
    plain = mlxrun.load(file)
    assert plain.storage.missed == "there is no compiler"
    assert plain.choices.products == "MLX's own: there is no compiler"
    assert run(["generate", str(file), "-p", "a", "-n", "1", "-v"]) == 0
    hints = [line for line in capsys.readouterr().err.splitlines() if "no compiler" in line]
    assert len(hints) == 2  # the choice, and its cost
    assert plain.choices.weights.startswith("plain float32: ")
    monkeypatch.setenv(memory.SHARE, "0")
    packed = mlxrun.load(file)
    assert packed.choices.weights.startswith("packed: ")
    assert packed.model.nbytes < plain.model.nbytes / 2


def test_a_policy_decides_the_form(file: Path) -> None:
    converted = mlxrun.load(file, policy="near")
    assert (converted.choices.weights, converted.choices.products) == ("policy near", "MLX's own")


def test_plain_weights_of_a_directory_are_multiplied_by_kernels(file: Path, tmp_path: Path) -> None:
    mlxrun.convert(file, tmp_path / "out")
    plain = mlxrun.load(tmp_path / "out").choices
    assert plain.weights.startswith("plain float32")
    assert plain.products.startswith("activations in float32, ")


def test_without_one_weights_stay_as_they_are(file: Path) -> None:
    assert mlxrun.load(file).choices.weights.startswith("GGUF blocks as stored: 16 matrices")
    products = mlxrun.load(file, products="fast").choices.products
    assert products.startswith("fast, activations in 8 bits, ")
    assert products.endswith(" threads (products=, --products)")


def test_weights_beyond_the_share_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    assert not expands(125, "float32", fixed_experts=False)[0]
    assert expands(124, "float32", fixed_experts=False)[0]
    monkeypatch.setenv(memory.LIMIT, "500")
    assert not expands(63, "float32", fixed_experts=False)[0]
    assert expands(62, "float32", fixed_experts=False)[0]
    assert not expands(1, "float32", fixed_experts=True)[0]
    assert not expands(1, "float16", fixed_experts=False)[0]


@pytest.mark.parametrize("wrong", ["half", "-0.1", "1.5", "1e9", "nan", "50%"])
def test_a_share_is_a_number_from_0_to_1(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.SHARE, wrong)
    with pytest.raises(ParameterError, match=memory.SHARE):
        memory.plain_room()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "-p", "a", "-n", "1"],
        ["generate", "-p", "a", "-n", "1", "--json"],
        ["check-batch", "--requests", "2"],
        ["bench", "-p", "2", "-n", "0", "-r", "1"],
    ],
)
def test_every_command_prints_the_choices(
    file: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command[0], str(file), *command[1:], "-v"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines if line.split(": ")[0] in NAMES] == NAMES


def test_types_of_cache_are_printed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["generate", str(file), "-p", "a", "-n", "1", "-v", "--cache-type-k", "q8"])
    assert "cache: keys in q8, values in float32" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has a BLAS")
@pytest.mark.parametrize(
    ("first", "environment", "expected"),
    [
        ("mlx.core", {}, "import mlxrun first"),
        (
            "mlxrun",
            {blas.VARIABLE: "absent.so"},
            "MLXRUN_BLAS names absent.so, which cannot be loaded: absent.so: cannot open",
        ),
        ("mlxrun", {blas.VARIABLE: "0"}, "None"),
    ],
)
def test_a_slow_blas_is_explained_once(
    first: str, environment: dict[str, str], expected: str
) -> None:
    script = (
        f"import {first}; from mlxrun.kernels.blas import advice; print(advice()); print(advice())"
    )
    inherited = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(mlxrun.__file__).parents[1])}
    asked = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    once, twice = asked.stdout.splitlines()
    assert expected in once
    assert twice == "None"


def test_the_hint_is_for_terminals_and_for_who_asks(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlxrun.cli.loading.LARGE", 0)
    monkeypatch.setattr(blas, "hint", lambda: "get one")

    def advised(*arguments: str, policy: str = "near") -> bool:
        loading = ["--policy", policy] if policy else []
        run(["generate", str(file), "-p", "a", "-n", "1", *loading, *arguments])
        return "hint: get one" in capsys.readouterr().err

    monkeypatch.setattr(blas, "_advised", False)
    assert not advised()
    monkeypatch.setattr(blas, "_advised", False)
    assert not advised("-v", policy="")  # blocks are multiplied without a BLAS
    monkeypatch.setattr(blas, "_advised", False)
    assert advised("-v")
    assert not advised("-v")


def test_a_blas_that_cannot_be_loaded_is_always_reported(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(blas.VARIABLE, str(file))
    for name, value in (("loaded", None), ("late", False), ("problem", None), ("_advised", False)):
        monkeypatch.setattr(blas, name, value)
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setattr("sys.platform", "linux")
    modules = {name: module for name, module in sys.modules.items() if name != "mlx.core"}
    with monkeypatch.context() as patch:
        patch.setattr("sys.modules", modules)
        assert blas.preload() is None
    assert f"names {file}, which cannot be loaded" in str(blas.problem)
    run(["generate", str(file), "-p", "a", "-n", "1"])
    assert f"hint: matrix products are slow: {blas.problem}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preloaded", "described"),
    [
        ("", "MLX's default"),
        ("/x/libfoo.so", "MLX's default"),
        ("a.so:/x/libblas.so.3", "/x/libblas"),
    ],
)
def test_a_blas_that_is_switched_off(
    file: Path, monkeypatch: pytest.MonkeyPatch, preloaded: str, described: str
) -> None:
    monkeypatch.setattr(blas, "loaded", None)
    monkeypatch.setattr(blas, "ACCELERATE", False)
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    monkeypatch.setenv(blas.VARIABLE, "0")
    assert mlxrun.load(file).choices.blas.startswith(described)
