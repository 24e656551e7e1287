"""Conversions of skeletons in stock mlx-lm, where it has a class for what they become."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from converters.gguf.source import open_gguf
from mlxrun import convert

from .measure import SAME, nmse
from .skeleton import expected, names, read


@dataclass(frozen=True)
class Limit:
    """Where stock mlx-lm computes something else than llama.cpp, and how near it comes."""

    reason: str
    error: float


_TABLE = "ggml looks GELU up in a table of half-precision numbers, mlx-lm computes it"
_WINDOW = "it ignores the window"
_WHOLE = "it turns the whole of each head, where half should turn"
_STORED = "it rotates by its own attention factor, whatever the file says"
_LATENT = "its class for DeepSeek V2 has other matrices in latent attention"
LIMITS: dict[str, Limit] = {
    "chatglm-fused": Limit(_WHOLE, 0.2),
    "chatglm-glm": Limit(_WHOLE, 0.2),
    "codeshell-gqa": Limit(_TABLE, 1e-7),
    "gemma-2b": Limit(_TABLE, 1e-7),
    "gemma-7b": Limit(_TABLE, 1e-7),
    "gemma2-46": Limit(_WINDOW, 0.2),
    "gemma2-caps": Limit(_WINDOW, 0.2),
    "gemma3-untied": Limit(_TABLE, 1e-5),
    "gemma3-windows": Limit(_TABLE, 1e-5),
    "gemma4-31b": Limit(_TABLE, 1e-7),
    "gemma4-e2b": Limit(_TABLE, 1e-7),
    "phi2-turning": Limit(_TABLE, 1e-6),
    "phi3-partial": Limit(_STORED, 1e-2),
    "spark2_5-gated": Limit(_TABLE, 1e-7),
    "starcoder2-mqa": Limit(_TABLE, 1e-6),
}
#: What its classes do not load or do not run; a name may stand for all that begin with it.
REFUSED = {
    "deepseek2-corrected": "its class for DeepSeek V3 knows the sigmoid alone",
    "deepseek2-dense": _LATENT,
    "deepseek2-lite": _LATENT,
    "deepseek2-v2": _LATENT,
    "gemma3-open": "it asks for a layer that sees everything",
    "gemma3-pattern": "it asks for a layer that sees everything",
    "mistral3-moe": "its heads share the hidden size",
    "olmo-": "it asks for a package of OLMo's authors",
}


@pytest.mark.parametrize("name", [name for name in names() if not name.startswith(tuple(REFUSED))])
def test_stock_mlx_lm_computes_llama_cpps_logits(name: str, tmp_path: Path) -> None:
    skeleton = read(name)
    source = skeleton.write(tmp_path / "x.gguf")
    kind = open_gguf(source).config["model_type"]
    if importlib.util.find_spec(f"mlx_lm.models.{kind}") is None:
        pytest.skip(f"mlx-lm has no class for {kind}")
    convert(source, tmp_path / "out", policy="exact")
    limit = LIMITS.get(name, Limit("none", SAME))
    logits = mlx_lm_logits(tmp_path / "out", skeleton.token_ids())
    assert nmse(logits, expected(skeleton)) <= limit.error, limit.reason


def mlx_lm_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """What stock mlx-lm computes in float32 from a directory, strictly loaded; (T, V)."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(path, lazy=False, strict=True)
    wide = tree_map(
        lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
        model.parameters(),
    )
    model.update(wide)
    logits = model(mx.array([tokens]), cache=make_prompt_cache(model))
    return np.array(logits[0].astype(mx.float32), np.float64)
