"""Sessions and the decode loop: whatever the way there, the tokens are those of a cold start."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import naive_decoder
import numpy as np
import pytest
from cache_configs import caching
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Tiny, nmse

from converters.gguf.reader import read_gguf
from mlxrun.errors import NumericError
from mlxrun.generation import engine, stepping
from mlxrun.generation.engine import PREFILL_CHUNK, Session, decode, prefill, score
from mlxrun.generation.sampling import Sampler
from mlxrun.generation.stepping import Stepper
from mlxrun.loader import load_model
from mlxrun.models.transformer import Transformer
from mlxrun.sampling_params import SamplingParams

MODEL = Tiny(hidden=32, heads=4, kv_heads=2, ffn=64, layers=2)
WINDOWS: list[tuple[int | None, int]] = [(None, 0), (6, 0), (5, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = MODEL.write(tmp_path_factory.mktemp("engine") / "x.gguf")
    return load_model(read_gguf(path), dtype="float32").model


def session_of(model: Transformer, window: int | None = None, keep: int = 0) -> Session:
    return Session(lambda: model.make_cache(caching(window=window, keep=keep)), window is not None)


def tokens_of(
    model: Transformer,
    session: Session,
    prompt: list[int],
    count: int,
    take: int | None = None,
    **params: Any,
) -> list[int]:
    """Up to ``count`` tokens; with ``take`` the iterator is closed after so many."""
    settings = SamplingParams(**({"temperature": 0.0} | params))
    sampler = Sampler(settings, MODEL.vocab, context_tokens=prompt)
    steps = decode(Stepper(model), session, sampler, prefill(model, session, prompt), count)
    drawn = [step.token for step in islice(steps, take)]
    steps.close()
    return drawn


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, MODEL.vocab, length).tolist()


def assert_consistent(session: Session) -> None:
    assert {cache.offset for cache in session.cache} == {len(session.tokens)}


@pytest.mark.parametrize(("window", "keep"), WINDOWS)
def test_greedy_tokens_are_a_naive_decoders(
    model: Transformer, window: int | None, keep: int
) -> None:
    prompt = random_prompt(9)
    drawn = tokens_of(model, session_of(model, window, keep), prompt, 12)
    text = list(prompt)
    for _ in range(12):
        text.append(int(naive_decoder.logits(MODEL, text, window, keep)[-1].argmax()))
    assert drawn == text[9:]


@pytest.mark.parametrize(("window", "keep"), WINDOWS)
@pytest.mark.parametrize("length", [1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 77])
def test_a_long_prompt_in_chunks_equals_one_pass(
    model: Transformer, window: int | None, keep: int, length: int
) -> None:
    prompt, seen = random_prompt(length), []
    session = session_of(model, window, keep)
    got = prefill(model, session, prompt, lambda done, total: seen.append((done, total)))
    cache = model.make_cache(caching(window=window, keep=keep))
    whole = model(mx.array([prompt]), cache)[:, -1]
    assert nmse(np.array(got), np.array(whole)) < 1e-10
    assert session.tokens == prompt
    assert_consistent(session)
    assert seen == [(done, length) for done in range(0, length, PREFILL_CHUNK)]


@pytest.mark.parametrize("length", [1, PREFILL_CHUNK, PREFILL_CHUNK + 77])
def test_every_tokens_logits_in_chunks_equal_one_pass(model: Transformer, length: int) -> None:
    prompt = random_prompt(length)
    got = score(model, prompt)
    whole = model(mx.array([prompt]), model.make_cache())[0]
    assert got.shape == whole.shape and got.dtype == mx.float32
    assert nmse(np.array(got), np.array(whole)) < 1e-10


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[list[int], int, int | None]]:
    """Prompts that share beginnings, how many tokens to draw, and where to interrupt."""
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
    model: Transformer,
    turns: list[tuple[list[int], int, int | None]],
    window: tuple[int | None, int],
    seed: int | None,
) -> None:
    """One session through all turns, some cut short, against a cold session for each."""
    params: dict[str, Any] = {} if seed is None else {"temperature": 0.8, "seed": seed}
    warm = session_of(model, *window)
    for prompt, count, take in turns:
        cold = tokens_of(model, session_of(model, *window), prompt, count, **params)
        assert tokens_of(model, warm, prompt, count, take, **params) == cold[:take]
        assert_consistent(warm)
        held = [*prompt, *cold[:take]]
        assert warm.tokens == held[: len(warm.tokens)]
        assert len(warm.tokens) >= len(prompt)


def test_only_new_tokens_are_computed(model: Transformer) -> None:
    session = session_of(model)
    prompt = random_prompt(20)
    reply = tokens_of(model, session, prompt, 5)
    assert session.reuse([*prompt, *reply, 7, 8]) == 24  # the last token was never fed back
    assert session.reuse([*prompt[:11], 9, 9]) == 11
    assert session.reuse(prompt[:11]) == 10  # one is left, for its logits
    assert session.reuse([250, 251]) == 0
    assert_consistent(session)


def test_a_window_that_cannot_go_back_starts_afresh(model: Transformer) -> None:
    session = session_of(model, 6, 2)
    tokens_of(model, session, random_prompt(30), 5)
    assert session.reuse([*random_prompt(10), 5, 5]) == 0
    assert session.tokens == []
    assert_consistent(session)


@pytest.mark.parametrize(("window", "keep"), WINDOWS)
def test_forks_go_their_own_ways(model: Transformer, window: int | None, keep: int) -> None:
    prompt = random_prompt(12)
    session = session_of(model, window, keep)
    start = [*prompt, *tokens_of(model, session, prompt, 4)]
    forks = [session, session.fork(), session.fork()]
    endings = [[5, 6, 7], [8, 9], [5, 6, 7, 8]]
    drawn = [
        tokens_of(model, fork, start + ending, 4, take=2)
        for fork, ending in zip(forks, endings, strict=True)
    ]
    for fork, ending, first in zip(forks, endings, drawn, strict=True):
        text = start + ending
        cold = tokens_of(model, session_of(model, window, keep), text, 4)
        assert first == cold[:2]
        assert tokens_of(model, fork, text, 4) == cold
        assert_consistent(fork)


@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_while_waiting_for_a_token_leaves_a_good_session(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    prompt, session = random_prompt(10), session_of(model)
    cold = tokens_of(model, session_of(model), prompt, 6)
    original, calls = engine.Step.rows_of, iter(range(10))

    def of(sampled: Any) -> list[engine.Step]:
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(sampled)

    monkeypatch.setattr(engine.Step, "rows_of", of)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(model, session, prompt, 6)
    monkeypatch.undo()
    assert_consistent(session)
    assert session.tokens == [*prompt, *cold[:at]]
    assert tokens_of(model, session, prompt, 6) == cold


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupt_in_the_middle_of_a_pass_heals_itself(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """Some layers have seen the tokens and some have not."""
    prompt, session = random_prompt(10), session_of(model)
    cold = tokens_of(model, session_of(model), [*prompt, 5, 6], 6)
    tokens_of(model, session, prompt, 3)
    cache = session.cache[layer]

    def attend(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "attend", attend)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, session, [*prompt, 5, 6])
    monkeypatch.undo()
    assert tokens_of(model, session, [*prompt, 5, 6], 6) == cold
    assert_consistent(session)


def test_the_next_step_is_queued_before_a_token_is_read(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    draws, of = stepping.next_token, engine.Step.rows_of
    monkeypatch.setattr(stepping, "next_token", lambda *a: (order.append("queue"), draws(*a))[1])
    monkeypatch.setattr(engine.Step, "rows_of", lambda s: (order.append("read"), of(s))[1])
    tokens_of(model, session_of(model), random_prompt(4), 3)
    assert order == ["queue", "queue", "read", "queue", "read", "read"]


def test_the_limit_is_kept_without_computing_beyond_it(model: Transformer) -> None:
    for limit in (1, 2, 5):
        session = session_of(model)
        assert len(tokens_of(model, session, random_prompt(4), limit)) == limit
        assert len(session.tokens) == 4 + limit - 1


def test_a_session_knows_its_size(model: Transformer) -> None:
    session = session_of(model)
    assert session.nbytes == 0
    tokens_of(model, session, random_prompt(300), 1)
    layers, kv_heads, dim, capacity = 2, 2, 8, 512
    assert session.nbytes == 2 * layers * kv_heads * dim * capacity * 4


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_model_that_computes_no_numbers_says_so(tmp_path: Path, value: float) -> None:
    weights = {"output_norm.weight": np.full(32, value)}
    path = replace(MODEL, weights=weights).write(tmp_path / "x.gguf")
    broken = load_model(read_gguf(path), dtype="float32").model
    session = session_of(broken)
    with pytest.raises(NumericError, match=r"finite.*float32"):
        tokens_of(broken, session, [1, 2, 3], 4)
