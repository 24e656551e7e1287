"""Refusals and warnings before weights are read, and MLX's own limits."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.errors import MemoryLimitError, ParameterError
from mlxrun.memory import device as memory


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny().write(tmp_path_factory.mktemp("guard") / "model.gguf")


def test_weights_beyond_all_memory_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = mlxrun.load(path).model.nbytes
    monkeypatch.setenv(memory.LIMIT, str(nbytes - 1))
    with pytest.raises(MemoryLimitError, match="to hold the weights alone needs") as refused:
        mlxrun.load(path)
    assert (refused.value.needed, refused.value.available) == (nbytes, nbytes - 1)
    converted = path.parent / "converted"
    mlxrun.convert(path, converted, policy="exact")
    monkeypatch.setenv(
        memory.LIMIT, str(4 * sum(math.prod(s) for s in Tiny().shapes().values()) - 1)
    )
    with pytest.raises(MemoryLimitError):
        mlxrun.load(converted)


def test_tight_memory_is_reported_and_tried(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(memory.LIMIT, "10MB")
    mlxrun.load(path)
    printed = capsys.readouterr().err
    assert printed.startswith("warning: memory is tight: ")
    assert f" for a context of {mlxrun.load(path).context_length} tokens" in printed
    capsys.readouterr()
    monkeypatch.setenv(memory.LIMIT, "none")
    mlxrun.load(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("1.5 g", 15 * 10**8), ("1000", 1000), ("NONE", 0), ("2kB", 2000)],
)
def test_the_environment_says_how_much_there_is(
    monkeypatch: pytest.MonkeyPatch, text: str, nbytes: int
) -> None:
    monkeypatch.setenv(memory.LIMIT, text)
    assert memory.machine_memory() == memory.room() == nbytes


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "1e9", "GB"])
def test_invalid_values_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(memory.LIMIT, text)
    with pytest.raises(ParameterError, match="MLXRUN_MEMORY_LIMIT must be a number of bytes"):
        memory.room()


def test_the_bound_of_a_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = [mx.get_memory_limit()]

    def set_limit(nbytes: int) -> int:
        bound.append(nbytes)
        return bound[-2]

    monkeypatch.setattr(mx, "set_cache_limit", set_limit)
    monkeypatch.setattr(memory, "machine_memory", lambda: 5000)
    monkeypatch.setattr(memory, "_bound", None)
    memory.bound_cache(1000)
    memory.bound_cache(3000)  # another model: the bound is ours to change
    assert bound[1:] == [1000, 500]
    bound.append(77)
    memory.bound_cache(1000)
    assert bound[-1] == 77


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal wires memory")
@pytest.mark.parametrize("wired", [True, 10**9, 0])
def test_only_metal_wires_memory(path: Path, wired: bool | int) -> None:
    with pytest.raises(ParameterError, match="wired must be left out without Metal"):
        mlxrun.load(path, wired=wired)


def test_wiring_stays_within_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    wired: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 100})
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    assert (memory.wire(), memory.wire(60)) == (100, 60)
    assert wired == [100, 60]
    with pytest.raises(ParameterError, match="from 0 to 100 bytes"):
        memory.wire(101)
