"""Shared fixtures: where the oracle is, and a BLAS that makes MLX's CPU backend usable."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Bounds are those of float32; what else the option has is tested where it is given.
os.environ["MLXRUN_PRODUCTS"] = "exact"

import mlxrun  # noqa: F401 - loads a BLAS, which must be before a test imports MLX

# No deadlines: how long an example takes says more about the machine than about the code.
# CI tries the same examples each time: a commit is not red for what an earlier one did. Everybody
# else explores.
settings.register_profile("mlxrun", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("mlxrun")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What the tests are made of stays: no collection of garbage need go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """MLX's random numbers in a test do not depend on the tests before it."""
    import mlx.core as mx

    mx.random.seed(0)


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The oracle folder; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MLXRUN_ORACLE", ROOT / ".." / "shared" / "oracle")).resolve()
    if not folder.is_dir():
        pytest.skip("the oracle folder is absent")
    return folder
