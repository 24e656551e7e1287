"""Conversions: the file's weights, its tokens, its continuations, in mlxrun and in stock mlx-lm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from real_models import Figures, RealModel
from real_texts import PROMPTS, STORY, strings

import mlxrun

# Nats a token between a conversion with policy near and the file. Near keeps every weight of
# SmolLM2's; of gemma's it rounds the scales of Q4_K and requantizes Q6_K, which costs 1.8e-4.
NEAR = {"smollm2": 1e-9, "gemma": 5e-4}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# In Gemma a norm follows each half of a layer, too, and what files store is the weight plus one.
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@pytest.fixture(scope="module")
def exact(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exact") / "model"
    mlxrun.convert(path, target, policy="exact")
    return target


def stored(path: Path, model: RealModel) -> Iterator[tuple[str, np.ndarray]]:
    """The file's weights under Hugging Face's names, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    names = _NAMES | (_GEMMA if model.name == "gemma" else {})
    for tensor in reader.tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        if model.name == "gemma" and name.endswith("norm"):
            weights = weights - 1
        if model.name == "smollm2" and name in ("attn_q", "attn_k"):
            # Halves of a head that turn together are neighbors in llama.cpp.
            heads = weights.reshape(-1, 32, 2, weights.shape[-1])
            weights = heads.swapaxes(1, 2).reshape(weights.shape)
        yield (f"model.layers.{layer}." if layer else "") + names[name], weights


def test_weights_are_the_files(exact: Path, path: Path, model: RealModel) -> None:
    """To the last bit: code times scale plus bias, rounded once."""
    arrays = mx.load(str(exact / "model.safetensors"))
    forms = json.loads((exact / "config.json").read_text())["quantization"]
    names = set()
    for name, weights in stored(path, model):
        names.add(name)
        got = arrays.pop(f"{name}.weight")
        if f"{name}.scales" in arrays:
            form = forms.get(name, forms)
            scales, biases = (
                arrays.pop(f"{name}.{part}").astype(mx.float32) for part in ("scales", "biases")
            )
            got = mx.dequantize(got, scales, biases, form["group_size"], form["bits"])
        got = np.array(got.astype(mx.float32))
        assert np.array_equal(got, weights), name
    assert not arrays


def test_its_tokens_are_the_files(exact: Path, path: Path) -> None:
    ours, converted = (mlxrun.load_tokenizer(source) for source in (path, exact))
    for text in strings():
        for special in (False, True):
            ids = ours.encode(text, parse_special=special)
            assert converted.encode(text, parse_special=special) == ids, repr(text)
            assert converted.decode(ids) == ours.decode(ids)


def test_it_continues_as_llama_cpp_does(exact: Path, figures: Figures) -> None:
    expected = [figures.continuations[name] for name in ("story", "science")]
    converted = mlxrun.load(exact, dtype="float32")
    got = converted.batch(
        [each.prompt for each in expected], max_tokens=16, temperature=0, ignore_eos=True
    )
    for one, own in zip(got, expected, strict=True):
        certain = own.certain[:16]
        assert one.tokens[: len(certain)] == certain


def test_near_is_near(llm: mlxrun.LLM, path: Path, model: RealModel, tmp_path: Path) -> None:
    mlxrun.convert(path, tmp_path / "near", policy="near")
    near = mlxrun.load(tmp_path / "near", dtype="float32")
    got = mlxrun.compare(llm, near, STORY, context=256, chunks=1)
    assert got.tokens == 127
    assert 0 <= got.divergence.value < NEAR[model.name]


@pytest.mark.filterwarnings("ignore")  # those of the libraries that mlx-lm loads
def test_stock_mlx_lm_continues_it_as_llama_cpp_does(exact: Path, figures: Figures) -> None:
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    stock, tokenizer = load(str(exact))
    stock.update(tree_map(wide, stock.parameters()))
    name = "science"
    own = figures.continuations[name]
    prompt = tokenizer.encode(PROMPTS[name])
    assert prompt == own.prompt
    certain = own.certain[:12]
    tokens = [token for token, _ in generate_step(mx.array(prompt), stock, max_tokens=12)]
    assert tokens[: len(certain)] == certain


def wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
