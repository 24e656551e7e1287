"""Products of plain matrices that a BLAS is handed in small pieces are those of the whole."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from converters.layout import dense
from mlxrun import blas
from mlxrun.weights import weight
from mlxrun.weights.weight import Weight


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS that has products of small matrices, small being tiny."""
    monkeypatch.setattr(blas, "small_products", True)
    monkeypatch.setattr(weight, "SMALL", 256)


@pytest.mark.parametrize("rows", [1, 16, 48, 97, 240])
@pytest.mark.parametrize("columns", [8, 64, 300])
def test_products_are_those_of_the_whole(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    plain = rng.standard_normal((rows, columns)).astype(np.float32)
    product = Weight(dense("float32"), mx.array(plain)).product()
    for shape in ((columns,), (1, columns), (1, 1, columns), (3, columns), (2, 5, columns)):
        x = rng.standard_normal(shape).astype(np.float32)
        made = product(mx.array(x))
        assert made.shape == (*shape[:-1], rows)
        np.testing.assert_allclose(np.array(made), x @ plain.T, rtol=1e-4, atol=1e-4)


def test_pieces_are_views_of_what_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = mx.zeros((48, 64))
    pieces = weight._blocks(matrix)
    assert pieces is not None
    assert pieces.shape == (12, 64, 4)
    assert weight._blocks(mx.zeros((4, 64))) is None  # small as it is
    assert weight._blocks(mx.zeros((997, 8))) is None  # a prime number of rows
    assert weight._blocks(matrix.astype(mx.float16)) is None
    assert weight._blocks(mx.zeros((3, 48, 64))) is None
    monkeypatch.setattr(blas, "small_products", False)
    assert weight._blocks(matrix) is None
