"""RoPE scaling: formulas as divisors of the inverse frequencies, and GGUF's keys for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.hyperparameters import Config, Hyperparameters, tidy
from converters.gguf.file import GGUFTensor

Factors = npt.NDArray[np.float64]


# Impossible scalings give impossible factors, which the caller must refuse.
_quietly = np.errstate(all="ignore")


@_quietly
def llama3_factors(dims: int, base: float, scaling: Mapping[str, Any]) -> Factors:
    """Llama 3.1's scaling, shape (dims / 2,).

    Wavelengths beyond ``original / low_freq_factor`` are stretched by ``factor``, those below
    ``original / high_freq_factor`` are left alone; between the two the inverse is interpolated.
    Source: the ``rope_type`` "llama3" of Hugging Face's transformers.
    """
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    wavelength = 2 * np.pi * base ** (np.arange(0, dims, 2) / dims)
    ratio = scaling.get("original_max_position_embeddings", 8192) / wavelength
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    factors: Factors = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


@_quietly
def yarn_factors(dims: int, base: float, scaling: Mapping[str, Any]) -> Factors:
    """YaRN's "NTK by parts" (Peng et al., 2023, arXiv:2309.00071, section 3.2), shape (dims / 2,).

    Over the original context, dimensions of more than ``beta_fast`` rotations keep their frequency,
    those of fewer than ``beta_slow`` are stretched by ``factor``. ``truncate`` (transformers)
    rounds the bounds between them to whole dimensions.
    """
    original = scaling.get("original_max_position_embeddings", 4096)

    def dim_of(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(scaling.get("beta_fast", 32)), dim_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    factors: Factors = 1 / ((1 - ramp) + ramp / scaling["factor"])
    return factors


def yarn_growth(scaling: Mapping[str, Any]) -> float:
    """The factor of DeepSeek on the square root of the attention scale, from ``mscale_all_dim``."""
    factor, all_dim = scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0)
    return 1.0 if factor <= 1 or not all_dim else 0.1 * all_dim * math.log(factor) + 1.0


def yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """YaRN's factor on queries and keys: stated, or from ``mscale`` and ``mscale_all_dim``."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def growth(mscale: float) -> float:
        factor = scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    return growth(scaling.get("mscale", 1)) / growth(scaling.get("mscale_all_dim", 0))


def longrope_attention_factor(context: int, original: int) -> float:
    """LongRoPE's factor on queries and keys (Ding et al., 2024, arXiv:2402.13753; Phi-3's form)."""
    factor = context / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_scaling(hp: Hyperparameters) -> Config | None:
    """The ``rope_scaling`` section, or None for plain rotary embeddings.

    YaRN: Peng et al., 2023, arXiv:2309.00071. Per-frequency factors (``rope_freqs``): the Llama 3.1
    formula where the stored factors follow it, else ``longrope`` with the factors written out.
    """
    # llama.cpp's default for a file that states a factor and no type.
    kind = hp.key("rope.scaling.type", "linear")
    long, freqs = "rope_factors_long.weight" in hp, "rope_freqs.weight" in hp
    known = kind in ("none", "linear", "yarn") or (kind == "longrope" and long)
    expected = "none, linear, yarn, or longrope with its factors"
    hp.refuse_if(not known, "rope.scaling.type", expected, repr(kind))
    factor = float(hp.key("rope.scaling.factor", hp.key("rope.scale_linear", 0.0))) or 1.0
    attention = float(hp.key("rope.scaling.attn_factor", 1.0))
    if long:
        scaled = kind != "none" and factor != 1.0
        hp.refuse_if(scaled, "rope.scaling.factor", "1 with LongRoPE")
        return _longrope(hp, attention)
    # Only YaRN has a place in config.json for a factor on queries and keys.
    place = kind == "yarn" and factor > 1.0 and not freqs
    hp.refuse_if(
        attention != 1.0 and not place, "rope.scaling.attn_factor", "1 without YaRN scaling"
    )
    if freqs:
        return _frequency_factors(hp, kind, factor)
    if kind == "yarn":
        return _yarn(hp, factor, attention)
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "type": "linear", "factor": tidy(factor)}


# llama.cpp has the paper's constants, whatever the file says. So it has for DeepSeek's line, of
# which Kimi K2 has been trained with others.
_OWN_YARN = ("deepseek2", "deepseek32", "mistral3", "mistral4")


def _yarn(hp: Hyperparameters, factor: float, attention: float) -> Config:
    # Zero stands for an absent key, as llama.cpp reads it.
    original = int(hp.key("rope.scaling.original_context_length", 0))
    scaling: Config = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": tidy(factor),
        "original_max_position_embeddings": original or hp["max_position_embeddings"],
    }
    if hp.architecture in _OWN_YARN:
        for key in ("beta_fast", "beta_slow"):
            value = hp.key(f"rope.scaling.yarn_{key}", None)
            if value is not None:
                scaling[key] = tidy(value)
    all_dim = float(hp.key("rope.scaling.yarn_log_multiplier", 0.0))
    if all_dim and hp.architecture == "mistral3":
        scaling["mscale_all_dim"] = tidy(all_dim)
    if attention != 1.0:
        # mlx-lm has no key for such a factor, so it goes into mscale:
        # attention * (0.1 ln(factor) + 1) = 0.1 * mscale * ln(factor) + 1.
        growth = 0.1 * math.log(factor)
        scaling["mscale"] = (attention * (growth + 1) - 1) / growth
    return scaling


def _frequency_factors(hp: Hyperparameters, kind: str, factor: float) -> Config:
    tensor = hp.tensor("rope_freqs.weight")
    if kind == "yarn":
        raise tensor.error(expected="no frequency factors with YaRN scaling", found="both")
    dims = int(hp.key("rope.dimension_count", hp["head_dim"]))
    factors = _factors(tensor, dims // 2)
    linear = factor if kind == "linear" else 1.0
    for high in (4.0, 1.0):  # Llama 3.1 and Llama 4
        llama3 = {
            "rope_type": "llama3",
            "type": "llama3",
            "factor": tidy(max(factors)),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }
        known = llama3_factors(dims, hp["rope_theta"], llama3)
        if linear == 1.0 and np.allclose(known, factors, rtol=1e-6):
            return llama3
    exact = [value * linear for value in factors]
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": exact,
        "long_factor": exact,
        "original_max_position_embeddings": hp["max_position_embeddings"],
    }


def _longrope(hp: Hyperparameters, attention: float) -> Config:
    """Phi 3's factors for contexts beyond the original one, and for shorter ones."""
    context = hp["max_position_embeddings"]
    original = int(hp.key("rope.scaling.original_context_length", context))
    half = int(hp.key("rope.dimension_count", hp["head_dim"])) // 2
    long, short = (
        _factors(hp.tensor(f"rope_factors_{kind}.weight"), half) for kind in ("long", "short")
    )
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "long_factor": long if context > original else short,
        "short_factor": short,
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _factors(tensor: GGUFTensor, count: int) -> list[float]:
    """Divisors of frequencies, one per rotated pair."""
    factors = tensor.raw().view("<f4") if tensor.type.name == "F32" else np.zeros(0, np.float32)
    if len(factors) != count or not (np.isfinite(factors).all() and (factors > 0).all()):
        found = f"{tensor.type.name} {tensor.shape}"
        raise tensor.error(expected=f"F32 with {count} positive factors", found=found)
    return [float(value) for value in factors]
