"""RoPE scaling as divisors of the inverse frequencies.

The converter recognizes a formula in stored factors, the model applies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

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
