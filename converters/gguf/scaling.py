"""RoPE scaling: GGUF's keys and tensors to the ``rope_scaling`` of ``config.json``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from converters.gguf.reader import GGUFFile
from converters.gguf.validate import tidy
from converters.rope import llama3_factors

Config = dict[str, Any]


def rope_scaling(gguf: GGUFFile, config: Config) -> Config | None:
    """The ``rope_scaling`` section, or None for plain rotary embeddings.

    YaRN: Peng et al., 2023, arXiv:2309.00071. Per-frequency factors (``rope_freqs``): the Llama 3.1
    formula where the stored factors follow it, else ``longrope`` with the factors written out.
    """
    # llama.cpp's default for a file that states a factor and no type.
    kind = gguf.key("rope.scaling.type", "linear")
    long = "rope_factors_long.weight" in gguf
    if kind not in ("none", "linear", "yarn") and not (kind == "longrope" and long):
        raise gguf.key_error(
            "rope.scaling.type",
            expected="none, linear, yarn, or longrope with its factors",
            found=repr(kind),
        )
    factor = float(gguf.key("rope.scaling.factor", gguf.key("rope.scale_linear", 0.0))) or 1.0
    if long and kind != "none" and factor != 1.0:
        raise gguf.key_error("rope.scaling.factor", expected="1 with LongRoPE")
    if long:
        return _longrope(gguf, config)
    _check_attention_factor(gguf, kind, factor)
    if "rope_freqs.weight" in gguf:
        return _frequency_factors(gguf, config, kind, factor)
    if kind == "yarn":
        return _yarn(gguf, factor, config["max_position_embeddings"])
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "type": "linear", "factor": tidy(factor)}


def _check_attention_factor(gguf: GGUFFile, kind: str, factor: float) -> None:
    """Only YaRN has a place in ``config.json`` for a factor on queries and keys."""
    attention = float(gguf.key("rope.scaling.attn_factor", 1.0))
    if attention != 1.0 and (kind != "yarn" or factor <= 1.0 or "rope_freqs.weight" in gguf):
        raise gguf.key_error("rope.scaling.attn_factor", expected="1 without YaRN scaling")


# llama.cpp has the paper's constants, whatever the file says. So it has for DeepSeek's line, of
# which Kimi K2 has been trained with others.
_OWN_YARN = ("deepseek2", "deepseek32", "mistral3", "mistral4")


def _yarn(gguf: GGUFFile, factor: float, context: int) -> Config:
    scaling: Config = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": tidy(factor),
        # Zero stands for an absent key, as llama.cpp reads it.
        "original_max_position_embeddings": int(gguf.key("rope.scaling.original_context_length", 0))
        or context,
    }
    if gguf.architecture in _OWN_YARN:
        for key in ("beta_fast", "beta_slow"):
            value = gguf.key(f"rope.scaling.yarn_{key}", None)
            if value is not None:
                scaling[key] = tidy(value)
    all_dim = float(gguf.key("rope.scaling.yarn_log_multiplier", 0.0))
    if all_dim and gguf.architecture == "mistral3":
        scaling["mscale_all_dim"] = tidy(all_dim)
    attention = float(gguf.key("rope.scaling.attn_factor", 1.0))
    if attention != 1.0:
        # mlx-lm has no key for such a factor, so it goes into mscale:
        # attention * (0.1 ln(factor) + 1) = 0.1 * mscale * ln(factor) + 1.
        growth = 0.1 * math.log(factor)
        scaling["mscale"] = (attention * (growth + 1) - 1) / growth
    return scaling


def _frequency_factors(gguf: GGUFFile, config: Config, kind: str, factor: float) -> Config:
    tensor = gguf.tensor("rope_freqs.weight")
    if kind == "yarn":
        raise tensor.error(expected="no frequency factors with YaRN scaling", found="both")
    dims = int(gguf.key("rope.dimension_count", config["head_dim"]))
    if tensor.type.name != "F32" or tensor.elements != dims // 2:
        raise tensor.error(
            expected=f"F32 with {dims // 2} factors", found=f"{tensor.type.name} {tensor.shape}"
        )
    factors = tensor.raw().view("<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise tensor.error(expected="positive factors", found="others among them")
    linear = factor if kind == "linear" else 1.0
    for high in (4.0, 1.0):  # Llama 3.1 and Llama 4
        llama3 = {
            "rope_type": "llama3",
            "type": "llama3",
            "factor": tidy(float(factors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }
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
    """Phi 3's factors for contexts beyond the original one, and for shorter ones."""
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
