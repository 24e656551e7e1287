"""``mlxrun kernels``: what is shown, and what a test says and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.gguf.types import GGMLType
from converters.quantize.policy import Policy
from mlxrun.cli import kernels as command
from mlxrun.kernels import dispatch as kernels
from mlxrun.kernels import gpu, selftest
from mlxrun.kernels.interface import Missing
from mlxrun.kernels.selftest import GPU_WAYS, WORKS, Result, Subject


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("MLXRUN_KERNELS", raising=False)
    return kernels.place()


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU."""
    monkeypatch.setattr(gpu, "language", lambda: gpu.METAL)
    monkeypatch.setattr(gpu, "device_name", lambda: "M9")


def result(kind: str, problem: str | None = None, wrong: tuple[str, ...] = ()) -> Result:
    seconds = {work.name: {"blocks": 1e-5, "expanded": 2e-5, "repacked": 3e-5} for work in WORKS}
    errors = {way.name: 1e-7 for way in GPU_WAYS}
    return Result(GGMLType[kind], True, errors, wrong, seconds, problem)


def give(monkeypatch: pytest.MonkeyPatch, device: str, *results: Result) -> None:
    subject = Subject(device, {}, GPU_WAYS, Policy("near"))
    monkeypatch.setattr(command, "_subject", lambda kinds: subject)
    monkeypatch.setattr(selftest, "run", lambda *_, **__: list(results))


def test_one_screen(mlxrun_cli, cache):
    shown = mlxrun_cli("kernels")
    assert (shown.code, shown.err) == (0, "")
    rows = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert rows["device"].endswith("CPU")
    assert str(cache) in rows["cache"]
    assert "core, glue, F32, F16, Q4_0" in rows["to be compiled"]
    assert "not yet run on Apple hardware" in rows["gpu"]
    assert "missing" not in rows
    assert not list(cache.glob("*.so"))


def test_the_same_as_json(mlxrun_cli):
    facts = json.loads(mlxrun_cli("kernels", "--json").out)
    assert facts["device"] == "CPU"
    assert facts["threads"] >= 1
    assert "Q4_K" in facts["to_be_compiled"]
    assert facts["missing"] == []


def test_without_a_compiler_it_says_what_to_install(mlxrun_cli, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    rows = {line.split("  ")[0]: line for line in mlxrun_cli("kernels").out.splitlines()}
    assert rows["compiler"].endswith("none")
    assert "apt install g++" in rows["missing"]
    assert "mlxrun-kernels" in rows["missing"]


def test_switched_off_is_said(mlxrun_cli, monkeypatch):
    monkeypatch.setenv("MLXRUN_KERNELS", "0")
    shown = mlxrun_cli("kernels")
    assert shown.code == 0
    assert "switched off by MLXRUN_KERNELS=0" in shown.out
    tested = mlxrun_cli("kernels", "--selftest")
    assert tested.code == 1
    assert tested.error == "error: no kernels to test: switched off by MLXRUN_KERNELS=0"


def test_an_unknown_instruction_set(mlxrun_cli, monkeypatch):
    monkeypatch.setenv("MLXRUN_KERNELS", "avx1024")
    shown = mlxrun_cli("kernels")
    assert shown.code == 1
    assert "no such instruction set" in shown.error


def test_an_unknown_type(mlxrun_cli):
    shown = mlxrun_cli("kernels", "--selftest", "--type", "Q9_K")
    assert shown.code == 2
    assert "'Q9_K' is not one of Q4_0, " in shown.err


def test_the_kernels_of_this_cpu(mlxrun_cli, monkeypatch):
    monkeypatch.undo()  # the objects that the user has, or compiled once for later tests
    tested = mlxrun_cli("kernels", "--selftest", "--type", "q8_0", "--size", "300", "--json")
    facts = json.loads(tested.out)
    assert (tested.code, facts["passed"]) == (0, True)
    (found,) = facts["types"]
    assert (found["type"], found["rows_equal"]) == ("Q8_0", True)
    assert set(found["errors"]) == {"near", "fast", "exact"}


def test_a_table_and_a_verdict(mlxrun_cli, monkeypatch):
    give(monkeypatch, "CPU", result("Q4_K"), result("Q6_K"))
    shown = mlxrun_cli("kernels", "--selftest")
    assert shown.code == 0
    (line,) = (line for line in shown.out.splitlines() if line.startswith("Q6_K"))
    assert line.split()[1:6] == ["equal", "1e-07", "1e-07", "1e-07", "10"]
    assert line.count("10 us 3.00x") == len(WORKS)
    assert "all 2 types passed" in shown.out
    assert "not yet run on Apple hardware" in shown.out


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (result("Q6_K", wrong=("float16",)), "1e-07 WRONG"),
        (result("Q6_K", "unable to build"), "Q6_K cannot run: unable to build"),
    ],
)
def test_what_is_wrong_is_named_and_ends_with_1(mlxrun_cli, mac, monkeypatch, bad, said):
    selftest.keep("M9", [result("Q4_K")])
    give(monkeypatch, "M9", result("Q4_K"), bad)
    shown = mlxrun_cli("kernels", "--selftest")
    assert shown.code == 1
    assert said in shown.out
    assert "wrong: Q6_K" in shown.out
    assert selftest.kept("M9") is None


def test_a_gpu_uses_its_kernels_after_the_test(mlxrun_cli, mac, monkeypatch):
    assert "off until 'mlxrun kernels --selftest' has passed" in mlxrun_cli("kernels").out
    assert isinstance(gpu.available([GGMLType.Q4_K]), Missing)
    give(monkeypatch, "M9", result("Q4_K"))
    mlxrun_cli("kernels", "--selftest", "--type", "Q4_K")
    assert isinstance(gpu.available([GGMLType.Q4_K]), Missing)  # not all types
    assert mlxrun_cli("kernels", "--selftest").code == 0
    assert isinstance(gpu.available([GGMLType.Q4_K]), gpu.Kernels)
    assert "multiplied as they are  Q4_K" in mlxrun_cli("kernels").out
