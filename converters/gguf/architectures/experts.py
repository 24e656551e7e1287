"""Architectures with mixtures of experts."""

from __future__ import annotations

from converters.gguf.architectures.fine_grained import FINE_GRAINED
from converters.gguf.architectures.indexed import INDEXED
from converters.gguf.architectures.keys import (
    needs_experts,
    only,
    shared_width,
    unscaled,
    windows,
)
from converters.gguf.architectures.limits import one_base, text_alone
from converters.gguf.architectures.row import (
    ATTENTION,
    BIASED_QKV,
    FFN_NORM,
    GATED,
    HUNYUAN_NORMS,
    PERMUTED,
    QK_NORMS,
    SHARED_EXPERTS,
    SPARSE,
    SPARSE_LLAMA,
    Architecture,
    Config,
    as_row,
    renamed,
    without,
)
from converters.gguf.architectures.windowed_experts import WINDOWED_EXPERTS
from converters.gguf.numbers import float_of, scalar
from converters.gguf.reader import GGUFFile


def _mixtral(gguf: GGUFFile, config: Config) -> Config:
    if gguf.architecture == "mistral3":
        only(gguf, "attention.temperature_scale", 0.0)
    return {}


def _qwen2moe(gguf: GGUFFile, config: Config) -> Config:
    shared = gguf.tensor("blk.0.ffn_up_shexp.weight").shape[0]
    return {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _gpt_oss(gguf: GGUFFile, config: Config) -> Config:
    one_base(gguf, config)
    return {**windows(gguf, 2), "intermediate_size": config["moe_intermediate_size"]}


def _minimax_m2(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "expert_gating_func", 2)
    unscaled(gguf, config)
    return {
        "intermediate_size": config["moe_intermediate_size"],
        "shared_intermediate_size": 0,
        "rotary_dim": scalar(gguf, "rope.dimension_count", config["head_dim"]),
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
    }


def _qwen3moe(gguf: GGUFFile, config: Config) -> Config:
    if gguf.architecture == "qwen3vlmoe":
        text_alone(gguf, config, interleaved=True)
    return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


_QWEN3_MOE = Architecture(
    "qwen3_moe", "Qwen3MoeForCausalLM", SPARSE_LLAMA | QK_NORMS, keys=_qwen3moe
)


def _llama4(gguf: GGUFFile, config: Config) -> Config:
    """Everything in the section on text, as the model also sees."""
    needs_experts(gguf, config)
    only(gguf, "expert_used_count", 1)
    only(gguf, "attention.sliding_window_pattern", 4)
    unscaled(gguf, config, "linear", "llama3", "yarn")
    if not gguf.key("attention.sliding_window", 8192):
        key = f"{gguf.architecture}.attention.sliding_window"
        raise gguf.error(key, expected="chunks in three of four layers")
    text = {
        **config,
        "model_type": "llama4_text",
        "intermediate_size": config["moe_intermediate_size"],
        "intermediate_size_mlp": config["intermediate_size"],
        "interleave_moe_layer_step": scalar(gguf, "interleave_moe_layer_step"),
        "use_qk_norm": config["num_experts"] != 128,  # nothing else tells the larger model
        "rope_theta": float_of(gguf, "rope.freq_base_swa", config["rope_theta"]),
        "rope_scaling": config.get("rope_scaling"),
        # llama.cpp asks no file for these.
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }
    return {"text_config": text}


def _hunyuan_moe(gguf: GGUFFile, config: Config) -> Config:
    unscaled(gguf, config)
    return {
        "moe_topk": config["num_experts_per_tok"],
        "num_shared_expert": 1,
        "intermediate_size": shared_width(gguf),
        "use_qk_norm": True,
    }


_LLAMA_4 = {
    **renamed(GATED, "mlp.", "feed_forward."),
    **renamed(SPARSE, "mlp.switch_mlp", "feed_forward.experts"),
    **renamed(SHARED_EXPERTS, "mlp.shared_experts", "feed_forward.shared_expert"),
    "ffn_gate_inp": "feed_forward.router",
}

EXPERTS: dict[str, Architecture] = {
    **FINE_GRAINED,
    **INDEXED,
    **WINDOWED_EXPERTS,
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            **renamed(without(SPARSE, "ffn_gate_inp"), "switch_mlp", "experts"),
        },
        keys=_gpt_oss,
    ),
    "hunyuan-moe": Architecture(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        {
            **SPARSE_LLAMA,
            **HUNYUAN_NORMS,
            **renamed(SHARED_EXPERTS, "shared_experts", "shared_mlp"),
            "ffn_gate_inp": "mlp.gate.wg",
        },
        keys=_hunyuan_moe,
    ),
    "llama4": Architecture(
        "llama4",
        "Llama4ForConditionalGeneration",
        ATTENTION | FFN_NORM | _LLAMA_4,
        ends={
            "token_embd": "language_model.model.embed_tokens",
            "output_norm": "language_model.model.norm",
            "output": "language_model.lm_head",
        },
        prefix="language_model.model.layers",
        keys=_llama4,
        optional=frozenset(_LLAMA_4),
    ),
    "minimax-m2": Architecture(
        "minimax",
        "MiniMaxM2ForCausalLM",
        {
            **renamed(SPARSE_LLAMA | QK_NORMS, "mlp.", "block_sparse_moe."),
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
        keys=_minimax_m2,
        partial_rotary=True,
    ),
    # Llama with experts; GGUF has no name of its own for it.
    "mixtral": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        renamed(SPARSE_LLAMA, "mlp.", "block_sparse_moe."),
        keys=_mixtral,
        order=PERMUTED,
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        SPARSE_LLAMA | QK_NORMS,
        keys=lambda gguf, config: {"norm_topk_prob": False},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **SPARSE_LLAMA,
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        },
        keys=_qwen2moe,
        reshape={"ffn_gate_inp_shexp": as_row},
        zero_biases=(BIASED_QKV,),
        always_biased=True,
    ),
    "qwen3moe": _QWEN3_MOE,
    "qwen3vlmoe": _QWEN3_MOE,
}
