"""A table of families: a Hugging Face ``config.json`` into a ``ModelConfig``.

To add a family, write its row: its differences from :func:`decoder`, or a function where they
depend on the config. An option that no family has yet goes into ``config.py`` and is read once,
where the layer is built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from converters.architectures.rope import yarn_growth
from mlxrun.errors import CheckpointError, UnsupportedArchitectureError
from mlxrun.models.config import (
    Experts,
    FeedForward,
    LatentAttention,
    ModelConfig,
    Rope,
    Temperature,
)
from mlxrun.models.decoder import (
    HFConfig,
    Options,
    decoder,
    head_dim_of,
    moe,
    number,
    optional_number,
    positive_int,
    rope_base,
    rope_of,
)

_POST_NORM: Options = {
    "before_attention": None,
    "after_attention": "post_attention_layernorm",
    "before_feed_forward": None,
    "after_feed_forward": "post_feedforward_layernorm",
}
_SANDWICH: Options = {
    "after_attention": "post_attention_layernorm",
    "before_feed_forward": "pre_feedforward_layernorm",
    "after_feed_forward": "post_feedforward_layernorm",
}
_PARALLEL: Options = {"before_feed_forward": "input_layernorm", "parallel": True}
_UNGATED = ("up_proj", "down_proj")
_FUSED: Options = {"names": ("gate_up_proj", "down_proj"), "fused": True}
_LAYER_NORM: Options = {"norm": {"kind": "layer"}, "eps": ("layer_norm_eps", 1e-5)}


def _hunyuan(config: HFConfig, **options: Any) -> ModelConfig:
    """Norms of queries and keys after RoPE, whose base grows with the context."""
    scaling = config.get("rope_scaling") or {}
    width, alpha = head_dim_of(config), float(scaling.get("alpha") or 1.0)
    base = rope_base(config) * alpha ** (width / (width - 2))
    norms = {"qk_norm": "after_rope", "norms": ("query_layernorm", "key_layernorm")}
    plain = {**config, "rope_theta": base, "rope_scaling": None}
    return decoder(plain, attention=norms, **options)


def _hunyuan_moe(config: HFConfig) -> ModelConfig:
    """Hunyuan with experts, some of them shared."""
    each = {k: v[0] if isinstance(v, list) else v for k, v in config.items()}
    shared = FeedForward(
        positive_int(each, "intermediate_size") * positive_int(each, "num_shared_expert")
    )
    each["num_experts_per_tok"] = each["moe_topk"]
    experts = moe(each, router="gate.wg", shared=shared, shared_name="shared_mlp")
    return _hunyuan(config, layer={"feed_forward": experts})


def _smollm3(config: HFConfig) -> ModelConfig:
    """Every fourth layer has no positions."""
    every = int(config.get("no_rope_layer_interval", 4))
    rotated = [int((i + 1) % every != 0) for i in range(int(config["num_hidden_layers"]))]
    return decoder({**config, "no_rope_layers": config.get("no_rope_layers") or rotated})


def _granite(config: HFConfig, mlp: str = "mlp", **options: Any) -> ModelConfig:
    """Multipliers everywhere; some have windows and sinks."""
    return decoder(
        config,
        attention={
            "scale": number(config, "attention_multiplier"),
            "sinks": bool(config.get("attention_sinks", False)),
        },
        layer={"residual": number(config, "residual_multiplier"), "mlp": mlp},
        embedding_scale=number(config, "embedding_multiplier"),
        logit_scale=1 / number(config, "logits_scaling", above=0),
        **options,
    )


def _gemma(config: HFConfig, **options: Any) -> ModelConfig:
    """Norms stored as offsets from one, embeddings scaled by sqrt(hidden)."""
    return decoder(
        config,
        defaults={"tie_word_embeddings": True},
        norm={"offset": 1.0},
        feed_forward={"activation": "gelu_tanh"},
        embedding_scale=float(config["hidden_size"]) ** 0.5,
        **options,
    )


def _gemma2(config: HFConfig, qk_norm: str | None = None, **options: Any) -> ModelConfig:
    """Norms on both sides of each sublayer, soft caps, layers with windows."""
    scale = number(config, "query_pre_attn_scalar", above=0) ** -0.5
    cap = optional_number(config, "attn_logit_softcapping")
    return _gemma(
        config,
        attention={"scale": scale, "qk_norm": qk_norm, "softcap": cap},
        layer=_SANDWICH,
        logit_softcap=optional_number(config, "final_logit_softcapping"),
        **options,
    )


def _gemma3(config: HFConfig) -> ModelConfig:
    """Five windowed layers, with a theta of their own, to one of full attention."""
    local = Rope(int(config["head_dim"]), number(config, "rope_local_base_freq", 10000.0, above=0))
    return _gemma2(
        config,
        qk_norm="head",
        layers=lambda i, window: {"attention": {"rope": local}} if window else {},
        full_every=int(config.get("sliding_window_pattern", 6)),
    )


def _olmo3(config: HFConfig) -> ModelConfig:
    """OLMo 2 with windows; only layers of full attention have a scaled RoPE."""
    plain = Rope(head_dim_of(config), rope_base(config))
    return decoder(
        config,
        attention={"qk_norm": "whole"},
        layer=_POST_NORM,
        layers=lambda i, window: {"attention": {"rope": plain}} if window else {},
        full_every=4,
    )


def _no_rope_if_full(i: int, window: int | None) -> Options:
    """With windows, full attention has no positions."""
    return {} if window else {"attention": {"rope": None}}


def _exaone4(config: HFConfig) -> ModelConfig:
    """Norms after the sublayers, windows in the larger model."""
    pattern = config.get("sliding_window_pattern")
    every = len(pattern) if isinstance(pattern, str) else int(pattern or 4)
    windows: Options = {"layers": _no_rope_if_full, "full_every": every}
    return decoder(
        config,
        attention={"qk_norm": "head"},
        layer=_POST_NORM,
        **(windows if config.get("sliding_window") else {}),
    )


def _cohere(config: HFConfig, **options: Any) -> ModelConfig:
    """Parallel blocks under one norm, RoPE of neighbors, scaled logits."""
    return decoder(
        config,
        defaults={"tie_word_embeddings": True, "rope_traditional": True},
        **_LAYER_NORM,
        attention={"qk_norm": "each" if config.get("use_qk_norm") else None},
        layer=_PARALLEL,
        logit_scale=number(config, "logit_scale", 1.0),
        **options,
    )


def _cohere2(config: HFConfig) -> ModelConfig:
    every = int(config.get("sliding_window_pattern", 4))
    return _cohere(config, layers=_no_rope_if_full, full_every=every)


def _gpt(config: HFConfig) -> ModelConfig:
    """Layer norms, biases, mostly a plain GELU; positions of any kind."""
    return decoder(
        config,
        norm={"kind": "layer"},
        eps=("layer_norm_epsilon", None),
        attention={"scale": number(config, "attention_multiplier", head_dim_of(config) ** -0.5)},
        feed_forward={} if config.get("gated") else {"names": _UNGATED},
        experts={} if config.get("num_experts") else None,
        layer={
            "parallel": bool(config.get("use_parallel_residual")),
            "before_attention": config["attention_norm"],
            "before_feed_forward": config["feed_forward_norm"],
        },
        positions="embed_positions" if config["position_embedding_type"] == "learned" else None,
        embedding_norm="embed_norm" if config.get("embedding_norm") else None,
    )


def _stablelm(config: HFConfig) -> ModelConfig:
    """Layer norms, RoPE on a quarter of each head; heads may have their own norms."""
    parallel = bool(config.get("use_parallel_residual", False))
    qk_norm = "each" if config.get("qk_layernorm") else None
    return decoder(
        config,
        **_LAYER_NORM,
        attention={"qk_norm": qk_norm, "norms": ("q_layernorm", "k_layernorm")},
        layer=_PARALLEL if parallel else {},
    )


def _ministral3(config: HFConfig) -> ModelConfig:
    """Llama whose queries are scaled by position beyond the original context."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    beta = scaling.get("llama_4_scaling_beta")
    temperature = None
    if beta:
        temperature = Temperature(float(beta), int(scaling["original_max_position_embeddings"]))
    return decoder(config, attention={"temperature": temperature})


def _qwen2_moe(config: HFConfig) -> ModelConfig:
    """Weights of experts not normalized; a gated shared expert."""
    shared = FeedForward(int(config["shared_expert_intermediate_size"]))
    gated = {"shared": shared, "shared_gate": "shared_expert_gate"}
    return decoder(config, experts={"norm_topk_prob": False, **gated})


def _deepseek(config: HFConfig) -> ModelConfig:
    """Latent attention, many small experts behind a few dense layers."""
    heads, width = int(config["num_attention_heads"]), int(config["qk_nope_head_dim"])
    rope_dim = int(config["qk_rope_head_dim"])
    all_dim = yarn_growth(config.get("rope_scaling") or {})
    attention = LatentAttention(
        heads,
        width,
        int(config["v_head_dim"]),
        int(config["kv_lora_rank"]),
        int(config["q_lora_rank"]) if config.get("q_lora_rank") else None,
        (width + rope_dim) ** -0.5 * all_dim**2,
        rope_of({**config, "rope_traditional": True}, rope_dim),
    )
    dense = int(config.get("first_k_dense_replace", 0))
    return decoder(
        {**config, "rope_scaling": None},
        layer={"attention": attention},
        layers=lambda i, window: {} if i < dense else {"feed_forward": _deepseek_moe(config)},
    )


def _glm4_moe(config: HFConfig) -> ModelConfig:
    """Many small experts behind a few dense layers."""
    dots = config["model_type"] == "dots1"
    experts = _deepseek_moe(config, experts="experts" if dots else "switch_mlp")
    dense = int(config.get("first_k_dense_replace", 0))
    return decoder(
        config,
        attention={"qk_norm": "head" if config.get("use_qk_norm", dots) else None},
        layers=lambda i, window: {} if i < dense else {"feed_forward": experts},
    )


def _deepseek_moe(config: HFConfig, **more: Any) -> Experts:
    """Fine-grained and shared experts (DeepSeekMoE, arXiv:2401.06066)."""
    softmax = config["model_type"] in ("deepseek", "deepseek_v2")
    gating = str(config.get("scoring_func", "softmax" if softmax else "sigmoid"))
    if gating not in ("softmax", "sigmoid", "noaux_tc"):
        raise CheckpointError(f"config.json: scoring_func {gating!r} is not known")
    shared = int(config.get("n_shared_experts") or 0) * int(config["moe_intermediate_size"])
    return moe(
        {**config, "num_experts": config["n_routed_experts"]},
        norm_topk_prob=not softmax,
        gating="softmax" if gating == "softmax" else "sigmoid",
        scale=number(config, "routed_scaling_factor", 1.0),
        bias=None if softmax else "gate.e_score_correction_bias",
        groups=int(config.get("n_group") or 1),
        used_groups=int(config.get("topk_group") or 1),
        shared=FeedForward(shared) if shared else None,
        shared_name="shared_experts",
        **more,
    )


FAMILIES: dict[str, Callable[[HFConfig], ModelConfig]] = {
    # Llama 1-3, Mistral, TinyLlama, SmolLM2 and everything that shares their layers.
    **dict.fromkeys(("baichuan", "llama", "mistral", "qwen2", "refact", "seed_oss"), decoder),
    # DeepSeek 1, dots.llm1 and GLM 4.5.
    **dict.fromkeys(("deepseek", "dots1", "glm4_moe"), _glm4_moe),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek),
    # Arcee's AFM: Llama with a plain feed-forward of squared ReLU.
    "arcee": partial(decoder, feed_forward={"activation": "relu2", "names": _UNGATED}),
    "cohere": _cohere,  # Command R
    "cohere2": _cohere2,  # Command R7B: with windows
    "exaone4": _exaone4,
    "gemma": _gemma,
    "gemma2": partial(_gemma2, full_every=2),
    "gemma3_text": _gemma3,
    # ChatGLM 3 and GLM 4 (9B): RoPE of neighbors in half of each head, gate and up fused.
    "glm": partial(decoder, defaults={"rope_traditional": True}, feed_forward=_FUSED),
    # GLM 4 (0414): norms on both sides of each sublayer.
    "glm4": partial(
        decoder,
        defaults={"rope_traditional": True},
        feed_forward=_FUSED,
        layer={
            "after_attention": "post_self_attn_layernorm",
            "after_feed_forward": "post_mlp_layernorm",
        },
    ),
    "gpt": _gpt,  # GPT-2 and its line
    # Attention sinks, every other layer windowed, clamped experts with biases.
    "gpt_oss": partial(
        decoder,
        attention={"sinks": True},
        experts={
            "router": "router",
            "experts": "experts",
            "gating": "softmax_topk",
            "activation": "clamped_swiglu",
        },
        full_every=2,
    ),
    "granite": _granite,
    "granite_swa": _granite,
    "granitemoe": partial(_granite, experts={"router": "router.layer"}, mlp="block_sparse_moe"),
    "hunyuan_v1_dense": _hunyuan,
    "hunyuan_v1_moe": _hunyuan_moe,
    "ministral3": _ministral3,
    "mixtral": partial(decoder, experts={}, layer={"mlp": "block_sparse_moe"}),
    # Layer norms stored as offsets from one, squared ReLU, RoPE on half of a head.
    "nemotron": partial(
        decoder,
        norm={"kind": "layer", "offset": 1.0},
        eps=("norm_eps", 1e-5),
        feed_forward={"activation": "relu2", "names": _UNGATED},
    ),
    # OLMo 1: norms without weights, projections bounded.
    "olmo": partial(decoder, norm={"kind": "layer", "bare": True}, eps=("layer_norm_eps", 1e-5)),
    # OLMo 2: norms after the sublayers, queries and keys normalized as a whole.
    "olmo2": partial(decoder, attention={"qk_norm": "whole"}, layer=_POST_NORM),
    "olmo3": _olmo3,
    "olmoe": partial(decoder, attention={"qk_norm": "whole"}, experts={"norm_topk_prob": False}),
    # Phi 1 and 2: parallel blocks under one norm, a plain feed-forward, biases everywhere.
    "phi": partial(
        decoder,
        **_LAYER_NORM,
        attention={"out": "dense"},
        feed_forward={"activation": "gelu_tanh", "names": ("fc1", "fc2")},
        layer=_PARALLEL,
        final_norm="final_layernorm",
    ),
    # Phi 3 and 4: fused projections of queries, keys and values, and of gate and up.
    "phi3": partial(decoder, attention={"fused": True}, feed_forward=_FUSED),
    "qwen2_moe": _qwen2_moe,
    "qwen3": partial(decoder, attention={"qk_norm": "head"}),
    "qwen3_moe": partial(decoder, attention={"qk_norm": "head"}, experts={"norm_topk_prob": True}),
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    # Layer norms, biases and a plain feed-forward.
    "starcoder2": partial(
        decoder,
        norm={"kind": "layer"},
        eps=("norm_epsilon", 1e-5),
        feed_forward={"activation": "gelu_tanh", "names": ("c_fc", "c_proj")},
    ),
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
