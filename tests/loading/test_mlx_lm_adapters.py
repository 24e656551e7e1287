"""Adapters for models that run through mlx-lm's classes, against mlx-lm's own layers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapter_files import write_mlx_lm
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as load_stock
from mlx_lm_models import CONFIGS, save, stock, stock_logits
from tiny_models import nmse

from mlxrun.errors import AdapterError
from mlxrun.loader import load_model
from mlxrun.weights.adapters import AdapterChoice

SAME = 1e-10
TOKENS = np.random.default_rng(5).integers(3, 288, 24).tolist()


def logits(path: Path, adapter: AdapterChoice = ()) -> np.ndarray:
    model = load_model(path, dtype="float32", adapter=adapter).model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0])


def suitable(path: Path) -> list[str]:
    """The modules that an adapter can change: every kind, the embedding included."""
    model, _ = load_stock(path)
    found = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "to_lora") or isinstance(module, nn.Linear | nn.Embedding)
        or type(module).__name__ == "SwitchLinear"
    ]  # fmt: skip
    return [name for name in found if not name.endswith(("router", ".gate"))]


@pytest.mark.parametrize("name", ["helium", "jamba", "mamba2", "qwen3_next"])
def test_they_compute_the_same_as_in_mlx_lm(tmp_path: Path, name: str) -> None:
    base = save(tmp_path / "base", CONFIGS[name], stock(CONFIGS[name]), tokenizer=False)
    adapter = write_mlx_lm(base, tmp_path / "a", suitable(base))
    model, _ = load_stock(base)
    expected = stock_logits(load_adapters(model, str(adapter)).eval(), [TOKENS])
    assert nmse(logits(base, adapter), expected) < SAME
    other = write_mlx_lm(base, tmp_path / "b", suitable(base)[:2], seed=1, rank=2)
    both = logits(base, [adapter, (other, 0.25), (other, 0.5), (other, -0.75)])
    assert nmse(both, expected) < SAME
    assert nmse(logits(base), expected) > 1e-3


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", CONFIGS["helium"], stock(CONFIGS["helium"]), tokenizer=False)
    q = "model.layers.0.self_attn.q_proj"
    good = write_mlx_lm(base, tmp_path / "a", ["self_attn.q_proj"])
    tensors = dict(mx.load(str(good / "adapters.safetensors")))
    for module, message in (
        ("model.layers.7.self_attn.q_proj", "layers.7.*no such module"),
        ("model.layers.0.self_attn.k_proj", "do not fit model.layers.0.self_attn.k_proj"),
        ("model.layers.0.self_attn", "takes no adapter"),
    ):
        moved = {name.replace(q, module): array for name, array in tensors.items()}
        mx.save_safetensors(str(good / "adapters.safetensors"), moved)
        with pytest.raises(AdapterError, match=message):
            logits(base, good)
    dora = write_mlx_lm(base, tmp_path / "b", ["self_attn.q_proj"], kind="dora")
    with pytest.raises(AdapterError, match="DoRA"):
        logits(base, dora)
