"""The memory plan: bytes of weights and caches, requests that fit, requests that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cache_configs import caching
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Tiny

import mlxrun
from mlxrun.config import CacheConfig
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.errors import MemoryLimitError
from mlxrun.kernels import dispatch as kernels
from mlxrun.loader import open_model
from mlxrun.memory.device import SHARE
from mlxrun.memory.footprint import DEFAULT_CACHE, Footprint, LayerFootprint
from mlxrun.memory.plan import ALONE, MemoryPlan, plan_loaded, plan_source

MB = 10**6


def planned(path: Path, cache: CacheConfig = DEFAULT_CACHE, **options: Any) -> MemoryPlan:
    source = open_model(path)
    return plan_source(source, source.storage(**options), cache=cache)


sizes = st.integers(0, 5000)
layers = st.builds(
    LayerFootprint,
    token=st.integers(1, 5000),
    window=st.none() | st.integers(1, 2000),
    stream=sizes,
    pair=st.integers(0, 64),
    seen=sizes,
)
footprints = st.builds(
    Footprint, st.lists(layers, min_size=1, max_size=4).map(tuple), sizes, joint=st.booleans()
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(head_dim=32).write(tmp_path_factory.mktemp("plan") / "model.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("types", [(None, None), ("f16", "f16"), ("q8", "q4")], ids=str)
@pytest.mark.parametrize("tokens", [5, 256, 257, 700])
def test_stored_bytes_are_those_that_caches_allocate(
    llm: mlxrun.LLM,
    path: Path,
    tokens: int,
    types: tuple[str | None, str | None],
    window: int | None,
) -> None:
    expected = caching(window, 4 if window else 0, *types)
    caches = llm.model.make_cache(
        caching(window=window, keep=expected.keep, keys=types[0], values=types[1])
    )
    llm.model(mx.zeros((1, tokens), mx.int32), caches, last_only=True)
    plan = planned(path, expected)
    assert plan.footprint.stored(tokens) == sum(cache.nbytes for cache in caches)
    loaded = plan_loaded(llm.model, llm.config, llm.storage, cache=expected)
    assert (loaded.footprint, loaded.weights) == (plan.footprint, plan.weights)


@pytest.mark.parametrize("kind", ["Q4_0", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_before_loading_are_those_after(tmp_path: Path, kind: str, dtype: str) -> None:
    gguf = Tiny(kinds={"*": kind}).write(tmp_path / "m.gguf")
    assert planned(gguf, dtype=dtype).weights == mlxrun.load(gguf, dtype=dtype).model.nbytes
    mlxrun.convert(gguf, tmp_path / "converted")
    directory = tmp_path / "converted"
    loaded = mlxrun.load(directory, dtype=dtype)
    assert planned(directory, dtype=dtype).weights == loaded.model.nbytes


@given(footprints, st.integers(1, 5000), st.integers(1, 64), st.integers(1, 10**9))
def test_the_largest_that_fits(
    footprint: Footprint, context: int, parallel: int, limit: int
) -> None:
    plan = MemoryPlan(footprint, weights=10**6, limit=limit, prefill_tokens=64)
    longest, most = plan.context_for(parallel), plan.parallel_for(context)
    assert longest == 0 or plan.terms(longest, parallel).fits
    assert most == 0 or plan.terms(context, most).fits
    assert not plan.terms(context, most + 1).fits


@given(footprints, st.integers(1, 5000), st.integers(1, 16))
def test_more_takes_more(footprint: Footprint, context: int, parallel: int) -> None:
    plan = MemoryPlan(footprint, weights=0, limit=0)
    terms = plan.terms(context, parallel)
    assert terms.fits  # the limit is unknown
    assert terms.scratch > 0
    assert terms.total == terms.sequence * parallel + terms.scratch + terms.reserve
    assert plan.terms(context, parallel + 1).sequence == terms.sequence
    assert plan.terms(2 * context, parallel).sequence >= terms.sequence


def test_windows_bound_the_cache() -> None:
    layer = LayerFootprint(token=10, window=300)
    assert [layer.stored(n) for n in (0, 1, 256, 257, 10**6)] == [0, 2560, 2560, 3000, 3000]
    assert [LayerFootprint(token=1, step=256).stored(n) for n in (1, 513)] == [256, 768]


def test_requests_that_never_fit_are_refused_at_once() -> None:
    plan = MemoryPlan(Footprint((LayerFootprint(token=1000),), 0), 20 * MB, 220 * MB)
    memory = plan.available(context=4096, parallel=4)
    assert plan.cost(200) <= (memory or 0) < plan.cost(100_100)
    with pytest.raises(MemoryLimitError):
        plan.check(100_000)
    assert plan.check(1000).fits


def test_a_request_costs_the_bytes_of_its_own_tokens() -> None:
    plan = MemoryPlan(Footprint((LayerFootprint(token=1),), 0), 0, 0)
    assert (plan.cost(20), plan.cost(1000)) == (256, 1024)


def test_prompts_are_planned_for_in_the_chunks_of_their_prefill() -> None:
    assert ALONE == PREFILL_CHUNK


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_near_is_the_same_whether_asked_for_or_chosen(
    tmp_path: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are packed: scales are as narrow as the file's where that loses nothing."""
    monkeypatch.setattr(kernels, "available", lambda *_: kernels.Missing("switched off"))
    monkeypatch.setenv(SHARE, "0")
    kinds = {"*": "Q8_0", "output.weight": "Q4_1", "blk.0.attn_v.weight": "Q5_1"}
    file = Tiny(kinds=kinds).write(tmp_path / "m.gguf")
    source = open_model(file)
    asked, chosen = (source.storage(dtype=dtype, policy=policy) for policy in ("near", None))
    assert asked == replace(chosen, reason=asked.reason, missed=None)
    for policy in ("near", None):
        assert mlxrun.load(file, dtype=dtype, policy=policy).model.nbytes == asked.nbytes
