"""Architectures with short convolutions between layers of attention: LFM2."""

from __future__ import annotations

from converters.gguf.architectures.keys import unscaled
from converters.gguf.architectures.limits import needs_experts, no_windows, tied, whole_heads
from converters.gguf.architectures.row import (
    GATED,
    SPARSE,
    Architecture,
    Config,
    depthwise,
    renamed,
)
from converters.gguf.numbers import float_of, per_layer, scalar
from converters.gguf.reader import GGUFFile

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
}
_CONVOLUTION = {
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
_LAYER = {"attn_norm": "operator_norm", "ffn_norm": "ffn_norm", **_ATTENTION, **_CONVOLUTION}


def _lfm2(gguf: GGUFFile, config: Config) -> Config:
    unscaled(gguf, config)
    no_windows(gguf)
    tied(gguf)
    whole_heads(gguf, config)
    kv_heads = per_layer(gguf, "attention.head_count_kv")
    return {
        "norm_eps": config["rms_norm_eps"],
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
        "conv_L_cache": scalar(gguf, "shortconv.l_cache"),
        "conv_bias": False,
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


def _lfm2moe(gguf: GGUFFile, config: Config) -> Config:
    needs_experts(gguf, config)
    if scalar(gguf, "expert_gating_func") != 2:
        key = f"{gguf.architecture}.expert_gating_func"
        raise gguf.error(key, expected="2, the sigmoid, in this architecture")
    return {
        **_lfm2(gguf, config),
        "num_dense_layers": scalar(gguf, "leading_dense_block_count", 0),
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 0.0) or 1.0,
    }


CONVOLUTION: dict[str, Architecture] = {
    "lfm2": Architecture(
        "lfm2",
        "Lfm2ForCausalLM",
        {
            **_LAYER,
            "ffn_gate": "feed_forward.w1",
            "ffn_down": "feed_forward.w2",
            "ffn_up": "feed_forward.w3",
        },
        ends={"token_embd_norm": "model.embedding_norm"},
        final_norm="token_embd_norm",
        keys=_lfm2,
        reshape={"shortconv.conv": depthwise},
        optional=frozenset({*_ATTENTION, *_CONVOLUTION}),
        own_shapes=True,
        per_layer=True,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {
            **_LAYER,
            **renamed(GATED, "mlp.", "feed_forward."),
            **renamed(SPARSE, "mlp.", "feed_forward."),
            "exp_probs_b.bias": "feed_forward.expert_bias",
        },
        ends={"token_embd_norm": "model.embedding_norm"},
        final_norm="token_embd_norm",
        keys=_lfm2moe,
        reshape={"shortconv.conv": depthwise},
        optional=None,
        own_shapes=True,
        per_layer=True,
    ),
}
