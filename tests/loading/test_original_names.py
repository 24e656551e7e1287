"""Original repositories load directly and convert; mlx-lm's own loading of them is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from original_names import (
    CONFIGS,
    INV_FREQ,
    MIXTRAL,
    SAME,
    VISION,
    Undo,
    both,
    fused,
    parameters,
    renamed,
    save_arrays,
    stock,
    whole_latent,
    with_extra,
)
from tiny_models import nmse

import mlxrun
from mlxrun.loading.directory import load_directory

TOKENS = mx.array([[1, *range(5, 285, 7)]])


def agree(name: str, ours: np.ndarray, wanted: np.ndarray) -> bool:
    """Float noise; gemma's GELU is rounded to half precision as ggml does it, mlx-lm's is not."""
    return nmse(ours, wanted) < (1e-6 if name.startswith("gemma") else 1e-9)


# Name: (config, what its repository looks like, whether mlx-lm reads that).
SOURCES: dict[str, tuple[str, Undo, bool]] = {
    "llama": ("llama", INV_FREQ, True),
    "mixtral": ("mixtral", MIXTRAL, True),
    "mixtral fused": (
        "mixtral",
        both(
            fused("experts.gate_up_proj", "experts.down_proj"),
            lambda arrays: {n.replace(".block_sparse_moe.", ".mlp."): a for n, a in arrays.items()},
        ),
        False,
    ),
    "qwen2_moe": ("qwen2_moe", SAME, True),
    "qwen3_moe": ("qwen3_moe", SAME, True),
    "qwen3_moe fused": (
        "qwen3_moe",
        fused("experts.gate_up_proj", "experts.down_proj"),
        False,
    ),
    "qwen3_moe fused the other way": (
        "qwen3_moe",
        fused("experts.gate_up_proj", "experts.down_proj", turned=True),
        False,
    ),
    "olmoe": ("olmoe", SAME, True),
    "granitemoe": (
        "granitemoe",
        fused("input_linear.weight", "output_linear.weight"),
        True,
    ),
    "gpt_oss": (
        "gpt_oss",
        fused("experts.gate_up_proj", "experts.down_proj", turned=True, interleaved=True),
        False,
    ),
    "deepseek_v2": ("deepseek_v2", SAME, True),
    "deepseek_v3": ("deepseek_v3", both(SAME, whole_latent), True),
    "gemma3": ("gemma3", with_extra(*VISION), True),
    "gemma3 of transformers 5": (
        "gemma3",
        both(renamed("language_model.model.", "model.language_model."),
             with_extra(*(f"model.{name}" for name in VISION))),
        False,
    ),
    "mistral3": ("mistral3", with_extra(*VISION), True),
    "mistral3 of transformers 5": (
        "mistral3",
        both(renamed("language_model.lm_head.", "lm_head."),
             renamed("language_model.model.", "model.language_model.")),
        True,
    ),
}  # fmt: skip


def logits(path: Path) -> np.ndarray:
    loaded = load_directory(path, dtype="float32")
    assert loaded.unused == []
    return np.array(loaded.model(TOKENS, loaded.model.make_cache())[0])


def theirs(path: Path) -> np.ndarray:
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    return plain(model)


def plain(model: nn.Module) -> np.ndarray:
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    return np.array(model(TOKENS)[0])


def source(path: Path, name: str, dtype: mx.Dtype = mx.float32, *, judged: bool = False) -> Path:
    """A repository; or, where mlx-lm does not read that, the same weights under its names."""
    kind, undo, readable = SOURCES[name]
    arrays = parameters(stock(CONFIGS[kind], dtype))
    if kind == "gemma3":  # the embedding is the head
        del arrays["language_model.lm_head.weight"]
    return save_arrays(path, CONFIGS[kind], undo(arrays) if readable or not judged else arrays)


@pytest.mark.parametrize("name", SOURCES)
def test_original_repositories_load_directly(tmp_path: Path, name: str) -> None:
    wanted = theirs(source(tmp_path / "judge", name, judged=True))
    assert agree(name, logits(source(tmp_path / "m", name)), wanted)


@pytest.mark.parametrize("name", SOURCES)
def test_original_repositories_convert(tmp_path: Path, name: str) -> None:
    path = source(tmp_path / "m", name, mx.bfloat16)
    report = mlxrun.convert(path, tmp_path / "out", bits=4, group_size=32)
    assert {t.fidelity for t in report.tensors} == {"exact", "requantised"}
    assert agree(name, logits(tmp_path / "out"), theirs(tmp_path / "out"))
    copied = mlxrun.convert(path, tmp_path / "copy")
    assert {t.fidelity for t in copied.tensors} == {"exact"}
    assert np.array_equal(logits(tmp_path / "copy"), logits(path))
