"""Sessions and the engine's loop: whatever the way there, the tokens are those of a cold start."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import naive_decoder
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Tiny, nmse

import mlxrun
from mlxrun.engine import model_runner
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.engine.sequence import Session
from mlxrun.errors import NumericError

MODEL = Tiny(hidden=32, heads=4, kv_heads=2, ffn=64, layers=2)
WINDOWS: list[tuple[int | None, int]] = [(None, 0), (6, 0), (5, 2)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    """A model whose sessions share nothing with each other."""
    llm = mlxrun.load(MODEL.write(tmp_path_factory.mktemp("engine") / "x.gguf"), dtype="float32")
    llm.prefix_cache.budget = 0
    return llm


def tokens_of(
    llm: mlxrun.LLM,
    session: Session,
    prompt: list[int],
    count: int,
    take: int | None = None,
    **options: Any,
) -> list[int]:
    """Up to ``count`` tokens; with ``take`` the iterator is closed after so many."""
    options = {"temperature": 0.0, "ignore_eos": True} | options
    chunks: Any = llm.stream(prompt, session=session, max_tokens=count, **options)
    tokens = [token for chunk in islice(chunks, take) for token in chunk.tokens]
    chunks.close()
    return tokens


def cached(llm: mlxrun.LLM, session: Session, prompt: list[int]) -> int:
    """Tokens of a prompt that a session has not computed again."""
    completion = llm.generate(prompt, session=session, max_tokens=1, temperature=0, ignore_eos=True)
    return completion.usage.cached_tokens


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, MODEL.vocab, length).tolist()


def assert_consistent(session: Session) -> None:
    assert {cache.offset for cache in session.cache} == {len(session.tokens)}


@pytest.mark.parametrize(("window", "keep"), WINDOWS)
def test_greedy_tokens_are_a_naive_decoders(llm: mlxrun.LLM, window: int | None, keep: int) -> None:
    prompt = random_prompt(9)
    sampled = tokens_of(llm, llm.session(window=window, keep=keep), prompt, 12)
    text = list(prompt)
    for _ in range(12):
        text.append(int(naive_decoder.logits(MODEL, text, window, keep)[-1].argmax()))
    assert sampled == text[9:]


@pytest.mark.parametrize(("window", "keep"), WINDOWS)
@pytest.mark.parametrize("length", [1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 77])
def test_a_long_prompt_in_chunks_equals_one_pass(
    llm: mlxrun.LLM,
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    keep: int,
    length: int,
) -> None:
    prompt: list[int] = random_prompt(length)
    session = llm.session(window=window, keep=keep)
    seen: list[tuple[int, int]] = []
    logits: list[mx.array] = []
    sample = model_runner.sample
    monkeypatch.setattr(model_runner, "sample", lambda *a: (logits.append(a[2]), sample(*a))[1])
    tokens_of(llm, session, prompt, 1, progress=lambda done, total: seen.append((done, total)))
    whole = llm.model(mx.array([prompt]), llm.session(window=window, keep=keep).cache)[:, -1]
    (got,) = logits
    assert nmse(np.array(got), np.array(whole)) < 1e-10
    assert session.tokens == prompt
    assert_consistent(session)
    assert seen == [(done, length) for done in range(0, length, PREFILL_CHUNK)]


@pytest.mark.parametrize("length", [1, PREFILL_CHUNK, PREFILL_CHUNK + 77])
def test_every_tokens_logits_in_chunks_equal_one_pass(llm: mlxrun.LLM, length: int) -> None:
    prompt = random_prompt(length)
    got = llm.logits(prompt)
    whole = llm.model(mx.array([prompt]), llm.session().cache)[0]
    assert got.shape == whole.shape and got.dtype == mx.float32
    assert nmse(np.array(got), np.array(whole)) < 1e-10


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[list[int], int, int | None]]:
    """Prompts that share prefixes, how many tokens to sample, and where to interrupt."""
    base = random_prompt(24, seed=draw(st.integers(0, 3)))
    turns = []
    for _ in range(draw(st.integers(1, 4))):
        other = random_prompt(8, seed=draw(st.integers(4, 7)))
        prompt = base[: draw(st.integers(0, 24))] + other[: draw(st.integers(1, 8))]
        count = draw(st.integers(1, 6))
        turns.append((prompt, count, draw(st.one_of(st.none(), st.integers(0, count)))))
    return turns


@given(turns=conversations(), window=st.sampled_from(WINDOWS), seed=st.sampled_from([None, 3]))
@settings(max_examples=30)
def test_reusing_and_interrupting_never_changes_tokens(
    llm: mlxrun.LLM,
    turns: list[tuple[list[int], int, int | None]],
    window: tuple[int | None, int],
    seed: int | None,
) -> None:
    """One session through all turns, some cut short, against a cold session for each."""
    options: dict[str, Any] = {} if seed is None else {"temperature": 0.8, "seed": seed}
    most, keep = window
    warm = llm.session(window=most, keep=keep)
    for prompt, count, take in turns:
        cold = tokens_of(llm, llm.session(window=most, keep=keep), prompt, count, **options)
        before = list(warm.tokens)
        assert tokens_of(llm, warm, prompt, count, take, **options) == cold[:take]
        assert_consistent(warm)
        if take == 0:  # has not begun
            assert warm.tokens == before
            continue
        expected = [*prompt, *cold[:take]]
        assert warm.tokens == expected[: len(warm.tokens)]
        assert len(warm.tokens) >= len(prompt)


def test_only_new_tokens_are_computed(llm: mlxrun.LLM) -> None:
    session, prompt = llm.session(), random_prompt(20)
    completion = tokens_of(llm, session, prompt, 5)
    assert cached(llm, session, [*prompt, *completion, 7, 8]) == 24  # the last was never fed back
    before = llm.direct_engine.runner.num_computed
    assert cached(llm, session, [*prompt[:11], 9, 9]) == 11
    assert llm.direct_engine.runner.num_computed == before + 2
    assert cached(llm, session, prompt[:11]) == 10  # one is left, for its logits
    assert cached(llm, session, [250, 251]) == 0
    assert_consistent(session)


def test_a_window_that_cannot_go_back_starts_afresh(llm: mlxrun.LLM) -> None:
    session = llm.session(window=6, keep=2)
    tokens_of(llm, session, random_prompt(30), 5)
    prompt = [*random_prompt(10), 5, 5]
    assert cached(llm, session, prompt) == 0
    assert session.tokens == prompt
    assert_consistent(session)


@pytest.mark.parametrize(("window", "keep"), WINDOWS)
def test_forks_go_their_own_ways(llm: mlxrun.LLM, window: int | None, keep: int) -> None:
    prompt = random_prompt(12)
    session = llm.session(window=window, keep=keep)
    start = [*prompt, *tokens_of(llm, session, prompt, 4)]
    forks = [session, session.fork(), session.fork()]
    endings = [[5, 6, 7], [8, 9], [5, 6, 7, 8]]
    sampled = [
        tokens_of(llm, fork, start + ending, 4, take=2)
        for fork, ending in zip(forks, endings, strict=True)
    ]
    for fork, ending, first in zip(forks, endings, sampled, strict=True):
        text = start + ending
        cold = tokens_of(llm, llm.session(window=window, keep=keep), text, 4)
        assert first == cold[:2]
        assert tokens_of(llm, fork, text, 4) == cold
        assert_consistent(fork)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_while_waiting_for_a_token_leaves_a_good_session(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch, at: int, seeded: bool
) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 3} if seeded else {}
    prompt, session = random_prompt(10), llm.session()
    cold = tokens_of(llm, llm.session(), prompt, 6, **options)
    original, calls = model_runner.read_tokens, iter(range(10))

    def read(sampled: Any) -> list[model_runner.Token]:
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(sampled)

    monkeypatch.setattr(model_runner, "read_tokens", read)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(llm, session, prompt, 6, **options)
    monkeypatch.undo()
    assert_consistent(session)
    assert session.tokens == [*prompt, *cold[:at]]
    assert tokens_of(llm, session, prompt, 6, **options) == cold


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupt_in_the_middle_of_a_pass_heals_itself(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """Some layers have seen the tokens and some have not."""
    prompt, session = random_prompt(10), llm.session()
    cold = tokens_of(llm, llm.session(), [*prompt, 5, 6], 6)
    tokens_of(llm, session, prompt, 3)
    interrupt(monkeypatch, session.cache[layer])
    with pytest.raises(KeyboardInterrupt):
        tokens_of(llm, session, [*prompt, 5, 6], 6)
    monkeypatch.undo()
    assert_consistent(session)
    assert session.tokens[:10] == prompt
    assert tokens_of(llm, session, [*prompt, 5, 6], 6) == cold
    assert_consistent(session)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("read", [1, 2, 7])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 5}], ids=str)
def test_an_interrupt_changes_no_tokens_of_another_stream(
    llm: mlxrun.LLM,
    monkeypatch: pytest.MonkeyPatch,
    layer: int,
    read: int,
    options: dict[str, Any],
) -> None:
    """Its caches and its sampler may have been a step or two ahead."""
    options = options | {"max_tokens": 24, "ignore_eos": True, "repetition_penalty": 1.2}
    prompt = random_prompt(12)
    cold = llm.generate(prompt, session=llm.session(), **options).tokens
    running = llm.stream(prompt, session=llm.session(), **options)
    tokens = [token for chunk in islice(running, read) for token in chunk.tokens]
    session = llm.session()
    interrupt(monkeypatch, session.cache[layer])
    with pytest.raises(KeyboardInterrupt):
        tokens_of(llm, session, random_prompt(5, seed=1), 6)
    monkeypatch.undo()
    tokens += [token for chunk in running for token in chunk.tokens]
    assert tuple(tokens) == tuple(cold)


def interrupt(monkeypatch: pytest.MonkeyPatch, cache: Any) -> None:
    def attend(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "attend", attend)


def test_the_next_step_is_queued_before_a_token_is_read(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sample, read = model_runner.next_token, model_runner.read_tokens
    monkeypatch.setattr(
        model_runner, "next_token", lambda *a: (order.append("queue"), sample(*a))[1]
    )
    monkeypatch.setattr(
        model_runner, "read_tokens", lambda one: (order.append("read"), read(one))[1]
    )
    tokens_of(llm, llm.session(), random_prompt(4), 4)
    assert order == ["queue", "queue", "read", "queue", "read", "queue", "read", "read"]


def test_the_limit_is_kept_without_computing_beyond_it(llm: mlxrun.LLM) -> None:
    runner = llm.direct_engine.runner
    for limit in (1, 2, 5):
        session, before = llm.session(), runner.num_computed
        assert len(tokens_of(llm, session, random_prompt(4), limit)) == limit
        assert len(session.tokens) == 4 + limit - 1
        assert runner.num_computed - before == 4 + limit - 1


def test_a_session_knows_its_size(llm: mlxrun.LLM) -> None:
    session = llm.session()
    assert session.nbytes == 0
    tokens_of(llm, session, random_prompt(300), 1)
    layers, kv_heads, dim, capacity = 2, 2, 8, 512
    assert session.nbytes == 2 * layers * kv_heads * dim * capacity * 4


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_model_that_computes_no_numbers_says_so(tmp_path: Path, value: float) -> None:
    weights = {"output_norm.weight": np.full(32, value)}
    path = replace(MODEL, weights=weights).write(tmp_path / "x.gguf")
    broken = mlxrun.load(path, dtype="float32")
    with pytest.raises(NumericError, match=r"finite.*float32"):
        tokens_of(broken, broken.session(), [1, 2, 3], 4)
