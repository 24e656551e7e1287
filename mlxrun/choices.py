"""What was chosen for a model on this machine, and how to choose otherwise: what ``-v`` prints.

Asks the rooms that choose; chooses nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from mlxrun.display import table_of
from mlxrun.generation.engine import PREFILL_CHUNK
from mlxrun.kernels import blas, dispatch
from mlxrun.kernels.device import device, device_name
from mlxrun.memory.device import cores
from mlxrun.products import described

if TYPE_CHECKING:
    from mlxrun.llm import LLM


@dataclass(frozen=True)
class Choices:
    """Each choice in words, and in brackets what overrides it.

    Attributes:
        device: what computes.
        blas: the library that multiplies matrices on the CPU.
        dtype: of activations.
        weights: the form they are held in, and why.
        products: how activations are multiplied with them.
        projections: whether those of one input are one product.
        cache: how keys and values are stored.
        decode: how a drawn token's step runs.
        prefill: how a prompt is read.
        sampling: the sampling parameters that the model's files recommend.
    """

    device: str
    blas: str
    dtype: str
    weights: str
    products: str
    projections: str
    cache: str
    decode: str
    prefill: str
    sampling: str

    def storing(self, keys: str | None, values: str | None) -> Choices:
        """The choices of a session with other types of cache; None for the default."""
        if keys is None and values is None:
            return self
        plain = self.dtype.split()[0]
        return replace(self, cache=f"keys in {keys or plain}, values in {values or plain}")

    def lines(self) -> list[str]:
        """A line for each, beginning with its name."""
        return [f"{field.name}: {getattr(self, field.name)}" for field in fields(self)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        return table_of(self)


def choices(llm: LLM) -> Choices:
    """The choices that a loaded model runs by."""
    name, model = device_name(), llm.model
    dtype = str(model.dtype).removeprefix("mlx.core.")
    joins = device().joins_projections and not model.summary.through
    return Choices(
        device=f"CPU, {cores()} cores" if name == "CPU" else name,
        blas=blas.described(),
        dtype=f"{dtype} (dtype=, --dtype)",
        weights=llm.held,
        products=_products(llm),
        projections="one product where forms agree" if joins else _apart(llm),
        cache=f"keys and values in {dtype}, as activations "
        "(cache_type_k=, cache_type_v=; --cache-type-k, --cache-type-v)",
        decode=_decode(llm),
        prefill=f"{PREFILL_CHUNK} tokens a pass",
        sampling=str(llm.defaults),
    )


def _products(llm: LLM) -> str:
    if llm.native:
        found = dispatch.status()
        where = f"{found.isa} kernels on {found.threads} threads"
        if llm.products is None:
            return f"activations in float32, {where}"
        return f"{described(llm.products)}, {where} (products=, --products)"
    return f"MLX's own: {llm.missed}" if llm.missed else "MLX's own"


def _apart(llm: LLM) -> str:
    return "one operation for those of one input" if llm.native else "a product each"


def _decode(llm: LLM) -> str:
    if not llm.model.joint:
        return "built step by step: the model is no function of its caches"
    if llm.stepper.refusal:
        return f"built step by step: MLX cannot record here ({llm.stepper.refusal})"
    return f"recorded from step {llm.stepper.patience + 1} on where caches allow, built before"
