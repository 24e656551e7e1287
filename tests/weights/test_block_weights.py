"""Matrices of GGUF blocks against their plain matrices, in every way that a model uses one."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import random_blocks

from converters.gguf.types import GGMLType
from mlxrun.kernels import dispatch as kernels
from mlxrun.weights.blocks import BlockWeight
from mlxrun.weights.fused import split
from mlxrun.weights.linear import Projection
from mlxrun.weights.lora import LoRA, LoRAWeight, combined

ROWS, COLUMNS, COUNT = 24, 256, 3
KINDS = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16", "F32")


@pytest.fixture(scope="module")
def native() -> kernels.Kernels:
    found = kernels.available({GGMLType[kind] for kind in KINDS})
    assert isinstance(found, kernels.Kernels), found
    return found


def made(
    native: kernels.Kernels, kind: str, *, stacked: bool = False, order: bool = False,
    factor: bool = False,
) -> tuple[BlockWeight, np.ndarray]:  # fmt: skip
    """A form, and the plain float64 matrix that it stands for."""
    rng = np.random.default_rng(7)
    shape = (COUNT, ROWS) if stacked else (ROWS,)
    quantized = gguf.GGMLQuantizationType[kind]
    if kind in ("F16", "BF16", "F32"):
        stored = gguf.quants.quantize(rng.standard_normal((*shape, COLUMNS), np.float32), quantized)
        stored = np.ascontiguousarray(stored).view(np.uint8)
    else:
        elements, size = gguf.GGML_QUANT_SIZES[quantized]
        count = int(np.prod(shape)) * COLUMNS // elements
        stored = random_blocks(kind, count, size, rng, scale=1 / 64).reshape(*shape, -1)
    source = stored if kind != "F32" else stored.view(np.float32)
    plain = gguf.quants.dequantize(source, quantized).reshape(*shape, COLUMNS).astype(np.float64)
    places = rng.permutation(ROWS) if order else None
    if places is not None:
        plain = plain[..., places, :]
    by = rng.uniform(0.5, 2, COUNT if stacked else 1).astype(np.float32) if factor else None
    if by is not None:
        plain = plain * by.reshape(-1, 1, 1) if stacked else plain * by
    matrix = kernels.Matrix(
        mx.array(stored),
        GGMLType[kind],
        COLUMNS,
        None if places is None else mx.array(places.astype(np.int32)),
    )
    return BlockWeight("m", matrix, native, 3, None if by is None else mx.array(by)), plain


def close(found: mx.array, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    error = ((np.array(found, np.float64) - expected) ** 2).mean()
    assert error <= 1e-11 * (expected**2).mean()


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix(native: kernels.Kernels, kind: str, order: bool, factor: bool) -> None:
    form, plain = made(native, kind, order=order, factor=factor)
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(ROWS).astype(np.float32)
    assert (form.shape, form.rows, form.columns) == ((ROWS, COLUMNS), ROWS, COLUMNS)
    for shape in ((COLUMNS,), (3, COLUMNS), (2, 5, COLUMNS)):
        x = rng.standard_normal(shape).astype(np.float32)
        close(form.product()(mx.array(x)), x @ plain.T)
        close(form.product(mx.array(bias))(mx.array(x)), x @ plain.T + bias)
    np.testing.assert_array_equal(np.array(form.dequantize(mx.float32)), plain.astype(np.float32))
    ids = np.array([[3, 0], [23, 3]])
    taken = form.take(mx.array(ids), mx.float32)
    np.testing.assert_array_equal(np.array(taken), plain.astype(np.float32)[ids])


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack(native: kernels.Kernels, kind: str, factor: bool) -> None:
    form, plain = made(native, kind, stacked=True, factor=factor)
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((COUNT, ROWS)).astype(np.float32)
    assert form.shape == (COUNT, ROWS, COLUMNS)
    chosen = rng.integers(0, COUNT, (2, 5, 2))
    for same in (1, 2):  # the same input for all chosen, or one for each
        x = rng.standard_normal((2, 5, same, 1, COLUMNS)).astype(np.float32)
        expected = x @ plain[chosen].swapaxes(-1, -2)
        close(form.gathered_product()(mx.array(x), mx.array(chosen)), expected)
        biased = form.gathered_product(mx.array(bias))(mx.array(x), mx.array(chosen))
        close(biased, expected + bias[chosen][..., None, :])
    x = rng.standard_normal((2, COUNT, 4, COLUMNS)).astype(np.float32)
    close(form.product()(mx.array(x)), x @ plain.swapaxes(-1, -2))
    np.testing.assert_array_equal(np.array(form.dequantize(mx.float32)), plain.astype(np.float32))


def test_matrices_of_one_input_are_one_operation(native: kernels.Kernels) -> None:
    forms = [made(native, "Q4_0"), made(native, "Q8_0", order=True), made(native, "F16")]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, COLUMNS)).astype(np.float32)
    bias = rng.standard_normal(ROWS).astype(np.float32)
    biases = (None, bias, None)
    projections = [
        Projection(form, None if own is None else mx.array(own))
        for (form, _), own in zip(forms, biases, strict=True)
    ]
    product = split(projections, None)
    assert product is not None
    for found, (_, plain), own in zip(product(mx.array(x)), forms, biases, strict=True):
        close(found, x @ plain.T + (0 if own is None else own))
    scaled, _ = made(native, "Q4_0", factor=True)
    assert split([Projection(forms[0][0]), Projection(scaled)], None) is None


@pytest.mark.parametrize("stretched", [False, True])
def test_adapters_add_to_blocks(native: kernels.Kernels, stretched: bool) -> None:
    form, plain = made(native, "Q4_K", order=True)
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((4, COLUMNS)) / 16, rng.standard_normal((ROWS, 4)) / 16
    adapted = plain + 0.5 * b @ a
    magnitude = rng.uniform(0.5, 2, ROWS) if stretched else None
    if magnitude is not None:
        adapted *= (magnitude / np.linalg.norm(adapted, axis=-1))[:, None]
    arrays = [None if x is None else mx.array(x, mx.float32) for x in (a, b, magnitude)]
    update = LoRA("test", arrays[0], arrays[1], 0.5, magnitude=arrays[2])
    low_rank = combined([update], ROWS, lambda: form.dequantize(mx.float32), mx.float32)
    both = LoRAWeight(form, low_rank)
    x = rng.standard_normal((3, COLUMNS)).astype(np.float32)
    close(both.product()(mx.array(x)), x @ adapted.T)
    close(both.take(mx.array([5, 0]), mx.float32), adapted[[5, 0]])
    assert split([Projection(both), Projection(form)], None) is None


def test_planes_say_how_exact_a_product_is(native: kernels.Kernels) -> None:
    form, plain = made(native, "Q4_K")
    x = np.random.default_rng(1).standard_normal((4, COLUMNS)).astype(np.float32)
    expected = x @ plain.T
    errors = []
    for planes in (1, 2, 3):
        found = np.array(BlockWeight("m", form.matrix, native, planes).product()(mx.array(x)))
        errors.append(((found - expected) ** 2).mean() / (expected**2).mean())
    assert 1e-8 < errors[0] <= 1e-3
    assert 1e-12 < errors[1] <= 1e-8
    assert errors[2] <= 1e-12


def test_numbers_that_are_none_are_found(native: kernels.Kernels) -> None:
    form, _ = made(native, "Q4_0")
    assert form.finite
    stored = np.array(form.matrix.blocks)
    stored[5, 18:20] = np.array([np.nan], np.float16).view(np.uint8)
    matrix = kernels.Matrix(mx.array(stored), GGMLType.Q4_0, COLUMNS)
    assert not BlockWeight("m", matrix, native, 3).finite
