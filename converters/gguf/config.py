"""GGUF metadata to ``config.json`` in Hugging Face terms.

Knows the hyperparameters that all families share (``family_keys`` knows the rest, ``scaling`` the
rotary ones); knows nothing of how the tensors themselves are stored.
"""

from __future__ import annotations

from typing import Any

from converters.gguf.family_keys import FAMILY_KEYS, experts
from converters.gguf.names import architecture_of
from converters.gguf.numbers import scalar, tidy
from converters.gguf.reader import GGUFFile
from converters.gguf.scaling import rope_scaling
from converters.gguf.shapes import check_shapes

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
    heads = scalar(gguf, "attention.head_count")
    hidden = scalar(gguf, "embedding_length")
    head_dim = _head_dim(gguf, hidden // heads)
    config: Config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": scalar(gguf, "feed_forward_length"),
        "num_hidden_layers": scalar(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": scalar(gguf, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": scalar(gguf, "context_length", 4096),
        **_epsilon(gguf, architecture.model_type),
        "hidden_act": "silu",
        "rope_theta": tidy(gguf.key("rope.freq_base", 10000.0)),
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
        config |= experts(gguf, config)
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
    return {name: tidy(gguf.key(f"attention.layer_norm_{suffix}"))}


def _head_dim(gguf: GGUFFile, default: int) -> int:
    if gguf.key("attention.kv_lora_rank", 0):
        return scalar(gguf, "attention.key_length_mla")
    head_dim = scalar(gguf, "attention.key_length", default)
    value_dim = scalar(gguf, "attention.value_length", default)
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
    rotated = scalar(gguf, "rope.dimension_count", head_dim)
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
