"""What a small model has: its attention, its feed-forwards and its positions, in a few words.

Read from the built :class:`ModelConfig` where the transformer is our own, and from the file's keys
and tensors otherwise and for what a config does not say.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf.source import open_gguf
from mlxrun.models.config import Attention, Experts, FeedForward, ModelConfig
from mlxrun.models.families import FAMILIES, model_config

from .skeleton import Skeleton

Words = dict[str, bool]


@dataclass(frozen=True)
class Features:
    """Words on one model, each with whether it has that.

    Attributes:
        native: runs on the transformer of this project; else on a class of MLX-LM.
    """

    native: bool
    attention: Words
    feed_forward: Words
    positions: Words


def features(skeleton: Skeleton) -> Features:
    """What a skeleton has."""
    with tempfile.TemporaryDirectory() as folder:
        path = skeleton.write(Path(folder) / "x.gguf")
        config = open_gguf(path).config
    native = config["model_type"] in FAMILIES
    model = model_config(config) if native else None
    return Features(
        native,
        _attention(skeleton, model),
        _feed_forward(skeleton, model),
        _positions(skeleton, model),
    )


def _has(skeleton: Skeleton, pattern: str) -> bool:
    return any(re.search(pattern, name) for name in skeleton.shapes())


_TURNING = "rope.dimension_count", "rope.freq_base"
#: Architectures that never rotate, whatever keys their files have (llama_model_rope_type).
_STILL = {"glm5-next", "jamba", "kimi-k3", "kimi-linear", "nemotron_h", "nemotron_h_moe"}


def _turns(skeleton: Skeleton) -> bool:
    keys = skeleton.keys
    switched_off = keys.get("rope.scaling.finetuned") is False  # as Granite's files say it
    return skeleton.arch not in _STILL and not switched_off and any(k in keys for k in _TURNING)


def _turns_partly(keys: Mapping[str, Any]) -> bool:
    heads = np.max(keys.get("attention.head_count", 1))
    width = keys.get("attention.key_length", keys["embedding_length"] // max(heads, 1))
    return bool(keys.get("rope.dimension_count", width) < width)


def _kinds(model: ModelConfig | None, kind: type[Any], part: str) -> list[Any]:
    found = [getattr(layer, part, None) for layer in model.layers] if model else []
    return [part for part in found if isinstance(part, kind)]


def _attention(skeleton: Skeleton, model: ModelConfig | None) -> Words:
    layers: list[Attention] = _kinds(model, Attention, "attention")
    if model:
        grouped = any(a.kv_heads < a.heads for a in layers)
        window = any(a.window for a in layers)
    else:
        heads = np.max(skeleton.keys.get("attention.head_count", 0))
        kv_heads = np.array(skeleton.keys.get("attention.head_count_kv", heads))
        grouped = bool(((kv_heads > 0) & (kv_heads < heads)).any())
        window = bool(skeleton.keys.get("attention.sliding_window"))
    latent = _has(skeleton, r"attn_kv_a_mqa")
    decays, skips = _has(skeleton, r"\.ssm_a"), _has(skeleton, r"\.ssm_d\b")
    return {
        "MLA": latent,
        "GQA": grouped and not latent,
        "MHA": not grouped and not latent and _has(skeleton, r"attn_(q|qkv|k)\."),
        "window": window,
        "sinks": _has(skeleton, "attn_sinks"),
        "QK norm": _has(skeleton, r"attn_[qk]_norm"),
        "soft cap": any(a.softcap for a in layers),
        "temperature": any(a.temperature for a in layers)
        or bool(skeleton.keys.get("attention.temperature_scale")),
        "biases": _has(skeleton, r"attn_(q|k|v|qkv|output)\.bias"),
        "state space": decays and skips,
        "delta rule": decays and not skips,
        "short convolutions": _has(skeleton, "shortconv"),
        "RWKV": _has(skeleton, "time_mix_"),
    }


def _feed_forward(skeleton: Skeleton, model: ModelConfig | None) -> Words:
    sparse = _has(skeleton, "ffn_gate_inp")
    plain: list[FeedForward] = _kinds(model, FeedForward, "feed_forward")
    experts: list[Experts] = _kinds(model, Experts, "feed_forward")
    gated = _has(skeleton, r"ffn_gate\.") or any(ff.fused or len(ff.names) == 3 for ff in plain)
    dense = _has(skeleton, r"ffn_down\.")
    grouped = skeleton.keys.get("expert_group_count", 1) > 1
    return {
        "gated": dense and gated and not sparse,
        "plain": dense and not gated and not sparse,
        "MoE": sparse,
        "shared expert": _has(skeleton, "shexp"),
        "expert groups": any(e.groups > 1 for e in experts) if model else grouped,
        "dense layers": sparse and dense,
        "biases": _has(skeleton, r"ffn_(gate|up|down)(_exps)?\.bias"),
    }


def _positions(skeleton: Skeleton, model: ModelConfig | None) -> Words:
    keys = skeleton.keys
    layers = [layer.attention for layer in model.layers] if model else []
    ropes = [getattr(attention, "rope", None) for attention in layers]
    turning = any(ropes) if model else _turns(skeleton)
    turned = [a for a in _kinds(model, Attention, "attention") if a.rope]
    partial = any(a.rope.dims < a.head_dim for a in turned) if model else _turns_partly(keys)
    return {
        "RoPE": turning and not partial,
        "partial RoPE": turning and partial,
        "two bases": len({r.base for r in ropes if r}) > 1,
        "linear scaling": keys.get("rope.scaling.type") == "linear"
        and keys.get("rope.scaling.factor", 1) != 1,
        "YaRN": keys.get("rope.scaling.type") == "yarn",
        "LongRoPE": _has(skeleton, "rope_factors_long"),
        "frequency factors": _has(skeleton, "rope_freqs"),
        "NoPE layers": any(ropes) and not all(ropes),
        "learned": _has(skeleton, "position_embd"),
        "ALiBi": any(getattr(attention, "alibi", None) for attention in layers),
    }
