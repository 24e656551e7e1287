"""Matrices that files may have fused, and which of their rows are whose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.gguf.numbers import scalar
from converters.gguf.reader import GGUFFile

Rows = npt.NDArray[np.intp]


def gate_and_up(gguf: GGUFFile) -> list[tuple[str, Rows]]:
    """Experts whose gates and projections up are one matrix each."""
    count, size = scalar(gguf, "expert_count"), scalar(gguf, "expert_feed_forward_length")
    rows = np.arange(count * 2 * size).reshape(count, 2, size)
    return [("ffn_gate_exps", rows[:, 0].ravel()), ("ffn_up_exps", rows[:, 1].ravel())]
