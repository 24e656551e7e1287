"""One short function per family: a Hugging Face ``config.json`` into a ``ModelConfig``.

To add a family, write its function and its row in ``FAMILIES``; an option that no family has yet
goes into ``config.py`` and is read once, where the layer is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converters.rope import yarn_growth
from mlxrun.errors import CheckpointError, UnsupportedArchitectureError
from mlxrun.models.config import (
    Experts,
    FeedForward,
    LatentAttention,
    ModelConfig,
    Norm,
    Rope,
    Temperature,
)
from mlxrun.models.plan import (
    HFConfig,
    Options,
    decoder,
    epsilon,
    head_width,
    layer_windows,
    moe,
    number,
    optional_float,
    rope_base,
    rope_of,
    whole,
)


def llama(config: HFConfig) -> ModelConfig:
    """Llama 1-3, Mistral, TinyLlama, SmolLM2 and everything that shares their layers."""
    return decoder(config)


def arcee(config: HFConfig) -> ModelConfig:
    """Arcee's AFM: Llama with a plain feed-forward of squared ReLU."""
    return decoder(config, feed_forward={"activation": "relu2", "names": ("up_proj", "down_proj")})


def hunyuan(config: HFConfig, **layer: Any) -> ModelConfig:
    """Hunyuan, dense: norms of queries and keys after RoPE, whose base grows with the context."""
    scaling = config.get("rope_scaling") or {}
    width, alpha = head_width(config), float(scaling.get("alpha") or 1.0)
    base = rope_base(config) * alpha ** (width / (width - 2))
    norms = {"qk_norm": "after_rope", "norms": ("query_layernorm", "key_layernorm")}
    plain = {**config, "rope_theta": base, "rope_scaling": None}
    return decoder(plain, attention=norms, layer=layer)


def hunyuan_moe(config: HFConfig) -> ModelConfig:
    """Hunyuan A13B: Hunyuan with experts, some of them shared."""
    each = {k: v[0] if isinstance(v, list) else v for k, v in config.items()}
    shared = FeedForward(whole(each, "intermediate_size") * whole(each, "num_shared_expert"))
    options: Options = {"router": "gate.wg", "shared": shared, "shared_name": "shared_mlp"}
    each["num_experts_per_tok"] = each["moe_topk"]
    return hunyuan(config, feed_forward=moe(each, **options))


def olmo(config: HFConfig) -> ModelConfig:
    """OLMo 1: norms without weights, projections bounded."""
    return decoder(config, norm=Norm("layer", epsilon(config, "layer_norm_eps", 1e-5), bare=True))


def qwen3(config: HFConfig) -> ModelConfig:
    """Qwen 3, dense: queries and keys normalized per head."""
    return decoder(config, attention={"qk_norm": "head"})


def smollm3(config: HFConfig) -> ModelConfig:
    """SmolLM 3: every fourth layer has no positions."""
    every = int(config.get("no_rope_layer_interval", 4))
    rotated = [int((i + 1) % every != 0) for i in range(int(config["num_hidden_layers"]))]
    return decoder({**config, "no_rope_layers": config.get("no_rope_layers") or rotated})


def granite(config: HFConfig, **layer: Any) -> ModelConfig:
    """Granite 3 and 4, dense: multipliers everywhere; some have windows and sinks."""
    return decoder(
        config,
        attention={
            "scale": number(config, "attention_multiplier"),
            "sinks": bool(config.get("attention_sinks", False)),
        },
        layer={"residual": number(config, "residual_multiplier"), **layer},
        embedding_scale=number(config, "embedding_multiplier"),
        logit_scale=1 / number(config, "logits_scaling", above=0),
    )


def gemma(config: HFConfig, **options: Any) -> ModelConfig:
    """Gemma 1: norms stored as offsets from one, embeddings scaled by sqrt(hidden)."""
    return decoder(
        {"tie_word_embeddings": True, **config},
        norm=Norm(eps=epsilon(config, "rms_norm_eps", 1e-6), offset=1.0),
        feed_forward={"activation": "gelu_tanh"},
        embedding_scale=float(config["hidden_size"]) ** 0.5,
        **options,
    )


def gemma2(config: HFConfig) -> ModelConfig:
    """Gemma 2: norms on both sides of each sublayer, soft caps, every other layer windowed."""
    return _gemma(config, windows=layer_windows(config, every=2))


def gemma3(config: HFConfig) -> ModelConfig:
    """Gemma 3: five windowed layers, with a theta of their own, to one of full attention."""
    windows = layer_windows(config, every=int(config.get("sliding_window_pattern", 6)))
    local = Rope(int(config["head_dim"]), number(config, "rope_local_base_freq", 10000.0, above=0))
    return _gemma(
        config,
        qk_norm="head",
        layers=lambda i: {"attention": {"rope": local} if windows[i] else {}},
        windows=windows,
    )


def olmo2(config: HFConfig) -> ModelConfig:
    """OLMo 2: norms after the sublayers, queries and keys normalized as a whole."""
    return decoder(config, attention={"qk_norm": "whole"}, layer=_AFTER)


def olmo3(config: HFConfig) -> ModelConfig:
    """OLMo 3: OLMo 2 with windows; only layers of full attention have a scaled RoPE."""
    windows = layer_windows(config, every=4)
    plain = Rope(head_width(config), rope_base(config))
    return decoder(
        config,
        attention={"qk_norm": "whole"},
        layer=_AFTER,
        layers=lambda i: {"attention": {"rope": plain} if windows[i] else {}},
        windows=windows,
    )


def exaone4(config: HFConfig) -> ModelConfig:
    """EXAONE 4: norms after the sublayers; with windows, full attention has no positions."""
    pattern = config.get("sliding_window_pattern")
    every = len(pattern) if isinstance(pattern, str) else int(pattern or 4)
    windows = layer_windows(config, every=every) if config.get("sliding_window") else None
    return decoder(
        config,
        attention={"qk_norm": "head"},
        layer=_AFTER,
        layers=lambda i: {"attention": {"rope": None} if windows and not windows[i] else {}},
        windows=windows,
    )


def cohere(config: HFConfig, **options: Any) -> ModelConfig:
    """Command R: parallel blocks under one norm, RoPE of neighbors, scaled logits."""
    return decoder(
        {"tie_word_embeddings": True, "rope_traditional": True, **config},
        norm=Norm("layer", epsilon(config, "layer_norm_eps", 1e-5)),
        attention={"qk_norm": "each" if config.get("use_qk_norm") else None},
        layer={"before_feed_forward": "input_layernorm", "parallel": True},
        logit_scale=number(config, "logit_scale", 1.0),
        **options,
    )


def cohere2(config: HFConfig) -> ModelConfig:
    """Command R7B: Command R with windows; full attention has no positions."""
    windows = layer_windows(config, every=int(config.get("sliding_window_pattern", 4)))
    return cohere(
        config,
        layers=lambda i: {"attention": {} if windows[i] else {"rope": None}},
        windows=windows,
    )


def phi(config: HFConfig) -> ModelConfig:
    """Phi 1 and 2: parallel blocks under one norm, a plain feed-forward, biases everywhere."""
    return decoder(
        config,
        norm=Norm("layer", epsilon(config, "layer_norm_eps", 1e-5)),
        attention={"out": "dense"},
        feed_forward={"activation": "gelu_tanh", "names": ("fc1", "fc2")},
        layer={"before_feed_forward": "input_layernorm", "parallel": True},
        final_norm="final_layernorm",
    )


def phi3(config: HFConfig) -> ModelConfig:
    """Phi 3 and 4: fused projections of queries, keys and values, and of gate and up."""
    return decoder(
        config,
        attention={"fused": True},
        feed_forward={"names": ("gate_up_proj", "down_proj"), "fused": True},
    )


def gpt(config: HFConfig) -> ModelConfig:
    """GPT-2 and its line: layer norms, biases, mostly a plain GELU; positions of any kind."""
    return decoder(
        config,
        norm=Norm("layer", epsilon(config, "layer_norm_epsilon")),
        attention={"scale": number(config, "attention_multiplier", head_width(config) ** -0.5)},
        feed_forward={} if config.get("gated") else {"names": ("up_proj", "down_proj")},
        layer={
            "parallel": bool(config.get("use_parallel_residual")),
            "before_attention": config["attention_norm"],
            "before_feed_forward": config["feed_forward_norm"],
            **({"feed_forward": moe(config)} if config.get("num_experts") else {}),
        },
        positions="embed_positions" if config["position_embedding_type"] == "learned" else None,
        embedding_norm="embed_norm" if config.get("embedding_norm") else None,
    )


def stablelm(config: HFConfig) -> ModelConfig:
    """StableLM 2: layer norms, RoPE on a quarter of each head; heads may have their own norms."""
    together = bool(config.get("use_parallel_residual", False))
    own = "input_layernorm" if together else "post_attention_layernorm"
    each = "each" if config.get("qk_layernorm") else None
    return decoder(
        config,
        norm=Norm("layer", epsilon(config, "layer_norm_eps", 1e-5)),
        attention={"qk_norm": each, "norms": ("q_layernorm", "k_layernorm")},
        layer={"parallel": together, "before_feed_forward": own},
    )


def starcoder2(config: HFConfig) -> ModelConfig:
    """StarCoder 2: layer norms, biases and a plain feed-forward."""
    return decoder(
        config,
        norm=Norm("layer", epsilon(config, "norm_epsilon", 1e-5)),
        feed_forward={"activation": "gelu_tanh", "names": ("c_fc", "c_proj")},
    )


def nemotron(config: HFConfig) -> ModelConfig:
    """Nemotron: layer norms stored as offsets from one, squared ReLU, RoPE on half of a head."""
    return decoder(
        config,
        norm=Norm("layer", epsilon(config, "norm_eps", 1e-5), offset=1.0),
        feed_forward={"activation": "relu2", "names": ("up_proj", "down_proj")},
    )


def glm(config: HFConfig, **layer: Any) -> ModelConfig:
    """ChatGLM 3 and GLM 4 (9B): RoPE of neighbors in half of each head, gate and up fused."""
    fused = {"names": ("gate_up_proj", "down_proj"), "fused": True}
    return decoder({"rope_traditional": True, **config}, feed_forward=fused, layer=layer)


def glm4(config: HFConfig) -> ModelConfig:
    """GLM 4 (0414): norms on both sides of each sublayer."""
    after = {"after_attention": "post_self_attn_layernorm"}
    return glm(config, **after, after_feed_forward="post_mlp_layernorm")


def ministral3(config: HFConfig) -> ModelConfig:
    """Ministral 3: Llama whose queries are scaled by position beyond the original context."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    beta = scaling.get("llama_4_scaling_beta")
    temperature = None
    if beta:
        temperature = Temperature(float(beta), int(scaling["original_max_position_embeddings"]))
    return decoder(config, attention={"temperature": temperature})


def mixtral(config: HFConfig) -> ModelConfig:
    """Mixtral: Llama with experts."""
    return decoder(config, layer={"feed_forward": moe(config), "mlp": "block_sparse_moe"})


def qwen2_moe(config: HFConfig) -> ModelConfig:
    """Qwen 1.5 and 2 MoE: weights are not normalized; a gated shared expert."""
    shared = FeedForward(int(config["shared_expert_intermediate_size"]))
    normalize = bool(config.get("norm_topk_prob", False))
    experts = moe(config, normalize=normalize, shared=shared, shared_gate="shared_expert_gate")
    return decoder(config, layer={"feed_forward": experts})


def qwen3_moe(config: HFConfig) -> ModelConfig:
    """Qwen 3 MoE: Qwen 3 with experts."""
    experts = moe(config, normalize=bool(config.get("norm_topk_prob", True)))
    return decoder(config, attention={"qk_norm": "head"}, layer={"feed_forward": experts})


def olmoe(config: HFConfig) -> ModelConfig:
    """OLMoE: queries and keys normalized as a whole, weights of experts not normalized."""
    experts = moe(config, normalize=bool(config.get("norm_topk_prob", False)))
    return decoder(config, attention={"qk_norm": "whole"}, layer={"feed_forward": experts})


def granitemoe(config: HFConfig) -> ModelConfig:
    """Granite 3 with experts."""
    experts = moe(config, router="router.layer")
    return granite(config, feed_forward=experts, mlp="block_sparse_moe")


def gpt_oss(config: HFConfig) -> ModelConfig:
    """gpt-oss: attention sinks, every other layer windowed, clamped experts with biases."""
    experts = moe(
        config,
        router="router",
        experts="experts",
        gating="softmax_topk",
        activation="clamped_swiglu",
    )
    return decoder(
        config,
        attention={"sinks": True},
        layer={"feed_forward": experts},
        windows=layer_windows(config, every=2),
    )


def deepseek(config: HFConfig) -> ModelConfig:
    """DeepSeek V2 and V3: latent attention, many small experts behind a few dense layers."""
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
        layers=lambda i: {} if i < dense else {"feed_forward": deepseek_moe(config)},
    )


def glm4_moe(config: HFConfig) -> ModelConfig:
    """DeepSeek 1, GLM 4.5 and dots.llm1: many small experts behind a few dense layers."""
    dots = config["model_type"] == "dots1"
    experts = deepseek_moe(config, experts="experts" if dots else "switch_mlp")
    dense = int(config.get("first_k_dense_replace", 0))
    return decoder(
        config,
        attention={"qk_norm": "head" if config.get("use_qk_norm", dots) else None},
        layers=lambda i: {} if i < dense else {"feed_forward": experts},
    )


FAMILIES: dict[str, Callable[[HFConfig], ModelConfig]] = {
    **dict.fromkeys(("baichuan", "llama", "mistral", "qwen2", "refact", "seed_oss"), llama),
    **dict.fromkeys(("deepseek", "dots1", "glm4_moe"), glm4_moe),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), deepseek),
    "arcee": arcee,
    "cohere": cohere,
    "cohere2": cohere2,
    "exaone4": exaone4,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "glm": glm,
    "glm4": glm4,
    "gpt": gpt,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "granite_swa": granite,
    "granitemoe": granitemoe,
    "hunyuan_v1_dense": hunyuan,
    "hunyuan_v1_moe": hunyuan_moe,
    "ministral3": ministral3,
    "mixtral": mixtral,
    "nemotron": nemotron,
    "olmo": olmo,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "phi": phi,
    "phi3": phi3,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
}

_AFTER: Options = {
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


def _gemma(config: HFConfig, qk_norm: str | None = None, **options: Any) -> ModelConfig:
    scale = number(config, "query_pre_attn_scalar", above=0) ** -0.5
    cap = optional_float(config, "attn_logit_softcapping")
    return gemma(
        config,
        attention={"scale": scale, "qk_norm": qk_norm, "softcap": cap},
        layer=_SANDWICH,
        logit_softcap=optional_float(config, "final_logit_softcapping"),
        **options,
    )


def deepseek_moe(config: HFConfig, **more: Any) -> Experts:
    """Fine-grained and shared experts (DeepSeekMoE, arXiv:2401.06066)."""
    softmax = config["model_type"] in ("deepseek", "deepseek_v2")
    gating = str(config.get("scoring_func", "softmax" if softmax else "sigmoid"))
    if gating not in ("softmax", "sigmoid", "noaux_tc"):
        raise CheckpointError(f"config.json: scoring_func {gating!r} is not known")
    shared = int(config.get("n_shared_experts") or 0) * int(config["moe_intermediate_size"])
    return moe(
        {**config, "num_experts": config["n_routed_experts"]},
        gating="softmax" if gating == "softmax" else "sigmoid",
        normalize=bool(config.get("norm_topk_prob", not softmax)),
        scale=number(config, "routed_scaling_factor", 1.0),
        bias=None if softmax else "gate.e_score_correction_bias",
        groups=int(config.get("n_group") or 1),
        used_groups=int(config.get("topk_group") or 1),
        shared=FeedForward(shared) if shared else None,
        shared_name="shared_experts",
        **more,
    )
