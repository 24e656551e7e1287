"""Projections with a norm, a gate and a residual: fused and apart, the results are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.layout import dense
from mlxrun.kernels import dispatch as kernels
from mlxrun.models.functions import GATES
from mlxrun.weights import fused
from mlxrun.weights.blocks import BlockWeight
from mlxrun.weights.fused import RMSNorm
from mlxrun.weights.linear import MLXWeight, Projection

COLUMNS, EXACT = 512, 3
TYPES = (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0)


@pytest.fixture(scope="module")
def cpu() -> kernels.Kernels:
    found = kernels.available(TYPES)
    if isinstance(found, kernels.Missing):
        pytest.skip(found.reason)
    return found


def blocks(cpu: kernels.Kernels, type: GGMLType, *shape: int) -> BlockWeight:
    """Random blocks with scales near 1/64 at their places."""
    rng = np.random.default_rng(int(type) + sum(shape))
    numbers, size = BLOCKS[type]
    raw = rng.integers(0, 256, (*shape, COLUMNS // numbers, size), np.uint8)
    for at in {GGMLType.Q4_K: (0, 2), GGMLType.Q6_K: (208,), GGMLType.Q8_0: (0,)}[type]:
        scales = rng.uniform(0.01, 0.02, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    stored = mx.array(raw.reshape(*shape, -1))
    return BlockWeight("test", kernels.Matrix(stored, type, COLUMNS), cpu, EXACT)


def plain(projection: Projection) -> Projection:
    """The same numbers, as a plain matrix, which nothing is fused with."""
    return Projection(
        MLXWeight(dense("float32"), projection.weight.dequantize(mx.float32)), projection.bias
    )


def same(found: mx.array, expected: mx.array) -> None:
    assert found.shape == expected.shape
    error = (found - expected).square().mean() / expected.square().mean()
    assert error.item() < 1e-11


def numbers(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def norms() -> list[Callable[[mx.array], mx.array] | None]:
    weight = 1 + numbers(COLUMNS) / 8
    layer_norm = lambda x: mx.fast.layer_norm(x, weight, None, 1e-5)  # noqa: E731
    return [None, RMSNorm(weight, 1e-5), RMSNorm(None, 1e-6), layer_norm]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("norm", range(4))
def test_a_projection_with_norm_bias_and_residual(
    cpu: kernels.Kernels, norm: int, rows: int
) -> None:
    before = norms()[norm]
    projection = Projection(blocks(cpu, GGMLType.Q4_K, 96), numbers(96))
    x, residual = numbers(2, rows, COLUMNS), numbers(2, rows, 96)
    ours = fused.linear(projection, before)
    theirs = fused.linear(plain(projection), before)
    same(ours(x), theirs(x))
    same(ours(x, residual), theirs(x, residual))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_and_a_linear_side_become_one(cpu: kernels.Kernels, name: str) -> None:
    gate, norm = GATES[name], RMSNorm(numbers(COLUMNS) / 128, 1e-5)  # where gates are bent
    sides = [Projection(blocks(cpu, type, 64), numbers(64)) for type in TYPES[:2]]
    x = numbers(5, COLUMNS)
    # Of the very same products: the GELU is of numbers in half precision, to which others would be
    # rounded differently here and there.
    first, second = (fused.linear(side, norm)(x) for side in sides)
    made = fused.gated(sides, gate, norm)
    if name in kernels.GATES:
        assert made is not None
        same(made(x), gate.function(first, second))
    else:
        assert made is None


def test_projections_of_one_input_are_split(cpu: kernels.Kernels) -> None:
    norm = norms()[1]
    parts = [Projection(blocks(cpu, t, 32 * (i + 1))) for i, t in enumerate(TYPES)]
    x = numbers(2, 7, COLUMNS)
    made = fused.split(parts, norm)
    assert made is not None
    for found, part in zip(made(x), parts, strict=True):
        same(found, fused.linear(plain(part), norm)(x))


def test_stacked_sides_are_chosen_by_index(cpu: kernels.Kernels) -> None:
    gate = GATES["silu"]
    sides = [Projection(blocks(cpu, type, 4, 32)) for type in TYPES[:2]]
    x, chosen = numbers(3, 1, 1, COLUMNS), mx.array([[0, 3], [1, 0], [2, 3]])
    made = fused.gated_experts(sides, gate)
    assert made is not None
    first, second = (plain(side).weight.gathered_product()(x, chosen) for side in sides)
    same(made(x, chosen), gate.function(first, second))


def test_what_is_no_plain_block_is_not_fused(cpu: kernels.Kernels) -> None:
    whole = Projection(blocks(cpu, GGMLType.Q4_K, 64))
    scaled = Projection(replace(blocks(cpu, GGMLType.Q4_K, 64), factor=mx.array([2.0])))
    assert fused.split([whole, plain(whole)], None) is None
    assert fused.split([whole, scaled], None) is None
    x = numbers(4, COLUMNS)
    same(fused.linear(scaled, norms()[1])(x), 2 * fused.linear(whole, norms()[1])(x))
