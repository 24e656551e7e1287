"""The decoder that families share, from the keys that their ``config.json`` files share.

A family (``families.py``) calls :func:`decoder` with its differences.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from converters.gguf.validate import MAX_BLOCKS
from converters.rope import (
    llama3_factors,
    longrope_attention_factor,
    yarn_attention_factor,
    yarn_factors,
)
from mlxrun.errors import CheckpointError
from mlxrun.models.config import (
    Attention,
    Experts,
    FeedForward,
    Layer,
    ModelConfig,
    Norm,
    Rope,
)

HFConfig = Mapping[str, Any]
Options = dict[str, Any]


def moe(config: HFConfig, **more: Any) -> Experts:
    """Experts under the usual keys."""
    count = config.get("num_experts") or config.get("num_local_experts")
    size = config.get("moe_intermediate_size") or config["intermediate_size"]
    if count is None:
        raise KeyError("num_experts")
    return Experts(int(count), whole(config, "num_experts_per_tok"), int(size), **more)


def whole(config: HFConfig, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    """A size or count: a whole number of at least 1."""
    value = config[key] if default is None else config.get(key)
    value = default if value is None and default is not None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise impossible(key, value, f"a whole number from 1 to {most}")
    return value


def number(
    config: HFConfig,
    key: str,
    default: float | None = None,
    *,
    above: float = -math.inf,
    most: float = sys.float_info.max,
) -> float:
    """A finite number within bounds; the default where it is absent or null."""
    value = config[key] if default is None else config.get(key)
    value = default if value is None and default is not None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
        bounds = [f"above {above:g}"] * (above > -math.inf)
        bounds += [f"at most {most:g}"] * (most < sys.float_info.max)
        raise impossible(key, value, " ".join(["a finite number", " and ".join(bounds)]).strip())
    return float(value)


def epsilon(config: HFConfig, key: str, default: float | None = None) -> float:
    """The epsilon of norms."""
    return number(config, key, default, above=0, most=1)


def impossible(key: str, value: object, allowed: str) -> CheckpointError:
    written = json.dumps(value, default=str)
    return CheckpointError(
        f"config.json has an impossible value: {key} must be {allowed}, not {written[:80]}"
    )


def decoder(
    config: HFConfig,
    *,
    norm: Norm | None = None,
    attention: Options | None = None,
    feed_forward: Options | None = None,
    layer: Options | None = None,
    layers: Callable[[int], Options] = lambda i: {},
    windows: Sequence[int | None] | None = None,
    **model: Any,
) -> ModelConfig:
    """The decoder of a config, with the differences of its family.

    Args:
        norm: all norms; RMS with the config's epsilon by default.
        attention, feed_forward, layer: fields that differ in every layer.
        layers: fields that differ in layer i, those of its attention under that key.
        windows: of each layer; from the config by default.
        model: fields of the model that differ.
    """
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    kv_heads = whole(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads")
    head_dim = head_width(config)
    positions = config.get("position_embedding_type", "rope")
    rope = rope_of(config, head_dim) if positions == "rope" else None
    clip, alibi = optional_float(config, "clip_qkv"), optional_float(config, "max_alibi_bias")
    attend = Attention(heads, kv_heads, head_dim, head_dim**-0.5, rope, clip=clip, alibi=alibi)
    fixed = (feed_forward or {}).get("activation")
    inner = FeedForward(whole(config, "intermediate_size"), fixed or _activation(config))
    plan = replace(
        Layer(
            replace(attend, **(attention or {})),
            replace(inner, **(feed_forward or {})),
        ),
        **(layer or {}),
    )

    # As transformers has it: zeros are the layers without positions.
    nope = [i for i, rotated in enumerate(config.get("no_rope_layers") or ()) if not rotated]

    def build(index: int, window: int | None) -> Layer:
        changes = dict(layers(index))
        place: Options = {"window": window} | ({"rope": None} if index in nope else {})
        own = replace(plan.attention, **place, **changes.pop("attention", {}))
        return replace(plan, attention=own, **changes)

    seen = windows if windows is not None else layer_windows(config)
    norm = norm or Norm(eps=epsilon(config, "rms_norm_eps", 1e-6))
    return ModelConfig(
        family=str(config["model_type"]),
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        layers=tuple(build(i, window) for i, window in enumerate(seen)),
        norm=norm,
        tied=bool(config.get("tie_word_embeddings", False)),
        context_length=whole(config, "max_position_embeddings", 4096),
        **model,
    )


def head_width(config: HFConfig) -> int:
    shared = whole(config, "hidden_size") // whole(config, "num_attention_heads")
    return whole(config, "head_dim", shared)


def rope_base(config: HFConfig) -> float:
    """RoPE's theta."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    section = config if config.get("rope_theta") is not None else scaling
    return number(section, "rope_theta", 10000.0, above=0)


def optional_float(config: HFConfig, key: str) -> float | None:
    """A number, or None where it is absent, null or zero."""
    return number(config, key, above=0) if config.get(key) else None


def _activation(config: HFConfig) -> str:
    known = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu2": "relu2",
    }
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in known:
        raise impossible("hidden_act", name, f"one of {', '.join(known)}")
    return known[name]


def layer_windows(config: HFConfig, every: int | None = None) -> list[int | None]:
    """The sliding window of each layer, or None.

    Args:
        every: one of so many layers has full attention, where there are no ``layer_types``.
    """
    layers = whole(config, "num_hidden_layers", most=MAX_BLOCKS)
    window = whole(config, "sliding_window") if config.get("sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None and every is not None:
        kinds = ["full" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if kinds is not None:
        if len(kinds) != layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(kinds)} entries for {layers} layers"
            )
        return [window if kind == "sliding_attention" else None for kind in kinds]
    # Qwen 2 states a window and switches it off; Mistral 0.1 states it and means every layer.
    if window is None or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return [None] * layers
    full = int(config.get("max_window_layers", 0))
    return [None if i < full else window for i in range(layers)]


# What a section of rotary parameters may hold without being a scaling.
_NO_SCALING = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}


def rope_of(config: HFConfig, head_dim: int) -> Rope:
    """The rotary embedding of a config; unknown scalings are errors, as text would be wrong."""
    # transformers 5 moved everything rotary into one section.
    scaling: HFConfig = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = rope_base(config)
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    dims = int(head_dim * float(partial))
    if dims < 2 or dims % 2 or dims > head_dim:
        raise CheckpointError(
            f"config.json: rotary embeddings rotate pairs, not {dims} dimensions of a head of "
            f"{head_dim}"
        )
    traditional = bool(config.get("rope_traditional", False))
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind is None and set(scaling) - _NO_SCALING:
        raise CheckpointError(f"config.json: rope scaling of no known type: {dict(scaling)}")

    def rope(**more: Any) -> Rope:
        made = Rope(dims, base, traditional=traditional, **more)
        numbers = (made.base, made.scale, made.attention_factor, *(made.factors or ()))
        if not all(0 < number < math.inf for number in numbers):
            raise CheckpointError(
                f"config.json: rope_theta {base} with {dict(scaling)} gives impossible frequencies"
            )
        return made

    if kind in (None, "default"):
        return rope()
    if kind == "linear":
        return rope(scale=1.0 / float(scaling["factor"]))
    if kind == "llama3":
        return rope(factors=tuple(llama3_factors(dims, base, scaling)))
    if kind == "yarn":
        factors = tuple(yarn_factors(dims, base, scaling))
        return rope(factors=factors, attention_factor=yarn_attention_factor(scaling))
    if kind in ("longrope", "su"):
        context, key = int(config["max_position_embeddings"]), "original_max_position_embeddings"
        original = int(scaling[key] if key in scaling else config[key])
        factors = tuple(float(x) for x in scaling["long_factor"])
        if len(factors) != dims // 2:
            raise CheckpointError(f"config.json: long_factor needs {dims // 2} entries")
        attention_factor = scaling.get("attention_factor")
        if attention_factor is None:
            attention_factor = longrope_attention_factor(context, original)
        return rope(factors=factors, attention_factor=float(attention_factor))
    raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported")
