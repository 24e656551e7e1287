"""Weight matrices, the products with them, and projections of one input fused into one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import mlx.core as mx

from converters.quantize.layout import Layout
from mlxrun.kernels.device import device

# From this many rows on, the CPU dequantizes a packed matrix once rather than per row: its packed
# product runs on one core, row by row (measured, docs/architecture.md).
CPU_DENSE_ROWS = 8

Product = Callable[[mx.array], mx.array]
GatheredProduct = Callable[[mx.array, mx.array], mx.array]


def settled(constant: mx.array) -> mx.array:
    """A constant, computed now: a lazy one can be evaluated only by the thread that built it."""
    mx.eval(constant)
    return constant


class Weight(ABC):
    """An immutable matrix (rows, columns), or a stack of such, however it is stored."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(..., rows, columns)."""

    @property
    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """All of its arrays."""

    @abstractmethod
    def product(self, bias: mx.array | None = None) -> Product:
        """A function ``x (..., columns) -> x @ W.T + bias (..., rows)``.

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
        return sum(int(array.nbytes) for array in self.arrays)


@dataclass(frozen=True)
class MLXWeight(Weight):
    """A matrix of shape (rows, columns), or a stack of such, in one of MLX's layouts.

    Attributes:
        layout: mode, bits, group size and dtype.
        weight: the plain array, or the packed codes.
        scales, biases: of a quantized layout; ``biases`` only of an affine one.
        factor: of the whole matrix, (1,), or of each of a stack, (experts,).
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
    """``x -> factor * product(x) + bias``; None: none."""
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
    """As :meth:`MLXWeight.product`, of a plain matrix (..., rows, columns)."""
    transposed = settled(weight.swapaxes(-1, -2))
    return lambda x: x @ transposed


# Products of several projections with one input.
Split = Callable[[mx.array], list[mx.array]]


@dataclass(frozen=True)
class Projection:
    """A matrix (rows, columns) with its bias (rows,), or without one."""

    weight: Weight
    bias: mx.array | None = None

    @property
    def fusable(self) -> Hashable:
        """Equal for projections whose rows can be one matrix; None for one that stays separate.

        An adapter's update and a factor of a whole matrix belong to one projection.
        """
        weight = self.weight
        if not isinstance(weight, MLXWeight) or weight.factor is not None:
            return None
        return weight.layout, *(str(part.dtype) for part in weight.arrays), self.bias is None

    @property
    def function(self) -> Product:
        """``x (..., columns) -> (..., rows)``."""
        return self.weight.product(self.bias)

    def cut(self, start: int, stop: int) -> Projection:
        """The projection to some of the rows, as views."""
        whole, bias = self.weight, self.bias
        assert isinstance(whole, MLXWeight)
        parts = (whole.weight, whole.scales, whole.biases, bias)
        weight, scales, biases, bias = (
            None if part is None else part[start:stop] for part in parts
        )
        assert weight is not None
        return Projection(replace(whole, weight=weight, scales=scales, biases=biases), bias)


def separate(projections: Sequence[Projection]) -> Split:
    """``x (..., columns) -> [(..., rows), ...]``, a product for each."""
    functions = [each.function for each in projections]
    return lambda x: [function(x) for function in functions]


def fuse(projections: Sequence[Projection]) -> tuple[Split, list[Projection]]:
    """As :func:`separate`, one product for all that can be fused; and the projections as its views.

    The fused matrix is computed now: once the caller drops the projections, their memory is free.
    """
    made, results = list(projections), []
    for places in _groups(projections):
        whole = _concatenated([projections[place] for place in places])
        edges = list(accumulate(projections[place].weight.rows for place in places))
        for place, start, stop in zip(places, [0, *edges], edges, strict=False):
            made[place] = whole.cut(start, stop) if len(places) > 1 else whole
        results.append((places, whole.function, edges[:-1]))
    if len(results) == len(made):
        return separate(made), made

    def split(x: mx.array) -> list[mx.array]:
        parts: dict[int, mx.array] = {}
        for places, function, edges in results:
            parts |= zip(places, mx.split(function(x), edges, axis=-1), strict=True)
        return [parts[place] for place in range(len(made))]

    return split, made


def _groups(projections: Sequence[Projection]) -> list[list[int]]:
    """Places of the projections that become one."""
    found: dict[Hashable, list[int]] = {}
    for place, projection in enumerate(projections):
        key = projection.fusable
        found.setdefault(place if key is None else key, []).append(place)
    return list(found.values())


def _concatenated(projections: Sequence[Projection]) -> Projection:
    if len(projections) == 1:
        return projections[0]

    def rows(parts: Sequence[mx.array | None]) -> mx.array | None:
        present = [part for part in parts if part is not None]
        return mx.concatenate(present) if present else None

    weights = [each.weight for each in projections if isinstance(each.weight, MLXWeight)]
    weight = rows([each.weight for each in weights])
    scales, biases = (
        rows([each.scales for each in weights]),
        rows([each.biases for each in weights]),
    )
    bias = rows([each.bias for each in projections])
    assert weight is not None
    mx.eval([part for part in (weight, scales, biases, bias) if part is not None])
    return Projection(replace(weights[0], weight=weight, scales=scales, biases=biases), bias)
