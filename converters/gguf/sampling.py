"""Sampling parameters recommended by a GGUF, under the names of ``generation_config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

# As llama.cpp's converter copies them out of a generation_config.json (gguf/metadata.py). The key
# general.sampling.sequence, an order of stages, has no counterpart: here the order is fixed.
KEYS: Final = {
    f"general.sampling.{key}": name
    for key, name in {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "xtc_probability": "xtc_probability",
        "xtc_threshold": "xtc_threshold",
        "penalty_last_n": "penalty_last_n",
        "penalty_repeat": "repetition_penalty",
        "mirostat": "mirostat",
        "mirostat_tau": "mirostat_tau",
        "mirostat_eta": "mirostat_eta",
    }.items()
}


def sampling_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``generation_config.json`` that a GGUF's metadata recommend.

    Only numbers are taken over; their ranges are checked where they are used. transformers wants
    ``do_sample`` stated, and no temperature of 0.
    """
    config: dict[str, Any] = {}
    for key, name in KEYS.items():
        value = metadata.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            config[name] = decimal(value)
    if config.get("temperature") == 0:
        del config["temperature"]
        return {"do_sample": False, **config}
    return {"do_sample": True, **config} if config else {}


def decimal(value: float) -> float:
    """The number that was written before it became a float32: 0.949999988 was 0.95."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
