"""Prefixes that sessions, batches and engines of one model share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun import llm as llm_module
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.engine.sequence import Session
from mlxrun.errors import ParameterError
from mlxrun.lock import device_lock

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
PROMPT = np.random.default_rng(0).integers(3, 288, PREFILL_CHUNK + 90).tolist()


@pytest.fixture
def llm(tmp_path: Path) -> mlxrun.LLM:
    return mlxrun.load(Tiny(hidden=32, ffn=48).write(tmp_path / "x.gguf"))


def test_a_new_session_starts_from_the_prefix_of_another(llm: mlxrun.LLM) -> None:
    first = llm.session()
    completion = llm.generate(PROMPT, session=first, **GREEDY)
    assert completion.usage.cached_tokens == 0
    following = [*PROMPT, *completion.tokens, 7, 8]
    again = llm.generate(following, session=llm.session(), **GREEDY)
    assert again.usage.cached_tokens == len(PROMPT) + 4
    assert again.tokens == llm.generate(following, session=first, **GREEDY).tokens
    assert llm.generate(PROMPT, session=llm.session(window=9), **GREEDY).usage.cached_tokens == 0


def test_short_turns_are_shared_too(llm: mlxrun.LLM) -> None:
    session, text = llm.session(), PROMPT[:3]
    for turn in range(6):
        text = [*text, *llm.generate(text, session=session, **GREEDY).tokens, 7 + turn]
    again = llm.generate(text, session=llm.session(), **GREEDY)
    assert again.usage.cached_tokens == len(text) - 2  # a last token was never fed back


def test_without_a_session_whole_chunks_are_taken_over(llm: mlxrun.LLM) -> None:
    options = GREEDY | {"temperature": 1.0, "seed": 3}
    first, second = (llm.generate(PROMPT, **options) for _ in range(2))
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, PREFILL_CHUNK)
    assert first.tokens == second.tokens


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "in a session"])
def test_who_finds_nothing_has_asked(llm: mlxrun.LLM, kept: bool) -> None:
    for first in range(5):
        session = llm.session() if kept else None
        llm.generate([9 + first, *PROMPT], session=session, **GREEDY)
    figures = llm.prefix_cache.figures
    assert (figures.lookups, figures.hits, figures.tokens) == (5, 0, 0)
    completion = llm.generate([9, *PROMPT], session=llm.session() if kept else None, **GREEDY)
    figures = llm.prefix_cache.figures
    assert (figures.lookups, figures.hits, figures.tokens) == (6, 1, completion.usage.cached_tokens)


def test_a_prefix_that_a_session_copied_is_not_in_use(llm: mlxrun.LLM) -> None:
    """They are copies: the cache may evict the originals."""
    sessions = [llm.session(), llm.session(), None, None]
    for session in sessions:
        llm.generate(PROMPT, session=session, **GREEDY)
    assert llm.prefix_cache.figures.hits == 2
    llm.prefix_cache.clear()
    assert llm.prefix_cache.nbytes == 0


def test_batches_and_engines_share_with_sessions(llm: mlxrun.LLM) -> None:
    cold = llm.generate(PROMPT, session=llm.session(), **GREEDY)
    prompts = [[*PROMPT, 5], [*PROMPT[:50], 6, 7]]
    cached = [completion.usage.cached_tokens for completion in llm.batch(prompts, **GREEDY)]
    assert cached == [len(PROMPT), 50]
    with llm.engine() as engine:
        completion = engine.submit(PROMPT, **GREEDY).result()
    assert completion.usage.cached_tokens == len(PROMPT) - 1
    assert completion.tokens == cold.tokens
    figures = llm.prefix_cache.figures
    assert figures.hits == 3 and figures.tokens == len(PROMPT) + 50 + len(PROMPT) - 1
    assert 0 < figures.nbytes <= figures.budget


def test_threads_find_one_prefix_cache(llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    known = llm_module.room

    def slow() -> int:
        time.sleep(0.05)  # so that all come before the first is done
        return known()

    monkeypatch.setattr(llm_module, "room", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: llm.prefix_cache, range(4)))
    assert all(one is llm.prefix_cache for one in found)


@pytest.mark.parametrize("touch", [Session.fork, Session.reset, lambda one: one.rewind(9)])
def test_a_session_is_not_touched_while_another_thread_computes(
    llm: mlxrun.LLM, touch: Callable[[Session], object]
) -> None:
    session = llm.session()
    llm.generate(PROMPT[:20], session=session, **GREEDY)
    thread = threading.Thread(target=touch, args=[session])
    with device_lock:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and len(session.tokens) == 24
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_it_can_be_turned_off_or_kept_apart(llm: mlxrun.LLM) -> None:
    for _ in range(2):
        (completion,) = llm.batch([PROMPT], prefix_bytes=0, **GREEDY)
        assert completion.usage.cached_tokens == 0
    assert llm.prefix_cache.nbytes == 0
    with llm.engine(prefix_bytes=10**7) as engine:
        completions = [engine.submit(PROMPT, **GREEDY).result() for _ in range(2)]
    assert [r.usage.cached_tokens for r in completions] == [0, len(PROMPT) - 1]
    assert llm.prefix_cache.nbytes == 0
    llm.generate(PROMPT, session=llm.session(), **GREEDY)
    assert llm.prefix_cache.nbytes > 0
    llm.prefix_cache.budget = 0
    assert llm.prefix_cache.nbytes == 0
    for _ in range(2):
        assert llm.generate(PROMPT, session=llm.session(), **GREEDY).usage.cached_tokens == 0
    with pytest.raises(ParameterError, match="prefix_bytes"):
        llm.batch([PROMPT], prefix_bytes=-1)
