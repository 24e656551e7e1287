"""Matrices that files may have fused, and which of their rows are whose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.gguf.architectures.row import Shape
from converters.gguf.numbers import layer_count
from converters.gguf.reader import GGUFFile

Rows = npt.NDArray[np.intp]


def shape_of(gguf: GGUFFile, module: str) -> Shape:
    """Shape of a matrix in the first layer that has it; that bounds what a file makes us count.

    Raises:
        GGUFError: no layer has it.
    """
    names = [f"blk.{i}.{module}.weight" for i in range(layer_count(gguf))]
    return gguf.tensor(next((name for name in names if name in gguf), names[0])).shape


def gate_and_up(gguf: GGUFFile) -> list[tuple[str, Rows]]:
    """Experts whose gates and projections up are one matrix each."""
    count, size = shape_of(gguf, "ffn_gate_up_exps")[:2]
    if size % 2:
        key = f"{gguf.architecture}.expert_feed_forward_length"
        raise gguf.error(key, expected=f"half of the {size} rows of gates and projections")
    rows = np.arange(count * size).reshape(count, 2, -1)
    return [("ffn_gate_exps", rows[:, 0].ravel()), ("ffn_up_exps", rows[:, 1].ravel())]
