"""Shared fixtures: where the oracle is, and a BLAS that makes MLX's CPU backend usable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadlines: how long an example takes says more about the machine than about the code.
settings.register_profile("mlxrun", deadline=None)
settings.load_profile("mlxrun")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The oracle folder; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MLXRUN_ORACLE", ROOT / ".." / "shared" / "oracle")).resolve()
    if not folder.is_dir():
        pytest.skip("the oracle folder is absent")
    return folder
