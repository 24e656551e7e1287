"""Tiny random models of mlx-lm's classes, written as its users have them, and their logits.

mlx-lm itself is the judge: the same weights through its own loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from converters.huggingface.tokenizer_files import tokenizer_files

VOCAB = 288

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "model_type": "mamba2", "num_heads": 8, "head_dim": 16, "hidden_size": 64, "state_size": 16,
        "intermediate_size": 128, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-5, "n_groups": 2,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
        "time_step_limit": [0.0, float("inf")], "time_step_rank": "auto", "vocab_size": VOCAB,
    },
    "mamba": {
        "model_type": "falcon_mamba", "hidden_size": 64, "intermediate_size": 128, "state_size": 8,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
        "time_step_rank": 4, "tie_word_embeddings": True, "vocab_size": VOCAB,
    },
    "falcon_h1": {
        **_COMMON, "model_type": "falcon_h1", "mamba_d_ssm": 64, "mamba_d_state": 16,
        "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_conv": 4,
    },
    "jamba": {
        **_COMMON, "model_type": "jamba", "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 8,
        "mamba_expand": 2, "num_experts": 4, "num_experts_per_tok": 2,
    },
    "granitemoehybrid": {
        **_COMMON, "model_type": "granitemoehybrid", "attention_bias": False,
        "embedding_multiplier": 2.0, "attention_multiplier": 0.25, "logits_scaling": 2.0,
        "residual_multiplier": 0.5, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4,
        "mamba_n_groups": 1, "mamba_conv_bias": True,
    },
    "nemotron_h": {
        **_COMMON, "model_type": "nemotron_h", "attention_bias": False, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4,
        "n_groups": 2, "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False,
        "use_conv_bias": True, "hybrid_override_pattern": ["M", "*", "-", "E"],
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
        "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32,
    },
    "lfm2": {
        **_COMMON, "model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3,
        "block_dim": 64, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"],
    },
    "lfm2_moe": {
        **_COMMON, "model_type": "lfm2_moe", "norm_eps": 1e-5, "conv_bias": False,
        "conv_L_cache": 3, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "use_expert_bias": True, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "qwen3_next": {
        **_COMMON, "model_type": "qwen3_next", "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32, "mlp_only_layers": [],
        "moe_intermediate_size": 32, "partial_rotary_factor": 0.5, "full_attention_interval": 2,
        "norm_topk_prob": True,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **_COMMON, "model_type": "qwen3_5_text", "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        },
    },
    "plamo2": {
        **_COMMON, "model_type": "plamo2", "hidden_size_per_head": 16, "mamba_d_state": 16,
        "mamba_d_conv": 4, "mamba_num_heads": 4, "mamba_step": 2, "tie_word_embeddings": True,
    },
    "kimi_linear": {
        **_COMMON, "model_type": "kimi_linear", "model_max_length": 2048, "num_experts": 4,
        "moe_intermediate_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts_per_token": 2,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "mla_use_nope": True,
        "num_key_value_heads": 4,
        "linear_attn_config": {
            "kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
    },
    "rwkv7": {
        "model_type": "rwkv7", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96,
        "norm_eps": 1e-5, "head_dim": 32, "num_hidden_layers": 2, "a_low_rank_dim": 8,
        "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8,
    },
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": {
            **_COMMON, "model_type": "gemma3n_text", "num_hidden_layers": 4, "sliding_window": 16,
            "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
            "rope_local_base_freq": 1000.0, "final_logit_softcapping": 30.0,
            "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 16, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
            "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
        },
    },
    "gemma4": {
        "model_type": "gemma4", "vocab_size": VOCAB,
        "text_config": {
            **_COMMON, "model_type": "gemma4_text", "num_hidden_layers": 4, "sliding_window": 16,
            "global_head_dim": 32, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    },
    "recurrent_gemma": {
        **_COMMON, "model_type": "recurrent_gemma", "attention_bias": False, "conv1d_width": 4,
        "logits_soft_cap": 30.0, "attention_window_size": 16, "num_key_value_heads": 1,
        "block_types": ["recurrent", "attention"],
    },
    "helium": {**_COMMON, "model_type": "helium", "attention_bias": False, "mlp_bias": False},
    "llama4": {
        "model_type": "llama4",
        "text_config": {
            **_COMMON, "model_type": "llama4_text", "attention_bias": False,
            "attention_chunk_size": 16, "interleave_moe_layer_step": 2, "intermediate_size": 48,
            "intermediate_size_mlp": 96, "num_experts_per_tok": 1, "num_hidden_layers": 4,
            "num_local_experts": 4, "rope_scaling": None, "use_qk_norm": True,
        },
    },
}  # fmt: skip


def stock(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's class with random weights that make every parameter count."""
    from mlx_lm.utils import _get_classes

    made, arguments = _get_classes(dict(config))
    model = made(arguments.from_dict(dict(config)))
    rng = np.random.default_rng(seed)
    noisy = []
    for name, array in tree_flatten(model.parameters()):
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if "norm" in name or array.ndim < 2:
            noisy.append((name, array + 0.1 * mx.array(noise)))
        else:
            noisy.append((name, mx.array(noise * array.shape[-1] ** -0.5)))
    model.update(tree_unflatten(noisy))
    model.eval()
    mx.eval(model.parameters())
    return model


def save(path: Path, config: Mapping[str, Any], model: nn.Module, tokenizer: bool = True) -> Path:
    """A model directory as mlx-lm writes it."""
    path.mkdir(exist_ok=True)
    arrays = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    if tokenizer:
        vocabulary = read_gguf(Tiny(vocab=VOCAB, template=TEMPLATE).write(path / "v.gguf"))
        for name, content in tokenizer_files(vocabulary).items():
            (path / name).write_bytes(content)
        (path / "v.gguf").unlink()
    return path


TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content + 's' }}{% endfor %}"


def stock_logits(model: nn.Module, passes: Iterable[Sequence[int]]) -> np.ndarray:
    """mlx-lm's logits, (T, V), of tokens that come in passes."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    parts = [model(mx.array([list(part)]), cache=cache)[0] for part in passes]
    return np.array(mx.concatenate(parts).astype(mx.float32))
