"""The decoder that families share, from the keys that their ``config.json`` files share."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from converters.architectures.rope import (
    llama3_factors,
    longrope_attention_factor,
    yarn_attention_factor,
    yarn_factors,
)
from converters.gguf.validate import MAX_BLOCKS
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
Options = Mapping[str, Any]
_NO_CHANGES: Options = {}


# ---------------------------------------------------------------------------- checked values


def positive_int(
    config: HFConfig, key: str, default: int | None = None, most: int = 2**31 - 1
) -> int:
    """A size or count: an integer from 1 to ``most``."""
    value = _value(config, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise invalid_value(key, value, f"a whole number from 1 to {most}")
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
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
        bounds = [f"above {above:g}"] * (above > -math.inf)
        bounds += [f"at most {most:g}"] * (most < sys.float_info.max)
        raise invalid_value(key, value, " ".join(["a finite number", " and ".join(bounds)]).strip())
    return float(value)


def optional_number(config: HFConfig, key: str) -> float | None:
    """A number above 0, or None where it is absent, null or zero."""
    return number(config, key, above=0) if config.get(key) else None


def _value(config: HFConfig, key: str, default: Any) -> Any:
    """The value of a key, or the default where it is absent or null."""
    if default is None:
        return config[key]
    value = config.get(key)
    return default if value is None else value


def invalid_value(key: str, value: object, allowed: str) -> CheckpointError:
    written = json.dumps(value, default=str)
    return CheckpointError(
        f"config.json has an impossible value: {key} must be {allowed}, not {written[:80]}"
    )


# ------------------------------------------------------------------------------- the decoder


def decoder(
    config: HFConfig,
    *,
    defaults: Options = _NO_CHANGES,
    eps: tuple[str, float | None] = ("rms_norm_eps", 1e-6),
    norm: Options = _NO_CHANGES,
    attention: Options = _NO_CHANGES,
    feed_forward: Options = _NO_CHANGES,
    experts: Options | None = None,
    layer: Options = _NO_CHANGES,
    layers: Callable[[int, int | None], Options] = lambda i, window: {},
    full_every: int | None = None,
    **model: Any,
) -> ModelConfig:
    """The decoder of a config, with the differences of its family.

    Args:
        defaults: keys that the config may leave out.
        eps: key and default of the epsilon of norms.
        norm, attention, feed_forward, layer: fields that differ in every layer.
        experts: arguments of :func:`moe`, for experts in place of the feed-forward.
        layers: called with a layer's index and window (None for full attention); fields that differ
            in that layer, those of its attention under ``attention``.
        full_every: see :func:`layer_windows`.
        model: fields of the model that differ.
    """
    config = {**defaults, **config}
    hidden, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads")
    head_dim = head_dim_of(config)
    rotary = config.get("position_embedding_type", "rope") == "rope"
    attend = Attention(
        heads,
        kv_heads,
        head_dim,
        head_dim**-0.5,
        rope_of(config, head_dim) if rotary else None,
        clip=optional_number(config, "clip_qkv"),
        alibi=optional_number(config, "max_alibi_bias"),
    )
    activation = feed_forward.get("activation") or _activation(config)
    inner = FeedForward(positive_int(config, "intermediate_size"), activation)
    shared = Layer(
        replace(attend, **attention),
        replace(inner, **feed_forward) if experts is None else moe(config, **experts),
    )
    shared = replace(shared, **layer)
    # As in transformers: zeros mark the layers without RoPE.
    nope = [i for i, rotated in enumerate(config.get("no_rope_layers") or ()) if not rotated]

    def build(index: int, window: int | None) -> Layer:
        changes = dict(layers(index, window))
        positions: Options = {"window": window} | ({"rope": None} if index in nope else {})
        own = replace(shared.attention, **positions, **changes.pop("attention", {}))
        return replace(shared, attention=own, **changes)

    return ModelConfig(
        family=str(config["model_type"]),
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=hidden,
        layers=tuple(
            build(i, window) for i, window in enumerate(layer_windows(config, full_every))
        ),
        norm=Norm(**{"eps": number(config, *eps, above=0, most=1), **norm}),
        tied=bool(config.get("tie_word_embeddings", False)),
        context_length=positive_int(config, "max_position_embeddings", 4096),
        **model,
    )


def moe(config: HFConfig, norm_topk_prob: bool | None = None, **more: Any) -> Experts:
    """Experts under the usual keys.

    Args:
        norm_topk_prob: the default of that key; None where weights are always normalized.
        more: other fields.
    """
    count = config.get("num_experts") or config.get("num_local_experts")
    size = config.get("moe_intermediate_size") or config["intermediate_size"]
    if count is None:
        raise KeyError("num_experts")
    if norm_topk_prob is not None:
        more["normalize"] = bool(config.get("norm_topk_prob", norm_topk_prob))
    return Experts(int(count), positive_int(config, "num_experts_per_tok"), int(size), **more)


def head_dim_of(config: HFConfig) -> int:
    default = positive_int(config, "hidden_size") // positive_int(config, "num_attention_heads")
    return positive_int(config, "head_dim", default)


def rope_base(config: HFConfig) -> float:
    """RoPE's theta."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    section = config if config.get("rope_theta") is not None else scaling
    return number(section, "rope_theta", 10000.0, above=0)


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def _activation(config: HFConfig) -> str:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise invalid_value("hidden_act", name, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def layer_windows(config: HFConfig, full_every: int | None = None) -> list[int | None]:
    """The sliding window of each layer, or None.

    Args:
        full_every: one of so many layers has full attention, where there are no ``layer_types``.
    """
    layers = positive_int(config, "num_hidden_layers", most=MAX_BLOCKS)
    window = positive_int(config, "sliding_window") if config.get("sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None and full_every is not None:
        sliding = ((i + 1) % full_every != 0 for i in range(layers))
        kinds = ["sliding_attention" if x else "full_attention" for x in sliding]
    if kinds is not None:
        if len(kinds) != layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(kinds)} entries for {layers} layers"
            )
        return [window if kind == "sliding_attention" else None for kind in kinds]
    # Qwen 2 has a window and switches it off; Mistral 0.1 applies it to every layer.
    if window is None or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return [None] * layers
    full = int(config.get("max_window_layers", 0))
    return [None if i < full else window for i in range(layers)]


# Keys of a section of rotary parameters that are no scaling.
_NO_SCALING = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}


def rope_of(config: HFConfig, head_dim: int) -> Rope:
    """The rotary embedding of a config; an unknown scaling is an error, as text would be wrong."""
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
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind is None and set(scaling) - _NO_SCALING:
        raise CheckpointError(f"config.json: rope scaling of no known type: {dict(scaling)}")

    more: dict[str, Any] = {}
    if kind == "linear":
        more["scale"] = 1.0 / float(scaling["factor"])
    elif kind == "llama3":
        more["factors"] = tuple(llama3_factors(dims, base, scaling))
    elif kind == "yarn":
        more["factors"] = tuple(yarn_factors(dims, base, scaling))
        more["attention_factor"] = yarn_attention_factor(scaling)
    elif kind in ("longrope", "su"):
        more = _longrope(config, scaling, dims)
    elif kind not in (None, "default"):
        raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported")
    rope = Rope(dims, base, traditional=bool(config.get("rope_traditional", False)), **more)
    numbers = (rope.base, rope.scale, rope.attention_factor, *(rope.factors or ()))
    if not all(0 < number < math.inf for number in numbers):
        raise CheckpointError(
            f"config.json: rope_theta {base} with {dict(scaling)} gives impossible frequencies"
        )
    return rope


def _longrope(config: HFConfig, scaling: HFConfig, dims: int) -> dict[str, Any]:
    context, key = int(config["max_position_embeddings"]), "original_max_position_embeddings"
    original = int(scaling[key] if key in scaling else config[key])
    factors = tuple(float(x) for x in scaling["long_factor"])
    if len(factors) != dims // 2:
        raise CheckpointError(f"config.json: long_factor needs {dims // 2} entries")
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = longrope_attention_factor(context, original)
    return {"factors": factors, "attention_factor": float(attention_factor)}
