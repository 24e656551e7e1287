"""A model in memory and what is known of where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.report import ConversionReport
from mlxrun.loading.adapters import Adapters
from mlxrun.model import Model
from mlxrun.models.families import FAMILIES, model_config
from mlxrun.models.transformer import Transformer
from mlxrun.weights.parameters import Parameters


@dataclass(frozen=True)
class Loaded:
    """A model in memory and what is known of where it came from.

    Attributes:
        model: ready to run.
        config: ``config.json`` in Hugging Face terms.
        report: the conversion's report for a GGUF; None for a directory.
        unused: parameters of the source that the model has no place for.
        held: in which form the weights are, and why.
        products: the option of that name, where matrices are the file's own blocks; else None.
        native: whether the kernels of this package multiply with all matrices.
        missed: why the file's own blocks are not multiplied, where they could be; None elsewhere.
    """

    model: Model[Any]
    config: dict[str, Any]
    report: ConversionReport | None
    unused: list[str]
    held: str = ""
    products: str | None = None
    native: bool = False
    missed: str | None = None


def build(
    config: dict[str, Any],
    params: Parameters,
    report: ConversionReport | None,
    adapters: Adapters,
    held: str = "",
) -> Loaded:
    """The model of a ``config.json`` over its parameters, which are read now.

    Our transformer for our own families, else mlx-lm's class.

    Args:
        held: in which form the weights are, and why.

    Raises:
        UnsupportedArchitectureError: neither has the ``model_type``.
        CheckpointError: config and weights do not make such a model.
    """
    foreign = foreign_classes(config)
    if foreign:
        from mlxrun.loading.fallback.model import build_foreign

        made, unused = build_foreign(foreign, config, params)
        adapters.check_applied({*params.arrays} - {*unused}, modules=False)
        return Loaded(made, config, report, unused, held)
    model = Transformer(model_config(config), params)
    adapters.check_applied(params.used)
    params.settle()
    return Loaded(model, config, report, params.unused(), held)


def foreign_classes(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """mlx-lm's classes for a config; None for our own families.

    Raises:
        UnsupportedArchitectureError: neither defines the ``model_type``, or the directory wants
            code of its own to be run.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return None
    from mlxrun.loading.fallback.registry import classes, unsupported

    found = classes(config)
    if found is None:
        raise unsupported(kind, FAMILIES)
    return found
