"""Names of transformers' modules as mlxrun's; experts that are adapted one by one, as one stack."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from converters.directory.spellings import EXPERT_PARTS, spelling_of
from mlxrun.errors import AdapterError
from mlxrun.weights.low_rank import OTHER_MODEL, Update

_TEXT = (("model.language_model.", "model."), ("language_model.", ""))
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_EXPERT = re.compile(r"(model\.layers\.\d+\.).+\.experts\.(\d{1,6})\.(\w+)")


def text_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a module or parameter in the text model that ``config.json`` describes."""
    for begin, end in _TEXT:
        if name.startswith(begin):
            name = end + name.removeprefix(begin)
    layer = _LAYER.fullmatch(name)
    if layer:
        for begin, ours in spelling_of(config).aliases.items():
            if layer[2].startswith(begin):
                return layer[1] + ours + layer[2].removeprefix(begin)
    return name


def stacked(
    origin: str, updates: Mapping[str, Update], config: Mapping[str, Any]
) -> dict[str, Update]:
    """The updates, those of single experts joined to one of the stack.

    Raises:
        AdapterError: experts of one stack have other shapes or scales.
    """
    home = spelling_of(config).experts
    found: dict[str, Update] = {}
    stacks: dict[str, dict[int, Update]] = defaultdict(dict)
    for module, update in updates.items():
        expert = _EXPERT.fullmatch(module)
        if home and expert and expert[3] in EXPERT_PARTS:
            stacks[f"{expert[1]}{home}.{EXPERT_PARTS[expert[3]]}"][int(expert[2])] = update
        else:
            found[module] = update
    for module, members in stacks.items():
        found[module] = _stack(f"{origin}: {module}", members, _count(config))
    return found


def _count(config: Mapping[str, Any]) -> int:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(config[key]) for key in keys if config.get(key)), 0)


def _stack(origin: str, members: Mapping[int, Update], count: int) -> Update:
    """Experts without an adapter of their own get one of noughts."""
    first = members[min(members)]
    alike = {(m.a.shape, m.b.shape, m.scale, m.lengths is None) for m in members.values()}
    if len(alike) > 1 or first.lengths is not None or max(members) >= count:
        raise AdapterError(
            f"{origin}: expected adapters of one shape and scale (and no DoRA) for experts 0 to "
            f"{count - 1}, found {len(alike)} kinds, up to expert {max(members)}",
            hint=OTHER_MODEL,
        )
    none = replace(first, a=mx.zeros_like(first.a), b=mx.zeros_like(first.b))
    each = [members.get(number, none) for number in range(count)]
    return Update(origin, mx.stack([m.a for m in each]), mx.stack([m.b for m in each]), first.scale)
