"""The parameters of a model by name: the one door to weights for the layers that are built."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from converters.quantize.layout import Layout, dense
from mlxrun.errors import CheckpointError
from mlxrun.kernels.device import device
from mlxrun.weights.blocks import BlockWeight, dense_block_weight
from mlxrun.weights.fused import Added, Gate, gated, gated_experts, linear, split
from mlxrun.weights.linear import (
    GatheredProduct,
    MLXWeight,
    Product,
    Projection,
    Split,
    Weight,
    fuse,
    separate,
)
from mlxrun.weights.lora import LoRA, LoRAWeight, combined

if TYPE_CHECKING:
    from mlxrun.kernels.native import Kernels


@dataclass
class Parameters:
    """Arrays by Hugging Face name, each handed out once and checked against the config's shapes.

    Attributes:
        arrays: by full name, e.g. ``model.layers.0.mlp.up_proj.weight``. Those handed out are
            removed, so that none is in memory both as stored and as used.
        layouts: of quantized modules, by module.
        dtype: of activations; plain arrays and scales are cast to it as they are handed out.
        expand: hand out quantized matrices as plain ones.
        updates: of adapters, by module.
        blocks: matrices that stay GGUF blocks, by full name; removed like arrays.
        kernels: of this CPU, for a run in float32, which multiply plain matrices as well, or None.
        planes: activations have 8 bits times this where they are multiplied with blocks.
        prefix: of the module that names are relative to.
        fuse: make projections of one input one product, where their layouts agree. By default on a
            GPU, which launches fewer kernels then; on a CPU it costs as much as it saves.
        used: full names handed out so far; shared between views.
        handed: arrays and matrices handed out, by full module name; shared between views.
    """

    arrays: MutableMapping[str, mx.array]
    layouts: Mapping[str, Layout]
    dtype: mx.Dtype
    expand: bool = False
    updates: Mapping[str, Sequence[LoRA]] = field(default_factory=dict)
    blocks: MutableMapping[str, BlockWeight] = field(default_factory=dict)
    kernels: Kernels | None = None
    planes: int = 3
    prefix: str = ""
    fuse: bool = field(default_factory=lambda: device().joins_projections)
    used: set[str] = field(default_factory=set)
    handed: dict[str, list[mx.array | Weight]] = field(default_factory=dict)

    def under(self, name: str) -> Parameters:
        """The same weights, with names relative to a module."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def _get(self, name: str) -> mx.array:
        full = self.prefix + name
        if full not in self.arrays and full not in self.blocks:
            raise CheckpointError(
                f"the weights have no {full}",
                hint="Download or convert the model again",
            )
        self.used.add(full)
        if full in self.blocks:
            return self.blocks.pop(full).dequantize(self.dtype)
        return self.arrays.pop(full)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.arrays or self.prefix + name in self.blocks

    def vector(self, name: str, *shape: int) -> mx.array:
        """A norm's weight or a bias, or a stack of them, in the run's dtype."""
        array = self._cast(name, self._get(name))
        self._expect(name, array.shape, shape)
        self._hand(name, array)
        return array

    def array(self, name: str, *, cast: bool = True) -> mx.array:
        """An array of any shape, for a caller that checks it; floats in the run's dtype.

        Args:
            cast: whether floats are; codes and one-byte scales never are.
        """
        array = self._get(name)
        if cast and mx.issubdtype(array.dtype, mx.floating):
            array = self._cast(name, array)
        self._hand(name, array)
        return array

    def experts(self, module: str, count: int, rows: int, columns: int) -> GatheredProduct:
        """Stacked projections chosen by index; see :meth:`Weight.gathered_product`."""
        stack = self._projection(module, rows, columns, (count,))
        return stack.weight.gathered_product(stack.bias)

    def gated_experts(
        self, modules: Sequence[str], count: int, rows: int, columns: int, gate: Gate
    ) -> GatheredProduct:
        """As :meth:`experts`, of a gate and a linear side that become one, (..., K, 1, rows)."""
        stacks = [self._projection(module, rows, columns, (count,)) for module in modules]
        if fused := gated_experts(stacks, gate):
            return fused
        first, second = (each.weight.gathered_product(each.bias) for each in stacks)
        return lambda x, chosen: gate.function(first(x, chosen), second(x, chosen))

    def weight(self, module: str, rows: int, columns: int, stacked: tuple[int, ...] = ()) -> Weight:
        """A matrix in its own form, its floats in the run's dtype; or a stack of them.

        One dtype everywhere: MLX promotes a product of two half types to float32.
        """
        stored = self._stored(module, rows, columns, stacked)
        updates = self.updates.get(self.prefix + module)
        if not updates:
            return stored
        for update in updates:
            update.check(self.prefix + module, stored.shape)
        lora = combined(updates, stored.rows, lambda: stored.dequantize(mx.float32), self.dtype)
        self._hand(module, *lora.arrays)
        return LoRAWeight(stored, lora)

    def _stored(self, module: str, rows: int, columns: int, stacked: tuple[int, ...]) -> Weight:
        layout, full = self.layouts.get(self.prefix + module), f"{self.prefix}{module}.weight"
        if full in self.blocks:
            blocks = self.blocks.pop(full)
            self.used.add(full)
            self._expect(f"{module}.weight", blocks.shape, (*stacked, rows, columns))
            self._hand(module, blocks)
            return blocks
        weight = self._get(f"{module}.weight")
        if layout is None:
            self._expect(f"{module}.weight", weight.shape, (*stacked, rows, columns))
            return self._plain(module, self._cast(f"{module}.weight", weight))
        packed = self._packed(module, layout, weight)
        words, groups = columns * layout.bits // 32, columns // layout.group_size
        self._expect(f"{module}.weight", weight.shape, (*stacked, rows, words))
        for name, array in (("scales", packed.scales), ("biases", packed.biases)):
            if array is not None:
                self._expect(f"{module}.{name}", array.shape, (*stacked, rows, groups))
        if self.expand:
            return self._plain(module, packed.dequantize(self.dtype))
        self._hand(module, packed)
        return packed

    def _packed(self, module: str, layout: Layout, weight: mx.array) -> MLXWeight:
        scales = self._get(f"{module}.scales")
        codes = (weight.dtype, scales.dtype if layout.mode != "affine" else mx.uint8)
        if codes != (mx.uint32, mx.uint8):
            raise CheckpointError(
                f"{self.prefix}{module} holds {weight.dtype} with scales of {scales.dtype}, which "
                f"is not how {layout.mode} is stored"
            )
        if layout.mode != "affine":
            factor = None  # a GGUF's, of a whole matrix or of each of a stack of experts
            if self.has(f"{module}.factor"):
                factor = self._get(f"{module}.factor")
                self._expect(f"{module}.factor", factor.shape, weight.shape[:-2] or (1,))
            return MLXWeight(layout, weight, scales, factor=factor)
        biases = self._get(f"{module}.biases")
        if self.dtype == mx.float32 and scales.dtype == biases.dtype == mx.float16:
            return MLXWeight(layout, weight, scales, biases)  # products widen them, at no loss
        return MLXWeight(
            layout,
            weight,
            self._cast(f"{module}.scales", scales),
            self._cast(f"{module}.biases", biases),
        )

    def _plain(self, module: str, weight: mx.array) -> Weight:
        form: Weight
        if self.kernels is None:
            form = MLXWeight(dense(str(weight.dtype).removeprefix("mlx.core.")), weight)
        else:
            form = dense_block_weight(self.prefix + module, weight, self.kernels, self.planes)
        self._hand(module, form)
        return form

    def _cast(self, name: str, array: mx.array) -> mx.array:
        """The array in the run's dtype, unless that would change it beyond rounding."""
        if not mx.issubdtype(array.dtype, mx.floating):
            raise CheckpointError(f"{self.prefix}{name} holds {array.dtype} and no floats")
        cast = array.astype(self.dtype)
        if self.dtype == mx.float16 and array.dtype != mx.float16 and _damaged(array, cast):
            raise CheckpointError(
                f"{self.prefix}{name} has values that float16 cannot hold",
                hint="Load the model with dtype bfloat16 or float32",
            )
        return cast

    def _expect(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self.prefix}{name} has the shape {found}, config.json implies {expected}"
            )

    def linear(self, module: str, rows: int, columns: int, *, norm: Product | None = None) -> Added:
        """A projection ``(..., columns) -> (..., rows)``, with its bias if it has one."""
        return linear(self._projection(module, rows, columns), norm)

    def linears(
        self, parts: Sequence[tuple[str, int]], columns: int, *, norm: Product | None = None
    ) -> Split:
        """Projections of one input: ``x (..., columns) -> [(..., rows), ...]``.

        Args:
            parts: module and rows of each.
            columns: of all.
            norm: applied to the input first.
        """
        return self._split(parts, [self._projection(*part, columns) for part in parts], norm)

    def _split(
        self,
        parts: Sequence[tuple[str, int]],
        projections: list[Projection],
        norm: Product | None,
    ) -> Split:
        if fused := split(projections, norm):
            return fused
        if self.fuse:
            product, projections = fuse(projections)
            for (module, _), projection in zip(parts, projections, strict=True):
                self.handed[self.prefix + module] = [projection.weight]
                if projection.bias is not None:
                    self.handed[f"{self.prefix}{module}.bias"] = [projection.bias]
        else:
            product = separate(projections)
        return product if norm is None else lambda x: product(norm(x))

    def gated(
        self,
        modules: Sequence[str],
        rows: int,
        columns: int,
        gate: Gate,
        *,
        norm: Product | None = None,
    ) -> Product:
        """A gate and a linear side of one input as one: ``x (..., columns) -> (..., rows)``.

        Args:
            modules: of both, or one module that has the rows of both below each other.
            rows: of each side.
            norm: applied to the input first.
        """
        if len(modules) == 1:
            both = self.linear(modules[0], 2 * rows, columns, norm=norm)
            return lambda x: gate.function(*mx.split(both(x), 2, axis=-1))
        parts = [(module, rows) for module in modules]
        projections = [self._projection(*part, columns) for part in parts]
        if fused := gated(projections, gate, norm):
            return fused
        wide = self._split(parts, projections, norm)
        return lambda x: gate.function(*wide(x))

    def _projection(
        self, module: str, rows: int, columns: int, stacked: tuple[int, ...] = ()
    ) -> Projection:
        weight, bias = self.weight(module, rows, columns, stacked), f"{module}.bias"
        return Projection(weight, self.vector(bias, *stacked, rows) if self.has(bias) else None)

    def _hand(self, name: str, *parts: mx.array | Weight) -> None:
        self.handed.setdefault(self.prefix + name, []).extend(parts)

    def settle(self) -> None:
        """Evaluate all that was handed out, so that a damaged file fails here.

        One module at a time: until then the arrays that views are taken of stay in memory as well.
        """
        for parts in self.handed.values():
            mx.eval([part.arrays if isinstance(part, Weight) else part for part in parts])

    @property
    def module_bytes(self) -> dict[str, int]:
        """Bytes handed out, by full module name."""
        return {
            name: sum(int(part.nbytes) for part in parts) for name, parts in self.handed.items()
        }

    @property
    def block_weights(self) -> list[BlockWeight]:
        """The GGUF blocks handed out."""
        parts = [part for parts in self.handed.values() for part in parts]
        return [part for part in parts if isinstance(part, BlockWeight)]

    @property
    def nbytes(self) -> int:
        return sum(self.module_bytes.values())

    def unused(self) -> list[str]:
        """Names that were not handed out."""
        return sorted([*self.arrays, *self.blocks])


def _damaged(wide: mx.array, narrow: mx.array) -> bool:
    """Whether a cast made numbers infinite, or changed a matrix as a whole by more than 1%."""
    back = narrow.astype(mx.float32)
    wide = wide.astype(mx.float32)
    lost = bool(mx.any(mx.isinf(back) & ~mx.isinf(wide)).item())
    if lost or wide.ndim < 2:
        return lost
    # Where weights are tiny enough to vanish, so do their squares: measure relative to the largest.
    largest = mx.maximum(mx.abs(wide).max(), 1e-38)
    error, size = ((back - wide) / largest).square().sum(), (wide / largest).square().sum()
    return bool((error > 1e-4 * size).item())
