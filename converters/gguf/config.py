"""GGUF metadata to ``config.json`` in Hugging Face terms."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.architectures import Architecture
from converters.architectures.base import experts, only, several_experts, small_epsilon
from converters.gguf.names import architecture_of
from converters.gguf.reader import GGUFFile
from converters.gguf.regroup import regroup
from converters.gguf.scaling import rope_scaling
from converters.gguf.validate import check_shapes, layer_count, scalar, tidy

Config = dict[str, Any]


def model_config(gguf: GGUFFile) -> Config:
    """The ``config.json`` of a model file, without its ``quantization`` section."""
    architecture = architecture_of(gguf)
    return hyperparameters(regroup(gguf, architecture), architecture)


def hyperparameters(gguf: GGUFFile, architecture: Architecture) -> Config:
    """As :func:`model_config`, of a file whose tensors are regrouped already."""
    only(gguf, "attention.causal", True)
    with_experts = bool(gguf.key("expert_count", 0))
    if with_experts and "ffn_down_exps" not in architecture.layer:
        raise gguf.key_error("expert_count", expected="no experts in this architecture")
    config: Config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": gguf.tensor("token_embd.weight").shape[0],
        "hidden_size": scalar(gguf, "embedding_length"),
        "intermediate_size": _size(gguf, architecture, "feed_forward_length", 0),
        "num_hidden_layers": layer_count(gguf),
        "max_position_embeddings": scalar(gguf, "context_length", 4096),
        **_epsilon(gguf, architecture),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf,
        "mlp_bias": _any_bias(gguf, "ffn_gate", "ffn_up", "ffn_down"),
    }
    config |= _attention(gguf, architecture, config["hidden_size"])
    scaling = rope_scaling(gguf, config)
    if scaling:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        token = gguf.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = int(token)
    if with_experts or "ffn_down_exps" in architecture.required:
        config |= experts(gguf, config)
        config["intermediate_size"] = config["intermediate_size"] or config["moe_intermediate_size"]
    config |= architecture.keys(gguf, config)
    several_experts(gguf, config)
    small_epsilon(gguf, config)
    if scalar(gguf, "expert_group_count", 0) > 1 and "n_group" not in config:
        raise gguf.key_error(
            "expert_group_count", expected="no groups of experts in this architecture"
        )
    if not (architecture.own_shapes or architecture.per_layer):
        check_shapes(gguf, config)
    return config


def _attention(gguf: GGUFFile, architecture: Architecture, hidden: int) -> Config:
    """Heads and RoPE; nothing for a model without attention."""
    heads = _size(gguf, architecture, "attention.head_count", 0)
    if not heads and "attn_output" in architecture.layer:
        raise gguf.key_error("attention.head_count", expected="at least one head")
    if not heads:
        return {}
    head_dim = _head_dim(gguf, architecture, hidden // heads)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": _size(gguf, architecture, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": tidy(gguf.key("rope.freq_base", 10000.0)),
        "partial_rotary_factor": _rotated(gguf, architecture, head_dim) / head_dim,
        "attention_bias": _any_bias(gguf, "attn_q", "attn_k", "attn_v", "attn_output"),
    }


def _size(gguf: GGUFFile, architecture: Architecture, suffix: str, default: int) -> int:
    """A size of all layers, or the largest where they may differ."""
    value = gguf.key(suffix, default)
    if architecture.per_layer and isinstance(value, np.ndarray | list):
        return int(max(value, default=default))
    return scalar(gguf, suffix, default)


def _epsilon(gguf: GGUFFile, architecture: Architecture) -> Config:
    suffix = "rms_epsilon" if "rms" in architecture.epsilon else "epsilon"
    return {architecture.epsilon: tidy(gguf.key(f"attention.layer_norm_{suffix}"))}


def _head_dim(gguf: GGUFFile, architecture: Architecture, default: int) -> int:
    if "attn_k_b" in architecture.layer and scalar(gguf, "attention.kv_lora_rank", 0):
        return scalar(gguf, "attention.key_length_mla")
    head_dim = scalar(gguf, "attention.key_length", default)
    value_dim = scalar(gguf, "attention.value_length", default)
    if value_dim != head_dim and not architecture.value_width:
        raise gguf.key_error("attention.value_length", expected=f"key_length, {head_dim}")
    if head_dim < 1 or head_dim % 2:
        raise gguf.key_error(
            "attention.key_length",
            expected="heads of an even width, as RoPE rotates pairs",
            found=str(head_dim),
        )
    return head_dim


def _rotated(gguf: GGUFFile, architecture: Architecture, head_dim: int) -> int:
    """Rotated dimensions of a head."""
    rotated = scalar(gguf, "rope.dimension_count", head_dim)
    if rotated != head_dim and not architecture.partial_rotary:
        raise gguf.key_error(
            "rope.dimension_count",
            expected=f"the whole head, {head_dim}, in this architecture",
        )
    return rotated


def _any_bias(gguf: GGUFFile, *modules: str) -> bool:
    layers = range(layer_count(gguf))
    return any(f"blk.{i}.{module}.bias" in gguf for i in layers for module in modules)
