"""Sequences whose caches differ go through a model together, each with the tokens it gets alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.config import CacheConfig
from mlxrun.engine.blocks import Block, Blocks
from mlxrun.errors import ParameterError
from mlxrun.kv_cache.attention import ScaledOp
from mlxrun.kv_cache.dense import RowCache
from mlxrun.kv_cache.factory import make_cache
from mlxrun.kv_cache.options import Shape

NAMES = ("cache_type_k", "cache_type_v", "attention")
#: Types of keys and values, and a pattern of attention.
CHOICES: tuple[dict[str, str], ...] = (
    {},
    {"cache_type_k": "q8", "cache_type_v": "q4"},
    {"attention": "window:24+4"},
    {"attention": "strided:16/4"},
    {"attention": "blocks:4x8"},
    {"attention": "blocks:3x8", "cache_type_k": "q8", "cache_type_v": "q8"},
    {"cache_type_k": "q4c", "cache_type_v": "q8"},
    {"cache_type_k": "f16", "cache_type_v": "f32"},
)


@dataclass
class Row:
    longest: int
    block: Block | None = None
    row: int = 0
    caches: list[Any] = field(default_factory=list)


def made(choice: dict[str, str]) -> RowCache:
    cache = make_cache(CacheConfig(**choice), Shape(2, 64, 64), None)
    assert isinstance(cache, RowCache)
    x = mx.zeros((1, 2, 5, 64))
    cache.attend(x, x, x, ScaledOp(1.0))
    return cache


def test_rows_of_a_block_are_of_one_kind() -> None:
    blocks: Blocks = Blocks()
    rows = [[Row(40) for _ in range(3)] for _ in CHOICES]
    for copy in range(3):
        for own, choice in zip(rows, CHOICES, strict=True):
            own[copy].caches = [made(choice)]
            blocks.join([own[copy]])
    assert len(list(blocks)) == len(CHOICES)
    for own in rows:
        assert len({id(row.block) for row in own}) == 1
    for own in rows:  # nothing is spread over blocks of another kind
        for row in own[1:]:
            assert row.block is not None
            row.block.clear(row.row)
    blocks.compact()
    assert [block.num_occupied for block in blocks] == [1] * len(CHOICES)


@pytest.fixture(scope="module", params=["whole", "windows"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    """A model that sees everything, and one with windows in some of its layers."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny = Tiny(hidden=128, heads=4, kv_heads=2, head_dim=64, layers=3)
    path = tiny.write(folder / "m.gguf")
    if request.param == "windows":
        path = folder / "m"
        mlxrun.convert(folder / "m.gguf", path)
        file = path / "config.json"
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        more = {"model_type": "mistral", "sliding_window": 20, "layer_types": kinds}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return mlxrun.load(path)


def choices(llm: mlxrun.LLM) -> list[dict[str, str]]:
    """Those that the model can have: keys by channel go with no window."""
    windows = any(block.attention.window for block in llm.model.config.layers)
    return [c for c in CHOICES if not (windows and "c" in c.get("cache_type_k", ""))]


@pytest.mark.parametrize("temperature", [0, 0.8], ids=["greedy", "seeded"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["joint", "deterministic"])
def test_a_batch_of_all_kinds(llm: mlxrun.LLM, temperature: float, deterministic: bool) -> None:
    rng, kinds = np.random.default_rng(1), choices(llm)
    each = [kinds[i % len(kinds)] for i in range(2 * len(kinds))]
    prompts = [rng.integers(3, 250, rng.integers(4, 90)).tolist() for _ in each]
    options: dict[str, Any] = {"temperature": temperature, "ignore_eos": True}
    lengths = [10 + 3 * i % 25 for i in range(len(each))]
    got = llm.batch(
        prompts,
        max_tokens=lengths,
        seed=list(range(len(each))),
        parallel=7,
        deterministic=deterministic,
        **{name: [c.get(name) for c in each] for name in NAMES},
        **options,
    )
    for i, (completion, prompt, choice) in enumerate(zip(got, prompts, each, strict=True)):
        alone = llm.generate(prompt, max_tokens=lengths[i], seed=i, **choice, **options)
        assert completion.tokens == alone.tokens, choice


def test_no_request_gets_the_cache_type_of_the_first(llm: mlxrun.LLM) -> None:
    """Without a type each prompt has the default, whichever comes first."""
    prompts = [[7, 9, 11 + i] * 20 for i in range(3)]
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 30}
    kinds = {"attention": "window:24+4", "cache_type_k": "q8", "cache_type_v": "q4"}
    got = llm.batch(
        prompts, **options, **{name: [kind, None, None] for name, kind in kinds.items()}
    )
    alone = [llm.generate(prompts[0], **options, **kinds)]
    alone += [llm.generate(prompt, **options) for prompt in prompts[1:]]
    assert [completion.tokens for completion in got] == [completion.tokens for completion in alone]


def test_an_engine_serves_all_kinds_at_once(llm: mlxrun.LLM) -> None:
    prompt = [7, 9, 11] * 20
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 30}
    dense = {"attention": "dense"}
    each = [dense, *(dense | choice for choice in choices(llm))]
    with llm.engine(parallel=4, attention="window:24+4") as engine:
        handles = [engine.submit(prompt, **choice, **options) for choice in each]
        usual = engine.submit(prompt, **options)
        made = mlxrun.Request(prompt, mlxrun.SamplingParams(temperature=0), 30, ignore_eos=True)
        expected = llm.generate(prompt, attention="window:24+4", **options).tokens
        assert (
            usual.result(PATIENCE).tokens == engine.submit(made).result(PATIENCE).tokens == expected
        )
        for handle, choice in zip(handles, each, strict=True):
            assert (
                handle.result(PATIENCE).tokens == llm.generate(prompt, **choice, **options).tokens
            )


@pytest.mark.parametrize(
    "wrong",
    [{"attention": "odd"}, {"cache_type_k": "q9"}, {"cache_type_v": "q4c"}, {"cache_type_k": 8}],
)
def test_impossible_caches_are_refused_at_once(llm: mlxrun.LLM, wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        llm.batch(["tea", "coffee"], **{name: [None, value] for name, value in wrong.items()})
    with llm.engine(parallel=2) as engine, pytest.raises(ParameterError):
        engine.submit("tea", **wrong)
