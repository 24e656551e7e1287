"""Requirements of a GPU's kernels, run through an emulator: products of every form with a type.

As a script (under a sanitizer, which must be loaded before Python): ``gpu_cases.py TYPE ... FLAG``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
from decoders import Decoders
from emulated import Emulator
from tiny_models import random_blocks

from converters.gguf.types import BLOCKS, GGMLType
from mlxrun.kernels.gpu import TYPES, Kernels
from mlxrun.kernels.interface import Matrix

#: Of the norm of a result, which is computed in float64.
TOLERANCES = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 4e-3}
LISTED = [
    GGMLType[name] for name in ("Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS", "Q8_0", "Q4_0")
]


@dataclass
class Case:
    """A result and the one in float64, (..., rows)."""

    name: str
    got: mx.array
    expected: np.ndarray
    dtype: mx.Dtype

    def error(self) -> float:
        got = np.array(self.got.astype(mx.float32)).astype(np.float64).reshape(self.expected.shape)
        return float(np.linalg.norm(got - self.expected) / np.linalg.norm(self.expected))

    def check(self) -> None:
        assert self.error() <= TOLERANCES[self.dtype], (self.name, self.error())


class Weights:
    """Random matrices of a type: ``matrix`` for kernels, ``values`` in float64."""

    def __init__(
        self, decoders: Decoders, kind: GGMLType, *shape: int, ordered: bool = False, seed: int = 0
    ) -> None:
        rng = np.random.default_rng([seed, int(kind), *shape])
        elements, size = BLOCKS[kind]
        *stack, columns = shape
        count = int(np.prod(stack))
        raw = random_blocks(kind.name, count * columns // elements, size, rng, 0.01)
        raw = raw.reshape(*stack, -1)
        order = rng.permutation(stack[-1]).astype(np.int32) if ordered else None
        values = decoders.values(kind, raw)
        self.values = (values if order is None else values[..., order, :]).astype(np.float64)
        self.matrix = Matrix(
            mx.array(raw), kind, columns, None if order is None else mx.array(order)
        )


def inputs(rng: np.random.Generator, dtype: mx.Dtype, *shape: int) -> tuple[mx.array, np.ndarray]:
    """Random activations in a dtype, and their values in float64."""
    x = mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)
    return x, np.array(x.astype(mx.float32)).astype(np.float64)


def products(kernels: Kernels, weights: Weights, dtype: mx.Dtype, rows: int) -> Iterator[Case]:
    x, plain = inputs(np.random.default_rng(rows), dtype, 1, rows, weights.matrix.columns)
    got = kernels.product([weights.matrix])(x)[0]
    yield Case(f"{rows} rows {weights.values.shape}", got, plain @ weights.values.T, dtype)


def gathered(
    kernels: Kernels, weights: Weights, dtype: mx.Dtype, tokens: int, used: int, own: bool
) -> Iterator[Case]:
    """``own``: each expert has a row of x of its own; else a token's share one."""
    rng = np.random.default_rng(tokens)
    x, plain = inputs(rng, dtype, 1, tokens, used if own else 1, 1, weights.matrix.columns)
    chosen = rng.integers(0, len(weights.values), (1, tokens, used))
    expected = np.einsum(
        "btsoc,btsrc->btsr",
        np.broadcast_to(plain, (1, tokens, used, 1, plain.shape[-1])),
        weights.values[chosen],
    )
    got = kernels.experts([weights.matrix])(x, mx.array(chosen.astype(np.uint32)))[0]
    yield Case(f"{tokens} tokens of {used} experts, own={own}", got, expected[..., None, :], dtype)


def cases(
    kernels: Kernels, decoders: Decoders, kind: GGMLType, dtype: mx.Dtype, whole: bool
) -> Iterator[Case]:
    """``whole``: every number of rows and every way to choose experts; else some."""
    plain = Weights(decoders, kind, 37, 512)
    ordered = Weights(decoders, kind, 66, 256, ordered=True)
    stack = Weights(decoders, kind, 3, 35, 256, ordered=whole)
    for rows in (1, 2, 3, 7, 8, 9, 33) if whole else (1, 8, 9):
        yield from products(kernels, plain, dtype, rows)
    for rows in (2, 40):
        yield from products(kernels, ordered, dtype, rows)
    yield from products(kernels, Weights(decoders, kind, 1, 256), dtype, 3)
    yield from gathered(kernels, stack, dtype, 3, 2, own=False)
    yield from gathered(kernels, stack, dtype, 22, 3, own=True)
    if whole:
        yield from gathered(kernels, stack, dtype, 3, 2, own=True)
        yield from gathered(kernels, stack, dtype, 22, 3, own=False)


def rows_are_equal(kernels: Kernels, decoders: Decoders, kind: GGMLType) -> bool:
    """Whether rows and whole matrices are the type's weights, bit for bit."""
    weights = Weights(decoders, kind, 19, 512, ordered=True)
    ids = np.array([[3, 0], [18, 3]], np.int32)
    stack = Weights(decoders, kind, 3, 7, 256, ordered=True)
    taken = np.array(kernels.take(weights.matrix)(mx.array(ids)))
    every = np.array(kernels.dequantize(stack.matrix))
    return np.array_equal(taken, weights.values[ids]) and np.array_equal(every, stack.values)


def check(
    emulator: Emulator, decoders: Decoders, kind: GGMLType, dtype: mx.Dtype, whole: bool
) -> list[Case]:
    """All cases of a type, and its rows."""
    kernels = Kernels(emulator.device, fused=TYPES, make=emulator.kernel)
    with emulator.record():
        list(cases(kernels, decoders, kind, dtype, whole))
        rows_are_equal(kernels, decoders, kind)
    found = list(cases(kernels, decoders, kind, dtype, whole))
    for case in found:
        case.check()
    assert rows_are_equal(kernels, decoders, kind)
    return found


if __name__ == "__main__":
    *named, flags = sys.argv[1:]
    with TemporaryDirectory() as folder:
        emulator = Emulator(Path(folder), *flags.split())
        decoders = Decoders(Path(folder))
        for name in named:
            check(emulator, decoders, GGMLType[name], mx.float16, whole=False)
    print("checked", *named)
