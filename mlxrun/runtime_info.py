"""How a model runs on this machine, with the options that change it: ``-v`` prints it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mlxrun.config import CacheTypeOptions, names_of
from mlxrun.display import table_of
from mlxrun.engine.model_runner import DecodeStep
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.kernels import blas, dispatch
from mlxrun.kernels.device import device, device_name
from mlxrun.memory.device import cores
from mlxrun.model import Model, WeightStorage
from mlxrun.products import described
from mlxrun.sampling_params import SamplingDefaults


@dataclass(frozen=True)
class RuntimeInfo:
    """How a model runs, each in words, with the option that changes it in brackets.

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

    def __str__(self) -> str:
        return "\n".join(f"{field.name}: {getattr(self, field.name)}" for field in fields(self))

    def _repr_html_(self) -> str:
        return table_of(self)


def runtime_info(
    model: Model[Any],
    storage: WeightStorage,
    products: str | None,
    defaults: SamplingDefaults,
    step: DecodeStep,
) -> RuntimeInfo:
    """How a loaded model runs."""
    name, native = device_name(), storage.native
    dtype = str(model.dtype).removeprefix("mlx.core.")
    if device().joins_projections and not model.summary.through:
        projections = "one product where layouts agree"
    else:
        projections = "one operation for those of one input" if native else "a product each"
    names = names_of(CacheTypeOptions)
    keywords = ", ".join(f"{name}=" for name in names)
    flags = ", ".join("--" + name.replace("_", "-") for name in names)
    return RuntimeInfo(
        device=f"CPU, {cores()} cores" if name == "CPU" else name,
        blas=blas.described(),
        dtype=f"{dtype} (dtype=, --dtype)",
        weights=storage.reason,
        products=_products(storage, products),
        projections=projections,
        cache=f"keys and values in {dtype}, as activations ({keywords}; {flags})",
        decode=_decode(model, step),
        prefill=f"{PREFILL_CHUNK} tokens a pass",
        sampling=str(defaults),
    )


def _products(storage: WeightStorage, products: str | None) -> str:
    if storage.native:
        found = dispatch.status()
        where = f"{found.isa} kernels on {found.threads} threads"
        if products is None:
            return f"activations in float32, {where}"
        return f"{described(products)}, {where} (products=, --products)"
    return f"MLX's own: {storage.missed}" if storage.missed else "MLX's own"


def _decode(model: Model[Any], step: DecodeStep) -> str:
    if not model.joint:
        return "not compiled: the model is no function of its caches"
    if step.compile_error:
        return f"not compiled: MLX cannot compile here ({step.compile_error})"
    return f"compiled from step {step.compile_after + 1} on where caches allow"
