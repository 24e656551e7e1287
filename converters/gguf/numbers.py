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
    return int(value)


def tidy(value: Any) -> float:
    """A float32 as the shortest decimal that reads back as the same float32."""
    return float(str(np.float32(value)))


def float_of(gguf: GGUFFile, suffix: str, default: float | None = None) -> float:
    return tidy(gguf.key(suffix) if default is None else gguf.key(suffix, default))
