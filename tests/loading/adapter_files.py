"""Random adapters in every format, written without the code that is tested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model


def write_mlx_lm(
    base: Path,
    path: Path,
    keys: list[str],
    *,
    kind: str = "lora",
    layers: int = 2,
    seed: int = 0,
    rank: int = 4,
) -> Path:
    """An adapter such as mlx-lm's trainer saves for the model directory ``base``."""
    model, _ = load_model(base)
    settings = {"rank": rank, "scale": 2.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, layers, settings, use_dora=kind == "dora")
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, value in tree_flatten(model.parameters()):
        part = name.rpartition(".")[2]
        if part in ("lora_a", "lora_b"):
            tensors[name] = mx.array(0.1 * rng.standard_normal(value.shape, dtype=np.float32))
        elif part == "m":
            tensors[name] = value * mx.array(rng.uniform(0.5, 1.5, value.shape).astype(np.float32))
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": settings}
    return write_directory(path, "adapters.safetensors", tensors, config)


def write_directory(
    path: Path, file: str, tensors: Mapping[str, mx.array], config: Mapping[str, Any]
) -> Path:
    path.mkdir(exist_ok=True)
    mx.save_safetensors(str(path / file), dict(tensors))
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
