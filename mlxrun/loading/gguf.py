"""A GGUF file into a transformer: through the converter's stream, tensor by tensor, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from converters.convert import Converted, check_policy, half_dtype, skipped, stream
from converters.gguf.config import model_config
from converters.gguf.names import map_names
from converters.gguf.reader import GGUFFile
from converters.layout import Layout
from converters.policy import FIXED, Policy
from converters.report import ConversionReport
from mlxrun.loading.adapters import AdapterChoice, read_adapters
from mlxrun.loading.model import Loaded, build
from mlxrun.loading.run import DTYPES, form, resolve_dtype
from mlxrun.models.families import FAMILIES

Progress = Callable[[int, int, str], None]


def load_gguf(
    gguf: GGUFFile,
    *,
    dtype: str | None = None,
    policy: str | None = None,
    adapter: AdapterChoice = (),
    progress: Progress | None = None,
) -> Loaded:
    """Convert a GGUF straight into memory.

    Args:
        dtype: of activations and scales; by default float32 on the CPU and with policy ``exact``
            (half precision rounds what the policy keeps), half precision elsewhere. With near,
            scales are held in half precision all the same where that loses nothing.
        policy: ``exact``, ``near`` or ``compact``. By default plain float32 (exact) on the CPU
            where memory allows (see :func:`form`), and near elsewhere.

    Raises:
        UnsupportedArchitectureError, GGUFError, InexactError: as the converter raises them.
        AdapterError: an adapter is damaged or was made for another model.
    """
    names = map_names(gguf)
    config = model_config(gguf)
    adapters = read_adapters(adapter, config)
    run = run_dtype(gguf, dtype, policy)
    native = config["model_type"] in FAMILIES
    chosen, held = _chosen(gguf, policy, run)
    bound = replace(chosen, factors=native)
    arrays: dict[str, mx.array] = {}
    layouts: dict[str, Layout] = {}
    report = ConversionReport({"name": gguf.path.name}, bound.name, skipped=skipped(names))
    for converted in stream(names, bound, progress=progress):
        arrays |= _to_mlx(converted)
        if converted.layout.quantized:
            layouts[converted.target.removesuffix(".weight")] = converted.layout
        if converted.record:
            report.tensors.append(converted.record)
    return build(config, adapters.parameters(arrays, layouts, DTYPES[run]), report, adapters, held)


def run_dtype(gguf: GGUFFile, dtype: str | None, policy: str | None) -> str:
    """The dtype of activations that a file is run with here; see :func:`load_gguf`."""
    return resolve_dtype(dtype or ("float32" if policy == "exact" else None), half_dtype(gguf))


def run_policy(gguf: GGUFFile, name: str | None, dtype: str) -> Policy:
    """The policy that a file is loaded with on this machine, for activations of a dtype."""
    return _chosen(gguf, name, dtype)[0]


def _chosen(gguf: GGUFFile, name: str | None, dtype: str) -> tuple[Policy, str]:
    """That policy, and in words in which form it holds weights and why."""
    if name is not None:
        return _bound(gguf, check_policy(name), dtype), f"policy {name}"
    kept = any(t.type in FIXED and len(t.shape) == 3 for t in gguf.tensors)
    held = form(sum(t.elements for t in gguf.tensors), dtype, kept=kept)
    if held.plain:
        return Policy("exact", dtype, packed=False), str(held)
    return _bound(gguf, "near", dtype), str(held)


def _bound(gguf: GGUFFile, name: str, dtype: str) -> Policy:
    """A policy for a run with activations of a dtype."""
    if name == "compact":  # counts bits: float32 scales would leave none for the codes
        return Policy(name, half_dtype(gguf))
    return Policy(name, dtype, narrow=name == "near" and dtype == "float32")


def _to_mlx(converted: Converted) -> dict[str, mx.array]:
    arrays = {}
    for name, array, dtype in converted.named_arrays():
        made = mx.array(np.asarray(array, order="C"))
        arrays[name] = made.view(mx.bfloat16) if dtype == "bfloat16" else made
    return arrays
