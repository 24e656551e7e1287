"""A tiny random model as a file, and ``mlxrun bench`` called in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import Tiny

from mlxrun.cli.main import run


@dataclass
class Called:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with a context of 192 tokens."""
    return Tiny(keys={"context_length": 192}).write(tmp_path_factory.mktemp("bench") / "tiny.gguf")


@pytest.fixture
def bench(tiny: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Calls ``mlxrun bench`` of the tiny model with some options."""

    def call(*options: object) -> Called:
        code = run(["bench", str(tiny), *map(str, options)])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return call
