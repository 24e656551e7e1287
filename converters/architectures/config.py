"""``config.json`` of a GGUF file, in Hugging Face terms."""

from __future__ import annotations

import numpy as np

from converters.architectures.base import Architecture
from converters.architectures.hyperparameters import Config, Hyperparameters, tidy
from converters.architectures.rope import rope_scaling
from converters.gguf.reader import GGUFFile
from converters.gguf.validate import check_shapes


def hf_config(gguf: GGUFFile, architecture: Architecture) -> Config:
    """The ``config.json`` of a regrouped file, without its ``quantization`` section.

    Raises:
        GGUFError: a key is missing, or has a value that the model's class does not have.
    """
    hp = Hyperparameters(gguf)
    hp.only("attention.causal", True)
    with_experts = bool(hp.key("expert_count", 0))
    stray = with_experts and "ffn_down_exps" not in architecture.layer
    hp.refuse_if(stray, "expert_count", "no experts in this architecture")
    suffix = "rms_epsilon" if "rms" in architecture.epsilon else "epsilon"
    config = hp.config
    config |= {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": hp.tensor("token_embd.weight").shape[0],
        "hidden_size": hp.integer("embedding_length"),
        "intermediate_size": _size(hp, architecture, "feed_forward_length", 0),
        "num_hidden_layers": hp.layers,
        "max_position_embeddings": hp.integer("context_length", 4096),
        architecture.epsilon: tidy(hp.key(f"attention.layer_norm_{suffix}")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in hp,
        "mlp_bias": _any_bias(hp, "ffn_gate", "ffn_up", "ffn_down"),
    }
    config |= _attention(hp, architecture)
    scaling = rope_scaling(hp)
    if scaling:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        token = gguf.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = int(token)
    if with_experts or "ffn_down_exps" in architecture.required:
        config |= hp.experts()
        config["intermediate_size"] = config["intermediate_size"] or config["moe_intermediate_size"]
    config |= architecture.keys(hp)
    _check_class(hp)
    if not (architecture.own_shapes or architecture.per_layer):
        check_shapes(gguf, config)
    return config


def _check_class(hp: Hyperparameters) -> None:
    """Refuse values that some classes do not have."""
    kind = hp["model_type"]
    lone = kind in _SEVERAL_EXPERTS and hp.config.get("num_experts_per_tok") == 1
    hp.refuse_if(lone, "expert_used_count", "at least 2 in this architecture")
    large = hp.config.get("rms_norm_eps", 0.0) > _LARGEST_EPSILON
    hp.refuse_if(
        kind in _CONSTANT_EPSILON and large,
        "attention.layer_norm_rms_epsilon",
        f"at most {_LARGEST_EPSILON:g} in this architecture",
    )
    grouped = hp.integer("expert_group_count", 0) > 1 and "n_group" not in hp.config
    hp.refuse_if(grouped, "expert_group_count", "no groups of experts in this architecture")


# Classes that normalize the weight of a lone expert to 1.
_SEVERAL_EXPERTS = (
    "afmoe", "bailing_hybrid", "bailing_moe", "deepseek_v32", "exaone_moe", "glm_moe_dsa",
    "kimi_linear", "mimo_v2_flash", "nemotron_h",
)  # fmt: skip
# Classes in which some norms have a constant epsilon.
_CONSTANT_EPSILON = (
    "bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "kimi_linear", "llama4", "mamba2", "mistral4",
    "plamo2", "qwen3_5", "qwen3_5_moe", "qwen3_next",
)  # fmt: skip
# Up to it, the squared error of the logits stays below 1e-8 of their square.
_LARGEST_EPSILON = 2e-5


def _attention(hp: Hyperparameters, architecture: Architecture) -> Config:
    """Heads and RoPE; nothing for a model without attention."""
    heads = _size(hp, architecture, "attention.head_count", 0)
    if not heads:
        needed = "attn_output" in architecture.layer
        hp.refuse_if(needed, "attention.head_count", "at least one head")
        return {}
    head_dim = _head_dim(hp, architecture, hp["hidden_size"] // heads)
    rotated = hp.integer("rope.dimension_count", head_dim)
    hp.refuse_if(
        rotated != head_dim and not architecture.partial_rotary,
        "rope.dimension_count",
        f"the whole head, {head_dim}, in this architecture",
    )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": _size(hp, architecture, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": tidy(hp.key("rope.freq_base", 10000.0)),
        "partial_rotary_factor": rotated / head_dim,
        "attention_bias": _any_bias(hp, "attn_q", "attn_k", "attn_v", "attn_output"),
    }


def _size(hp: Hyperparameters, architecture: Architecture, suffix: str, default: int) -> int:
    """A size of all layers, or the largest where they may differ."""
    value = hp.key(suffix, default)
    if architecture.per_layer and isinstance(value, np.ndarray | list):
        return int(max(value, default=default))
    return hp.integer(suffix, default)


def _head_dim(hp: Hyperparameters, architecture: Architecture, default: int) -> int:
    if "attn_k_b" in architecture.layer and hp.integer("attention.kv_lora_rank", 0):
        return hp.integer("attention.key_length_mla")
    head_dim = hp.integer("attention.key_length", default)
    value_dim = hp.integer("attention.value_length", default)
    other = value_dim != head_dim and not architecture.value_width
    hp.refuse_if(other, "attention.value_length", f"key_length, {head_dim}")
    hp.refuse_if(
        head_dim < 1 or head_dim % 2 == 1,
        "attention.key_length",
        "heads of an even width, as RoPE rotates pairs",
        str(head_dim),
    )
    return head_dim


def _any_bias(hp: Hyperparameters, *modules: str) -> bool:
    return any(any(hp.in_layers(f"{module}.bias")) for module in modules)
