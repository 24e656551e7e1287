"""The memory plan of a model that is not loaded, from the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.directory.files import read_config
from converters.directory.names import text_config
from converters.gguf.config import model_config as gguf_config
from converters.gguf.reader import GGUFFile, read_gguf
from mlxrun.cache.choice import Wanted
from mlxrun.footprint import Footprint
from mlxrun.kernels.device import device
from mlxrun.loading.model import foreign_classes
from mlxrun.loading.run import DTYPES
from mlxrun.memory import room
from mlxrun.model import Model
from mlxrun.models.families import model_config
from mlxrun.planning.native import AS_IT_COMES, Run, weights
from mlxrun.planning.native import footprint as native_footprint
from mlxrun.planning.plan import ALONE, MemoryPlan
from mlxrun.planning.weights import Held, of_directory, of_gguf

# Weights that take less than this part of plain ones are packed.
_PACKED = 0.75


def plan_source(
    source: Path | GGUFFile,
    *,
    dtype: str | None = None,
    policy: str | None = None,
    cache: Wanted = AS_IT_COMES,
    beside: int = ALONE,
) -> tuple[MemoryPlan, Held]:
    """The plan of a model, and how its weights would be held.

    Args:
        source: a GGUF, or a model directory.
        dtype, policy: as :func:`mlxrun.load` takes them.
        cache: what is asked of caches.
        beside: tokens of prompts in a pass beside others that decode.

    Raises:
        MlxrunError: the model cannot be run, or its header is damaged.
    """
    config, held = promised(source, dtype=dtype, policy=policy)
    return MemoryPlan(footprint(config, held, cache), held.nbytes, room(), beside), held


def promised(
    source: Path | GGUFFile, *, dtype: str | None = None, policy: str | None = None
) -> tuple[dict[str, Any], Held]:
    """What headers promise: the config in Hugging Face terms, and how weights would be held.

    Args:
        source: a GGUF, or a model directory.
        dtype, policy: as :func:`mlxrun.load` takes them.

    Raises:
        MlxrunError: the header is damaged, or its tensors have no known names.
    """
    if isinstance(source, Path) and source.is_dir():
        config = text_config(read_config(source))
        ours = foreign_classes(config) is None
        return config, of_directory(source, config, dtype=dtype, ours=ours)
    gguf = read_gguf(source) if isinstance(source, Path) else source
    return gguf_config(gguf), of_gguf(gguf, dtype=dtype, policy=policy)


def plan_loaded(
    model: Model[Any],
    config: Mapping[str, Any],
    *,
    cache: Wanted = AS_IT_COMES,
    beside: int = ALONE,
    kept: int = 0,
    held: int = 0,
) -> MemoryPlan:
    """The plan of a model that is loaded, for admission to an engine.

    What else MLX holds, other models and sessions, is no room for it.

    Args:
        model: as :func:`mlxrun.load` gives it.
        config: its ``config.json``.
        cache: what is asked of caches.
        beside: tokens of prompts in a pass beside others that decode.
        kept: bytes that beginnings of prompts may take which are kept for later ones.
        held: bytes of them that there are already.
    """
    dtype = str(model.dtype).removeprefix("mlx.core.")
    ours = foreign_classes(config) is None
    plain = weights(model_config(dict(config))) * model.dtype.size if ours else 0
    packed = not model.mapped and model.nbytes < _PACKED * plain
    weighed = Held(model.nbytes, dtype, packed, "as loaded", fused=model.fused)
    limit = room()
    limit = max(1, limit - _others(model.nbytes - model.mapped + held)) if limit else 0
    return MemoryPlan(footprint(config, weighed, cache), model.nbytes, limit, beside, kept)


def _others(ours: int) -> int:
    """Bytes that MLX holds besides so many."""
    return max(0, mx.get_active_memory() - ours)


def footprint(config: Mapping[str, Any], held: Held, cache: Wanted = AS_IT_COMES) -> Footprint:
    """What a model takes besides its weights.

    Args:
        config: ``config.json`` in Hugging Face terms.
        held: how its weights are held.
        cache: what is asked of caches.
    """
    dtype, here = DTYPES[held.dtype], device()
    foreign = foreign_classes(config)
    if foreign is None:
        run = Run(dtype, here, held.packed, held.fused, cache)
        return native_footprint(model_config(dict(config)), run)
    from mlxrun.loading.fallback.footprint import footprint as foreign_footprint
    from mlxrun.loading.fallback.sizes import sketch

    return foreign_footprint(sketch(foreign, config, dtype), config, here)
