"""What one adapter changes, by the parameters' Hugging Face names, whatever format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.errors import shortened
from mlxrun.errors import AdapterError
from mlxrun.weights.low_rank import OTHER_MODEL, Update

# What models call the matrix that turns tokens into rows: adapters store it for looking up rows.
EMBEDDINGS = ("embed_tokens", "embeddings", "embedding", "wte")
DAMAGED = "The adapter is damaged: download or train it again"


@dataclass(frozen=True)
class Adapter:
    """The changes of one adapter at full strength.

    Attributes:
        name: for messages.
        updates: by module, e.g. ``model.layers.0.mlp.up_proj``.
        replaced: whole new parameters by name, e.g. ``model.norm.weight``.
    """

    name: str
    updates: Mapping[str, Update] = field(default_factory=dict)
    replaced: Mapping[str, mx.array] = field(default_factory=dict)


def low_rank_update(
    origin: str,
    a: mx.array | None,
    b: mx.array | None,
    scale: float,
    *,
    lengths: mx.array | None = None,
    rank: int | None = None,
) -> Update:
    """An update from the tensors of a file.

    Args:
        origin: which adapter and tensor, for messages.
        a: (..., rank, columns).
        b: (..., rows, rank).
        rank: what the adapter's configuration says it is; not checked if None.

    Raises:
        AdapterError: a tensor is missing, is no stack of matrices, holds no finite numbers, or the
            ranks differ.
    """
    if a is None or b is None:
        missing = "first (A)" if a is None else "second (B)"
        raise AdapterError(f"{origin}: the {missing} of the two matrices is missing", hint=DAMAGED)
    for array in (a, b) if lengths is None else (a, b, lengths):
        check_numbers(origin, array)
    if a.ndim not in (2, 3) or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2]:
        raise AdapterError(
            f"{origin}: expected two matrices or two equal stacks of them, "
            f"found shapes {a.shape} and {b.shape}",
            hint=DAMAGED,
        )
    found = a.shape[-2]
    if not found or found != b.shape[-1] or rank not in (None, found):
        expected = "above 0" if rank is None else str(rank)
        raise AdapterError(
            f"{origin}: expected one rank {expected}, found {found} and {b.shape[-1]}",
            hint=DAMAGED,
        )
    return Update(origin, a, b, scale, lengths=lengths)


def check_numbers(origin: str, array: mx.array) -> None:
    """Refuse what is no array of finite floats.

    Raises:
        AdapterError: it is not.
    """
    if not mx.issubdtype(array.dtype, mx.floating):
        raise AdapterError(f"{origin}: expected floats, found {array.dtype}", hint=DAMAGED)
    if not mx.isfinite(array.astype(mx.float32)).all().item():
        raise AdapterError(f"{origin}: holds infinite numbers or no numbers (NaN)", hint=DAMAGED)


def number(config: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number of an adapter's configuration.

    Raises:
        AdapterError: it is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        found = "nothing" if value is None else shortened(repr(value), 60)
        raise AdapterError(f"{where}: {key} must be a number, found {found}", hint=DAMAGED)
    return float(value)


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file.

    Raises:
        AdapterError: it is missing, unreadable or empty.
    """
    if not file.is_file():
        raise AdapterError(
            f"{file.parent} has no {file.name}",
            hint="Only safetensors are read; save the adapter as such",
        )
    try:
        arrays = mx.load(str(file), format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(list(arrays.values()))
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"cannot read {file}: {error}", hint=DAMAGED) from error
    if not arrays:
        raise AdapterError(f"{file} holds no tensors", hint=DAMAGED)
    return arrays


__all__ = [
    "DAMAGED",
    "EMBEDDINGS",
    "OTHER_MODEL",
    "Adapter",
    "check_numbers",
    "low_rank_update",
    "number",
    "read_tensors",
]
