"""The weights of a model by name, handed out once each, so that a loader can say what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from converters.layout import Layout, dense
from mlxrun.errors import CheckpointError
from mlxrun.models.weights import Weight, linear


@dataclass
class Parameters:
    """Arrays by Hugging Face name, with the layouts of the quantised ones.

    Attributes:
        arrays: full name to array, e.g. ``model.layers.0.mlp.up_proj.weight``.
        layouts: module name to layout, for quantised modules.
        dtype: of activations; plain arrays and scales are cast to it as they are handed out.
        expand: hand out quantised matrices as plain ones.
        prefix: what names are relative to.
        used: full names handed out so far; shared between views.
        handed: the arrays handed out, as the model holds them; shared between views.
    """

    arrays: Mapping[str, mx.array]
    layouts: Mapping[str, Layout]
    dtype: mx.Dtype
    expand: bool = False
    prefix: str = ""
    used: set[str] = field(default_factory=set)
    handed: list[mx.array] = field(default_factory=list)

    def under(self, name: str) -> Parameters:
        """The same weights, with names relative to a module."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def _get(self, name: str) -> mx.array:
        full = self.prefix + name
        if full not in self.arrays:
            raise CheckpointError(
                f"the weights have no {full}",
                hint="Download or convert the model again",
            )
        self.used.add(full)
        return self.arrays[full]

    def vector(self, name: str) -> mx.array:
        """A norm's weight or a bias, (n,), in the run's dtype."""
        self.handed.append(self._get(name).astype(self.dtype))
        return self.handed[-1]

    def weight(self, module: str) -> Weight:
        """A matrix in its own layout, its floats in the run's dtype.

        One dtype everywhere: MLX promotes a product of two half types to float32.
        """
        layout = self.layouts.get(self.prefix + module)
        weight = self._get(f"{module}.weight")
        if layout is None:
            return self._plain(weight)
        scales, biases = self._get(f"{module}.scales"), None
        if layout.mode == "affine":
            scales = scales.astype(self.dtype)
            biases = self._get(f"{module}.biases").astype(self.dtype)
        packed = Weight(layout, weight, scales, biases)
        if self.expand:
            return self._plain(packed.dequantize(self.dtype))
        self.handed.extend(packed.arrays)
        return packed

    def _plain(self, weight: mx.array) -> Weight:
        name = str(self.dtype).removeprefix("mlx.core.")
        self.handed.append(weight.astype(self.dtype))
        return Weight(dense(name), self.handed[-1])

    def linear(self, module: str) -> Callable[[mx.array], mx.array]:
        """A projection, with its bias if it has one."""
        weight = self.weight(module)
        biased = f"{self.prefix}{module}.bias" in self.arrays
        return linear(weight, self.vector(f"{module}.bias") if biased else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays handed out."""
        return sum(int(array.nbytes) for array in self.handed)

    def unused(self) -> list[str]:
        """Names that the model did not ask for."""
        return sorted(set(self.arrays) - self.used)
