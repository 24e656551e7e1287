"""Hyperparameters of a GGUF file as plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.gguf.reader import GGUFFile


def scalar(gguf: GGUFFile, suffix: str, default: int | None = None) -> int:
    """A hyperparameter that may be stored per layer but must be the same in all of them."""
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    if isinstance(value, np.ndarray | list):
        distinct = sorted({int(x) for x in value})
        if len(distinct) != 1:
            raise gguf.error(
                f"{gguf.architecture}.{suffix}",
                expected="one value for all layers in this architecture",
                found=f"the values {distinct[:8]}",
            )
        return distinct[0]
    if isinstance(value, str | bool):
        raise gguf.error(f"{gguf.architecture}.{suffix}", expected="a whole number")
    return int(value)


def layer_count(gguf: GGUFFile) -> int:
    """Layers that generate: those that only predict tokens further ahead come after them."""
    blocks, ahead = scalar(gguf, "block_count"), scalar(gguf, "nextn_predict_layers", 0)
    if not 0 <= ahead < blocks:
        raise gguf.error(
            f"{gguf.architecture}.nextn_predict_layers", expected=f"fewer than {blocks} blocks"
        )
    return blocks - ahead


def flag(gguf: GGUFFile, suffix: str, default: bool) -> bool:
    """A hyperparameter that is true or false."""
    value = gguf.key(suffix, default)
    if not isinstance(value, bool | int):
        raise gguf.error(f"{gguf.architecture}.{suffix}", expected="true or false")
    return bool(value)


def tidy(value: Any) -> float:
    """A float32 as the shortest decimal that reads back as the same float32."""
    return float(str(np.float32(value)))


def float_of(gguf: GGUFFile, suffix: str, default: float | None = None) -> float:
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    if not isinstance(value, int | float):
        raise gguf.error(f"{gguf.architecture}.{suffix}", expected="a number")
    return tidy(value)


def per_layer(gguf: GGUFFile, suffix: str, default: int | None = None) -> list[int]:
    """A hyperparameter of each layer that generates; stored once, it is that of every layer.

    Raises:
        GGUFError: there are more or fewer values than layers.
    """
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    layers = layer_count(gguf)
    if not isinstance(value, np.ndarray | list):
        return [scalar(gguf, suffix, default)] * layers
    if len(value) != scalar(gguf, "block_count"):
        raise gguf.error(f"{gguf.architecture}.{suffix}", expected="a value for each layer")
    return [int(x) for x in value[:layers]]
