"""What single families add to ``config.json``: a short function each, from metadata to keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from converters.gguf.numbers import float_of, scalar, tidy
from converters.gguf.reader import GGUFFile

Config = dict[str, Any]


def _windows(gguf: GGUFFile, every: int) -> Config:
    """Sliding windows: in all layers but each of a number, unless the file has its own pattern."""
    window = gguf.key("attention.sliding_window", None)
    if not window:
        return {}
    layers = scalar(gguf, "block_count")
    pattern = gguf.key("attention.sliding_window_pattern", every)
    if isinstance(pattern, np.ndarray | list):
        sliding = [bool(x) for x in pattern]
    else:
        every = int(pattern)
        sliding = [every > 0 and (i + 1) % every != 0 for i in range(layers)]
    return {
        "sliding_window": scalar(gguf, "attention.sliding_window"),
        "sliding_window_pattern": every,
        "layer_types": ["sliding_attention" if x else "full_attention" for x in sliding],
    }


def _gemma(gguf: GGUFFile, config: Config) -> Config:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma_scalar(gguf: GGUFFile, config: Config, layers_of_27b: int) -> Config:
    """The largest models divide scores by the square root of another width."""
    largest = config["num_hidden_layers"] == layers_of_27b
    width = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": width if largest else config["head_dim"]}


def _gemma2(gguf: GGUFFile, config: Config) -> Config:
    return {
        **_gemma(gguf, config),
        **_gemma_scalar(gguf, config, 46),
        **_windows(gguf, 2),
        "attn_logit_softcapping": float_of(gguf, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": float_of(gguf, "final_logit_softcapping", 30.0),
    }


def _gemma3(gguf: GGUFFile, config: Config) -> Config:
    cap = float(gguf.key("final_logit_softcapping", 0.0))
    return {
        **_gemma(gguf, config),
        **_gemma_scalar(gguf, config, 62),
        **_windows(gguf, 6),
        "rope_local_base_freq": float_of(gguf, "rope.freq_base_swa", 10000.0),
        **({"final_logit_softcapping": cap} if cap else {}),
    }


def _granite(gguf: GGUFFile, config: Config) -> Config:
    """Multipliers; a zero stands for none."""
    return {
        "embedding_multiplier": float_of(gguf, "embedding_scale", 0.0) or 1.0,
        "residual_multiplier": float_of(gguf, "residual_scale", 0.0) or 1.0,
        "logits_scaling": float_of(gguf, "logit_scale", 0.0) or 1.0,
        "attention_multiplier": float_of(gguf, "attention.scale", 0.0)
        or config["head_dim"] ** -0.5,
    }


def _cohere(gguf: GGUFFile, config: Config) -> Config:
    windows = _windows(gguf, 4) if gguf.architecture == "cohere2" else {}
    return {
        "logit_scale": float_of(gguf, "logit_scale", 1.0),
        "use_qk_norm": False,
        "rope_traditional": True,
        **windows,
    }


def _olmo2(gguf: GGUFFile, config: Config) -> Config:
    windows = _windows(gguf, 4)
    if not windows:
        return {}
    return {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **windows}


def _exaone4(gguf: GGUFFile, config: Config) -> Config:
    # The smaller model has no windows, whatever its file says of their size.
    windows = _windows(gguf, 4) if config["num_hidden_layers"] == 64 else {}
    # Stock mlx-lm asks for all of these keys, even to say that there is nothing.
    keys: Config = {"rope_scaling": config.get("rope_scaling")}
    if not windows:
        return {**keys, "sliding_window": None, "sliding_window_pattern": None}
    pattern = "L" * (windows["sliding_window_pattern"] - 1) + "G"
    return {**keys, **windows, "sliding_window_pattern": pattern}


def _phi3(gguf: GGUFFile, config: Config) -> Config:
    """Hugging Face keeps the context before scaling outside the section on scaling."""
    scaling = config.get("rope_scaling") or {}
    key = "original_max_position_embeddings"
    return {key: scaling.get(key, config["max_position_embeddings"])}


def _mistral3(gguf: GGUFFile, config: Config) -> Config:
    """Everything rotary in one section, as Hugging Face has it for this family."""
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default", "type": "default"})
    scale = float(gguf.key("attention.temperature_scale", 0.0))
    if scale:
        scaling["llama_4_scaling_beta"] = tidy(scale)
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    scaling["rope_theta"] = config["rope_theta"]
    return {"rope_parameters": scaling}


def _stablelm(gguf: GGUFFile, config: Config) -> Config:
    # Files say use_parallel_residual, too; what decides is whether there is a second norm.
    return {
        "use_qkv_bias": config["attention_bias"],
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in gguf,
    }


def experts(gguf: GGUFFile, config: Config) -> Config:
    """How many experts there are and how wide, under the names that families give it."""
    count, used = scalar(gguf, "expert_count"), scalar(gguf, "expert_used_count")
    if not 0 < used <= count:
        raise gguf.error(
            f"{gguf.architecture}.expert_used_count", expected=f"between 1 and {count}"
        )
    if "blk.0.ffn_up_shexp.weight" in gguf and gguf.architecture not in ("deepseek2", "qwen2moe"):
        raise gguf.tensor("blk.0.ffn_up_shexp.weight").error(
            expected="no shared expert in this architecture", found="one"
        )
    size = scalar(gguf, "expert_feed_forward_length", config["intermediate_size"])
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": size,
    }


def _qwen2moe(gguf: GGUFFile, config: Config) -> Config:
    shared = gguf.tensor("blk.0.ffn_up_shexp.weight").shape[0]
    return {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _gpt_oss(gguf: GGUFFile, config: Config) -> Config:
    return {**_windows(gguf, 2), "intermediate_size": config["moe_intermediate_size"]}


def _deepseek2(gguf: GGUFFile, config: Config) -> Config:
    if gguf.key("attention.temperature_scale", 0.0):
        key = f"{gguf.architecture}.attention.temperature_scale"
        raise gguf.error(key, expected="none in this architecture")
    turning = scalar(gguf, "rope.dimension_count")
    sigmoid = scalar(gguf, "expert_gating_func", 1) == 2
    version = "3" if sigmoid else "2"
    keys: Config = {
        "model_type": f"deepseek_v{version}",
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": gguf.key("attention.q_lora_rank", None),
        "kv_lora_rank": scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": config["head_dim"] - turning,
        "v_head_dim": scalar(gguf, "attention.value_length_mla"),
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": scalar(gguf, "expert_shared_count", 0),
        "n_group": scalar(gguf, "expert_group_count", 1),
        "topk_group": scalar(gguf, "expert_group_used_count", 1),
        "first_k_dense_replace": scalar(gguf, "leading_dense_block_count", 0),
        "routed_scaling_factor": float_of(gguf, "expert_weights_scale", 1.0),
        "norm_topk_prob": bool(gguf.key("expert_weights_norm", False)),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "greedy",
        "moe_layer_freq": 1,
        "partial_rotary_factor": 1.0,
    }
    scaling = config.get("rope_scaling") or {}
    if "mscale_all_dim" in scaling:
        # llama.cpp's converter stores a tenth of it; both factors are the same in these models.
        scaling["mscale_all_dim"] *= 10
        scaling["mscale"] = scaling["mscale_all_dim"]
    elif scaling.get("type") == "yarn" and scaling["factor"] > 1:
        # Without it llama.cpp applies YaRN's own factor to all of a head and to its rotated part.
        growth = 0.1 * math.log(scaling["factor"])
        scaling |= {"mscale_all_dim": 1.0, "mscale": ((1 + growth) ** 2 - 1) / growth}
    return keys


FAMILY_KEYS: dict[str, Callable[[GGUFFile, Config], Config]] = {
    "cohere2": _cohere,
    "command-r": _cohere,
    "deepseek2": _deepseek2,
    "exaone4": _exaone4,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "glm4": lambda gguf, config: {"rope_traditional": True},
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granite,
    "mistral3": _mistral3,
    "nemotron": lambda gguf, config: {"hidden_act": "relu2"},
    "olmo2": _olmo2,
    "olmoe": lambda gguf, config: {"norm_topk_prob": False},
    "phi2": lambda gguf, config: {"hidden_act": "gelu_new"},
    "phi3": _phi3,
    "qwen2moe": _qwen2moe,
    "qwen3moe": lambda gguf, config: {
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "stablelm": _stablelm,
    "starcoder2": lambda gguf, config: {"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
}
