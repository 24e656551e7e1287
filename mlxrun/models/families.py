"""One short function per family: a Hugging Face ``config.json`` becomes a ``ModelConfig``.

A family is data. To add one, write its function and its row in ``FAMILIES``; if it needs a knob
that no family has yet, the knob goes into ``config.py`` and is read once, where the layer is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from converters.gguf.checks import MAX_BLOCKS
from converters.rope import (
    llama3_factors,
    longrope_attention_factor,
    yarn_attention_factor,
    yarn_factors,
)
from mlxrun.errors import CheckpointError, UnsupportedArchitectureError
from mlxrun.models.config import Attention, FeedForward, Layer, ModelConfig, Rope

HFConfig = Mapping[str, Any]


def llama(config: HFConfig) -> ModelConfig:
    """Llama 1-3, Mistral, TinyLlama, SmolLM2 and everything that shares their layers."""
    return _decoder(config)


def qwen2(config: HFConfig) -> ModelConfig:
    """Qwen 2 and 2.5. Their biases on queries, keys and values come with the weights."""
    return _decoder(config)


def qwen3(config: HFConfig) -> ModelConfig:
    """Qwen 3, dense: normalises queries and keys per head."""
    return _decoder(config, qk_norm=True)


FAMILIES: dict[str, Callable[[HFConfig], ModelConfig]] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def model_config(config: HFConfig) -> ModelConfig:
    """The transformer that a ``config.json`` describes.

    Raises:
        UnsupportedArchitectureError: no family of that ``model_type`` is defined here.
        CheckpointError: a needed key is missing or a value is one that the family does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"model_type {kind!r} is not supported",
            hint=f"Supported: {', '.join(sorted(FAMILIES))}",
        )
    try:
        return FAMILIES[kind](config)
    except KeyError as missing:
        raise CheckpointError(f"config.json has no {missing.args[0]!r}") from missing
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"config.json has an impossible value: {error}") from error


def _decoder(config: HFConfig, *, qk_norm: bool = False) -> ModelConfig:
    """The plan that these families share: pre-norm blocks, grouped queries, gated feed-forward."""
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads")
    head_dim = _count(config, "head_dim", hidden // heads)
    activation = str(config.get("hidden_act", "silu"))
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not one of this family")
    rope, sharpening = rope_of(config, head_dim)
    eps = float(config.get("rms_norm_eps", 1e-6))
    if not (0 <= eps < math.inf and 0 < sharpening < math.inf):
        raise CheckpointError(
            f"config.json has an impossible value: rms_norm_eps {eps}, or an attention factor of "
            f"{sharpening}"
        )
    feed_forward = FeedForward(_count(config, "intermediate_size"))

    def layer(window: int | None) -> Layer:
        # Scaling queries and keys alike is scaling their products twice.
        scale = head_dim**-0.5 * sharpening**2
        return Layer(
            Attention(heads, kv_heads, head_dim, scale, rope, window, qk_norm), feed_forward
        )

    return ModelConfig(
        family=str(config["model_type"]),
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        layers=tuple(layer(window) for window in _windows(config)),
        norm_eps=eps,
        tied=bool(config.get("tie_word_embeddings", False)),
        context_length=_count(config, "max_position_embeddings", 4096),
    )


def _count(config: HFConfig, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    """A size or a number of things: a whole number of at least 1."""
    value = config[key] if default is None else config.get(key)
    value = default if value is None and default is not None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CheckpointError(
            f"config.json has an impossible value: {key} must be a whole number from 1 to {most}, "
            f"not {str(value)[:80]}"
        )
    return value


def _windows(config: HFConfig) -> list[int | None]:
    """The sliding window of each layer, or None."""
    layers = _count(config, "num_hidden_layers", most=MAX_BLOCKS)
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(kinds)} entries for {layers} layers"
            )
        return [
            _count(config, "sliding_window") if kind == "sliding_attention" and window else None
            for kind in kinds
        ]
    # Qwen 2 states a window and switches it off; Mistral 0.1 states it and means every layer.
    if window is None or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return [None] * layers
    full = int(config.get("max_window_layers", 0))
    return [None if i < full else _count(config, "sliding_window") for i in range(layers)]


# What a section of rotary parameters may hold without being a scaling.
_NO_SCALING = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}


def rope_of(config: HFConfig, head_dim: int) -> tuple[Rope, float]:
    """The rotary embedding of a config, and what it multiplies queries and keys by.

    Raises:
        CheckpointError: a scaling that is not known; running without it would give wrong text.
    """
    # transformers 5 moved everything rotary into one section.
    scaling: HFConfig = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = float(config.get("rope_theta") or scaling.get("rope_theta") or 10000.0)
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    dims = int(head_dim * float(partial))
    if dims < 2 or dims % 2 or dims > head_dim:
        raise CheckpointError(
            f"config.json: rotary embeddings turn pairs, they cannot turn {dims} dimensions of a "
            f"head of {head_dim}"
        )
    traditional = bool(config.get("rope_traditional", False))
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind is None and set(scaling) - _NO_SCALING:
        raise CheckpointError(f"config.json: rope scaling of no known type: {dict(scaling)}")

    def rope(**more: Any) -> Rope:
        made = Rope(dims, base, traditional=traditional, **more)
        numbers = (made.base, made.scale, *(made.factors or ()))
        if not all(0 < number < math.inf for number in numbers):
            raise CheckpointError(
                f"config.json: rope_theta {base} with {dict(scaling)} gives impossible frequencies"
            )
        return made

    if kind in (None, "default"):
        return rope(), 1.0
    if kind == "linear":
        return rope(scale=1.0 / float(scaling["factor"])), 1.0
    if kind == "llama3":
        return rope(factors=tuple(llama3_factors(dims, base, scaling))), 1.0
    if kind == "yarn":
        factors = tuple(yarn_factors(dims, base, scaling))
        return rope(factors=factors), yarn_attention_factor(scaling)
    if kind == "longrope":
        context = int(config["max_position_embeddings"])
        original = int(scaling["original_max_position_embeddings"])
        factors = tuple(float(x) for x in scaling["long_factor"])
        if len(factors) != dims // 2:
            raise CheckpointError(f"config.json: long_factor needs {dims // 2} entries")
        return rope(factors=factors), longrope_attention_factor(context, original)
    raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported")
