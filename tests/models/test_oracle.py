"""The transformer against llama.cpp's logits, and against a naive decoder where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import naive_decoder
import numpy as np
import pytest
from conformance.measure import logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_models import expected
from tiny_models import Tiny, nmse

import mlxrun
from converters.gguf.reader import read_gguf
from mlxrun.loader import load_model
from mlxrun.models.transformer import Transformer

SAME = 1e-9


def load(path: Path, policy: str | None = None) -> Transformer:
    return load_model(read_gguf(path), dtype="float32", policy=policy).model


@pytest.mark.parametrize("policy", [None, "exact"])
def test_quantized_files_have_the_logits_of_their_weights(oracle: Path, policy: str | None) -> None:
    """Q1_0 and Q2_0, which the gguf package cannot read, have no other judge."""
    files = [p for p in sorted((oracle / "quants").glob("*.gguf")) if "gpt-oss" not in p.name]
    assert len(files) == 33
    for path in files:
        tokens, wanted = expected(oracle, f"quants/{path.stem}")
        assert nmse(logits(load(path, policy), tokens), wanted) < SAME, path.name


@pytest.mark.parametrize("source", ["gguf", "near", "exact"])
def test_stories_continue_as_in_llama_cpp(oracle: Path, tmp_path: Path, source: str) -> None:
    path = oracle / "stories" / "stories260K.gguf"
    if source != "gguf":
        mlxrun.convert(path, tmp_path / "out", policy=source)
        path = tmp_path / "out"
    llm = mlxrun.load(path)
    options = {"temperature": 0, "ignore_eos": True}
    for story in json.loads((oracle / "stories" / "greedy.json").read_text()):
        wanted = story["tokens"]
        completion = llm.generate(story["prompt_tokens"], max_tokens=len(wanted), **options)
        assert list(completion.tokens) == wanted


BIASED = ("attn_q", "attn_k", "attn_v")


@st.composite
def models(draw: st.DrawFn) -> Tiny:
    """Any shape that a dense llama, Qwen 2 or Qwen 3 may have."""
    arch = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([8, 16, 48, 80]))
    heads = kv_heads * group
    modules = (*BIASED, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    possible = {"llama": modules, "qwen2": BIASED, "qwen3": ()}[arch]
    scaling = draw(st.sampled_from(["none", "linear", "yarn", "factors"]))
    keys: dict[str, object] = {"rope.freq_base": draw(st.sampled_from([1e4, 5e5]))}
    if scaling in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling, "rope.scaling.factor": draw(st.floats(1.5, 8))}
    if scaling == "yarn":
        keys["rope.scaling.original_context_length"] = draw(st.sampled_from([32, 64, 512]))
    return Tiny(
        arch=arch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=None if arch == "qwen2" else dim,
        hidden=heads * dim if arch == "qwen2" else draw(st.sampled_from([24, 64, 96])),
        layers=draw(st.integers(1, 3)),
        ffn=draw(st.sampled_from([32, 56, 160])),
        tied=draw(st.booleans()),
        biases=tuple(draw(st.sets(st.sampled_from(possible)))) if possible else (),
        rope_freqs=np.linspace(1, 3, dim // 2) if scaling == "factors" else None,
        keys=keys,
        seed=draw(st.integers(0, 1000)),
    )


@given(model=models(), chunks=st.lists(st.integers(1, 30), max_size=4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_shapes_agree_with_a_naive_decoder(
    tmp_path: Path, model: Tiny, chunks: list[int]
) -> None:
    tokens = np.random.default_rng(model.seed).integers(3, 288, 48).tolist()
    loaded = load(model.write(tmp_path / "x.gguf"))
    assert nmse(logits(loaded, tokens, chunks), naive_decoder.logits(model, tokens)) < SAME


def test_rows_of_a_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    model = load(Tiny().write(tmp_path / "x.gguf"))
    rows = np.random.default_rng(0).integers(3, 288, (3, 20))
    cache = model.make_cache()
    both = [model(mx.array(rows[:, :13]), cache), model(mx.array(rows[:, 13:]), cache)]
    got = np.concatenate([np.array(part) for part in both], axis=1)
    for row, alone in zip(got, rows.tolist(), strict=True):
        assert nmse(row, logits(model, alone)) < SAME


def test_last_only_is_the_last(tmp_path: Path) -> None:
    model = load(Tiny().write(tmp_path / "x.gguf"))
    tokens = list(range(10, 30))
    last = model(mx.array([tokens]), model.make_cache(), last_only=True)
    assert last.shape == (1, 1, 288)
    assert nmse(np.array(last[0, 0]), logits(model, tokens)[-1]) < SAME
