"""Weight matrices, the products with them, and projections of one input fused into one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

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
        weight, scales, biases, options = self.weight, self.scales, self.biases, self._options
        if scales is None:
            transposed = settled(weight.swapaxes(-1, -2))
            return finished(lambda x: x @ transposed, self.factor, bias)

        def packed(x: mx.array) -> mx.array:
            return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **options)

        def dense_from_many_rows(x: mx.array) -> mx.array:
            if prod(x.shape[:-1]) < CPU_DENSE_ROWS:
                return packed(x)
            return x @ self._expand(x.dtype).swapaxes(-1, -2)

        fast = device().fast_packed_matmul
        return finished(packed if fast else dense_from_many_rows, self.factor, bias)

    def gathered_product(self, bias: mx.array | None = None) -> GatheredProduct:
        return finished_each(self._gathered_product(), self.factor, bias)

    def _gathered_product(self) -> GatheredProduct:
        weight, scales, biases, options = self.weight, self.scales, self.biases, self._options
        if scales is not None:
            return lambda x, chosen: mx.gather_qmm(
                x, weight, scales, biases, rhs_indices=chosen, transpose=True, **options
            )
        transposed = settled(weight.swapaxes(-1, -2))
        if transposed.dtype != mx.float32 and not device().gathers_halves:
            return lambda x, chosen: mx.gather_mm(
                x.astype(mx.float32), transposed.astype(mx.float32), rhs_indices=chosen
            ).astype(x.dtype)
        return lambda x, chosen: mx.gather_mm(x, transposed, rhs_indices=chosen)

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        return scaled(self._expand(dtype), self.factor)

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        rows = self.part(ids)._expand(dtype)
        return rows if self.factor is None else rows * self.factor.astype(dtype)

    def part(self, rows: mx.array | slice) -> MLXWeight:
        """Some rows in the same layout."""
        scales = None if self.scales is None else self.scales[rows]
        biases = None if self.biases is None else self.biases[rows]
        return replace(self, weight=self.weight[rows], scales=scales, biases=biases)

    @property
    def _options(self) -> dict[str, Any]:
        layout = self.layout
        return {"group_size": layout.group_size, "bits": layout.bits, "mode": layout.mode}

    def _expand(self, dtype: mx.Dtype) -> mx.array:
        """The plain matrix without the factor."""
        scales, biases = self.scales, self.biases
        if scales is None:
            return self.weight.astype(dtype)
        if biases is not None:  # MLX multiplies in the type of the scales
            scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(self.weight, scales, biases, dtype=dtype, **self._options)


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
    def product(self) -> Product:
        """``x (..., columns) -> (..., rows)``."""
        return self.weight.product(self.bias)

    def rows(self, start: int, stop: int) -> Projection:
        """The projection to some of the rows, as views."""
        assert isinstance(self.weight, MLXWeight)
        bias = None if self.bias is None else self.bias[start:stop]
        return Projection(self.weight.part(slice(start, stop)), bias)


def separate(projections: Sequence[Projection]) -> Split:
    """``x (..., columns) -> [(..., rows), ...]``, a product for each."""
    functions = [each.product for each in projections]
    return lambda x: [function(x) for function in functions]


def fuse(projections: Sequence[Projection]) -> tuple[Split, list[Projection]]:
    """As :func:`separate`, one product for all that can be fused; and the projections as its views.

    The fused matrix is computed now: once the caller drops the projections, their memory is free.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, projection in enumerate(projections):
        key = projection.fusable
        groups.setdefault(place if key is None else key, []).append(place)
    made, results = list(projections), []
    for places in groups.values():
        whole = _concatenated([projections[place] for place in places])
        edges = list(accumulate(projections[place].weight.rows for place in places))
        for place, start, stop in zip(places, [0, *edges], edges, strict=False):
            made[place] = whole.rows(start, stop) if len(places) > 1 else whole
        results.append((places, whole.product, edges[:-1]))
    if len(results) == len(made):
        return separate(made), made

    def split(x: mx.array) -> list[mx.array]:
        parts: dict[int, mx.array] = {}
        for places, function, edges in results:
            parts |= zip(places, mx.split(function(x), edges, axis=-1), strict=True)
        return [parts[place] for place in range(len(made))]

    return split, made


def _concatenated(projections: Sequence[Projection]) -> Projection:
    if len(projections) == 1:
        return projections[0]
    weights = [each.weight for each in projections if isinstance(each.weight, MLXWeight)]

    def rows(parts: Iterable[Any]) -> Any:
        first, *others = parts
        return None if first is None else settled(mx.concatenate([first, *others]))

    whole = replace(
        weights[0],
        weight=rows(each.weight for each in weights),
        scales=rows(each.scales for each in weights),
        biases=rows(each.biases for each in weights),
    )
    return Projection(whole, rows(each.bias for each in projections))
