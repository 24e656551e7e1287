"""The oracle's skeletons as GGUF files, and what llama.cpp computes for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np

SKELETONS = (
    "cohere2",
    "command-r",
    "deepseek2",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt-oss",
    "granite",
    "granitemoe",
    "internlm2",
    "llama-linear-rope",
    "llama-yarn",
    "llama",
    "llama3-rope-freqs",
    "mistral-nemo-headdim",
    "mistral3",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3-window",
    "olmoe",
    "phi2",
    "phi3-longrope",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
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
