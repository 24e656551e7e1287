"""The real models, each loaded once, on the CPU: llama.cpp's figures were made on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance.measure import on_cpu
from real_models import MODELS, Figures, RealModel

import mlxrun


@pytest.fixture(scope="session", params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> RealModel:
    return request.param


@pytest.fixture(scope="session")
def path(model: RealModel) -> Path:
    """The model's file; tests of models that are not installed are skipped.

    In CI a model that its commands install must be there.
    """
    path = model.find()
    if path is None:
        message = f"{model.name} is not installed: {model.install}"
        if model.required and "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def figures(model: RealModel) -> Figures:
    return Figures.read(model)


@pytest.fixture(scope="session")
def llm(path: Path) -> mlxrun.LLM:
    with on_cpu():
        return mlxrun.load(path)


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with on_cpu():
        yield
