"""What keys and values take in each type of cache, for ``inspect``: facts and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlxrun.cli.console import Output, size, table
from mlxrun.config import StorageConfig
from mlxrun.errors import ParameterError
from mlxrun.kv_cache.factory import token_bytes
from mlxrun.kv_cache.options import NAMES, PER_CHANNEL, Shape

Facts = dict[str, Any]
Layers = Sequence[tuple[Shape, int | None]]


def cache_facts(layers: Layers, dtype: mx.Dtype, context: int) -> list[Facts]:
    """Bytes for each type, which keys and values both have; those by channel are for keys only.

    Args:
        layers: what a token leaves in each, and its window.
        dtype: of activations, which scales have as well.
        context: tokens.
    """
    if not layers:
        return []
    return [_facts(name, layers, dtype, context) for name in (*NAMES, *PER_CHANNEL)]


def _facts(name: str, layers: Layers, dtype: mx.Dtype, context: int) -> Facts:
    """Of one type; None where the model cannot have it."""
    facts: Facts = {"type": name, "keys": None, "values": None, "bits": None, "context": None}
    of_values = None if name in PER_CHANNEL else name
    if of_values is None and any(window for _, window in layers):
        return facts
    try:
        config = StorageConfig(cache_type_k=name, cache_type_v=of_values)
        each = [token_bytes([shape], dtype, config) for shape, _ in layers]
    except ParameterError:
        return facts
    numbers = sum(shape.heads * shape.key for shape, _ in layers)
    held = [min(context, window or context) for _, window in layers]
    facts["keys"] = sum(keys for keys, _ in each)
    facts["bits"] = 8 * facts["keys"] / numbers
    if of_values is not None:
        facts["values"] = sum(values for _, values in each)
        facts["context"] = sum(sum(both) * n for both, n in zip(each, held, strict=True))
    return facts


def print_cache_types(types: Sequence[Mapping[str, Any]], context: int) -> None:
    """The table."""
    rows = [
        (
            each["type"],
            _bytes(each["keys"]),
            _bytes(each["values"]),
            "-" if each["bits"] is None else f"{each['bits']:.4g}",
            "-" if each["context"] is None else size(each["context"]),
        )
        for each in types
    ]
    columns = ("type", "#keys", "#values", "#bits a number", f"#{context} tokens")
    out = Output()
    out.print(table("Types of cache, in bytes a token", columns, rows))
    out.print("Any type of keys goes with any of values (--cache-type-k, --cache-type-v).")


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
