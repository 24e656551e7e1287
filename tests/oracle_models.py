"""The oracle's skeletons as GGUF files, and what llama.cpp computes for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np

SKELETONS = (
    "llama",
    "llama3-rope-freqs",
    "llama-linear-rope",
    "llama-yarn",
    "mistral-nemo-headdim",
    "qwen2",
    "qwen3",
)


def write_skeleton(oracle: Path, name: str, path: Path) -> Path:
    """Write the model that ``archs/NAME.json`` describes, seed 0."""
    spec = importlib.util.spec_from_file_location("make_gguf", oracle / "make_gguf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(json.loads((oracle / "archs" / f"{name}.json").read_text()), str(path))
    return path


def expected(oracle: Path, name: str) -> tuple[list[int], np.ndarray]:
    """Tokens and llama.cpp's logits (T, V) of ``logits/NAME`` or ``quants/TYPE``."""
    with np.load(oracle / f"{name}.npz") as data:
        return [int(t) for t in data["tokens"]], data["logits"].astype(np.float64)
