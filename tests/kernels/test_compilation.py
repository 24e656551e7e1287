"""On a CPU steps are recorded, and neither a compiler runs nor a library is written or loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm_models import CONFIGS, save, stock
from tiny_models import Tiny

import mlxrun
from mlxrun.kernels import compilation
from mlxrun.kernels.device import CPU, device

pytestmark = pytest.mark.skipif(device() is not CPU, reason="on a GPU MLX compiles with Metal")

SETTINGS = (
    "{}, {'temperature': 0}, {'repetition_penalty': 1.1}, {'mirostat': 2}, {'dry_multiplier': 0.8},"
    "{'top_k': 0, 'typical_p': 0.9, 'xtc_probability': 0.5}, {'logprobs': 2}"
)


@pytest.fixture
def again() -> Iterator[None]:
    """Facts about MLX's compiler are determined anew, in the test and after it."""
    compilation._recorded_unfused.cache_clear()
    compilation._switched = False
    yield
    compilation._recorded_unfused.cache_clear()
    compilation._switched = False
    mx.enable_compile()
    assert compilation.avoid_fusion() is None


def written(folder: Path, code: str) -> list[str]:
    """Files that a process leaves in an empty temporary directory."""
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def test_no_libraries_of_steps(tmp_path: Path) -> None:
    file = Tiny().write(tmp_path / "tiny.gguf")
    code = f"""
        import mlxrun
        llm = mlxrun.load({str(file)!r})
        for settings in ({SETTINGS}):
            llm.generate("a", max_tokens=20, ignore_eos=True, seed=1, **settings)
        llm.batch(["a", "b", "c"], max_tokens=20, ignore_eos=True, seed=1)
        step = llm.direct_engine.runner.decode_step
        assert step.compile_error is None and step.compiled
    """
    assert written(tmp_path / "temporary", code) == []


@pytest.mark.parametrize("name", ["lfm2", "gemma3n"])
def test_no_libraries_of_mlx_lms_models(tmp_path: Path, name: str) -> None:
    """Their files compile functions of their own, such as gates."""
    model = save(tmp_path / "model", CONFIGS[name], stock(CONFIGS[name]))
    code = f"""
        import mlxrun
        mlxrun.load({str(model)!r}).generate("a", max_tokens=4, ignore_eos=True, seed=1)
    """
    assert written(tmp_path / "temporary", code) == []


def test_an_mlx_without_the_switch_records_nothing(
    again: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Tiny().write(tmp_path / "tiny.gguf")
    asked = {"max_tokens": 20, "ignore_eos": True, "seed": 1}
    recorded = mlxrun.load(file).generate("a", **asked)
    compilation._recorded_unfused.cache_clear()
    mx.enable_compile()
    monkeypatch.setattr(compilation, "_SYMBOL", "_ZN3mlx4core5unfuseEv")
    llm = mlxrun.load(file)
    assert llm.generate("a", **asked).tokens == recorded.tokens
    assert not llm.direct_engine.runner.decode_step.compiled
    assert "would fuse" in llm.choices.decode
    assert compilation._recording() == "", "nothing else in this process is fused either"


def test_compilation_that_is_switched_off_stays_so(again: None) -> None:
    mx.disable_compile()
    assert "switched off" in str(compilation.avoid_fusion())
    assert compilation._recording() == ""


def test_recordings_are_reused_unfused(again: None) -> None:
    mx.enable_compile()
    assert compilation._recording() == "fused"
    assert compilation.avoid_fusion() is None
    assert compilation._recording() == "unfused"


def on_gpu() -> mx.Device:
    return mx.Device(mx.gpu)


@pytest.mark.parametrize("symbol", [compilation._SYMBOL, "_ZN3mlx4core5unfuseEv"])
def test_a_gpu_fuses_again_after_a_cpu_did_not(
    again: None, monkeypatch: pytest.MonkeyPatch, symbol: str
) -> None:
    mx.enable_compile()
    monkeypatch.setattr(compilation, "_SYMBOL", symbol)
    compilation.avoid_fusion()
    unfused = compilation._recording()
    assert unfused != "fused"
    with monkeypatch.context() as patched:
        patched.setattr(mx, "default_device", on_gpu)
        assert compilation.avoid_fusion() is None
    assert compilation._recording() == "fused"
    compilation.avoid_fusion()
    assert compilation._recording() == unfused, "on the CPU again"


def test_a_gpu_leaves_compilation_off_that_was_off(
    again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mx.disable_compile()
    compilation.avoid_fusion()
    with monkeypatch.context() as patched:
        patched.setattr(mx, "default_device", on_gpu)
        assert compilation.avoid_fusion() is None
    assert compilation._recording() == ""
