"""Interrupts, errors and preemptions at any place of a step lose no request and change no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE
from requests_of import VOCABULARY, Ask, alone, engine_of, play
from tiny_models import Tiny

import mlxrun
from mlxrun.engine import model_runner
from mlxrun.engine.engine import Engine
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.errors import CacheError
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.sampling_params import SamplingParams

HOT = [SamplingParams(temperature=1.5, seed=seed, repetition_penalty=1.1) for seed in range(4)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )


@pytest.fixture(scope="module")
def tiny(path: Path) -> Any:
    return mlxrun.load(path, dtype="float32").model


@pytest.fixture
def llm(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path, dtype="float32")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


def asks_of(count: int, limit: int = 12) -> list[Ask]:
    return [Ask(prompt_of(5 + 3 * i, i), limit + i, HOT[i % len(HOT)]) for i in range(count)]


def failing(call: Callable[..., Any], number: int, error: type[BaseException]) -> Any:
    """The same function, whose call of that number raises."""
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return call(*args, **options)

    return wrapped


def drive(engine: Engine) -> int:
    """Step until all is done, as a caller does; returns the number of interrupts."""
    interrupts = 0
    for _ in range(10_000):
        if not engine.busy:
            return interrupts
        try:
            engine._locked_step()
        except KeyboardInterrupt:
            interrupts += 1
    raise AssertionError("the engine never ends")


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "name", ["_limit_memory", "_begin", "_schedule", "_process", "_finish", "_prefilled"]
)
def test_an_interrupt_anywhere_changes_no_tokens(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str, deterministic: bool, number: int
) -> None:
    asks = asks_of(4)
    engine = engine_of(tiny, rows=3, deterministic=deterministic)
    monkeypatch.setattr(engine, name, failing(getattr(engine, name), number, KeyboardInterrupt))
    for ask in asks:
        ask.submit(engine)
    assert drive(engine) == (name in ("_schedule", "_process", "_prefilled") or number <= 3)
    assert [ask.tokens for ask in asks] == [alone(tiny, ask) for ask in asks]


@pytest.mark.parametrize("number", [1, 2, 4, 9])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["read_tokens", "next_token"])
def test_an_interrupt_within_a_pass_changes_no_tokens(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str, deterministic: bool, number: int
) -> None:
    asks = asks_of(4)
    expected = [alone(tiny, ask) for ask in asks]
    engine = engine_of(tiny, rows=4, deterministic=deterministic)
    wrapped = failing(getattr(model_runner, name), number, KeyboardInterrupt)
    monkeypatch.setattr(model_runner, name, wrapped)
    for ask in asks:
        ask.submit(engine)
    assert drive(engine) == 1
    assert [ask.tokens for ask in asks] == expected


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_preemption_changes_no_tokens(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, deterministic: bool, interrupted: bool
) -> None:
    asks = [Ask(prompt_of(6, i), 400, HOT[i]) for i in range(3)]
    engine = engine_of(tiny, rows=3, memory=700, deterministic=deterministic)
    if interrupted:
        monkeypatch.setattr(engine, "_preempt", failing(engine._preempt, 1, KeyboardInterrupt))
    for ask in asks:
        ask.submit(engine, plan=lambda slots: slots)
    assert drive(engine) == interrupted
    assert engine.num_preempted > 0 or interrupted
    assert [ask.tokens for ask in asks] == [alone(tiny, ask) for ask in asks]


def test_an_error_of_one_request_is_its_own(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = asks_of(3)
    engine = engine_of(tiny)
    monkeypatch.setattr(engine.inputs, "sampler", failing(engine.inputs.sampler, 2, RuntimeError))
    for ask in asks:
        ask.submit(engine)
    play(engine)
    errors = [ask.sequence.error for ask in asks if ask.sequence is not None]
    assert [type(error) for error in errors] == [type(None), RuntimeError, type(None)]
    for number in (0, 2):
        assert asks[number].tokens == alone(tiny, asks[number])


def test_an_interrupt_before_a_session_has_begun_leaves_it_sound(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, options = llm.session(), {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    expected = llm.generate("tea", **options).tokens
    with monkeypatch.context() as patch:
        wrapped = failing(llm.inputs.sampler, 1, KeyboardInterrupt)
        patch.setattr(llm.inputs, "sampler", wrapped)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("tea", session=session, **options)
    assert llm.generate("tea", session=session, **options).tokens == expected


def test_a_session_may_be_forked_and_saved_while_its_request_waits(
    llm: mlxrun.LLM, tmp_path: Path
) -> None:
    session = llm.session()
    llm.generate("tea", session=session, max_tokens=3, temperature=0, ignore_eos=True)
    tokens = list(session.tokens)
    with llm.engine(parallel=1) as engine:
        running = engine.submit("one", max_tokens=None, ignore_eos=True)
        next(iter(running))
        waiting = engine.submit("tea", session=session, max_tokens=3, temperature=0)
        assert session.fork().tokens == tokens
        session.save(tmp_path / "talk.cache")
        running.cancel()
        waiting.result(PATIENCE)
    assert llm.load_session(tmp_path / "talk.cache").tokens == tokens


def test_a_session_outlives_an_engine_that_fails(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, options = llm.session(), {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    with llm.engine(parallel=1) as engine:
        monkeypatch.setattr(engine.runner, "run", failing(engine.runner.run, 2, RuntimeError))
        with pytest.raises(RuntimeError):
            engine.submit("tea", session=session, **options).result(PATIENCE)
    assert session.fork().tokens == session.tokens
    expected = llm.generate("tea", **options).tokens
    assert llm.generate("tea", session=session, **options).tokens == expected


def test_rewinding_a_session_wakes_the_reader_of_its_request(llm: mlxrun.LLM) -> None:
    session = llm.session()
    with llm.engine(parallel=1) as engine:
        handle = engine.submit("tea", session=session, max_tokens=None, ignore_eos=True)
        next(iter(handle))
        session.reset()
        with pytest.raises(CacheError, match="rewound"):
            handle.result(PATIENCE)


def test_a_request_waits_for_the_prefill_of_another_and_not_for_its_completion(tiny: Any) -> None:
    """Even where it cannot reuse the prefix, as that was prefilled together with decoding rows."""
    engine = engine_of(tiny, mode="direct", prefixes=PrefixCache(1 << 30, min_prefix_len=8))
    decoding = Ask([5], 1500)
    decoding.submit(engine)
    for _ in range(3):
        engine.step()
    prompt = prompt_of(2 * PREFILL_CHUNK + 81)
    first, second = Ask(prompt, 600), Ask(prompt, 4)
    for ask in (first, second):
        ask.submit(engine).reuse_step = PREFILL_CHUNK
    while not (second.sequence and second.sequence.finished):
        engine.step()
    assert first.sequence is not None and not first.sequence.finished
    play(engine)
    assert [len(ask.tokens) for ask in (decoding, first, second)] == [1500, 600, 4]


@pytest.mark.parametrize("with_decoding", [False, True])
def test_only_prefills_of_whole_chunks_are_stored_for_cold_starts(
    tiny: Any, with_decoding: bool
) -> None:
    engine = engine_of(tiny, mode="direct", prefixes=PrefixCache(1 << 30, min_prefix_len=8))
    if with_decoding:
        Ask([5], 100).submit(engine)
        for _ in range(3):
            engine.step()
    prompt = prompt_of(PREFILL_CHUNK + 40)
    ask = Ask(prompt, 2)
    ask.submit(engine).reuse_step = PREFILL_CHUNK
    play(engine)
    stored = engine.prefix_cache.matched_len(prompt, tiny.make_cache(), PREFILL_CHUNK)
    assert stored == (0 if with_decoding else PREFILL_CHUNK)


def test_memory_is_planned_for_requests_that_arrive_together(llm: mlxrun.LLM) -> None:
    engine = llm.direct_engine
    for _ in range(2):
        engine._inbox.put(engine.prepare(mlxrun.Request([5, 6], max_tokens=3)))
    engine.step()
    assert engine.scheduler.num_running == 2 and engine.scheduler.memory is not None
    play(engine)


@pytest.mark.parametrize("mode", ["online", "direct"])
def test_a_step_is_charged_with_the_time_until_its_own_tokens_are_there(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """As on a device that computes while Python goes on: the wait is where tokens are read."""
    clock, observed = [0.0], []
    monkeypatch.setattr("mlxrun.engine.engine.time.monotonic", lambda: clock[0])
    read = model_runner.Sampled.read

    def slow(sampled: Any) -> Any:
        clock[0] += 100 if sampled.firsts else 1
        return read(sampled)

    monkeypatch.setattr(model_runner.Sampled, "read", slow)
    engine = engine_of(tiny, mode=mode)
    budget = engine.scheduler.budget
    monkeypatch.setattr(
        budget, "observe", lambda chunks, seconds, *, decoding: observed.append((chunks, seconds))
    )
    first, second = asks_of(2)
    first.submit(engine)
    for _ in range(4):
        engine.step()
    second.submit(engine)
    play(engine)
    assert {len(second.prompt), len(first.prompt)} == {
        count for chunks, _ in observed for _, count in chunks
    }
    assert [seconds for _, seconds in observed] == [100 if chunks else 1 for chunks, _ in observed]
