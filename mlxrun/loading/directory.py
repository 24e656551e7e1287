"""A model directory into a transformer: ``config.json`` and safetensors, quantised or plain.

Reads what is there and casts floats to the dtype of the run. Knows files; arithmetic is elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.directory.files import read_config, weight_files
from converters.directory.names import normalise, text_config
from converters.directory.weights import read_weights, reading
from mlxrun.kernels.dispatch import Kernels, cpu_kernels
from mlxrun.loading.adapters import AdapterChoice, read_adapters
from mlxrun.loading.model import Loaded, build, foreign_classes
from mlxrun.loading.run import DTYPES, form, resolve_dtype
from mlxrun.models.families import model_config
from mlxrun.weights.parameters import Parameters
from mlxrun.weights.weight import Weight


def load_directory(path: Path, *, dtype: str | None = None, adapter: AdapterChoice = ()) -> Loaded:
    """Load a converted directory, or any mlx-lm or Hugging Face one of a supported family.

    Raises:
        AdapterError: an adapter is damaged or was made for another model.
        CheckpointError: files are missing, unreadable or contradict each other.
        UnsupportedArchitectureError: no family here has its ``model_type``.
    """
    config = text_config(read_config(path))
    ours = not foreign_classes(config)
    if ours:
        model_config(config)  # unknown families and impossible values, before anything is read
    with reading(path):
        return _loaded(path, config, ours=ours, dtype=dtype, adapter=adapter)


def _loaded(
    path: Path, config: dict[str, Any], *, ours: bool, dtype: str | None, adapter: AdapterChoice
) -> Loaded:
    weights = read_weights(weight_files(path), config)
    if ours:
        normalise(config, weights)
    adapters = read_adapters(adapter, config)
    arrays, layouts = weights.arrays, weights.layouts
    floats = {str(a.dtype) for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)}
    preferred = "bfloat16" if floats <= {"mlx.core.bfloat16", "mlx.core.float32"} else "float16"
    run = resolve_dtype(dtype, preferred)
    elements = sum(Weight(layout, arrays[f"{m}.weight"]).elements for m, layout in layouts.items())
    kept = any(f.mode != "affine" and arrays[f"{m}.weight"].ndim == 3 for m, f in layouts.items())
    held = form(elements, run, kept=kept) if layouts else None
    expand = held is not None and held.plain
    found = cpu_kernels((), run) if ours else None
    kernels = found if isinstance(found, Kernels) else None
    params = Parameters(arrays, layouts, DTYPES[run], expand, kernels=kernels)
    how = str(held or f"plain {run}, as they are stored")
    loaded = build(config, adapters.applied(params), None, adapters, how)
    return replace(loaded, native=kernels is not None and (held is None or held.plain))
