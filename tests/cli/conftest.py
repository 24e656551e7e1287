"""A tiny random model as a file and in memory, and the command line called in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.cli.main import run


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on standard error."""
        (line,) = self.err.splitlines()
        return line


Mlxrun = Callable[..., Result]


# An answer renders as it was generated, as in the templates of real models.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers that writes nonsense, with a context of 256 tokens."""
    folder = tmp_path_factory.mktemp("model")
    return Tiny(keys={"context_length": 256}, template=TEMPLATE).write(folder / "tiny.gguf")


@pytest.fixture(scope="session")
def llm(model: Path) -> mlxrun.LLM:
    return mlxrun.load(model)


@pytest.fixture
def mlxrun_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mlxrun:
    """Calls the command line: ``mlxrun_cli("generate", ..., stdin=b"...")``."""

    def call(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call
