"""How a directory of a model that only mlx-lm defines is converted: its class says what goes where.

The class renames the weights, names the modules that it can hold quantised, and those that it wants
in more bits than the rest (``quant_predicate``) or in their own type (``cast_predicate``).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from converters.directory.convert import Plan
from converters.directory.recipe import Form
from converters.directory.weights import Weights
from converters.layout import Layout, affine, fixed
from mlxrun.loading.fallback.model import empty_module
from mlxrun.loading.fallback.weights import matched
from mlxrun.weights.parameters import Parameters

NO_PLACE = "the model has no such parameter"


def foreign_plan(classes: tuple[Any, Any], config: dict[str, Any], weights: Weights) -> Plan:
    """The plan of a conversion for a class of mlx-lm.

    Args:
        classes: ``Model`` and ``ModelArgs``, as :func:`registry.classes` gives them.

    Raises:
        CheckpointError: config and weights do not make a model of that class.
    """
    model = empty_module(classes, config)
    modules = {
        path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")
    }
    arrays, wanted = matched(model, Parameters(weights.arrays, weights.layouts, mx.float32))
    found = Weights(arrays, _layouts(model, arrays), skipped=weights.skipped)
    for name in sorted(set(arrays) - wanted):
        found.skip(name, NO_PLACE)
    predicate = getattr(model, "quant_predicate", None)

    def form(module: str, asked: Form) -> Form | None:
        if module not in modules:
            return None
        own = True if predicate is None else predicate(module, modules[module])
        return _at_least(own, asked) if isinstance(own, dict) else asked if own else None

    keep = getattr(model, "cast_predicate", lambda name: True)
    return Plan(config, found, form, lambda name: not keep(name))


def _at_least(own: dict[str, Any], asked: Form) -> Form:
    """The form that a class wants for a module, unless more bits are asked for."""
    if asked.bits >= own["bits"]:
        return asked
    return Form("affine", int(own["bits"]), int(own.get("group_size", 64)))


def _layouts(model: Any, arrays: dict[str, mx.array]) -> dict[str, Layout]:
    """How the modules are packed that are."""
    layouts = {}
    for path, module in model.named_modules():
        if f"{path}.scales" in arrays and hasattr(module, "bits"):
            dtype = str(arrays[f"{path}.scales"].dtype).removeprefix("mlx.core.")
            packed = affine(module.bits, module.group_size, dtype)
            layouts[path] = packed if module.mode == "affine" else fixed(module.mode)
    return layouts
