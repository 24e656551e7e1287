"""How far mlxrun's logits are from llama.cpp's, whichever way tokens go through the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.gguf.reader import read_gguf
from mlxrun.loader import Loaded, load_model

#: Between two float32 implementations of the same model.
SAME = 1e-8

#: Lengths of the first chunks of a prompt; the rest follows at once.
WAYS: dict[str, Callable[[int], list[int]]] = {
    "one pass": lambda count: [],
    "chunks": lambda count: [1, 7, 1, 1, 2, 13],
    "token by token": lambda count: [1] * count,
}


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU, as llama.cpp did, also where there is a GPU."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """``mean((got - expected)^2) / mean(expected^2)``."""
    return float(np.mean((got - expected) ** 2) / np.mean(expected**2))


def load(path: Path, dtype: str = "float32") -> Loaded:
    """The model of a file."""
    return load_model(read_gguf(path), dtype=dtype)


def logits(model: Any, tokens: list[int], lengths: Sequence[int] = ()) -> np.ndarray:
    """Logits (T, V) of tokens put through one cache in chunks of these lengths, then the rest."""
    cache, parts, start = model.make_cache(), [], 0
    for length in [*lengths, len(tokens)]:
        chunk = tokens[start : start + length]
        if chunk:
            parts.append(np.array(model(mx.array([chunk]), cache)[0], np.float64))
        start += len(chunk)
    return np.concatenate(parts)


def measure(loaded: Loaded, tokens: list[int], expected: np.ndarray) -> dict[str, float]:
    """NMSE by way of feeding."""
    return {
        way: nmse(logits(loaded.model, tokens, lengths(len(tokens))), expected)
        for way, lengths in WAYS.items()
    }


def left_out(loaded: Loaded) -> list[str]:
    """Tensors of the file that the model does not use; what moves into ``config.json`` is used."""
    skipped = loaded.report.skipped if loaded.report else []
    fine = "stored in config.json", "layers that generate"
    left = [s for s in skipped if not any(words in s["reason"] for words in fine)]
    reasons = [f"{s['name']}: {s['reason']}" for s in left]
    return [*loaded.unused, *reasons]
