"""Tiny random models of mlx-lm's classes, written as its users have them, and their logits.

mlx-lm itself is the judge: the same weights through its own loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from converters.gguf.tokenizer import tokenizer_files

VOCAB = 288

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "model_type": "mamba2", "num_heads": 8, "head_dim": 16, "hidden_size": 64, "state_size": 16,
        "intermediate_size": 128, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-5, "n_groups": 2,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
        "time_step_limit": [0.0, float("inf")], "time_step_rank": "auto", "vocab_size": VOCAB,
    },
    "falcon_h1": {
        **_COMMON, "model_type": "falcon_h1", "mamba_d_ssm": 64, "mamba_d_state": 16,
        "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_conv": 4,
    },
}  # fmt: skip


def stock(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's class with random weights that make every parameter count."""
    from mlx_lm.utils import _get_classes

    made, arguments = _get_classes(dict(config))
    model = made(arguments.from_dict(dict(config)))
    rng = np.random.default_rng(seed)
    noisy = []
    for name, array in tree_flatten(model.parameters()):
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if "norm" in name or array.ndim < 2:
            noisy.append((name, array + 0.1 * mx.array(noise)))
        else:
            noisy.append((name, mx.array(noise * array.shape[-1] ** -0.5)))
    model.update(tree_unflatten(noisy))
    model.eval()
    mx.eval(model.parameters())
    return model


def save(path: Path, config: Mapping[str, Any], model: nn.Module, tokenizer: bool = True) -> Path:
    """A model directory as mlx-lm writes it."""
    path.mkdir(exist_ok=True)
    arrays = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    if tokenizer:
        vocabulary = read_gguf(Tiny(vocab=VOCAB, template=TEMPLATE).write(path / "v.gguf"))
        for name, content in tokenizer_files(vocabulary).items():
            (path / name).write_bytes(content)
        (path / "v.gguf").unlink()
    return path


TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content + 's' }}{% endfor %}"


def stock_logits(model: nn.Module, passes: Iterable[Sequence[int]]) -> np.ndarray:
    """mlx-lm's logits, (T, V), of tokens that come in passes."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    parts = [model(mx.array([list(part)]), cache=cache)[0] for part in passes]
    return np.array(mx.concatenate(parts).astype(mx.float32))
