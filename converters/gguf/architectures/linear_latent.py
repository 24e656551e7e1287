"""Architectures of linear and latent attention in turns: Kimi Linear, Ling 3."""

from __future__ import annotations

from math import prod

import numpy as np

from converters.gguf.architectures.keys import gating, only, shared_count, shared_width, unscaled
from converters.gguf.architectures.limits import needs_experts
from converters.gguf.architectures.mixers import flat
from converters.gguf.architectures.row import (
    ATTENTION,
    FFN_NORM,
    SOMETIMES_SPARSE,
    Architecture,
    Config,
    Names,
    Shape,
    log_of_negative,
    renamed,
)
from converters.gguf.numbers import float_of, per_layer, scalar
from converters.gguf.reader import GGUFFile

_LATENT = {
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
}
_CONVOLUTIONS = {f"ssm_conv1d_{x}": f"self_attn.{x}_conv.conv" for x in "qkv"}
_LINEAR = {
    **_CONVOLUTIONS,
    "ssm_f_a": "self_attn.f_a_proj",
    "ssm_f_b": "self_attn.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_dt.bias": "self_attn.dt_bias",
    "ssm_a": "self_attn.A_log",
    "ssm_norm": "self_attn.o_norm",
}


def _kernel(shape: Shape) -> Shape:
    """(channels, width, 1), from whatever axes of one there are."""
    return (prod(shape[:-1]), shape[-1], 1)


def _rates(shape: Shape) -> Shape:
    return (1, 1, prod(shape), 1)


def latent_sizes(gguf: GGUFFile) -> Config:
    """Sizes of latent attention."""
    turning, width = scalar(gguf, "rope.dimension_count"), scalar(gguf, "attention.key_length_mla")
    if not 0 <= turning < width:
        key = f"{gguf.architecture}.attention.key_length_mla"
        raise gguf.error(key, expected=f"more than {turning}, the part that turns")
    return {
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": width - turning,
        "v_head_dim": scalar(gguf, "attention.value_length_mla"),
    }


def _kimi_linear(gguf: GGUFFile, config: Config) -> Config:
    needs_experts(gguf, config)
    if scalar(gguf, "attention.q_lora_rank", 0):
        key = f"{gguf.architecture}.attention.q_lora_rank"
        raise gguf.error(key, expected="whole queries in this architecture")
    heads = per_layer(gguf, "attention.head_count_kv")
    linear = [i + 1 for i, count in enumerate(heads) if not count]
    full = [i + 1 for i, count in enumerate(heads) if count]
    if not linear or not full:
        key = f"{gguf.architecture}.attention.head_count_kv"
        raise gguf.error(key, expected="layers with attention and others without")
    return {
        **latent_sizes(gguf),
        "linear_attn_config": {
            "kda_layers": linear,
            "full_attn_layers": full,
            "num_heads": config["num_attention_heads"],
            "head_dim": scalar(gguf, "kda.head_dim"),
            "short_conv_kernel_size": scalar(gguf, "ssm.conv_kernel"),
        },
        "num_key_value_heads": config["num_attention_heads"],
        "mla_use_nope": True,
        "model_max_length": config["max_position_embeddings"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "num_shared_experts": shared_count(gguf, config),
        "moe_router_activation_func": gating(gguf, 2),
        "moe_renormalize": True,
        "moe_layer_freq": 1,
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count", 0),
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
        "num_expert_group": 1,
        "topk_group": 1,
    }


def _ling3(gguf: GGUFFile, config: Config) -> Config:
    needs_experts(gguf, config)
    # What mlx-lm's class has built in.
    unscaled(gguf, config)
    only(gguf, "expert_weights_norm", True, absent=False)
    only(gguf, "expert_gating_func", 2)
    only(gguf, "kda.safe_gate", True)
    for kind in ("exp", "shexp"):
        if np.any(gguf.key(f"swiglu_clamp_{kind}", 0.0)):
            key = f"{gguf.architecture}.swiglu_clamp_{kind}"
            raise gguf.error(key, expected="no limits of activations in this architecture")
    queries = scalar(gguf, "attention.q_lora_rank", 0)
    return {
        **latent_sizes(gguf),
        "head_dim": scalar(gguf, "kda.head_dim"),
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": queries or None,
        "layer_group_size": _group(gguf),
        "short_conv_kernel_size": scalar(gguf, "ssm.conv_kernel"),
        "kda_safe_gate": True,
        "kda_lower_bound": float_of(gguf, "kda.gate_lower_bound"),
        "no_kda_lora": True,
        "rope_interleave": True,
        "moe_shared_expert_intermediate_size": shared_width(gguf),
        "num_shared_experts": 1,
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count"),
        "n_group": scalar(gguf, "expert_group_count", 0) or 1,
        "topk_group": scalar(gguf, "expert_group_used_count", 0) or 1,
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
    }


def _group(gguf: GGUFFile) -> int:
    """Each how many layers one has latent attention; those after the last whole group have, too."""
    found = [count > 0 for count in per_layer(gguf, "attention.head_count_kv")]
    layers = len(found)
    for size in range(1, layers + 1):
        whole = layers // size * size
        if found == [(i + 1) % size == 0 or i >= whole for i in range(layers)]:
            return size
    key = f"{gguf.architecture}.attention.head_count_kv"
    raise gguf.error(key, expected="attention at the end of equal groups of layers")


def _ling3_output(gguf: GGUFFile, layer: int) -> Names:
    latent = per_layer(gguf, "attention.head_count_kv")[layer] > 0
    return {"attn_output": "attention.dense" if latent else "attention.o_proj"}


LINEAR_LATENT: dict[str, Architecture] = {
    "bailingmoe3": Architecture(
        "bailing_hybrid",
        "BailingMoeV3ForCausalLM",
        {
            **renamed(ATTENTION | _LATENT | _LINEAR, "self_attn.", "attention."),
            **{f"ssm_conv1d_{x}": f"attention.{x}_conv1d" for x in "qkv"},
            "ssm_f_a": "attention.f_proj",
            "ssm_g_a": "attention.g_proj",
            "attn_gate": "attention.g_proj",
            "attn_q_a": "attention.q_a_proj",
            "attn_q_a_norm": "attention.q_a_layernorm",
            "attn_q_b": "attention.q_b_proj",
            **FFN_NORM,
            **SOMETIMES_SPARSE,
            "exp_probs_b.bias": "mlp.gate.expert_bias",
        },
        by_layer=_ling3_output,
        ends={"token_embd": "model.word_embeddings"},
        keys=_ling3,
        values={"ssm_a": np.log},
        reshape={**dict.fromkeys(_CONVOLUTIONS, _kernel), "ssm_a": flat},
        optional=None,
        partial_rotary=True,
        own_shapes=True,
        per_layer=True,
    ),
    "kimi-linear": Architecture(
        "kimi_linear",
        "KimiLinearForCausalLM",
        {
            **ATTENTION,
            **_LATENT,
            **_LINEAR,
            **FFN_NORM,
            **SOMETIMES_SPARSE,
            "exp_probs_b.bias": "mlp.e_score_correction_bias",
        },
        keys=_kimi_linear,
        values={"ssm_a": log_of_negative},
        reshape={**dict.fromkeys(_CONVOLUTIONS, _kernel), "ssm_a": _rates},
        optional=None,
        partial_rotary=True,
        own_shapes=True,
        per_layer=True,
    ),
}
