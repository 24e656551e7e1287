"""Products of adapted weights against plain matrices with everything merged by hand."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.quantize.layout import Layout, affine, dense, fixed
from mlxrun.errors import AdapterError
from mlxrun.weights.linear import MLXWeight
from mlxrun.weights.lora import LoRA, LoRAWeight, combined

ROWS, COLUMNS, EXPERTS = 24, 64, 3
LAYOUTS = [dense("float32"), affine(4, 32, "float32"), affine(8, 64, "float32"), fixed("mxfp4")]


@dataclass(frozen=True)
class Sum:
    """A weight with adapters, and the plain matrix that this amounts to."""

    weight: LoRAWeight
    plain: np.ndarray


@st.composite
def sums(draw: st.DrawFn, stacked: bool = False) -> Sum:
    """Up to three updates: plain or stretched, of all rows or of some, on any layout."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    stack = (EXPERTS,) if stacked else ()
    layout = draw(st.sampled_from(LAYOUTS))
    stored = _stored(rng.standard_normal((*stack, ROWS, COLUMNS)).astype(np.float32), layout)
    base = np.array(stored.dequantize(mx.float32), np.float64)
    plain, updates = base.copy(), []
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(1, 9))
        first = None if stacked else draw(st.sampled_from([None, 0, 5, ROWS - 4]))
        rows = ROWS if first is None else draw(st.integers(1, ROWS - first))
        a = rng.standard_normal((*stack, rank, COLUMNS)) / 8
        b = rng.standard_normal((*stack, rows, rank)) / 8
        scale, strength = draw(st.floats(-3, 3)), draw(st.floats(-2, 2))
        here = slice(first or 0, (first or 0) + rows)
        adapted = base[..., here, :] + scale * b @ a
        magnitude = None
        if draw(st.booleans()):
            magnitude = rng.uniform(0.5, 2, (*stack, rows))
            adapted *= (magnitude / np.linalg.norm(adapted, axis=-1))[..., None]
        plain[..., here, :] += strength * (adapted - base[..., here, :])
        a, b, magnitude = (
            None if x is None else mx.array(x, mx.float32) for x in (a, b, magnitude)
        )
        updates.append(LoRA("test", a, b, scale, strength, magnitude, first))
    both = combined(updates, ROWS, lambda: stored.dequantize(mx.float32), mx.float32)
    return Sum(LoRAWeight(stored, both), plain)


def _stored(values: np.ndarray, layout: Layout) -> MLXWeight:
    if not layout.quantized:
        return MLXWeight(layout, mx.array(values))
    form = {"group_size": layout.group_size, "bits": layout.bits, "mode": layout.mode}
    return MLXWeight(layout, *mx.quantize(mx.array(values), **form))


def close(found: mx.array, expected: np.ndarray) -> None:
    error = np.abs(np.array(found, np.float64) - expected).max()
    assert error <= 2e-5 * max(1.0, np.abs(expected).max())


@given(case=sums(), tokens=st.integers(1, 12))
def test_a_product_is_that_of_the_merged_matrix(case: Sum, tokens: int) -> None:
    x = np.random.default_rng(tokens).standard_normal((2, tokens, COLUMNS))
    close(case.weight.product()(mx.array(x, mx.float32)), x @ case.plain.T)


@given(case=sums(), ids=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=8))
def test_rows_are_those_of_the_merged_matrix(case: Sum, ids: list[int]) -> None:
    close(case.weight.take(mx.array([ids]), mx.float32), case.plain[[ids]])


@given(case=sums(stacked=True), seed=st.integers(0, 100))
def test_experts_are_those_of_the_merged_stack(case: Sum, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, 1, 1, COLUMNS))
    chosen = rng.integers(0, EXPERTS, (2, 5, 2))
    product = case.weight.gathered_product()
    expected = np.einsum("btnoc,btkrc->btkor", x, case.plain[chosen])
    close(product(mx.array(x, mx.float32), mx.array(chosen)), expected)


@given(case=sums(stacked=True))
def test_heads_are_multiplied_each_with_its_own(case: Sum) -> None:
    x = np.random.default_rng(0).standard_normal((2, EXPERTS, 4, COLUMNS))
    close(case.weight.product()(mx.array(x, mx.float32)), x @ case.plain.swapaxes(-1, -2))


@given(
    a=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    b=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    first=st.sampled_from([None, 0, 7, ROWS]),
)
def test_only_what_fits_passes(a: list[int], b: list[int], first: int | None) -> None:
    update = LoRA("test", mx.zeros((1, *a)), mx.zeros((1, *b)), 1.0, first=first)
    with pytest.raises(AdapterError, match="test: matrices"):
        update.check("module", (ROWS, COLUMNS))
