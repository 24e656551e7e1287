"""How many steps a short prompt waits for its first token behind a long one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from requests_of import VOCABULARY, Ask, alone, engine_of, play
from test_serving import PARAMS
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.engine.engine import Engine
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.loader import load_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("tiny") / "x.gguf"
    Tiny(hidden=32, ffn=48, vocab=VOCABULARY + 160).write(path)
    return load_model(read_gguf(path), dtype="float32").model


@pytest.fixture(autouse=True)
def _equal_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the engine all steps take the same time, whatever else this machine does."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: 0.0)
    monkeypatch.setattr("mlxrun.engine.engine.time", clock)


def ask(count: int, seed: int, before: tuple[int, ...] = (), limit: int = 3) -> Ask:
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()
    return Ask([*before, *tokens], limit, PARAMS["greedy"](0))


def steps_to_first(engine: Engine, asked: Ask) -> int:
    for steps in range(1, 1000):
        engine.step()
        if asked.tokens:
            return steps
    raise AssertionError("no token ever comes")


@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["alone", "sharing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_its_first_token_comes_at_the_end_of_the_next_step(
    tiny: Any, budget: int, steps: int
) -> None:
    engine = engine_of(tiny, rows=4, prefill=16, stall=60.0, prefixes=PrefixCache(budget))
    long, short = ask(200, seed=1), ask(16, seed=2)
    long.submit(engine)
    for _ in range(steps):
        engine.step()
    short.submit(engine)
    assert steps_to_first(engine, short) == 1
    play(engine)
    assert long.tokens == alone(tiny, long)
    assert short.tokens == alone(tiny, short)


def test_a_long_conversation_of_which_most_is_known_counts_as_short(tiny: Any) -> None:
    engine = engine_of(tiny, rows=4, prefill=16, stall=60.0, prefixes=PrefixCache(1 << 30))
    first = ask(180, seed=1)
    first.submit(engine)
    play(engine)
    ask(100, seed=2).submit(engine)
    engine.step()
    turn = ask(6, seed=3, before=tuple(first.prompt))
    turn.submit(engine)
    assert steps_to_first(engine, turn) == 1
    play(engine)
    assert turn.tokens == alone(tiny, turn)
    assert turn.cached == 180


def test_one_that_waits_for_a_prefix_is_ranked_without_its_tokens(tiny: Any) -> None:
    """It waits until the prefix is prefilled, not until the whole prompt of the other is."""
    prefixes = PrefixCache(1 << 30, min_prefix_len=8)
    engine = engine_of(tiny, rows=4, prefill=16, stall=60.0, prefixes=prefixes)
    long = ask(400, seed=1)
    long.submit(engine)
    engine.step()
    short = ask(4, seed=2, before=tuple(long.prompt[:40]))
    short.submit(engine)
    assert steps_to_first(engine, short) == 3  # 17 to 32, 33 to 40, its own
    play(engine)
    assert short.tokens == alone(tiny, short)
