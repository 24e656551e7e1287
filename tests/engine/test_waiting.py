"""Prompts of a batch whose turn has not come: nothing is made for them, and order is kept."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.engine.engine import Engine
from mlxrun.kv_cache.dense import RowCache
from mlxrun.lock import device_lock
from mlxrun.sampling.sampler import Sampler

OPTIONS: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "prefix_bytes": 0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    return mlxrun.load(Tiny(hidden=32, ffn=48).write(tmp_path_factory.mktemp("waiting") / "m.gguf"))


def alive(*kinds: type) -> int:
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


def test_waiting_requests_have_neither_caches_nor_samplers(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, most, before = Engine.step, 0, alive(RowCache, Sampler)

    def counted(self: Engine) -> None:
        nonlocal most
        step(self)
        most = max(most, alive(RowCache, Sampler) - before)

    monkeypatch.setattr(Engine, "step", counted)
    got = llm.batch([[5, 6, 7]] * 60, parallel=3, max_tokens=2, **OPTIONS)
    assert len(got) == 60
    layers = llm.model.summary.layers
    # A sampler and caches of its own for each that is live, and the rows that they share.
    assert most <= 3 * (1 + layers) + 2 * layers


def test_a_higher_priority_goes_first_and_the_rest_in_order(llm: mlxrun.LLM) -> None:
    heard: list[int] = []
    priorities = [0, 0, 0, 2, 0, 1]
    llm.batch(
        [[5, 6, 7]] * 6,
        parallel=1,
        priority=priorities,
        max_tokens=1,
        on_token=lambda number, _: heard.append(number),
        **OPTIONS,
    )
    assert list(dict.fromkeys(heard)) == [3, 5, 0, 1, 2, 4]


def test_a_deadline_counts_from_when_an_engine_was_asked(llm: mlxrun.LLM) -> None:
    """Not from when its thread, which others keep from computing, takes the request in."""
    with llm.engine(parallel=1) as engine:
        with device_lock:
            handle = engine.submit([5, 6, 7], max_tokens=5, ignore_eos=True, deadline=0.05)
            time.sleep(0.1)
        completion = handle.result(PATIENCE)
    assert (completion.finish_reason, completion.tokens) == ("deadline", [])


def test_a_deadline_counts_from_the_start_of_the_batch(llm: mlxrun.LLM) -> None:
    deadlines = [None, 0.001, None, 600]
    got = llm.batch([[5, 6, 7]] * 4, parallel=1, deadline=deadlines, max_tokens=20, **OPTIONS)
    assert [completion.finish_reason for completion in got] == [
        "length",
        "deadline",
        "length",
        "length",
    ]
    assert got[1].tokens == []
    assert got[0].tokens == got[2].tokens == got[3].tokens
