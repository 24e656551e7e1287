"""Shared prefixes change no tokens, and stay within their budget."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from requests_of import VOCABULARY, Ask, alone, engine_of, play
from test_serving import KINDS, PARAMS, cancel, model_of
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.engine import model_runner, prefix_reuse
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.loader import load_model
from mlxrun.sampling.sampler import next_token

FORMATS: list[dict[str, Any]] = [
    {},
    {"window": 12, "keep": 2},
    {"keys": "q8", "values": "q4"},
    {"keys": "q4", "values": "f16", "window": 20},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    return load_model(read_gguf(path), dtype="float32").model


def family(rng: np.random.Generator, count: int, longest: int) -> list[list[int]]:
    """Prompts that branch off from each other at random places."""
    known = [rng.integers(3, VOCABULARY, longest).tolist()]
    while len(known) < count:
        origin = known[rng.integers(len(known))]
        tail = rng.integers(3, VOCABULARY, rng.integers(1, longest // 2)).tolist()
        known.append([*origin[: rng.integers(len(origin))], *tail])
    return known


def served(
    model: Any, asks: list[Ask], prefixes: PrefixCache, rows: int = 3, **formats: Any
) -> list[int]:
    """Serve requests together; how many tokens of each were cached."""
    engine = engine_of(model, rows=rows, prefixes=prefixes)
    for ask in asks:
        ask.submit(engine, caching(**formats))
    play(engine)
    return [ask.cached for ask in asks]


def asks_of(prompts: list[list[int]], limit: int = 6) -> list[Ask]:
    kinds = ("greedy", "seeded", "mixed")
    return [Ask(p, 1 + i % limit, PARAMS[kinds[i % 3]](i)) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_cache_continues_from_a_stored_prefix(tmp_path: Path, name: str) -> None:
    model = model_of(name, tmp_path)
    prompts = family(np.random.default_rng(1), 8, 60)
    prefixes = PrefixCache(1 << 30, min_prefix_len=2)
    cold = [alone(model, ask) for ask in asks_of(prompts)]
    for _ in range(2):
        asks = asks_of(prompts)
        cached = served(model, asks, prefixes)
        assert [ask.tokens for ask in asks] == cold
    assert sum(cached) > sum(map(len, prompts)) // 2


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_every_format_and_window_continues_from_a_stored_prefix(
    tiny: Any, formats: dict[str, Any]
) -> None:
    prompts = family(np.random.default_rng(2), 8, 60)
    prefixes, off = PrefixCache(1 << 30, min_prefix_len=2), PrefixCache(0)
    cold, first, second = asks_of(prompts), asks_of(prompts), asks_of(prompts)
    assert not any(served(tiny, cold, off, **formats))
    served(tiny, first, prefixes, **formats)
    assert sum(served(tiny, second, prefixes, **formats)) > sum(map(len, prompts)) // 2
    wanted = [ask.tokens for ask in cold]
    assert [ask.tokens for ask in first] == wanted
    assert [ask.tokens for ask in second] == wanted


@pytest.mark.parametrize("name", ["tiny", "gemma3-windows", "mamba2-130m", "falcon-h1-500m"])
def test_random_budgets_arrivals_and_cancellations(tiny: Any, tmp_path: Path, name: str) -> None:
    model = tiny if name == "tiny" else model_of(name, tmp_path)
    prompts = family(np.random.default_rng(3), 10, 40)
    wanted = [alone(model, ask) for ask in asks_of(prompts)]
    for seed in range(12 if name == "tiny" else 3):
        rng = np.random.default_rng(seed)
        budget = int(rng.choice([0, 20_000, 60_000, 10**9]))
        prefixes = PrefixCache(budget, min_prefix_len=int(rng.integers(1, 20)))
        engine = engine_of(model, rows=int(rng.integers(1, 5)), prefixes=prefixes)
        coming = [int(i) for i in rng.integers(len(prompts), size=14)]
        running: list[tuple[int, Ask]] = []
        while coming or engine.busy:
            assert prefixes.nbytes <= budget
            if coming and rng.random() < 0.4:
                number = coming.pop()
                ask = asks_of(prompts)[number]
                ask.submit(engine)
                running.append((number, ask))
            elif running and rng.random() < 0.05:
                cancel(engine, running[rng.integers(len(running))][1])
            else:
                engine.step()
        for number, ask in running:
            expected = wanted[number]
            cut = len(ask.tokens) if ask.reason == "cancelled" else None
            assert ask.tokens == expected[:cut], (seed, number)
        prefixes.clear()
        assert prefixes.nbytes == 0, "a prefix is still in use"


@pytest.mark.parametrize("name", ["tiny", "gemma3-windows", "falcon-h1-500m"])
def test_deterministic_hits_have_the_logits_of_a_cold_start(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bit for bit: whole chunks are taken over, and the rest is read as it would be."""
    model = tiny if name == "tiny" else model_of(name, tmp_path)
    rng = np.random.default_rng(4)
    base = rng.integers(3, VOCABULARY, 2 * PREFILL_CHUNK + 40).tolist()
    prompts = [base[:cut] + rng.integers(3, VOCABULARY, 9).tolist() for cut in (1064, 1030, 700)]
    prefixes = PrefixCache(1 << 30)
    logits: dict[bool, list[np.ndarray]] = {}
    cached = []
    for warm in (False, True):
        engine = engine_of(
            model, rows=1, deterministic=True, prefixes=prefixes if warm else PrefixCache(0)
        )
        logits[warm] = seen = []

        def record(plan: Any, settings: Any, state: Any, given: mx.array, seen: Any = seen) -> Any:
            seen.append(np.array(given))
            return next_token(plan, settings, state, given)

        monkeypatch.setattr(model_runner, "next_token", record)
        for prompt in prompts:
            ask = Ask(prompt, 4, PARAMS["greedy"](0))
            ask.submit(engine)
            play(engine)
            cached.append(ask.cached)
    assert cached == [0, 0, 0, 0, 2 * PREFILL_CHUNK, PREFILL_CHUNK]
    for one, other in zip(logits[False], logits[True], strict=True):
        np.testing.assert_array_equal(one, other)


def test_concurrent_requests_prefill_their_common_prefix_once(tiny: Any) -> None:
    rng = np.random.default_rng(5)
    base = rng.integers(3, VOCABULARY, 600).tolist()
    asks = [Ask([*base, 3 + i, 40], 3, PARAMS["greedy"](0)) for i in range(8)]
    engine = engine_of(tiny, rows=8, prefixes=PrefixCache(1 << 30))
    for ask in asks:
        ask.submit(engine)
    play(engine)
    assert [ask.cached for ask in asks] == [0, *[600] * 7]
    assert engine.runner.num_computed - engine.runner.num_idle == 600 + 8 * (2 + 3 - 1)


def test_one_that_waits_continues_when_the_other_is_cancelled(tiny: Any) -> None:
    rng = np.random.default_rng(6)
    base = rng.integers(3, VOCABULARY, 300).tolist()
    first, second = (Ask([*base, 5 + i], 3, PARAMS["greedy"](0)) for i in range(2))
    engine = engine_of(tiny, rows=2, prefixes=PrefixCache(1 << 30))
    first.submit(engine)
    engine.step()
    second.submit(engine)
    engine.step()
    cancel(engine, first)
    play(engine)
    assert second.tokens == alone(tiny, second)


def test_a_conversation_reuses_its_completion(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    prefixes = PrefixCache(1 << 30)
    model = model_of("llama-mqa", tmp_path)
    first = Ask(rng.integers(3, VOCABULARY, 40).tolist(), 30, PARAMS["greedy"](0))
    served(model, [first], prefixes)
    second = Ask([*first.prompt, *first.tokens, 5, 6, 7], 4, PARAMS["greedy"](0))
    assert served(model, [second], prefixes) == [40 + 29]  # the last token was never read
    assert second.tokens == alone(model, second)


def test_many_requests_stay_within_the_budget(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_reuse, "PREFILL_CHUNK", 16)
    rng = np.random.default_rng(8)
    budget = 300_000
    prefixes = PrefixCache(budget, min_prefix_len=4)
    engine = engine_of(tiny, rows=4, prefixes=prefixes)

    def serve(count: int) -> None:
        for prompt in family(rng, count, 60):
            Ask(prompt, 2, PARAMS["greedy"](0)).submit(engine)
        while engine.busy:
            engine.step()
            assert prefixes.nbytes <= budget

    serve(60)
    prefixes.clear()
    before = active()  # what only the first requests make is there by now
    for _ in range(3):
        serve(60)
        assert engine.runner.blocks.nbytes == 0, "rows without a sequence"
        assert active() - before <= budget + budget // 10
    assert prefixes.figures.evicted > 100


def active() -> int:
    """Bytes of all arrays, less those in unreferenced cycles."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def test_no_sequence_waits_for_caches_of_another_kind(tiny: Any) -> None:
    rng = np.random.default_rng(9)
    base = rng.integers(3, VOCABULARY, 300).tolist()
    plain, packed, like = (Ask([*base, 5 + i], 3, PARAMS["greedy"](0)) for i in range(3))
    engine = engine_of(tiny, rows=3, prefixes=PrefixCache(1 << 30))
    plain.submit(engine)
    engine.step()  # reads a part of its prompt
    packed.submit(engine, caching(keys="q8", values="q8"))
    like.submit(engine)
    engine.step()
    waiting = [ask for ask in (plain, packed, like) if ask.sequence.waits_for_prefix]
    assert waiting == [like]
    play(engine)
    assert like.tokens == alone(tiny, like)
