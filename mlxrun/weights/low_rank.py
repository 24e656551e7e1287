"""What adapters add to a matrix, and a weight that adds it to its products.

Knows the arithmetic of LoRA and DoRA; knows neither files nor names of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from converters.layout import dense
from mlxrun.errors import AdapterError
from mlxrun.weights.weight import (
    Form,
    GatheredProduct,
    Product,
    Weight,
    finished,
    finished_each,
    settled,
)

# A row of noughts has no direction to stretch in.
TINY = 1e-30
OTHER_MODEL = "Use an adapter that was made for this very model"


@dataclass(frozen=True)
class Update:
    """How one adapter changes one matrix W (rows, columns), or each matrix of a stack.

    LoRA (Hu et al., 2021, arXiv:2106.09685) makes it ``W + scale * b @ a``. DoRA (Liu et al., 2024,
    arXiv:2402.09353) then stretches each row of that to a learned length.

    Attributes:
        origin: which adapter and tensor, for messages.
        a: (..., rank, columns).
        b: (..., rows, rank), or fewer rows where ``first`` is set.
        scale: of the product, as the adapter has it.
        strength: how far the user wants to go from W (0) to the adapted matrix (1), or beyond.
        lengths: of the adapted rows, (..., rows), for DoRA.
        first: the row of W that the first row of ``b`` belongs to, where an adapter knows a part of
            a fused projection only; None where it has them all.
    """

    origin: str
    a: mx.array
    b: mx.array
    scale: float
    strength: float = 1.0
    lengths: mx.array | None = None
    first: int | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    @property
    def rows(self) -> slice:
        """The rows of W that change."""
        first = self.first or 0
        return slice(first, first + self.b.shape[-2])

    def check(self, module: str, shape: tuple[int, ...]) -> None:
        """Refuse an update that does not fit a module's matrix of ``shape`` (..., rows, columns).

        Raises:
            AdapterError: it was made for a matrix of another shape.
        """
        *stack, rows, columns = shape
        changed = rows if self.first is None else min(self.b.shape[-2], rows - self.first)
        wanted = (*stack, self.rank, columns), (*stack, changed, self.rank)
        if (self.a.shape, self.b.shape) != wanted:
            raise AdapterError(
                f"{self.origin}: matrices {_show(self.a.shape)} and {_show(self.b.shape)} do not "
                f"fit {module}, which is {_show(shape)}: expected {_show(wanted[0])} and "
                f"{_show(wanted[1])}",
                hint=OTHER_MODEL,
            )
        if self.lengths is not None and self.lengths.shape != (*stack, changed):
            raise AdapterError(
                f"{self.origin}: {_show(self.lengths.shape)} lengths of rows do not fit {module}: "
                f"expected {_show((*stack, changed))}",
                hint=OTHER_MODEL,
            )

    def gain(self, plain: mx.array) -> mx.array | None:
        """By how much this update stretches rows beyond LoRA, (..., rows); None if it does not.

        Args:
            plain: the rows of W that change, float32.
        """
        if self.lengths is None:
            return None
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        reached = mx.linalg.norm(plain + self.scale * b @ a, axis=-1)
        return self.lengths.astype(mx.float32) / mx.maximum(reached, TINY)


@dataclass(frozen=True)
class LowRank:
    """Any number of updates of one matrix as one: ``y = gain * (W @ x) + b @ (a @ x)``.

    Attributes:
        a: (..., ranks, columns), the updates' own below each other.
        b: (..., rows, ranks), scales included.
        gain: (..., rows), or None for ones.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.a, self.b] if self.gain is None else [self.a, self.b, self.gain]


def combined(
    updates: Sequence[Update], rows: int, plain: Callable[[], mx.array], dtype: mx.Dtype
) -> LowRank:
    """All updates of one matrix, each relative to the matrix without adapters.

    Args:
        updates: at least one.
        rows: of the matrix.
        plain: gives the matrix in float32, for updates that need its rows' lengths.
        dtype: of the result.
    """
    a, b, gain = [], [], None
    for update in updates:
        # W + t (g (W + s B A) - W) = (1 + t (g - 1)) W + (t s g B) A
        scaled = update.b.astype(mx.float32) * (update.scale * update.strength)
        if update.lengths is not None:
            own = update.gain(plain()[..., update.rows, :])
            assert own is not None
            scaled = scaled * own[..., None]
            more = _spread(update.strength * (own - 1), update.rows, rows, axis=-1)
            gain = more + (1.0 if gain is None else gain)
        a.append(update.a.astype(dtype))
        b.append(_spread(scaled, update.rows, rows, axis=-2).astype(dtype))
    return LowRank(
        mx.concatenate(a, axis=-2),
        mx.concatenate(b, axis=-1),
        None if gain is None else gain.astype(dtype),
    )


def _spread(part: mx.array, place: slice, rows: int, axis: int) -> mx.array:
    """The part at its place along an axis of ``rows``, zeros elsewhere."""
    widths = [(0, 0)] * part.ndim
    widths[axis] = (place.start, rows - place.stop)
    return mx.pad(part, widths)


@dataclass(frozen=True)
class AdaptedWeight(Form):
    """A matrix whose products include what adapters add; the matrix itself stays as it is.

    ``dequantize`` gives the matrix without adapters.
    """

    base: Form
    low_rank: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def arrays(self) -> list[mx.array]:
        return self.base.arrays + self.low_rank.arrays

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + sum(int(array.nbytes) for array in self.low_rank.arrays)

    def product(self, bias: mx.array | None = None) -> Product:
        product, gain = self.base.product(), self.low_rank.gain
        a, b = (settled(part.swapaxes(-1, -2)) for part in (self.low_rank.a, self.low_rank.b))
        if gain is None:
            return finished(lambda x: product(x) + (x @ a) @ b, None, bias)
        stretch = settled(gain[..., None, :])  # (..., 1, rows)
        return finished(lambda x: product(x) * stretch + (x @ a) @ b, None, bias)

    def gathered_product(self, bias: mx.array | None = None) -> GatheredProduct:
        product, gain = self.base.gathered_product(), self.low_rank.gain
        a, b = (_plain(part).gathered_product() for part in (self.low_rank.a, self.low_rank.b))

        def adapted(x: mx.array, chosen: mx.array) -> mx.array:
            y = product(x, chosen)
            stretched = y if gain is None else y * gain[chosen][..., None, :]
            return stretched + b(a(x, chosen), chosen)

        return finished_each(adapted, None, bias)

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        return self.base.dequantize(dtype)

    def take(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        taken, gain = self.base.take(ids, dtype), self.low_rank.gain
        added = (self.low_rank.b[ids] @ self.low_rank.a).astype(dtype)
        return (taken if gain is None else taken * gain[ids][..., None]) + added


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _plain(array: mx.array) -> Weight:
    return Weight(dense(str(array.dtype).removeprefix("mlx.core.")), array)
