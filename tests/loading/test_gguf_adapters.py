"""llama.cpp's adapters against llama.cpp's logits with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf_adapters import CASES, LOGITS, factors, token_ids, write, write_adapter
from tiny_models import Tiny, nmse

from converters.gguf.reader import read_gguf
from mlxrun import convert
from mlxrun.errors import AdapterError, GGUFError
from mlxrun.loader import load_model
from mlxrun.model import Model
from mlxrun.weights.adapters import AdapterChoice

SAME = 1e-8


def logits(model: Model[Any], tokens: list[int]) -> np.ndarray:
    return np.array(model(mx.array([tokens]), model.make_cache())[0])


def load(path: Path, adapter: AdapterChoice = ()) -> Model[Any]:
    if path.is_dir():
        return load_model(path, dtype="float32", adapter=adapter).model
    return load_model(read_gguf(path), dtype="float32", adapter=adapter).model


@pytest.mark.parametrize("name", CASES)
def test_logits_are_llama_cpps(tmp_path: Path, name: str) -> None:
    case, expected = CASES[name], np.load(LOGITS)[name]
    tokens = token_ids(case)
    base, adapter = write(case, tmp_path)
    assert nmse(logits(load(base), tokens), expected) > 1e-3
    assert nmse(logits(load(base, [(adapter, case.strength)]), tokens), expected) < SAME
    convert(base, tmp_path / "out", policy="exact")
    found = logits(load(tmp_path / "out", [(adapter, case.strength)]), tokens)
    assert nmse(found, expected) < SAME


def test_a_packed_model_adds_the_same(tmp_path: Path) -> None:
    """Whatever form the weights have, packed for a matrix product or for single rows."""
    kinds = {"*": "Q4_0", "output.weight": "Q8_0"}
    base = Tiny(kinds=kinds).write(tmp_path / "x.gguf")
    plain = Tiny(kinds=kinds).write(tmp_path / "plain.gguf", expand=True)
    shapes = {n: s for n, s in Tiny().shapes().items() if len(s) == 2}
    adapter = write_adapter(tmp_path / "a.gguf", "llama", shapes)
    tokens = np.random.default_rng(0).integers(3, 288, 20).tolist()
    expected = logits(load(plain, adapter), tokens)
    packed = load_model(read_gguf(base), dtype="float32", policy="exact", adapter=adapter).model
    cache = packed.make_cache()
    parts = [np.array(packed(mx.array([part]), cache)[0]) for part in (tokens[:17], tokens[17:])]
    assert nmse(np.concatenate(parts), expected) < SAME


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_factors_may_be_stored_in_any_type(tmp_path: Path, kind: str) -> None:
    base = Tiny(ffn=96).write(tmp_path / "x.gguf")
    shapes = {"blk.0.attn_q.weight": (64, 64), "blk.1.ffn_down.weight": (64, 96)}
    stored, plain = (
        write_adapter(tmp_path / f"{e}.gguf", "llama", shapes, rank=32, kind=kind, expand=e)
        for e in (False, True)
    )
    tokens = list(range(5, 30))
    assert np.array_equal(logits(load(base, stored), tokens), logits(load(base, plain), tokens))


class File:
    """An adapter for ``Tiny()`` of which parts can be changed."""

    def __init__(self) -> None:
        self.arch = "llama"
        self.keys: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora"}
        a, b = factors("q", (64, 64), 4)
        q = "blk.1.attn_q.weight"
        self.tensors = {f"{q}.lora_a": a, f"{q}.lora_b": b}

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        for key, value in self.keys.items():
            if isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, array in self.tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def rename(self, module: str) -> None:
        self.tensors = {n.replace("blk.1.attn_q", module): x for n, x in self.tensors.items()}

    def scale(self, factor: float) -> None:
        self.tensors = {n: x * np.float32(factor) for n, x in self.tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.keys.update({"general.type": "model"}), "general.type is 'model'"),
        (lambda f: f.keys.pop("general.type"), "general.type is None"),
        (lambda f: f.keys.update({"adapter.type": "ia3"}), "adapter.type is 'ia3'"),
        (lambda f: f.keys.update({"adapter.lora.alpha": "one"}), "lora.alpha"),
        (lambda f: f.keys.update({"adapter.lora.alpha": float("nan")}), "NaN|finite"),
        (lambda f: f.keys.update({"adapter.alora.invocation_tokens": [1, 2]}), "aLoRA"),
        (lambda f: setattr(f, "arch", "qwen2"), "qwen2.*internlm2 or llama"),
        (lambda f: setattr(f, "arch", "nonsense"), "nonsense"),
        (lambda f: f.tensors.popitem(), "attn_q: the second .B. .*missing"),
        (lambda f: f.tensors.clear(), "no tensors of an adapter"),
        (lambda f: f.tensors.update({"blk.0.attn_q.weight": np.ones((4, 4))}), "neither lora_a"),
        (lambda f: f.scale(float("nan")), "NaN"),
        (lambda f: f.rename("blk.7.attn_q"), "blk.7.attn_q.*no such module"),
        (lambda f: f.rename("blk.1.attn_r"), "blk.1.attn_r is no matrix"),
        (lambda f: f.rename("blk.01.attn_q"), "blk.01.attn_q is no matrix"),
        (lambda f: f.rename("blk.1.ffn_gate_exps"), "no matrix"),
        (lambda f: f.rename("blk.1.attn_k"), "64 x 4.*do not fit.*k_proj, which is 32 x 64"),
        (lambda f: f.rename("blk.1.attn_qkv"), "attn_qkv is no matrix"),
        (lambda f: f.rename("output"), "do not fit lm_head, which is 288 x 64"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    base = Tiny().write(tmp_path / "x.gguf")
    file = File()
    assert load(base, file.write(tmp_path / "good.gguf"))
    change(file)
    with pytest.raises((AdapterError, GGUFError), match=message):
        load(base, file.write(tmp_path / "bad.gguf"))


def test_no_byte_of_a_damaged_file_makes_it_crash(tmp_path: Path) -> None:
    base = Tiny().write(tmp_path / "x.gguf")
    data = File().write(tmp_path / "a.gguf").read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 3, 30, 200, len(data) - 1):
        (tmp_path / "a.gguf").write_bytes(data[:cut])
        with pytest.raises((AdapterError, GGUFError)):
            load(base, tmp_path / "a.gguf")
    for place in rng.integers(0, 400, 30):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        (tmp_path / "a.gguf").write_bytes(bytes(damaged))
        try:
            load(base, tmp_path / "a.gguf")
        except (AdapterError, GGUFError) as error:
            assert "\n" not in str(error)


def test_norms_of_an_adapter_replace_the_models(tmp_path: Path) -> None:
    """mergekit writes them; llama.cpp passes them over."""
    weight = np.linspace(0.5, 2, 64).astype(np.float32)
    base = Tiny().write(tmp_path / "x.gguf")
    other = Tiny(weights={"blk.1.ffn_norm.weight": weight}).write(tmp_path / "y.gguf")
    file = File()
    file.scale(0.0)
    file.tensors["blk.1.ffn_norm.weight"] = weight
    adapter = file.write(tmp_path / "a.gguf")
    tokens = list(range(5, 30))
    assert nmse(logits(load(base, adapter), tokens), logits(load(other), tokens)) < 1e-12
