"""Adapters as mlx-lm's trainer saves them: ``adapters.safetensors`` and ``adapter_config.json``.

Parameters have the names of mlx-lm's model, which are those of a converted checkpoint. Format:
mlx-lm's ``tuner`` (LORA.md there).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.errors import shortened
from mlxrun.errors import AdapterError
from mlxrun.loading.adapters.adapter import (
    DAMAGED,
    EMBEDDINGS,
    Adapter,
    check_numbers,
    low_rank_update,
    number,
    read_tensors,
)
from mlxrun.weights.low_rank import Update

_PARTS = ("lora_a", "lora_b", "m")


def read_mlx_lm(file: Path, config: Mapping[str, Any]) -> Adapter:
    """An adapter of kind ``lora``, ``dora`` or ``full``.

    Args:
        file: ``adapters.safetensors``, or a checkpoint of it.
        config: ``adapter_config.json``.

    Raises:
        AdapterError: of another kind, incomplete or damaged.
    """
    kind = config.get("fine_tune_type", "lora")
    name = file.parent.name
    if kind not in ("lora", "dora", "full"):
        raise AdapterError(
            f"{name}: fine_tune_type {shortened(repr(kind), 60)} is none of lora, dora and full"
        )
    arrays = read_tensors(file)
    if kind == "full":
        for key, array in arrays.items():
            check_numbers(f"{name}: {key}", array)
        return Adapter(name, replaced=arrays)
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(f"{name}: adapter_config.json has no lora_parameters", hint=DAMAGED)
    scale = number(parameters, "scale", name)
    modules: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for key, array in arrays.items():
        module, _, part = key.rpartition(".")
        if part not in _PARTS[: 3 if kind == "dora" else 2]:
            raise AdapterError(f"{name}: {key} is no tensor of a {kind} adapter", hint=DAMAGED)
        modules[module][part] = array
    rank = int(number(parameters, "rank", name)) if "rank" in parameters else None
    updates = {
        module: _update(f"{name}: {module}", module, parts, scale, rank, stretched=kind == "dora")
        for module, parts in modules.items()
    }
    return Adapter(name, updates)


def _update(
    origin: str,
    module: str,
    parts: Mapping[str, mx.array],
    scale: float,
    rank: int | None,
    *,
    stretched: bool,
) -> Update:
    """One module; mlx-lm stores the matrices of linear layers, but not of experts, transposed."""
    a, b, lengths = (parts.get(part) for part in _PARTS)
    if stretched and lengths is None:
        raise AdapterError(f"{origin}: the lengths of its rows (m) are missing", hint=DAMAGED)
    if module.endswith(EMBEDDINGS):
        a, b = b, a
    elif a is not None and b is not None and a.ndim == b.ndim == 2:
        a, b = a.T, b.T
    return low_rank_update(origin, a, b, scale, lengths=lengths, rank=rank)
