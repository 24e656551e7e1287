"""From the names of original Hugging Face repositories to those that mlxrun and mlx-lm share.

One table for loading and for converting. Arrays are views and stacks that MLX computes when they
are used; nothing is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converters.directory.recipe import EIGHT_BITS, Form
from converters.directory.weights import Weights


def normalise(config: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Rename and reshape a directory's arrays in place.

    Returns:
        The configuration of the text model that they are the weights of.
    """
    if config.get("tie_word_embeddings", False):
        for name in [name for name in weights.arrays if name.startswith("lm_head.")]:
            weights.skip(name, "the embedding serves as the head")
            weights.layouts.pop("lm_head", None)
    return config


def form_of(config: dict[str, Any]) -> Callable[[str], Form | bool]:
    """What a module of a family may become; see :class:`converters.directory.convert.Plan`."""
    _ = config
    return lambda module: EIGHT_BITS if module.endswith(_ROUTERS) else True


_ROUTERS = ("mlp.gate", "mlp.router", "router.layer", "block_sparse_moe.gate", "shared_expert_gate")
