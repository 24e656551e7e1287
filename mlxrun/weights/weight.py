"""Matrices in any form, and the products that a transformer takes with them.

A :class:`Form` knows how to multiply, to look up rows and to say its size. It is immutable.
:class:`Weight` is the one for MLX's own layouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from converters.layout import Layout
from mlxrun.kernels.device import device

# From this many rows on, the CPU dequantises a packed matrix once rather than per row: its packed
# product runs on one core, row by row (measured, docs/architecture.md).
CPU_DENSE_ROWS = 8

Product = Callable[[mx.array], mx.array]
GatheredProduct = Callable[[mx.array, mx.array], mx.array]


def settled(constant: mx.array) -> mx.array:
    """A constant that is computed now, so that any thread may compute with it.

    What is not evaluated yet can be evaluated only by the thread that built it.
    """
    mx.eval(constant)
    return constant


class Form(ABC):
    """A matrix of shape (rows, columns), or a stack of such."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(..., rows, columns)."""

    @property
    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """All arrays that it is made of."""

    @abstractmethod
    def product(self, bias: mx.array | None = None) -> Product:
        """A function ``x (..., columns) -> x @ W.T + bias (..., rows)``, chosen once.

        Of a stack: ``(B, count, T, columns) -> (B, count, T, rows)``, each its own.
        """

    @abstractmethod
    def gathered_product(self, bias: mx.array | None = None) -> GatheredProduct:
        """Products with matrices of a stack, chosen by index.

        ``(x (..., 1 or K, 1, columns), chosen (..., K)) -> (..., K, 1, rows)``; the bias is
        (count, rows).
        """

    @abstractmethod
    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        """The plain matrix, (..., rows, columns), in ``dtype``."""

    @abstractmethod
    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows by index, as an embedding needs them: (...) -> (..., columns) in ``dtype``."""

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in self.arrays)


@dataclass(frozen=True)
class Weight(Form):
    """A matrix of shape (rows, columns), or a stack of such, in one of MLX's layouts.

    Attributes:
        layout: mode, bits, group size and dtype.
        weight: the plain array, or the packed codes.
        scales, biases: of a quantised layout; ``biases`` only of an affine one.
        factor: what the whole matrix, (1,), or each of a stack, (experts,), is multiplied by.
    """

    layout: Layout
    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    factor: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, columns = self.weight.shape
        return (*rest, columns * 32 // self.layout.bits if self.layout.quantized else columns)

    @property
    def arrays(self) -> list[mx.array]:
        parts = (self.weight, self.scales, self.biases, self.factor)
        return [part for part in parts if part is not None]

    def product(self, bias: mx.array | None = None) -> Product:
        return finished(self._product(), self.factor, bias)

    def _product(self) -> Product:
        if not self.layout.quantized:
            return _plain_product(self.weight)
        if not device().fast_packed_matmul:
            return lambda x: (
                self._packed_product(x)
                if prod(x.shape[:-1]) < CPU_DENSE_ROWS
                else x @ self._expand(*self._packed, x.dtype).swapaxes(-1, -2)
            )
        return self._packed_product

    def _packed_product(self, x: mx.array) -> mx.array:
        layout = self.layout
        assert self.scales is not None
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=layout.group_size,
            bits=layout.bits,
            mode=layout.mode,
        )

    def gathered_product(self, bias: mx.array | None = None) -> GatheredProduct:
        return finished_each(self._gathered_product(), self.factor, bias)

    def _gathered_product(self) -> GatheredProduct:
        if self.scales is None:
            transposed = settled(self.weight.swapaxes(-1, -2))
            if transposed.dtype != mx.float32 and not device().gathers_halves:
                return lambda x, chosen: mx.gather_mm(
                    x.astype(mx.float32), transposed.astype(mx.float32), rhs_indices=chosen
                ).astype(x.dtype)
            return lambda x, chosen: mx.gather_mm(x, transposed, rhs_indices=chosen)
        layout, weight, scales, biases = self.layout, self.weight, self.scales, self.biases
        return lambda x, chosen: mx.gather_qmm(
            x,
            weight,
            scales,
            biases,
            rhs_indices=chosen,
            transpose=True,
            group_size=layout.group_size,
            bits=layout.bits,
            mode=layout.mode,
        )

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        return scaled(self._expand(*self._packed, dtype), self.factor)

    @property
    def _packed(self) -> tuple[mx.array, mx.array | None, mx.array | None]:
        return self.weight, self.scales, self.biases

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        scales = None if self.scales is None else self.scales[ids]
        biases = None if self.biases is None else self.biases[ids]
        rows = self._expand(self.weight[ids], scales, biases, dtype)
        return rows if self.factor is None else rows * self.factor.astype(dtype)

    def _expand(
        self, weight: mx.array, scales: mx.array | None, biases: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        layout = self.layout
        if not layout.quantized:
            return weight.astype(dtype)
        assert scales is not None
        if biases is not None:  # MLX multiplies in the type of the scales
            scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(
            weight,
            scales,
            biases,
            group_size=layout.group_size,
            bits=layout.bits,
            mode=layout.mode,
            dtype=dtype,
        )


def finished(product: Product, factor: mx.array | None, bias: mx.array | None) -> Product:
    """``x -> factor * product(x) + bias``; what is None is not there at all."""
    if factor is None:
        return product if bias is None else lambda x: product(x) + bias
    each = factor if factor.size == 1 else settled(factor[:, None, None])  # of a stack

    def scaled_product(x: mx.array) -> mx.array:
        y = product(x) * each.astype(x.dtype)
        return y if bias is None else y + bias

    return scaled_product


def finished_each(
    product: GatheredProduct, factor: mx.array | None, bias: mx.array | None
) -> GatheredProduct:
    """As :func:`finished`, with the factor and the bias of each chosen matrix."""
    if factor is None and bias is None:
        return product

    def whole(x: mx.array, chosen: mx.array) -> mx.array:
        y = product(x, chosen)
        if factor is not None:
            y = y * factor[chosen][..., None, None].astype(x.dtype)
        return y if bias is None else y + bias[chosen][..., None, :]

    return whole


def scaled(plain: mx.array, factor: mx.array | None) -> mx.array:
    """A matrix times its factor, or each of a stack times its own."""
    if factor is None:
        return plain
    return plain * factor.astype(plain.dtype).reshape(-1, *[1] * (plain.ndim - 1))


def _plain_product(weight: mx.array) -> Product:
    """As :meth:`Weight.product`, of a plain matrix (..., rows, columns)."""
    transposed = settled(weight.swapaxes(-1, -2))
    return lambda x: x @ transposed
