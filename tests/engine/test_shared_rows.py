"""Rows with one prefix store it once, and sample the same tokens as alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from hypothesis import given, settings
from hypothesis import strategies as st
from requests_of import VOCABULARY, Ask, alone, engine_of, model_of, play
from test_serving import PARAMS, cancel
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.engine import model_runner, prefix_reuse
from mlxrun.engine.engine import Engine
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK, shared_length
from mlxrun.kv_cache.dense import BUCKET, bucket
from mlxrun.kv_cache.formats import PLAIN
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.kv_cache.shared_prefix import SharedPrefixCache
from mlxrun.loader import load_model

#: Grouped queries, bounded scores, sinks with windows, latents, ALiBi, windows, a state.
FAMILIES = (
    "llama-mqa",
    "gemma2-caps",
    "gpt-oss-small",
    "deepseek2-lite",
    "bloom-560m",
    "gemma3-windows",
    "falcon-h1-500m",
)
FORMATS: list[dict[str, Any]] = [
    {"keys": "f32", "values": "f16"},
    {"keys": "q8", "values": "q8"},
    {"keys": "q4", "values": "q4"},
    {"keys": "q8", "values": "q4"},
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short prefixes be shared."""
    monkeypatch.setattr(prefix_reuse, "MIN_SHARED", 12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    return load_model(read_gguf(path), dtype="float32").model


def asks(count: int, common: int, seed: int = 0) -> list[Ask]:
    """Requests whose prompts have their first tokens in common."""
    rng = np.random.default_rng(seed)
    base = rng.integers(3, VOCABULARY, common).tolist()
    kinds = ("greedy", "seeded", "mixed")
    return [
        Ask(
            [*base, *rng.integers(3, VOCABULARY, rng.integers(1, 12)).tolist()],
            int(rng.integers(6, 14)),
            PARAMS[kinds[i % 3]](i),
        )
        for i in range(count)
    ]


def branches(engine: Engine) -> list[SharedPrefixCache]:
    """The caches of rows that share a prefix."""
    caches = [cache for block in engine.runner.blocks for cache in block.caches]
    return [cache for cache in caches if isinstance(cache, SharedPrefixCache)]


def serve(model: Any, given: list[Ask], rows: int = 4, **formats: Any) -> int:
    """Serve requests together; the most rows that ever shared a prefix."""
    engine = engine_of(model, rows=rows, prefixes=PrefixCache(1 << 30, min_prefix_len=2))
    for ask in given:
        ask.submit(engine, caching(**formats))
    most = 0
    while engine.busy:
        engine.step()
        each = [len(cache.offsets) for cache in branches(engine)]
        most = max([most, *each])
    return most


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str) -> None:
    model = model_of(name, tmp_path)
    wanted = [alone(model, ask) for ask in asks(5, 40)]
    given = asks(5, 40)
    shared = serve(model, given)
    assert [ask.tokens for ask in given] == wanted
    assert shared > 1 or not model.joint


@pytest.mark.parametrize("name", ["gpt-oss-small", "deepseek2-lite", "gemma3-windows"])
def test_recorded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A recording reads what rows share, and does not hold on to it."""
    model = model_of(name, tmp_path)
    wanted = [alone(model, ask) for ask in asks(5, 40)]
    monkeypatch.setattr(model_runner, "COMPILE_AFTER", 1)
    given = asks(5, 40)
    prefixes = PrefixCache(1 << 30, min_prefix_len=2)
    engine = engine_of(model, rows=4, prefixes=prefixes)
    for ask in given:
        ask.submit(engine)
    prefixes_seen: weakref.WeakSet[Any] = weakref.WeakSet()
    seen = 0
    while engine.busy:
        engine.step()
        prefixes_seen.update(cache.prefix for cache in branches(engine))
        seen = max(seen, len(prefixes_seen))
    assert [ask.tokens for ask in given] == wanted
    assert engine.runner.decode_step.compiled
    assert seen
    prefixes.clear()
    gc.collect()
    assert not prefixes_seen


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_every_format(tiny: Any, formats: dict[str, Any]) -> None:
    wanted, given = asks(5, 40), asks(5, 40)
    for ask in wanted:  # one after the other: none to share with
        assert serve(tiny, [ask], **formats) == 0
    assert serve(tiny, given, **formats) > 1
    assert [ask.tokens for ask in given] == [ask.tokens for ask in wanted]
    assert [len(ask.tokens) for ask in given] == [ask.limit for ask in given]


@given(seed=st.integers(0, 10**6), budget=st.sampled_from([0, 30_000, 60_000, 10**9]))
@settings(max_examples=4)
def test_joins_leaves_cancellations_and_evictions_at_random(
    tiny: Any, seed: int, budget: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = [asks(5, int(rng.integers(10, 90)), seed + i) for i in range(3)]
    wanted = {tuple(ask.prompt): alone(tiny, ask) for group in groups for ask in group}
    coming = [group[i] for i in rng.permutation(5) for group in groups]
    prefixes = PrefixCache(budget, min_prefix_len=int(rng.integers(1, 20)))
    engine = engine_of(tiny, rows=int(rng.integers(2, 6)), prefixes=prefixes)
    running: list[Ask] = []
    while coming or engine.busy:
        if coming and rng.random() < 0.4:
            ask = coming.pop()
            ask.submit(engine)
            running.append(ask)
        elif running and rng.random() < 0.05:
            cancel(engine, running[rng.integers(len(running))])
        elif rng.random() < 0.05:
            prefixes.clear()  # prefixes in use stay
        else:
            engine.step()
        assert prefixes.nbytes <= budget
    for ask in running:
        expected = wanted[tuple(ask.prompt)]
        assert ask.tokens == expected[: len(ask.tokens) if ask.reason == "cancelled" else None]
    prefixes.clear()
    assert prefixes.nbytes == 0, "a prefix is still in use"


def test_rows_share_one_copy_of_their_prefix(tiny: Any) -> None:
    common, rows = 1000, 20
    given = [Ask(ask.prompt, 40, ask.params) for ask in asks(rows, common)]
    engine = engine_of(tiny, rows=rows, prefill=512, prefixes=PrefixCache(1 << 30))
    for ask in given:
        ask.submit(engine)
    token = 2 * sum(form.token_bytes(1, 32, mx.float32) for form in (PLAIN, PLAIN))  # two layers
    together = 0
    while engine.busy:
        engine.step()
        blocks = list(engine.runner.blocks)
        if sum(len(block.rows) for block in blocks) == rows:
            together += 1
            shared = {cache.prefix for cache in branches(engine)}
            assert [prefix.nbytes for prefix in shared] == [common * token]
            # In addition, each row has its own tokens after the prefix, in a bucket.
            assert engine.runner.blocks.nbytes == (common + rows * BUCKET) * token
    assert together


def test_deterministic_rows_copy(tiny: Any) -> None:
    given = asks(4, 2 * PREFILL_CHUNK)
    engine = engine_of(tiny, rows=4, deterministic=True, prefixes=PrefixCache(1 << 30))
    for ask in given:
        ask.submit(engine)
    while engine.busy:
        engine.step()
        running = engine.scheduler.running
        caches = [cache for sequence in running for cache in engine.runner.caches_of(sequence)]
        assert not any(isinstance(cache, SharedPrefixCache) for cache in caches)
    assert sum(ask.cached for ask in given) > 0


def test_a_shared_prefix_is_freed_with_its_last_user(tiny: Any) -> None:
    prefixes = PrefixCache(1 << 30, min_prefix_len=2)
    engine = engine_of(tiny, rows=4, prefixes=prefixes)
    for ask in asks(5, 40):
        ask.submit(engine)
    play(engine)
    Ask([5, 6, 7], 2, PARAMS["greedy"](0)).submit(engine)
    play(engine)  # an empty block goes before the next step
    assert not prefixes.shared_lens(asks(1, 40)[0].prompt, tiny.make_cache())


@given(st.lists(st.integers(0, 60)), st.lists(st.integers(0, 60)))
def test_the_prefix_that_saves_about_the_most_is_shared(common: list[int], held: list[int]) -> None:
    def saved(length: int) -> int:
        return length * sum(n >= length for n in common)

    best = max((saved(n) for n in common if n >= prefix_reuse.MIN_SHARED), default=0)
    chosen = shared_length(common, held)
    assert (chosen == 0) == (best == 0)
    assert saved(chosen) >= prefix_reuse.PREFER_SHARED * best
    least = max(1, prefix_reuse.PREFER_SHARED * best)
    long = [n for n in held if n >= prefix_reuse.MIN_SHARED]
    good = {n for n in long if best and saved(n) >= least}
    assert not good or chosen in good, "others hold nearly as much already"


def test_more_that_share_than_that_copy_fit_into_memory(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, count = 512, 8  # two layers of keys and values, 32 wide
    given = [Ask(ask.prompt, 30, ask.params) for ask in asks(count, 900)]
    cost = 1024 * token
    live = {}
    for most in (prefix_reuse.MIN_SHARED, 10**6):
        monkeypatch.setattr(prefix_reuse, "MIN_SHARED", most)
        engine = engine_of(
            tiny, rows=count, memory=3 * cost, prefill=512, prefixes=PrefixCache(1 << 30)
        )
        for ask in given:
            ask.submit(engine, plan=lambda slots: bucket(slots) * token)
        live[most] = 0
        while engine.busy:
            engine.step()
            assert engine.scheduler.used <= 3 * cost
            if not any(None in block.rows for block in engine.runner.blocks):
                assert engine.runner.blocks.nbytes <= engine.scheduler.used
            live[most] = max(live[most], engine.scheduler.num_running)
        assert engine.scheduler.used == 0
    assert live[12] > live[10**6] == 3
