"""Sequences that are served together get the tokens that each gets alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from requests_of import VOCABULARY, Ask, alone, engine_of, model_of, play, prompts
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.engine.engine import Engine, Mode
from mlxrun.errors import NumericError
from mlxrun.loader import load_model
from mlxrun.sampling_params import SamplingParams

#: How many random schedules to play.
SCHEDULES = int(os.environ.get("MLXRUN_SCHEDULES", "60"))
#: One of each kind of memory and of layer.
KINDS = (
    "llama-mqa",
    "qwen3-narrow",
    "gemma2-caps",
    "gemma3-windows",
    "gpt-oss-small",
    "deepseek2-lite",
    "mixtral-8x",
    "mistral3-warm",
    "bloom-560m",
    "gpt2-small",
    "mamba2-130m",
    "falcon-h1-500m",
    "qwen3next-80b",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Tiny(hidden=32, ffn=48, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    return load_model(read_gguf(path), dtype="float32").model


def cancel(engine: Engine, ask: Ask) -> None:
    assert ask.sequence is not None
    engine.abort(ask.sequence)


PARAMS: dict[str, Callable[[int], SamplingParams]] = {
    "greedy": lambda i: SamplingParams(temperature=0),
    "seeded": lambda i: SamplingParams(temperature=0.9, seed=i),
    "mixed": lambda i: [
        SamplingParams(temperature=0),
        SamplingParams(seed=i),
        SamplingParams(temperature=1.3, top_k=0, top_p=1, min_p=0.1, seed=i),
        SamplingParams(temperature=0, repetition_penalty=1.3, penalty_last_n=-1),
        SamplingParams(seed=i, dry_multiplier=0.8, logprobs=3),
        SamplingParams(seed=i, mirostat=2),
        SamplingParams(seed=i, presence_penalty=0.5, logit_bias={5: 2.0}),
    ][i % 7],
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["joint", "deterministic"])
@pytest.mark.parametrize("kind", PARAMS)
def test_twenty_ragged_prompts(tiny: Any, kind: str, deterministic: bool) -> None:
    asks = [
        Ask(prompt, 1 + 7 * i % 23, PARAMS[kind](i))
        for i, prompt in enumerate(prompts(20, longest=90))
    ]
    engine = engine_of(tiny, rows=9, deterministic=deterministic)
    for ask in asks:
        ask.submit(engine)
    play(engine)
    assert [ask.tokens for ask in asks] == [alone(tiny, ask) for ask in asks]
    assert {ask.reason for ask in asks} == {"length"}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_memory(tmp_path: Path, name: str) -> None:
    model = model_of(name, tmp_path)
    asks = [
        Ask(prompt, 4 + 5 * i % 17, PARAMS["greedy" if i % 2 else "seeded"](i))
        for i, prompt in enumerate(prompts(6, longest=70, seed=3))
    ]
    engine = engine_of(model, rows=4)
    for ask in asks:
        ask.submit(engine)
    play(engine)
    assert [ask.tokens for ask in asks] == [alone(model, ask) for ask in asks]


def test_random_schedules(tiny: Any) -> None:
    """Joins, leaves and cancellations at any step: no sequence's tokens change."""
    pool = [
        Ask(prompt, 2 + 3 * i % 11, PARAMS["mixed"](i), end=7 if i % 3 == 0 else None)
        for i, prompt in enumerate(prompts(14, longest=40, seed=5))
    ]
    wanted = [alone(tiny, ask) for ask in pool]
    for seed in range(SCHEDULES):
        rng = np.random.default_rng(seed)
        engine = engine_of(tiny, rows=int(rng.integers(1, 6)), deterministic=seed % 10 == 0)
        coming = [int(i) for i in rng.permutation(len(pool))[: rng.integers(2, 9)]]
        running: list[tuple[int, Ask]] = []
        while coming or engine.busy:
            if coming and rng.random() < 0.5:
                number = coming.pop()
                own = pool[number]
                ask = Ask(own.prompt, own.limit, own.params, own.end)
                ask.submit(engine)
                running.append((number, ask))
            elif running and rng.random() < 0.05:
                cancel(engine, running[rng.integers(len(running))][1])
            else:
                engine.step()
        for number, ask in running:
            expected = wanted[number]
            if ask.reason == "cancelled":
                assert ask.tokens == expected[: len(ask.tokens)], (seed, number)
            else:
                assert ask.tokens == expected, (seed, number)
        assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_when_tokens_are_read(tiny: Any, mode: Mode) -> None:
    """The next step is queued before, except where a first token is waited for.

    A sequence that ends is computed once more at most, and never beyond its limit.
    """
    asks = [Ask(prompt, 10, PARAMS["greedy"](0)) for prompt in prompts(3, longest=6)]
    engine = engine_of(tiny, rows=3, mode=mode)
    for ask in asks:
        ask.submit(engine)
    online = mode == "online"
    for step in range(3):
        assert {len(ask.tokens) for ask in asks} == {step if online or not step else step - 1}
        engine.step()
        online = online and step == 0
    play(engine)
    decoded = engine.runner.num_computed - sum(len(ask.prompt) for ask in asks)
    assert decoded == sum(ask.limit - 1 for ask in asks)
    assert engine.runner.num_idle == 0
    assert engine.num_steps == 10


def test_how_much_is_read_at_once_is_learned_from_steps(tiny: Any) -> None:
    """Where any delay is too long, what follows the first step is read token by token."""
    ask = Ask([5, 6, 7, 8] * 50, 1, PARAMS["greedy"](0))
    engine = engine_of(tiny, rows=1, stall=1e-9, prefill=64)
    ask.submit(engine)
    play(engine)
    assert engine.num_steps == 1 + 200 - 64
    assert ask.tokens == alone(tiny, ask)


def test_one_bad_sequence_fails_alone(tmp_path: Path) -> None:
    bad = np.ones((VOCABULARY + 160, 32), np.float32) * 0.1
    bad[9] = np.inf
    model = Tiny(hidden=32, ffn=48, vocab=VOCABULARY + 160, weights={"token_embd.weight": bad})
    loaded = load_model(read_gguf(model.write(tmp_path / "x.gguf")), dtype="float32").model
    fine = Ask([3, 4, 5], 5, PARAMS["greedy"](0), end=None)
    poor = Ask([3, 9, 5], 5, PARAMS["greedy"](0))
    engine = engine_of(loaded, rows=2)
    for ask in (fine, poor):
        ask.submit(engine)
    play(engine)
    assert poor.sequence is not None
    assert isinstance(poor.sequence.error, NumericError)
    assert fine.tokens == alone(loaded, fine)


def test_deadlines_and_priorities_of_steps(tiny: Any) -> None:
    engine = engine_of(tiny, rows=1)
    late, first, second = (Ask([5, 6], 400, PARAMS["greedy"](0)) for _ in range(3))
    late.submit(engine, deadline=0.05)
    engine.step()
    second.limit = first.limit = 2
    second.submit(engine)
    first.submit(engine, priority=1)
    play(engine)
    assert late.reason == "deadline"
    assert late.tokens == alone(tiny, Ask([5, 6], len(late.tokens), late.params))
    assert first.tokens == second.tokens


def test_memory_does_not_grow_with_requests(tiny: Any) -> None:
    engine = engine_of(tiny, rows=4)

    def serve(count: int) -> int:
        for prompt in prompts(count, longest=12, seed=count):
            Ask(prompt, 3, PARAMS["mixed"](count)).submit(engine)
        play(engine)
        mx.clear_cache()
        return mx.get_active_memory()

    serve(20)
    before = serve(20)
    after = serve(100)
    assert after - before < 10 * 1024
