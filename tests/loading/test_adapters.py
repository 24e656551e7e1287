"""Adapters of mlx-lm's format on our models, against mlx-lm's own layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_files import write_mlx_lm
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as load_stock
from tiny_models import Tiny, nmse

from mlxrun import convert
from mlxrun.errors import AdapterError, MlxrunError, ParameterError
from mlxrun.loader import load_model
from mlxrun.weights.adapters import AdapterChoice

SAME = 1e-10
TOKENS = np.random.default_rng(5).integers(3, 288, 40).tolist()
EVERYWHERE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    Tiny(tied=request.param).write(folder / "x.gguf")
    convert(folder / "x.gguf", folder / "model", policy="exact")
    return folder / "model"


def ends(base: Path) -> list[str]:
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    return ["model.embed_tokens", *([] if tied else ["lm_head"])]


def logits(base: Path, adapter: AdapterChoice = ()) -> np.ndarray:
    model = load_model(base, dtype="float32", adapter=adapter).model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0])


def mlx_lm_logits(base: Path, adapter: Path) -> np.ndarray:
    model, _ = load_stock(base)
    load_adapters(model, str(adapter)).eval()
    return np.array(model(mx.array([TOKENS]))[0])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_adapters_compute_the_same_as_in_mlx_lm(
    base: Path, tmp_path: Path, kind: str
) -> None:
    adapter = write_mlx_lm(base, tmp_path / "a", EVERYWHERE + ends(base), kind=kind, layers=1)
    found = logits(base, adapter)
    assert nmse(found, mlx_lm_logits(base, adapter)) < SAME
    assert nmse(found, logits(base)) > 1e-3


def test_a_full_fine_tune_replaces_weights(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model, _ = load_stock(base)
    layer = model.layers[1]
    new = {
        "model.layers.1.mlp.up_proj.weight": layer.mlp.up_proj.weight * 1.5,
        "model.layers.1.input_layernorm.weight": mx.array(rng.uniform(0.5, 2, 64), mx.float32),
    }
    (tmp_path / "a").mkdir()
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), new)
    (tmp_path / "a" / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    found = logits(base, tmp_path / "a")
    assert nmse(found, mlx_lm_logits(base, tmp_path / "a")) < SAME
    assert nmse(found, logits(base)) > 1e-3
    with pytest.raises(AdapterError, match="replaces weights"):
        logits(base, [(tmp_path / "a", 0.5)])


def test_strength_nought_is_the_model_bit_for_bit(base: Path, tmp_path: Path) -> None:
    adapter = write_mlx_lm(base, tmp_path / "a", EVERYWHERE)
    assert np.array_equal(logits(base, [(adapter, 0)]), logits(base))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_strengths_and_adapters_add(base: Path, tmp_path: Path, kind: str) -> None:
    keys = EVERYWHERE + ends(base)
    one = write_mlx_lm(base, tmp_path / "one", keys, kind=kind)
    two = write_mlx_lm(base, tmp_path / "two", keys[1:], seed=1, rank=8)
    assert nmse(logits(base, [one, (two, 0.25), (two, 0.75)]), logits(base, [two, one])) < SAME
    assert nmse(logits(base, [(one, 3.0), (one, -3.0), two]), logits(base, two)) < SAME
    assert nmse(logits(base, [one, two]), logits(base, two)) > 1e-3


def refused(base: Path, adapter: Any) -> str:
    with pytest.raises(MlxrunError) as caught:
        logits(base, adapter)
    assert isinstance(caught.value, AdapterError | ParameterError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


Change = Callable[[dict[str, mx.array], dict[str, Any]], object]
Q = "model.layers.0.self_attn.q_proj"


def elsewhere(tensors: dict[str, mx.array], name: str) -> None:
    for part in ("lora_a", "lora_b"):
        tensors[f"{name}.{part}"] = tensors.pop(f"{Q}.{part}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(f"{Q}.lora_b"), "second .B."),
        (lambda t, c: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"] * mx.nan}), "NaN"),
        (lambda t, c: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"][:, :2]}), "rank"),
        (lambda t, c: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"][:5]}), "5.*do not fit"),
        (lambda t, c: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"].astype(mx.int32)}), "floats"),
        (lambda t, c: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"][0]}), "two matrices"),
        (lambda t, c: t.update({f"{Q}.m": mx.ones(64)}), "no tensor of a lora adapter"),
        (lambda t, c: elsewhere(t, "model.layers.9.self_attn.q_proj"), "layers.9.*no such module"),
        (lambda t, c: elsewhere(t, "model.layers.0.self_attn.w_proj"), "w_proj.*no such module"),
        (lambda t, c: c["lora_parameters"].update(rank=0), "rank"),
        (lambda t, c: c["lora_parameters"].update(rank=5), "rank 5"),
        (lambda t, c: c["lora_parameters"].update(scale="x"), "scale must be a number"),
        (lambda t, c: c["lora_parameters"].pop("scale"), "scale must be a number"),
        (lambda t, c: c.pop("lora_parameters"), "lora_parameters"),
        (lambda t, c: c.update(fine_tune_type="ia3"), "ia3"),
        (lambda t, c: c.update(fine_tune_type="dora"), "magnitudes"),
        (lambda t, c: c.update(fine_tune_type="full"), "no model.layers.*lora_. to replace"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    base: Path, tmp_path: Path, change: Change, message: str
) -> None:
    path = write_mlx_lm(base, tmp_path / "a", ["self_attn.q_proj"])
    tensors = dict(mx.load(str(path / "adapters.safetensors")))
    config = json.loads((path / "adapter_config.json").read_text())
    change(tensors, config)
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        logits(base, path)


def test_files_that_are_no_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_mlx_lm(base, tmp_path / "a", ["self_attn.q_proj"])
    assert "no adapter at" in refused(base, tmp_path / "none")
    assert "adapter_config.json" in refused(base, base)
    for odd in ("~no-such-user-at-all/a", "a" * 5000, "a\0b"):
        assert "adapter" in refused(base, odd)
    for strength in (float("nan"), float("inf"), 10**400, 1e308, "1", None, True):
        assert "strength" in refused(base, [(adapter, strength)])
    for wrong in (3, None, [3], [(adapter,)], [(adapter, 1, 2)], {"a": 1}, [(3, 1.0)], b"x"):
        assert "adapter" in refused(base, wrong)
    (adapter / "adapters.safetensors").write_bytes(b"\xff" * 100)
    assert "cannot read" in refused(base, adapter)
    (adapter / "adapters.safetensors").unlink()
    assert "safetensors" in refused(base, adapter)
    (adapter / "adapter_config.json").write_text("[" * 10)
    assert "cannot read" in refused(base, adapter)
    (adapter / "adapter_config.json").write_text("[]")
    assert "no JSON object" in refused(base, adapter).replace("not a", "no")
