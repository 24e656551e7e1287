"""The BLAS that is loaded for MLX."""

from __future__ import annotations

import ctypes

import pytest

from mlxrun.kernels import blas


def test_a_blas_multiplies_on_one_thread_if_asked() -> None:
    program = ctypes.CDLL(None)
    if not blas.loaded or not hasattr(program, "openblas_get_num_threads"):
        pytest.skip("no OpenBLAS was loaded")
    program.openblas_set_num_threads(2)
    blas.use_one_thread()
    assert program.openblas_get_num_threads() == 1


def test_without_a_blas_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "loaded", None)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    blas.use_one_thread()
