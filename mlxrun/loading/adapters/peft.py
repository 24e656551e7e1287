"""Adapters as Hugging Face PEFT saves them: ``adapter_model.safetensors``, ``adapter_config.json``.

Parameters have the names of transformers' model below ``base_model.model``. Format: PEFT's
``LoraConfig`` and ``save_pretrained``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.errors import shortened
from mlxrun.errors import AdapterError
from mlxrun.loading.adapters.adapter import (
    DAMAGED,
    EMBEDDINGS,
    Adapter,
    check_numbers,
    low_rank_update,
    number,
    read_tensors,
)
from mlxrun.loading.adapters.spelling import stacked, text_name
from mlxrun.weights.low_rank import Update

# ``default`` is what an adapter is called when nobody names it; files have it or not.
_PART = re.compile(
    r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_SAVED = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# Ways to begin training that take from the base model what they give to the adapter.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")


def read_peft(file: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> Adapter:
    """An adapter of ``peft_type`` LORA, DoRA and rank-stabilised ones included.

    Args:
        file: ``adapter_model.safetensors``.
        config: ``adapter_config.json``.
        model: the model's ``config.json``.

    Raises:
        AdapterError: of another kind, incomplete or damaged.
    """
    name = file.parent.name
    _check_kind(name, config)
    modules: dict[str, dict[str, mx.array]] = defaultdict(dict)
    replaced = {}
    for key, array in read_tensors(file).items():
        inner = key.removeprefix("base_model.model.")
        if found := _PART.fullmatch(inner):
            modules[found[1]][found[2].removeprefix("embedding_")] = (
                array.T if "embedding" in found[2] and array.ndim == 2 else array
            )
        elif (found := _SAVED.fullmatch(inner)) and "lora_" not in inner:
            check_numbers(f"{name}: {key}", array)
            replaced[text_name(f"{found[1]}.{found[2]}", model)] = array
        else:
            raise AdapterError(f"{name}: {shortened(key, 200)} is no tensor of a LoRA adapter")
    updates = {
        text_name(module, model): _update(f"{name}: {module}", module, parts, config)
        for module, parts in modules.items()
    }
    return Adapter(name, stacked(name, updates, model), replaced)


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise AdapterError(
            f"{name}: peft_type {shortened(repr(kind), 60)} is not known",
            hint="Only LORA is; merge others with PEFT's merge_and_unload",
        )
    if config.get("fan_in_fan_out") or config.get("layer_replication"):
        raise AdapterError(f"{name}: fan_in_fan_out and layer_replication are not known")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise AdapterError(
            f"{name} began as {start}, which changes the base model too",
            hint="Save it with PEFT's path_initial_model_for_weight_conversion",
        )


def _update(
    origin: str, module: str, parts: Mapping[str, mx.array], config: Mapping[str, Any]
) -> Update:
    a, b, lengths = parts.get("A"), parts.get("B"), parts.get("magnitude_vector")
    if config.get("use_dora") and lengths is None:
        raise AdapterError(f"{origin}: the lengths of its rows are missing", hint=DAMAGED)
    if module.endswith(EMBEDDINGS):  # stored for looking up rows; turned when it was read
        a, b = b, a
    rank = _setting(origin, config, "r", "rank_pattern", module)
    alpha = _setting(origin, config, "lora_alpha", "alpha_pattern", module)
    # Rank-stabilised: Kalajdzievski, 2023, arXiv:2312.03732.
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank) if rank > 0 else 0.0
    return low_rank_update(origin, a, b, scale, lengths=lengths, rank=int(rank))


# A stranger's pattern against a stranger's names: repeats within repeats take exponential time, and
# each repeat beside others multiplies it by the length of a name.
_REPEAT, _REPEATED_GROUP, _REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 3


def _setting(origin: str, config: Mapping[str, Any], key: str, patterns: str, module: str) -> float:
    """A number for a module: that of the first pattern which its name ends with, or the common."""
    own = config.get(patterns) or {}
    if not isinstance(own, dict):
        raise AdapterError(f"{origin}: {patterns} is no object", hint=DAMAGED)
    for pattern in own:
        if len(_REPEAT.findall(pattern)) > _REPEATS or _REPEATED_GROUP.search(pattern):
            raise AdapterError(
                f"{origin}: {patterns} has a pattern that could be matched for ever: "
                f"{shortened(repr(pattern), 60)}",
                hint="Name the modules",
            )
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise AdapterError(f"{origin}: {patterns}: {error}", hint=DAMAGED) from error
        if matches:
            return number(own, pattern, origin)
    return number(config, key, origin)
