"""A load determines each fact once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_mlx_lm
from tiny_models import Tiny

import mlxrun
from converters.architectures import config, mapping
from converters.gguf import reader
from mlxrun.cli.inspection import inspect_model
from mlxrun.models import families

STEPS: tuple[Callable[..., Any], ...] = (
    reader.read_gguf,
    mapping.regroup,
    mapping.map_tensors,
    config.hf_config,
    families.model_config,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each step is called, from whatever module."""
    counts: Counter[str] = Counter()

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counts[step.__name__] += 1
            return step(*args, **options)

        return call

    wrapped = [(step, counted(step)) for step in STEPS]
    for module in [m for n, m in sys.modules.items() if n.startswith(("converters", "mlxrun"))]:
        for name, value in list(vars(module).items()):
            for step, wrapper in wrapped:
                if value is step:
                    monkeypatch.setattr(module, name, wrapper)
    return counts


def test_a_gguf_is_read_mapped_and_defined_once(tmp_path: Path, calls: Counter[str]) -> None:
    mlxrun.load(Tiny(kinds={"*": "Q4_0"}).write(tmp_path / "m.gguf"))
    assert calls == dict.fromkeys((step.__name__ for step in STEPS), 1)


def test_a_directory_is_defined_once(tmp_path: Path, calls: Counter[str]) -> None:
    mlxrun.convert(Tiny().write(tmp_path / "m.gguf"), tmp_path / "out")
    assert calls["regroup"] == calls["map_tensors"] == calls["hf_config"] == 1
    adapter = write_mlx_lm(tmp_path / "out", tmp_path / "adapter", ["self_attn.q_proj"])
    calls.clear()
    mlxrun.load(tmp_path / "out", adapter=adapter)
    assert calls == {"model_config": 1}


def test_inspect_opens_a_gguf_once(tmp_path: Path, calls: Counter[str]) -> None:
    inspect_model(Tiny().write(tmp_path / "m.gguf"), context=None)
    assert calls["regroup"] == calls["map_tensors"] == calls["hf_config"] == 1
