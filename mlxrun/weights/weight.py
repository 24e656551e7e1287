"""Weights in any MLX layout, and the products that a transformer takes with them.

A :class:`Weight` knows how to multiply, to look up rows and to say its size. It is immutable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from converters.layout import Layout
from mlxrun import blas

# From this many rows on, the CPU dequantises a packed matrix once rather than per row: its packed
# product runs on one core, row by row (measured, docs/architecture.md).
CPU_DENSE_ROWS = 8
# Elements of a matrix that OpenBLAS surely takes for small beside one row (slow again from about
# 900,000 on), and down to which part of them a call is worth making.
SMALL, LEAST = 1 << 19, 16


def settled(constant: mx.array) -> mx.array:
    """A constant that is computed now, so that any thread may compute with it.

    What is not evaluated yet can be evaluated only by the thread that built it.
    """
    mx.eval(constant)
    return constant


@dataclass(frozen=True)
class Weight:
    """A matrix of shape (rows, columns) in one layout.

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
    def rows(self) -> int:
        return int(self.weight.shape[0])

    @property
    def columns(self) -> int:
        if not self.layout.quantized:
            return int(self.weight.shape[-1])
        return int(self.weight.shape[-1]) * 32 // self.layout.bits

    @property
    def elements(self) -> int:
        return prod(self.weight.shape[:-1]) * self.columns

    @property
    def arrays(self) -> list[mx.array]:
        parts = (self.weight, self.scales, self.biases, self.factor)
        return [part for part in parts if part is not None]

    def product(self) -> Callable[[mx.array], mx.array]:
        """A function ``x (..., columns) -> x @ W.T (..., rows)``, chosen once for this layout."""
        product, factor = self._product(), self.factor
        return product if factor is None else lambda x: product(x) * factor.astype(x.dtype)

    def _product(self) -> Callable[[mx.array], mx.array]:
        if not self.layout.quantized:
            return _plain_product(self.weight)
        if mx.default_device() == mx.cpu:
            return lambda x: (
                self._packed_product(x)
                if prod(x.shape[:-1]) < CPU_DENSE_ROWS
                else _multiply(x, self._expand(*self._packed, x.dtype).swapaxes(-1, -2))
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

    def gathered_product(self) -> Callable[[mx.array, mx.array], mx.array]:
        """As :meth:`product`, for stacked matrices of which an index chooses."""
        product, factor = self._gathered_product(), self.factor
        if factor is None:
            return product
        return lambda x, chosen: (
            product(x, chosen) * factor[chosen][..., None, None].astype(x.dtype)
        )

    def _gathered_product(self) -> Callable[[mx.array, mx.array], mx.array]:
        if self.scales is None:
            transposed = settled(self.weight.swapaxes(-1, -2))
            if mx.default_device() == mx.cpu and transposed.dtype != mx.float32:
                # MLX gathers halves on a GPU only.
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
        """The plain matrix, (rows, columns), in ``dtype``."""
        plain = self._expand(*self._packed, dtype)
        if self.factor is None:
            return plain
        return plain * self.factor.astype(dtype).reshape(-1, *[1] * (plain.ndim - 1))

    @property
    def _packed(self) -> tuple[mx.array, mx.array | None, mx.array | None]:
        return self.weight, self.scales, self.biases

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows by index, as an embedding needs them: (...) -> (..., columns) in ``dtype``."""
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


def _plain_product(weight: mx.array) -> Callable[[mx.array], mx.array]:
    """As :meth:`Weight.product`, of a plain matrix (..., rows, columns)."""
    transposed = settled(weight.swapaxes(-1, -2))
    if mx.default_device() != mx.cpu:
        return lambda x: x @ transposed
    blocks = _blocks(weight)
    if blocks is None:
        return lambda x: _multiply(x, transposed)
    rows, columns = weight.shape

    def product(x: mx.array) -> mx.array:
        if x.size > columns:
            return _multiply(x, transposed)
        return (x.reshape(1, 1, columns) @ blocks).reshape(*x.shape[:-1], rows)

    return product


def _multiply(x: mx.array, transposed: mx.array) -> mx.array:
    """``x @ transposed`` on a CPU, with rows of zeros where its BLAS is faster with some more."""
    rows = prod(x.shape[:-1])
    more = blas.missing(rows) if transposed.ndim == 2 and transposed.dtype == mx.float32 else 0
    if not more:
        return x @ transposed
    filled = mx.pad(x.reshape(rows, -1), [(0, more), (0, 0)])
    return (filled @ transposed)[:rows].reshape(*x.shape[:-1], -1)


def _blocks(weight: mx.array) -> mx.array | None:
    """A matrix on a CPU as a batch (B, columns, rows / B) of small ones; None if it does not pay.

    A BLAS copies a matrix before it multiplies, which for a single row takes longer than the
    product; small ones some multiply where they lie (5632 x 2048 by one row takes 1.6 ms of a
    core's time rather than 5.7).
    """
    if not (blas.small_products and weight.ndim == 2 and weight.dtype == mx.float32):
        return None
    if weight.size <= SMALL:
        return None
    rows, columns = weight.shape
    most = max(1, SMALL // columns)
    height = next(n for n in range(min(rows, most), 0, -1) if rows % n == 0)
    if height * columns < SMALL // LEAST:
        return None
    return settled(weight.reshape(rows // height, height, columns).swapaxes(-1, -2))


def gather(weight: Weight, bias: mx.array | None) -> Callable[[mx.array, mx.array], mx.array]:
    """Products with stacked matrices (experts, rows, columns), chosen by index.

    ``(x (..., 1 or K, 1, columns), experts (..., K)) -> (..., K, 1, rows)``.
    """
    product = weight.gathered_product()
    if bias is None:
        return product
    return lambda x, chosen: product(x, chosen) + bias[chosen][..., None, :]


def linear(weight: Weight, bias: mx.array | None) -> Callable[[mx.array], mx.array]:
    """``x -> x @ W.T + b``; without a bias the addition is not there at all."""
    product = weight.product()
    if bias is None:
        return product
    return lambda x: product(x) + bias
