"""llama.cpp's GGUF adapters as updates; what the file says is read by ``converters``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy.typing as npt

from converters.gguf.adapter import read_adapter
from mlxrun.loading.adapters.adapter import Adapter, check_numbers, low_rank_update


def read_gguf_adapter(path: Path, config: Mapping[str, Any]) -> Adapter:
    """An adapter of llama.cpp's for a model with this ``config.json``.

    Raises:
        GGUFError: the file is malformed.
        AdapterError: it is no LoRA adapter, or was made for another model.
    """
    adapter = read_adapter(path, config)
    norms = {name: mx.array(weight) for name, weight in adapter.norms.items()}
    for name, weight in norms.items():
        check_numbers(f"{path.name}: {name}", weight)
    updates = {
        module: low_rank_update(
            f"{path.name}: {pair.source}", _array(pair.a), _array(pair.b), pair.scale
        )
        for module, pair in adapter.pairs.items()
    }
    return Adapter(path.name, updates, norms)


def _array(floats: npt.NDArray[Any] | None) -> mx.array | None:
    return None if floats is None else mx.array(floats)
