"""GGUF metadata to ``config.json`` in Hugging Face terms.

Knows hyperparameters and how rotary embeddings are spelt in both worlds; knows nothing of how the
tensors themselves are stored.
"""

from __future__ import annotations

import math
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
    if gguf.key("expert_count", 0):
        raise gguf.error(
            f"{gguf.architecture}.expert_count",
            expected="no experts: this version runs dense models of this architecture",
        )
    embedding = gguf.tensor("token_embd.weight")
    heads = _scalar(gguf, "attention.head_count")
    hidden = _scalar(gguf, "embedding_length")
    config: Config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _scalar(gguf, "feed_forward_length"),
        "num_hidden_layers": _scalar(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _scalar(gguf, "attention.head_count_kv", heads),
        "head_dim": _head_dim(gguf, hidden // heads),
        "max_position_embeddings": _scalar(gguf, "context_length", 4096),
        "rms_norm_eps": _tidy(gguf.key("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "rope_theta": _tidy(gguf.key("rope.freq_base", 10000.0)),
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
    check_shapes(gguf, config)
    return config


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


def _yarn(gguf: GGUFFile, factor: float, context: int) -> Config:
    scaling: Config = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": _tidy(factor),
        # Zero stands for an absent key, as llama.cpp reads it.
        "original_max_position_embeddings": int(gguf.key("rope.scaling.original_context_length", 0))
        or context,
    }
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
    rotated = _scalar(gguf, "rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise gguf.error(
            f"{gguf.architecture}.rope.dimension_count",
            expected=f"the whole head, {head_dim}, in this architecture",
        )
    return head_dim


def _any_bias(gguf: GGUFFile, *modules: str) -> bool:
    layers = range(int(gguf.key("block_count")))
    return any(f"blk.{i}.{module}.bias" in gguf for i in layers for module in modules)


def _tidy(value: Any) -> float:
    """A float32 as the shortest decimal that reads back as the same float32."""
    return float(str(np.float32(value)))
