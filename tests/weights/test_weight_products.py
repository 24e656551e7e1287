"""Products that a BLAS is handed in pieces, or with more rows, are those of the whole."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from converters.layout import Layout, affine, dense
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


@pytest.mark.parametrize("small_ones", [False, True])
@pytest.mark.parametrize("form", [dense("float32"), dense("float16"), affine(8, 32, "float32")])
def test_more_rows_change_no_product(
    form: Layout, small_ones: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "small_products", small_ones)
    rng = np.random.default_rng(2)
    plain = mx.array(rng.integers(-8, 9, (24, 64)).astype(np.float32))
    if form.quantized:
        packed = mx.quantize(plain, group_size=form.group_size, bits=form.bits)
        subject = Weight(form, *packed)
        plain = mx.dequantize(*packed, group_size=form.group_size, bits=form.bits)
    else:
        plain = plain.astype(getattr(mx, form.dtype))
        subject = Weight(form, plain)
    product = subject.product()
    shapes = [(rows, 64) for rows in range(1, 50)] + [(3, 4, 64), (2, 1, 10, 64)]
    for shape in shapes:
        x = mx.array(rng.integers(-8, 9, shape)).astype(plain.dtype)
        monkeypatch.setattr(blas, "sixteen", 5)
        made = product(x)
        monkeypatch.setattr(blas, "sixteen", 0)
        assert made.shape == (*shape[:-1], 24)
        assert made.dtype == plain.dtype
        np.testing.assert_allclose(np.array(made), np.array(x @ plain.T), rtol=1e-5, atol=1e-4)


def test_rows_are_completed_to_sixteens_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blas, "sixteen", 5)
    completed = {rows: rows + blas.missing(rows) for rows in range(200)}
    assert all(after == rows for rows, after in completed.items() if rows < 5 or rows % 16 < 3)
    assert all(completed[rows] == 16 for rows in range(5, 17))
    assert all(completed[rows] == 32 for rows in range(19, 33))
    assert all(completed[rows] == 96 for rows in range(83, 96))
    assert all(completed[rows] == rows for rows in range(96, 200))
    monkeypatch.setattr(blas, "sixteen", 0)
    assert not any(blas.missing(rows) for rows in range(200))


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
