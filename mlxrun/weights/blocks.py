"""Matrices as the GGUF blocks of their file, neither copied nor converted.

The products are those of :mod:`mlxrun.kernels`, to which plain float32 is one more type of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx

from converters.gguf.types import GGMLType
from mlxrun.kernels.interface import BlockKernels, Matrix
from mlxrun.weights.linear import (
    GatheredProduct,
    Product,
    Weight,
    finished,
    finished_each,
    scaled,
    settled,
)

if TYPE_CHECKING:
    from mlxrun.kernels.native import Kernels


@dataclass(frozen=True)
class BlockWeight(Weight):
    """A matrix, or a stack of such, in GGUF blocks.

    Attributes:
        name: of the tensor in the file.
        matrix: its blocks, their type, and the order of the rows.
        kernels: multiply them.
        planes: activations have 8 bits times this: 1, 2 or 3.
        factor: of the whole matrix, (1,), or of each of a stack, (experts,).
        mapped: whether the blocks are pages of the file; else a copy.
    """

    name: str
    matrix: Matrix
    kernels: BlockKernels = field(repr=False, compare=False)
    planes: int
    factor: mx.array | None = None
    mapped: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.matrix.blocks.shape[:-1], self.matrix.columns)

    @property
    def arrays(self) -> list[mx.array]:
        parts = (self.matrix.blocks, self.matrix.order, self.factor)
        return [part for part in parts if part is not None]

    def product(self, bias: mx.array | None = None) -> Product:
        if len(self.shape) > 2:
            return self._product_of_each(bias)
        inside, after = (bias, None) if self.factor is None else (None, bias)
        product = self.kernels.product([self.matrix], self.planes, biases=[inside])
        return finished(lambda x: product(x)[0], self.factor, after)

    def _product_of_each(self, bias: mx.array | None) -> Product:
        """Of a stack: all of it is chosen for each token."""
        product, every = self.gathered_product(), settled(mx.arange(self.shape[0]))

        def each(x: mx.array) -> mx.array:  # (B, count, T, columns)
            x = x.swapaxes(1, 2)[..., None, :]  # (B, T, count, 1, columns)
            chosen = mx.broadcast_to(every, x.shape[:-2])
            return product(x, chosen).squeeze(-2).swapaxes(1, 2)  # (B, count, T, rows)

        return finished(each, None, bias)

    def gathered_product(self, bias: mx.array | None = None) -> GatheredProduct:
        inside, after = (bias, None) if self.factor is None else (None, bias)
        product = self.kernels.experts([self.matrix], self.planes, biases=[inside])
        return finished_each(lambda x, chosen: product(x, chosen)[0], self.factor, after)

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        return scaled(self.kernels.dequantize(self.matrix).astype(dtype), self.factor)

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        rows = self._rows(ids).astype(dtype)
        return rows if self.factor is None else rows * self.factor.astype(dtype)

    @cached_property
    def _rows(self) -> Product:
        return self.kernels.take(self.matrix)

    @property
    def finite(self) -> bool:
        """Whether all weights are numbers; reads all of them."""
        return bool(mx.isfinite(self.dequantize(mx.float32)).all().item())


def dense_block_weight(name: str, plain: mx.array, kernels: Kernels, planes: int) -> BlockWeight:
    """A plain float32 matrix (..., rows, columns) for the same products; it shares its memory."""
    stored = mx.contiguous(plain.view(mx.uint8))
    matrix = Matrix(stored, GGMLType.F32, plain.shape[-1])
    return BlockWeight(name, matrix, kernels, planes, mapped=False)
