"""The model that a ``config.json`` means, for people to read: what it is and what its caches take.

Reads no weights; mlx-lm's classes are asked with weights that are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.huggingface.names import text_config
from mlxrun.kv_cache.options import Shape
from mlxrun.model import Model
from mlxrun.models.config import ModelConfig

if TYPE_CHECKING:
    from mlxrun.models.mlx_lm import MLXLMClasses

Facts = dict[str, Any]


@dataclass(frozen=True)
class Described:
    """A model that can be run, by its ``config.json`` alone.

    Attributes:
        facts: its hyperparameters; None where they do not apply.
        cache_values: numbers that its caches hold after so many tokens.
        layers: what a token leaves in each, and its window; none where mlx-lm keeps them.
    """

    facts: Facts
    cache_values: Callable[[int], int]
    layers: tuple[tuple[Shape, int | None], ...] = ()


def describe(config: Mapping[str, Any]) -> Described:
    """The model that a ``config.json`` means, of ours or of mlx-lm's.

    Raises:
        UnsupportedArchitectureError: neither defines its ``model_type``.
        CheckpointError: a key is missing or a value is an impossible one.
    """
    from mlxrun.loader import definition

    config = text_config(dict(config))
    return described(definition(config), config)


def described(model: ModelConfig | MLXLMClasses, config: Mapping[str, Any]) -> Described:
    """The model of a definition; see :func:`mlxrun.loader.definition`."""
    if not isinstance(model, ModelConfig):
        from mlxrun.models.mlx_lm import sketch

        made = sketch(model, config)
        return Described(_mlx_lm_facts(made), made.cache_values)
    layers = tuple((x.attention.cache_shape, x.attention.window) for x in model.layers)
    return Described(_hyperparameters(model), lambda context: cache_values(model, context), layers)


def _mlx_lm_facts(model: Model[Any]) -> Facts:
    summary = model.summary
    return {
        "family": summary.family,
        "runs": f"through {summary.through}",
        "layers": summary.layers,
        "hidden_size": summary.hidden_size or None,
        "heads": summary.heads or None,
        "kv_heads": summary.kv_heads or None,
        "vocabulary": model.vocab_size,
        "context_length": model.context_length,
    }


def _hyperparameters(model: ModelConfig) -> Facts:
    first = model.layers[0]
    windows = [layer.attention.window for layer in model.layers]
    return {
        "family": model.family,
        "runs": None,
        "layers": len(model.layers),
        "hidden_size": model.hidden_size,
        "heads": first.attention.heads,
        "kv_heads": first.attention.kv_heads,
        "head_dim": first.attention.head_dim,
        "feed_forward": first.feed_forward.size,
        "vocabulary": model.vocab_size,
        "context_length": model.context_length,
        "tied_embeddings": model.tied,
        "windows": windows if any(windows) else None,
    }


def cache_values(model: ModelConfig, context: int) -> int:
    """Numbers that the caches hold after ``context`` tokens; a window layer holds its window."""
    total = 0
    for layer in model.layers:
        attention = layer.attention
        tokens = min(context, attention.window or context)
        shape = attention.cache_shape
        total += shape.heads * (shape.key + shape.value) * tokens
    return total
