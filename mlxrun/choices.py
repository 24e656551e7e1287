"""How a model runs on this machine, and what overrides each choice: ``-v`` prints it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from mlxrun.config import CacheTypeOptions, names_of
from mlxrun.display import table_of
from mlxrun.generation.engine import PREFILL_CHUNK
from mlxrun.kernels import blas, dispatch
from mlxrun.kernels.device import device, device_name
from mlxrun.memory.device import cores
from mlxrun.products import described

if TYPE_CHECKING:
    from mlxrun.llm import LLM


@dataclass(frozen=True)
class RuntimeInfo:
    """How a model runs, each in words, with what overrides it in brackets.

    Attributes:
        device: that computes.
        blas: the library that multiplies matrices on the CPU.
        dtype: of activations.
        weights: how they are stored, and why.
        products: how activations are multiplied with them.
        projections: whether those of one input are fused.
        cache: how keys and values are stored.
        decode: how a decode step runs.
        prefill: the chunks of a prompt.
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

    def storing(self, keys: str | None, values: str | None) -> RuntimeInfo:
        """The same with other types of cache; None for the default."""
        if keys is None and values is None:
            return self
        plain = self.dtype.split()[0]
        return replace(self, cache=f"keys in {keys or plain}, values in {values or plain}")

    def lines(self) -> list[str]:
        """``name: value`` for each."""
        return [f"{field.name}: {getattr(self, field.name)}" for field in fields(self)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        return table_of(self)


def runtime_info(llm: LLM) -> RuntimeInfo:
    """How a loaded model runs."""
    name, model = device_name(), llm.model
    dtype = str(model.dtype).removeprefix("mlx.core.")
    fuses = device().joins_projections and not model.summary.through
    names = names_of(CacheTypeOptions)
    keywords = ", ".join(f"{name}=" for name in names)
    flags = ", ".join("--" + name.replace("_", "-") for name in names)
    return RuntimeInfo(
        device=f"CPU, {cores()} cores" if name == "CPU" else name,
        blas=blas.described(),
        dtype=f"{dtype} (dtype=, --dtype)",
        weights=llm.held,
        products=_products(llm),
        projections="one product where layouts agree" if fuses else _separate(llm),
        cache=f"keys and values in {dtype}, as activations ({keywords}; {flags})",
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


def _separate(llm: LLM) -> str:
    return "one operation for those of one input" if llm.native else "a product each"


def _decode(llm: LLM) -> str:
    if not llm.model.joint:
        return "not compiled: the model is no function of its caches"
    if llm.stepper.refusal:
        return f"not compiled: MLX cannot compile here ({llm.stepper.refusal})"
    return f"compiled from step {llm.stepper.patience + 1} on where caches allow"
