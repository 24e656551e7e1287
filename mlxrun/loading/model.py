"""A model in memory and what is known of where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from converters.report import ConversionReport
from mlxrun.loading.adapters import Adapters
from mlxrun.models.families import model_config
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
    """

    model: Transformer
    config: dict[str, Any]
    report: ConversionReport | None
    unused: list[str]


def build(
    config: dict[str, Any],
    params: Parameters,
    report: ConversionReport | None,
    adapters: Adapters,
) -> Loaded:
    """The transformer of a ``config.json`` over its parameters, which are read now."""
    model = Transformer(model_config(config), params)
    adapters.check_applied(params.used)
    # Files are read lazily: a damaged one must fail here, not at the first token.
    mx.eval(params.handed)
    return Loaded(model, config, report, params.unused())
