"""A decoder as llama.cpp defines it on a GGUF's own tensors, in float64, the slow plain way.

No cache, no packing, no Hugging Face names: rows of q and k as the file has them.
"""

from __future__ import annotations

import math

import gguf
import numpy as np
from tiny_models import Tiny

Array = np.ndarray


def logits(model: Tiny, tokens: list[int], window: int | None = None, keep: int = 0) -> Array:
    """Logits after each token, (T, V).

    A query sees the first ``keep`` tokens and the last ``window``, itself among them.
    """
    w = {name: _weights(model, name, shape) for name, shape in model.shapes().items()}
    eps = model.metadata()["attention.layer_norm_rms_epsilon"]
    x = w["token_embd.weight"][tokens]
    for i in range(model.layers):
        layer = {k.removeprefix(f"blk.{i}."): v for k, v in w.items() if k.startswith(f"blk.{i}.")}
        x = x + _attention(model, layer, _norm(x, layer["attn_norm.weight"], eps), window, keep)
        h = _norm(x, layer["ffn_norm.weight"], eps)
        gate, up = _linear(layer, "ffn_gate", h), _linear(layer, "ffn_up", h)
        x = x + _linear(layer, "ffn_down", gate / (1 + np.exp(-gate)) * up)
    head = w.get("output.weight", w["token_embd.weight"])
    return _norm(x, w["output_norm.weight"], eps) @ head.T


def _weights(model: Tiny, name: str, shape: tuple[int, ...]) -> Array:
    data, kind = model.stored(name, shape)
    return gguf.quants.dequantize(data, kind).reshape(shape).astype(np.float64)


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _linear(layer: dict[str, Array], module: str, x: Array) -> Array:
    return x @ layer[f"{module}.weight"].T + layer.get(f"{module}.bias", 0)


def _attention(
    model: Tiny, layer: dict[str, Array], x: Array, window: int | None, keep: int
) -> Array:
    t, dim = len(x), model.width
    eps = model.metadata()["attention.layer_norm_rms_epsilon"]
    q = _linear(layer, "attn_q", x).reshape(t, model.heads, dim)
    k = _linear(layer, "attn_k", x).reshape(t, model.kv_heads, dim)
    v = _linear(layer, "attn_v", x).reshape(t, model.kv_heads, dim)
    if "attn_q_norm.weight" in layer:
        q = _norm(q, layer["attn_q_norm.weight"], eps)
        k = _norm(k, layer["attn_k_norm.weight"], eps)
    q, k = _rotate(model, q), _rotate(model, k)
    group = model.heads // model.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(dim)
    past, now = np.arange(t)[None, :], np.arange(t)[:, None]
    visible = past <= now
    if window is not None:
        visible &= (past < keep) | (past > now - window)
    scores = np.where(visible, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    out = np.einsum("hts,shd->thd", scores, v).reshape(t, model.heads * dim)
    return _linear(layer, "attn_output", out)


def _rotate(model: Tiny, x: Array) -> Array:
    """(T, H, D): neighbors for llama, halves for the others."""
    angles, scale = _angles(model, len(x))
    cos, sin = (scale * f(angles)[:, None, :] for f in (np.cos, np.sin))
    out = np.empty_like(x)
    if model.arch == "llama":
        first, second = (np.s_[..., 0::2], np.s_[..., 1::2])
    else:
        half = x.shape[-1] // 2
        first, second = (np.s_[..., :half], np.s_[..., half:])
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[first] * sin + x[second] * cos
    return out


def _angles(model: Tiny, tokens: int) -> tuple[Array, float]:
    """Angles (T, D/2) and what queries and keys are multiplied by."""
    keys, dim = model.metadata(), model.width
    base = keys.get("rope.freq_base", 10000.0)
    inverse = base ** (-np.arange(0, dim, 2) / dim)
    if model.rope_freqs is not None:
        inverse = inverse / model.rope_freqs
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    scale = keys.get("rope.scaling.attn_factor", 1.0)
    if kind == "linear":
        inverse = inverse / factor
    if kind == "yarn":
        original = keys.get("rope.scaling.original_context_length", keys["context_length"])
        edges = [
            dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (32, 1)
        ]
        low, high = max(0, math.floor(edges[0])), min(dim - 1, math.ceil(edges[1]))
        ramp = 1 - np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
        inverse = inverse / factor * (1 - ramp) + inverse * ramp
        scale *= 1 + 0.1 * math.log(factor) if factor > 1 else 1
    return np.arange(tokens)[:, None] * inverse, scale
