"""Hyperparameters of a GGUF file as plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.gguf.reader import GGUFFile


def scalar(gguf: GGUFFile, suffix: str, default: int | None = None) -> int:
    """A whole number; one per layer is allowed if they are equal."""
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    if isinstance(value, np.ndarray | list):
        distinct = sorted({int(x) for x in value})
        if len(distinct) != 1:
            raise gguf.key_error(
                suffix,
                expected="one value for all layers in this architecture",
                found=f"the values {distinct[:8]}",
            )
        return distinct[0]
    if isinstance(value, str | bool):
        raise gguf.key_error(suffix, expected="a whole number")
    return int(value)


def layer_count(gguf: GGUFFile) -> int:
    """Layers without those for multi-token prediction, which come last."""
    blocks, ahead = scalar(gguf, "block_count"), scalar(gguf, "nextn_predict_layers", 0)
    if not 0 <= ahead < blocks:
        raise gguf.key_error("nextn_predict_layers", expected=f"fewer than {blocks} blocks")
    return blocks - ahead


def flag(gguf: GGUFFile, suffix: str, default: bool) -> bool:
    value = gguf.key(suffix, default)
    if not isinstance(value, bool | int):
        raise gguf.key_error(suffix, expected="true or false")
    return bool(value)


def tidy(value: Any) -> float:
    """A float32 as its shortest decimal."""
    return float(str(np.float32(value)))


def float_of(gguf: GGUFFile, suffix: str, default: float | None = None) -> float:
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    if not isinstance(value, int | float):
        raise gguf.key_error(suffix, expected="a number")
    return tidy(value)


def per_layer(gguf: GGUFFile, suffix: str, default: int | None = None) -> list[int]:
    """A whole number for each layer; stored once, it is that of every layer."""
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    layers = layer_count(gguf)
    if not isinstance(value, np.ndarray | list):
        return [scalar(gguf, suffix, default)] * layers
    if len(value) != scalar(gguf, "block_count"):
        raise gguf.key_error(suffix, expected="a value for each layer")
    return [int(x) for x in value[:layers]]


def values_per_layer(gguf: GGUFFile, suffix: str, default: float | None = None) -> list[Any]:
    """As :func:`per_layer`, of numbers of any kind; a file may have more values than layers."""
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    return for_each_layer(gguf, f"{gguf.architecture}.{suffix}", value)


def for_each_layer(gguf: GGUFFile, key: str, value: Any) -> list[Any]:
    """The value of a key for each layer; stored once, it is that of every layer."""
    layers = layer_count(gguf)
    values = (
        np.asarray(value).tolist() if isinstance(value, np.ndarray | list) else [value] * layers
    )
    if None in values or len(values) < layers:
        raise gguf.error(key, expected=f"{layers} values")
    return list(values[:layers])
