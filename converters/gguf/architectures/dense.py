"""Architectures whose every layer is attention and one feed-forward."""

from __future__ import annotations

from functools import partial

from converters.gguf.architectures.keys import (
    NORMS_OF_HEADS,
    fused_qkv,
    hunyuan,
    norms_of_heads,
    stablelm,
    windows,
)
from converters.gguf.architectures.limits import needs_windows, one_base
from converters.gguf.architectures.mixers import flat
from converters.gguf.architectures.row import (
    AFTER_NORMS,
    ATTENTION,
    BIASED_ATTENTION,
    BIASED_QKV,
    FFN_NORM,
    FUSED_GATE,
    GATED,
    HUNYUAN_NORMS,
    LLAMA,
    LLAMA_BIASES,
    PERMUTED,
    QK_NORMS,
    SANDWICH,
    UNGATED,
    Architecture,
    Config,
    without,
)
from converters.gguf.numbers import float_of, scalar
from converters.gguf.reader import GGUFFile


def _gemma(gguf: GGUFFile, config: Config) -> Config:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma_scalar(gguf: GGUFFile, config: Config, layers_of_27b: int) -> Config:
    """The largest models divide scores by the square root of another width."""
    largest = config["num_hidden_layers"] == layers_of_27b
    width = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": width if largest else config["head_dim"]}


def _gemma2(gguf: GGUFFile, config: Config) -> Config:
    one_base(gguf, config)
    return {
        **_gemma(gguf, config),
        **_gemma_scalar(gguf, config, 46),
        **windows(gguf, 2),
        "attn_logit_softcapping": float_of(gguf, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": float_of(gguf, "final_logit_softcapping", 30.0),
    }


def _gemma3(gguf: GGUFFile, config: Config) -> Config:
    cap = float(gguf.key("final_logit_softcapping", 0.0))
    return {
        **_gemma(gguf, config),
        **_gemma_scalar(gguf, config, 62),
        **windows(gguf, 6),
        "rope_local_base_freq": float_of(gguf, "rope.freq_base_swa", 10000.0),
        **({"final_logit_softcapping": cap} if cap else {}),
    }


def _cohere(gguf: GGUFFile, config: Config) -> Config:
    return {
        "logit_scale": float_of(gguf, "logit_scale", 1.0),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in gguf,
        "rope_traditional": True,
        **(windows(gguf, 4) if gguf.architecture == "cohere2" else {}),
    }


def _olmo2(gguf: GGUFFile, config: Config) -> Config:
    found = windows(gguf, 4)
    if not found:
        return {}
    return {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **found}


def _exaone4(gguf: GGUFFile, config: Config) -> Config:
    # The smaller model has no windows, whatever its file says of their size.
    large = config["num_hidden_layers"] == 64
    found = needs_windows(gguf, windows(gguf, 4)) if large else {}
    # Stock mlx-lm asks for all of these keys, even to say that there is nothing.
    keys: Config = {"rope_scaling": config.get("rope_scaling")}
    if not found:
        return {**keys, "sliding_window": None, "sliding_window_pattern": None}
    pattern = "L" * (found["sliding_window_pattern"] - 1) + "G"
    return {**keys, **found, "sliding_window_pattern": pattern}


def _phi3(gguf: GGUFFile, config: Config) -> Config:
    """Hugging Face keeps the context before scaling outside the section on scaling."""
    scaling = config.get("rope_scaling") or {}
    key = "original_max_position_embeddings"
    return {key: scaling.get(key, config["max_position_embeddings"])}


def _mistral3(gguf: GGUFFile, config: Config) -> Config:
    """Everything rotary in one section, as Hugging Face has it for this family."""
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    # Stock mlx-lm asks for both keys, even to say that queries do not sharpen.
    scaling["llama_4_scaling_beta"] = float_of(gguf, "attention.temperature_scale", 0.0)
    context = config["max_position_embeddings"]
    original = scalar(gguf, "rope.scaling.original_context_length", context)
    scaling.setdefault("original_max_position_embeddings", original or context)
    scaling["rope_theta"] = config["rope_theta"]
    return {"rope_parameters": scaling}


def _baichuan(gguf: GGUFFile, config: Config) -> Config:
    """The larger model knows positions by ALiBi; nothing but its depth says so."""
    if config["num_hidden_layers"] == 32:
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if config["num_hidden_layers"] != 40:
        raise gguf.error(
            f"{gguf.architecture}.block_count",
            expected="the 32 layers of the 7B model or the 40 of the 13B one",
            found=str(config["num_hidden_layers"]),
        )
    return {"position_embedding_type": "alibi", "max_alibi_bias": 8.0}


def _olmo(gguf: GGUFFile, config: Config) -> Config:
    return {"clip_qkv": float_of(gguf, "attention.clamp_kqv", 0.0) or None}


DENSE: dict[str, Architecture] = {
    "arcee": Architecture(
        "arcee",
        "ArceeForCausalLM",
        {**ATTENTION, **FFN_NORM, **UNGATED},
        keys=lambda gguf, config: {"hidden_act": "relu2"},
        order=PERMUTED,
        zero_biases=(BIASED_ATTENTION,),
    ),
    "baichuan": Architecture("baichuan", "BaichuanForCausalLM", keys=_baichuan, order=PERMUTED),
    "chatglm": Architecture(
        "glm",
        "GlmForCausalLM",
        {**ATTENTION, **FFN_NORM, **FUSED_GATE},
        keys=lambda gguf, config: {"rope_traditional": True},
        parts={"attn_qkv": fused_qkv},
        zero_biases=(BIASED_QKV,),
        partial_rotary=True,
    ),
    "cohere2": Architecture(
        "cohere2",
        "Cohere2ForCausalLM",
        without(LLAMA, "ffn_norm"),
        keys=_cohere,
        epsilon="layer_norm_eps",
    ),
    "command-r": Architecture(
        "cohere",
        "CohereForCausalLM",
        without(LLAMA, "ffn_norm") | QK_NORMS,
        keys=_cohere,
        epsilon="layer_norm_eps",
        optional=frozenset(QK_NORMS),
    ),
    "exaone4": Architecture(
        "exaone4",
        "Exaone4ForCausalLM",
        without(LLAMA, "attn_norm", "ffn_norm") | QK_NORMS | AFTER_NORMS,
        keys=_exaone4,
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", keys=_gemma, norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", SANDWICH, keys=_gemma2, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", SANDWICH | QK_NORMS, keys=_gemma3, norm_offset=1.0
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        {
            **ATTENTION,
            "post_attention_norm": "post_self_attn_layernorm",
            **FFN_NORM,
            "post_ffw_norm": "post_mlp_layernorm",
            **FUSED_GATE,
        },
        keys=lambda gguf, config: {"rope_traditional": True},
        zero_biases=(BIASED_QKV,),
        partial_rotary=True,
    ),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        LLAMA | HUNYUAN_NORMS,
        keys=hunyuan,
        zero_biases=(BIASED_ATTENTION,),
    ),
    "llama": Architecture("llama", "LlamaForCausalLM", order=PERMUTED, zero_biases=LLAMA_BIASES),
    "mistral3": Architecture("ministral3", "Ministral3ForCausalLM", keys=_mistral3, order=PERMUTED),
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**ATTENTION, **FFN_NORM, **UNGATED},
        keys=lambda gguf, config: {"hidden_act": "relu2"},
        epsilon="norm_eps",
        norm_offset=1.0,
        zero_biases=(BIASED_ATTENTION, ("ffn_up", "ffn_down")),
        norm_biases=True,
        partial_rotary=True,
    ),
    "olmo": Architecture(
        "olmo",
        "OlmoForCausalLM",
        without(LLAMA, "attn_norm", "ffn_norm"),
        keys=_olmo,
        epsilon="layer_norm_eps",
        order=PERMUTED,
        final_norm=None,
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        without(LLAMA, "attn_norm", "ffn_norm") | QK_NORMS | AFTER_NORMS,
        keys=_olmo2,
    ),
    "phi2": Architecture(
        "phi",
        "PhiForCausalLM",
        {
            **ATTENTION,
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        ends={"output_norm": "model.final_layernorm"},
        keys=lambda gguf, config: {"hidden_act": "gelu_new"},
        epsilon="layer_norm_eps",
        parts={"attn_qkv": fused_qkv},
        norm_biases=True,
        head_bias=True,
        partial_rotary=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            **FFN_NORM,
            **FUSED_GATE,
        },
        keys=_phi3,
        joins={"attn_qkv": ("attn_q", "attn_k", "attn_v")},
        partial_rotary=True,
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", zero_biases=(BIASED_QKV,), always_biased=True
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", LLAMA | QK_NORMS),
    "refact": Architecture(
        "refact",
        "GPTRefactForCausalLM",
        keys=lambda gguf, config: {"position_embedding_type": "alibi", "max_alibi_bias": 8.0},
        zero_biases=LLAMA_BIASES,
    ),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        {**ATTENTION, "post_attention_norm": "post_attention_layernorm", **GATED},
        zero_biases=(BIASED_QKV,),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", order=PERMUTED),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        LLAMA | NORMS_OF_HEADS,
        keys=stablelm,
        epsilon="layer_norm_eps",
        parts={f"attn_{side}_norm": partial(norms_of_heads, side) for side in "qk"},
        reshape=dict.fromkeys(NORMS_OF_HEADS, flat),
        zero_biases=(BIASED_QKV,),
        optional=frozenset({"ffn_norm", *NORMS_OF_HEADS}),
        norm_biases=True,
        partial_rotary=True,
    ),
}
