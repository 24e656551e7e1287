"""GGUF metadata to ``config.json`` in Hugging Face terms.

Knows hyperparameters and how rotary embeddings are spelt in both worlds; knows nothing of how the
tensors themselves are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from converters.gguf.names import architecture_of
from converters.gguf.reader import GGUFFile
from converters.gguf.shapes import check_shapes
from converters.rope import llama3_factors

Config = dict[str, Any]


def model_config(gguf: GGUFFile) -> Config:
    """The ``config.json`` of a model file, without its ``quantization`` section.

    Raises:
        UnsupportedArchitectureError: the architecture is unknown.
        GGUFError: a hyperparameter is missing, contradicts the tensors or is of a kind that the
            architecture does not have.
    """
    architecture = architecture_of(gguf)
    if gguf.key("expert_count", 0) and "ffn_gate_exps" not in architecture.layer:
        raise gguf.error(
            f"{gguf.architecture}.expert_count", expected="no experts in this architecture"
        )
    embedding = gguf.tensor("token_embd.weight")
    heads = _scalar(gguf, "attention.head_count")
    hidden = _scalar(gguf, "embedding_length")
    head_dim = _head_dim(gguf, hidden // heads)
    config: Config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _scalar(gguf, "feed_forward_length"),
        "num_hidden_layers": _scalar(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _scalar(gguf, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _scalar(gguf, "context_length", 4096),
        **_epsilon(gguf, architecture.model_type),
        "hidden_act": "silu",
        "rope_theta": _tidy(gguf.key("rope.freq_base", 10000.0)),
        "partial_rotary_factor": _rotated(gguf, head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in gguf,
        "attention_bias": _any_bias(gguf, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _any_bias(gguf, "ffn_gate", "ffn_up", "ffn_down"),
    }
    scaling = rope_scaling(gguf, config)
    if scaling:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        token = gguf.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = int(token)
    if "ffn_gate_exps" in architecture.layer:
        config |= _experts(gguf, config)
    if gguf.architecture in FAMILY_KEYS:
        config |= FAMILY_KEYS[gguf.architecture](gguf, config)
    check_shapes(gguf, config)
    return config


def _epsilon(gguf: GGUFFile, model_type: str) -> Config:
    """The norms' epsilon, under the name that a family gives it."""
    name = {
        "cohere": "layer_norm_eps",
        "cohere2": "layer_norm_eps",
        "nemotron": "norm_eps",
        "phi": "layer_norm_eps",
        "stablelm": "layer_norm_eps",
        "starcoder2": "norm_epsilon",
    }.get(model_type, "rms_norm_eps")
    suffix = "rms_epsilon" if name == "rms_norm_eps" else "epsilon"
    return {name: _tidy(gguf.key(f"attention.layer_norm_{suffix}"))}


def rope_scaling(gguf: GGUFFile, config: Config) -> Config | None:
    """The ``rope_scaling`` section, or None for plain rotary embeddings.

    YaRN: Peng et al., 2023, arXiv:2309.00071. Per-frequency factors (``rope_freqs``): the Llama 3.1
    formula where the stored factors follow it, else ``longrope`` with the factors written out.
    """
    # llama.cpp's default for a file that states a factor and no type.
    kind = gguf.key("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise gguf.error(
            f"{gguf.architecture}.rope.scaling.type",
            expected="none, linear or yarn",
            found=repr(kind),
        )
    factor = float(gguf.key("rope.scaling.factor", gguf.key("rope.scale_linear", 0.0))) or 1.0
    if "rope_factors_long.weight" in gguf:
        return _longrope(gguf, config)
    _check_attention_factor(gguf, kind, factor)
    if "rope_freqs.weight" in gguf:
        return _frequency_factors(gguf, config, kind, factor)
    if kind == "yarn":
        return _yarn(gguf, factor, config["max_position_embeddings"])
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "type": "linear", "factor": _tidy(factor)}


def _check_attention_factor(gguf: GGUFFile, kind: str, factor: float) -> None:
    """Only YaRN has a place in ``config.json`` for a factor on queries and keys."""
    attention = float(gguf.key("rope.scaling.attn_factor", 1.0))
    if attention != 1.0 and (kind != "yarn" or factor <= 1.0 or "rope_freqs.weight" in gguf):
        raise gguf.error(
            f"{gguf.architecture}.rope.scaling.attn_factor", expected="1 without YaRN scaling"
        )


# For these llama.cpp reads more than YaRN's factor; others have the paper's constants.
_OWN_YARN = ("deepseek2", "mistral3")


def _yarn(gguf: GGUFFile, factor: float, context: int) -> Config:
    scaling: Config = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": _tidy(factor),
        # Zero stands for an absent key, as llama.cpp reads it.
        "original_max_position_embeddings": int(gguf.key("rope.scaling.original_context_length", 0))
        or context,
    }
    if gguf.architecture in _OWN_YARN:
        for key in ("beta_fast", "beta_slow"):
            value = gguf.key(f"rope.scaling.yarn_{key}", None)
            if value is not None:
                scaling[key] = _tidy(value)
        all_dim = float(gguf.key("rope.scaling.yarn_log_multiplier", 0.0))
        if all_dim:
            scaling["mscale_all_dim"] = _tidy(all_dim)
    attention = float(gguf.key("rope.scaling.attn_factor", 1.0))
    if attention != 1.0:
        # mlx-lm reads no key for such an extra factor, so it goes into mscale:
        # attention * (0.1 ln(factor) + 1) = 0.1 * mscale * ln(factor) + 1.
        growth = 0.1 * math.log(factor)
        scaling["mscale"] = (attention * (growth + 1) - 1) / growth
    return scaling


def _frequency_factors(gguf: GGUFFile, config: Config, kind: str, factor: float) -> Config:
    tensor = gguf.tensor("rope_freqs.weight")
    if kind == "yarn":
        raise tensor.error(expected="no frequency factors beside YaRN scaling", found="both")
    factors = tensor.raw().view("<f4")
    dims = int(gguf.key("rope.dimension_count", config["head_dim"]))
    if tensor.type.name != "F32" or len(factors) != dims // 2:
        raise tensor.error(
            expected=f"F32 with {dims // 2} factors", found=f"{tensor.type.name} {tensor.shape}"
        )
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise tensor.error(expected="positive factors", found="others among them")
    llama3 = {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": _tidy(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    linear = factor if kind == "linear" else 1.0
    known = llama3_factors(dims, config["rope_theta"], llama3)
    if linear == 1.0 and np.allclose(known, factors, rtol=1e-6):
        return llama3
    exact = [float(value) * linear for value in factors]
    context = config["max_position_embeddings"]
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": exact,
        "long_factor": exact,
        "original_max_position_embeddings": context,
    }


def _longrope(gguf: GGUFFile, config: Config) -> Config:
    """Phi 3's factors for contexts beyond the original one, and those for shorter ones."""
    context = config["max_position_embeddings"]
    original = int(gguf.key("rope.scaling.original_context_length", context))
    long, short = (_stored_factors(gguf, config, kind) for kind in ("long", "short"))
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "long_factor": long if context > original else short,
        "short_factor": short,
        "original_max_position_embeddings": original,
        "attention_factor": float(gguf.key("rope.scaling.attn_factor", 1.0)),
    }


def _stored_factors(gguf: GGUFFile, config: Config, kind: str) -> list[float]:
    tensor = gguf.tensor(f"rope_factors_{kind}.weight")
    half = int(gguf.key("rope.dimension_count", config["head_dim"])) // 2
    factors = tensor.raw().view("<f4") if tensor.type.name == "F32" else np.zeros(0, np.float32)
    if len(factors) != half or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise tensor.error(expected=f"F32 with {half} positive factors", found=str(tensor.shape))
    return [float(value) for value in factors]


def _scalar(gguf: GGUFFile, suffix: str, default: int | None = None) -> int:
    """A hyperparameter that may be stored per layer but must be the same in all of them."""
    value = gguf.key(suffix) if default is None else gguf.key(suffix, default)
    if isinstance(value, np.ndarray | list):
        distinct = sorted({int(x) for x in value})
        if len(distinct) != 1:
            raise gguf.error(
                f"{gguf.architecture}.{suffix}",
                expected="one value for all layers in this architecture",
                found=f"the values {distinct[:8]}",
            )
        return distinct[0]
    return int(value)


def _head_dim(gguf: GGUFFile, default: int) -> int:
    if gguf.key("attention.kv_lora_rank", 0):
        return _scalar(gguf, "attention.key_length_mla")
    head_dim = _scalar(gguf, "attention.key_length", default)
    value_dim = _scalar(gguf, "attention.value_length", default)
    if value_dim != head_dim:
        raise gguf.error(
            f"{gguf.architecture}.attention.value_length", expected=f"key_length, {head_dim}"
        )
    if head_dim < 1 or head_dim % 2:
        raise gguf.error(
            f"{gguf.architecture}.attention.key_length",
            expected="heads of an even width, as rotary embeddings turn pairs",
            found=str(head_dim),
        )
    return head_dim


def _rotated(gguf: GGUFFile, head_dim: int) -> int:
    """Dimensions of a head that turn."""
    rotated = _scalar(gguf, "rope.dimension_count", head_dim)
    partly = gguf.architecture in ("deepseek2", "glm4", "nemotron", "phi2", "phi3", "stablelm")
    if rotated != head_dim and not partly:
        raise gguf.error(
            f"{gguf.architecture}.rope.dimension_count",
            expected=f"the whole head, {head_dim}, in this architecture",
        )
    return rotated


def _any_bias(gguf: GGUFFile, *modules: str) -> bool:
    layers = range(int(gguf.key("block_count")))
    return any(f"blk.{i}.{module}.bias" in gguf for i in layers for module in modules)


def _tidy(value: Any) -> float:
    """A float32 as the shortest decimal that reads back as the same float32."""
    return float(str(np.float32(value)))


def _windows(gguf: GGUFFile, every: int) -> Config:
    """Sliding windows: in all layers but each of a number, unless the file has its own pattern."""
    window = gguf.key("attention.sliding_window", None)
    if not window:
        return {}
    layers = _scalar(gguf, "block_count")
    pattern = gguf.key("attention.sliding_window_pattern", every)
    if isinstance(pattern, np.ndarray | list):
        sliding = [bool(x) for x in pattern]
    else:
        every = int(pattern)
        sliding = [every > 0 and (i + 1) % every != 0 for i in range(layers)]
    return {
        "sliding_window": _scalar(gguf, "attention.sliding_window"),
        "sliding_window_pattern": every,
        "layer_types": ["sliding_attention" if x else "full_attention" for x in sliding],
    }


def _float(gguf: GGUFFile, suffix: str, default: float | None = None) -> float:
    return _tidy(gguf.key(suffix) if default is None else gguf.key(suffix, default))


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
        "attn_logit_softcapping": _float(gguf, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _float(gguf, "final_logit_softcapping", 30.0),
    }


def _gemma3(gguf: GGUFFile, config: Config) -> Config:
    cap = float(gguf.key("final_logit_softcapping", 0.0))
    return {
        **_gemma(gguf, config),
        **_gemma_scalar(gguf, config, 62),
        **_windows(gguf, 6),
        "rope_local_base_freq": _float(gguf, "rope.freq_base_swa", 10000.0),
        **({"final_logit_softcapping": cap} if cap else {}),
    }


def _granite(gguf: GGUFFile, config: Config) -> Config:
    """Multipliers; a zero stands for none."""
    return {
        "embedding_multiplier": _float(gguf, "embedding_scale", 0.0) or 1.0,
        "residual_multiplier": _float(gguf, "residual_scale", 0.0) or 1.0,
        "logits_scaling": _float(gguf, "logit_scale", 0.0) or 1.0,
        "attention_multiplier": _float(gguf, "attention.scale", 0.0) or config["head_dim"] ** -0.5,
    }


def _cohere(gguf: GGUFFile, config: Config) -> Config:
    windows = _windows(gguf, 4) if gguf.architecture == "cohere2" else {}
    return {
        "logit_scale": _float(gguf, "logit_scale", 1.0),
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
        scaling["llama_4_scaling_beta"] = _tidy(scale)
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    scaling["rope_theta"] = config["rope_theta"]
    return {"rope_parameters": scaling}


def _stablelm(gguf: GGUFFile, config: Config) -> Config:
    # Files say use_parallel_residual, too; what decides is whether there is a second norm.
    return {
        "use_qkv_bias": config["attention_bias"],
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in gguf,
    }


def _experts(gguf: GGUFFile, config: Config) -> Config:
    """How many experts there are and how wide, under the names that families give it."""
    count, used = _scalar(gguf, "expert_count"), _scalar(gguf, "expert_used_count")
    if not 0 < used <= count:
        raise gguf.error(
            f"{gguf.architecture}.expert_used_count", expected=f"between 1 and {count}"
        )
    if "blk.0.ffn_up_shexp.weight" in gguf and gguf.architecture not in ("deepseek2", "qwen2moe"):
        raise gguf.tensor("blk.0.ffn_up_shexp.weight").error(
            expected="no shared expert in this architecture", found="one"
        )
    size = _scalar(gguf, "expert_feed_forward_length", config["intermediate_size"])
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
    turning = _scalar(gguf, "rope.dimension_count")
    sigmoid = _scalar(gguf, "expert_gating_func", 1) == 2
    version = "3" if sigmoid else "2"
    keys: Config = {
        "model_type": f"deepseek_v{version}",
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": gguf.key("attention.q_lora_rank", None),
        "kv_lora_rank": _scalar(gguf, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": config["head_dim"] - turning,
        "v_head_dim": _scalar(gguf, "attention.value_length_mla"),
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": _scalar(gguf, "expert_shared_count", 0),
        "n_group": _scalar(gguf, "expert_group_count", 1),
        "topk_group": _scalar(gguf, "expert_group_used_count", 1),
        "first_k_dense_replace": _scalar(gguf, "leading_dense_block_count", 0),
        "routed_scaling_factor": _float(gguf, "expert_weights_scale", 1.0),
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
