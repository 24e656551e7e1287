"""LoRA and DoRA: low-rank updates of a matrix, and a weight that adds them to its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from converters.quantize.layout import dense
from mlxrun.errors import AdapterError
from mlxrun.weights.linear import (
    GatheredProduct,
    MLXWeight,
    Product,
    Weight,
    finished,
    finished_each,
    settled,
)

# A row of zeros has no direction to scale in.
TINY = 1e-30
OTHER_MODEL = "Use an adapter that was made for this very model"


@dataclass(frozen=True)
class LoRA:
    """How one adapter changes one matrix W (rows, columns), or each matrix of a stack.

    LoRA (Hu et al., 2021, arXiv:2106.09685) makes it ``W + scale * B @ A``. DoRA (Liu et al., 2024,
    arXiv:2402.09353) then scales each row of that to a learned magnitude. Arrays are MLX's, or
    NumPy's where weights are merged.

    Attributes:
        origin: which adapter and tensor, for messages.
        a: (..., rank, columns).
        b: (..., rows, rank), or fewer rows where ``first`` is set.
        scale: of the product, as the adapter has it.
        strength: 0 leaves W as it is, 1 is the adapted matrix.
        magnitude: DoRA's, the norms of the adapted rows, (..., rows).
        first: the row of W that the first row of B belongs to, for an adapter of a part of a fused
            projection; None where it has all rows.
    """

    origin: str
    a: Any
    b: Any
    scale: float
    strength: float = 1.0
    magnitude: Any = None
    first: int | None = None

    @property
    def rows(self) -> slice:
        """The rows of W that change."""
        first = self.first or 0
        return slice(first, first + self.b.shape[-2])

    def check(self, module: str, shape: tuple[int, ...]) -> None:
        """Refuse an update that does not fit a matrix of ``shape`` (..., rows, columns)."""
        *stack, rows, columns = shape
        changed = rows if self.first is None else min(self.b.shape[-2], rows - self.first)
        rank = self.a.shape[-2]
        expected = (*stack, rank, columns), (*stack, changed, rank)
        if (self.a.shape, self.b.shape) != expected:
            raise AdapterError(
                f"{self.origin}: matrices {_show(self.a.shape)} and {_show(self.b.shape)} do not "
                f"fit {module}, which is {_show(shape)}: expected {_show(expected[0])} and "
                f"{_show(expected[1])}",
                hint=OTHER_MODEL,
            )
        if self.magnitude is not None and self.magnitude.shape != (*stack, changed):
            raise AdapterError(
                f"{self.origin}: {_show(self.magnitude.shape)} magnitudes do not fit {module}: "
                f"expected {_show((*stack, changed))}",
                hint=OTHER_MODEL,
            )

    def factors(self, plain: Callable[[], Any], library: Any = mx) -> tuple[Any, Any]:
        """``(B', s)``, so that the update adds ``s * W + B' @ A`` to W.

        Args:
            plain: gives the rows of W that change, float32; called for DoRA only.
            library: of the arrays, ``mlx.core`` or ``numpy``.

        Returns:
            B' (..., rows, rank), float32, and s (..., rows), or None for zeros.
        """
        b = self.b.astype(library.float32)
        if self.magnitude is None:
            return b * (self.scale * self.strength), None
        # W + t (g (W + c B A) - W) = (1 + t (g - 1)) W + (t c g B) A
        adapted = plain() + self.scale * b @ self.a.astype(library.float32)
        norms = library.maximum(library.linalg.norm(adapted, axis=-1), TINY)
        gain = self.magnitude.astype(library.float32) / norms
        scaled = b * (self.scale * self.strength) * gain[..., None]
        return scaled, self.strength * (gain - 1)


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


@dataclass(frozen=True)
class CombinedLoRA:
    """Any number of updates of one matrix as one: ``y = row_scale * (W @ x) + B @ (A @ x)``.

    Attributes:
        a: (..., ranks, columns), those of the updates below each other.
        b: (..., rows, ranks), scales included.
        row_scale: (..., rows), or None for ones.
    """

    a: mx.array
    b: mx.array
    row_scale: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.a, self.b] if self.row_scale is None else [self.a, self.b, self.row_scale]


def combined(
    updates: Sequence[LoRA], rows: int, plain: Callable[[], mx.array], dtype: mx.Dtype
) -> CombinedLoRA:
    """All updates of one matrix, each relative to the matrix without adapters."""
    a, b, row_scale = [], [], None
    for update in updates:
        own = update.rows
        scaled, more = update.factors(lambda own=own: plain()[..., own, :])  # type: ignore[misc]
        if more is not None:
            more = _spread(more, own, rows, axis=-1)
            row_scale = more + (1.0 if row_scale is None else row_scale)
        a.append(update.a.astype(dtype))
        b.append(_spread(scaled, own, rows, axis=-2).astype(dtype))
    return CombinedLoRA(
        mx.concatenate(a, axis=-2),
        mx.concatenate(b, axis=-1),
        None if row_scale is None else row_scale.astype(dtype),
    )


def _spread(part: mx.array, place: slice, rows: int, axis: int) -> mx.array:
    """The part at its place along an axis of ``rows``, zeros elsewhere."""
    widths = [(0, 0)] * part.ndim
    widths[axis] = (place.start, rows - place.stop)
    return mx.pad(part, widths)


@dataclass(frozen=True)
class LoRAWeight(Weight):
    """A matrix whose products include the updates of adapters; the matrix itself is unchanged.

    ``dequantize`` gives the matrix without adapters.
    """

    base: Weight
    lora: CombinedLoRA

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def arrays(self) -> list[mx.array]:
        return self.base.arrays + self.lora.arrays

    def product(self, bias: mx.array | None = None) -> Product:
        product, row_scale = self.base.product(), self.lora.row_scale
        a, b = (settled(part.swapaxes(-1, -2)) for part in (self.lora.a, self.lora.b))
        if row_scale is None:
            return finished(lambda x: product(x) + (x @ a) @ b, None, bias)
        scale = settled(row_scale[..., None, :])  # (..., 1, rows)
        return finished(lambda x: product(x) * scale + (x @ a) @ b, None, bias)

    def gathered_product(self, bias: mx.array | None = None) -> GatheredProduct:
        product, row_scale = self.base.gathered_product(), self.lora.row_scale
        a, b = (
            MLXWeight(dense(str(part.dtype).removeprefix("mlx.core.")), part).gathered_product()
            for part in (self.lora.a, self.lora.b)
        )

        def adapted(x: mx.array, chosen: mx.array) -> mx.array:
            y = product(x, chosen)
            scaled = y if row_scale is None else y * row_scale[chosen][..., None, :]
            return scaled + b(a(x, chosen), chosen)

        return finished_each(adapted, None, bias)

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        return self.base.dequantize(dtype)

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        taken, row_scale = self.base.take(ids, dtype), self.lora.row_scale
        added = (self.lora.b[ids] @ self.lora.a).astype(dtype)
        return (taken if row_scale is None else taken * row_scale[ids][..., None]) + added
