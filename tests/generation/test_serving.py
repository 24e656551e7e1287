"""Sequences that are served together get the tokens that each gets alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conformance.skeleton as conformance
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.errors import MemoryLimitError, MlxrunError, NumericError, QueueFullError
from mlxrun.generation.engine import Session, decode, prefill
from mlxrun.generation.sampling import Sampler
from mlxrun.generation.serving import Job, Service
from mlxrun.generation.stepping import Stepper
from mlxrun.loader import load_model
from mlxrun.outputs import Chunk, FinishReason, Request, SamplingParams

#: How many random schedules to play.
SCHEDULES = int(os.environ.get("MLXRUN_SCHEDULES", "60"))
VOCABULARY = 128
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


@dataclass
class Counted:
    """Stands for a reply: counts tokens, knows no text."""

    limit: int
    end: int | None = None
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    cached: int = 0

    def add(self, token: int, logprobs: Any = ()) -> Chunk | None:
        self.tokens.append(token)
        if token == self.end:
            self.reason = "stop"
            return None
        if len(self.tokens) == self.limit:
            self.reason = "length"
        return Chunk("", (token,), logprobs)

    def finish(self, reason: FinishReason | None = None, *, peak_memory: int = 0) -> Chunk:
        return Chunk("", (), (), reason or self.reason or "length")


@dataclass
class Ask:
    """One request of a test, and what it got."""

    prompt: list[int]
    limit: int
    params: SamplingParams
    end: int | None = None
    got: list[Chunk | MlxrunError] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [t for item in self.got if isinstance(item, Chunk) for t in item.tokens]

    @property
    def reason(self) -> FinishReason | None:
        last = self.got[-1] if self.got else None
        return last.finish_reason if isinstance(last, Chunk) else None

    def submit(self, service: Service, model: Any, **more: Any) -> int:
        request = Request(self.prompt, self.params, self.limit, **more)
        sampler = Sampler(self.params, VOCABULARY, context_tokens=self.prompt)
        reply: Any = Counted(self.limit, self.end)
        job = Job(request, sampler, reply, self.limit, model.make_cache(), 0, self.got.append)
        return service.submit(job)


def alone(model: Any, ask: Ask) -> list[int]:
    """What a request gets with nobody beside it, from the loop of a single sequence."""
    session = Session(model.make_cache, owner=model)
    sampler = Sampler(ask.params, VOCABULARY, context_tokens=ask.prompt)
    tokens = []
    for step in decode(
        Stepper(model), session, sampler, prefill(model, session, ask.prompt), ask.limit
    ):
        if step.token == ask.end:
            break
        tokens.append(step.token)
    return tokens


def play(service: Service) -> None:
    for _ in range(10_000):
        if not service.busy:
            return
        service.step()
    raise AssertionError("the service never ends")


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, rng.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Tiny(hidden=32, ffn=48, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    return load_model(read_gguf(path), dtype="float32").model


def model_of(name: str, folder: Path) -> Any:
    path = conformance.read(name).write(folder / f"{name}.gguf")
    return load_model(read_gguf(path), dtype="float32").model


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
    service = Service(tiny, rows=9, deterministic=deterministic)
    for ask in asks:
        ask.submit(service, tiny)
    play(service)
    assert [ask.tokens for ask in asks] == [alone(tiny, ask) for ask in asks]
    assert {ask.reason for ask in asks} == {"length"}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_memory(tmp_path: Path, name: str) -> None:
    model = model_of(name, tmp_path)
    asks = [
        Ask(prompt, 4 + 5 * i % 17, PARAMS["greedy" if i % 2 else "seeded"](i))
        for i, prompt in enumerate(prompts(6, longest=70, seed=3))
    ]
    service = Service(model, rows=4)
    for ask in asks:
        ask.submit(service, model)
    play(service)
    assert [ask.tokens for ask in asks] == [alone(model, ask) for ask in asks]


def test_random_schedules(tiny: Any) -> None:
    """Joins, leaves and cancellations at any step: nobody's tokens change."""
    pool = [
        Ask(prompt, 2 + 3 * i % 11, PARAMS["mixed"](i), end=7 if i % 3 == 0 else None)
        for i, prompt in enumerate(prompts(14, longest=40, seed=5))
    ]
    wanted = [alone(tiny, ask) for ask in pool]
    for seed in range(SCHEDULES):
        rng = np.random.default_rng(seed)
        service = Service(tiny, rows=int(rng.integers(1, 6)), deterministic=seed % 10 == 0)
        coming = [int(i) for i in rng.permutation(len(pool))[: rng.integers(2, 9)]]
        running: dict[int, tuple[int, Ask]] = {}
        cancelled: set[int] = set()
        while coming or service.busy:
            if coming and rng.random() < 0.5:
                number = coming.pop()
                own = pool[number]
                ask = Ask(own.prompt, own.limit, own.params, own.end)
                running[ask.submit(service, tiny)] = number, ask
            elif running and rng.random() < 0.05:
                key = int(rng.choice(list(running)))
                if service.cancel(key):
                    cancelled.add(key)
            else:
                service.step()
        for key, (number, ask) in running.items():
            expected = wanted[number]
            if key in cancelled:
                assert ask.tokens == expected[: len(ask.tokens)], (seed, number)
                assert ask.reason == "cancelled"
            else:
                assert ask.tokens == expected, (seed, number)
        assert service.scheduler.live == service.scheduler.waiting == 0


@pytest.mark.parametrize("stall", [0.1, math.inf], ids=["online", "offline"])
def test_when_tokens_are_read(tiny: Any, stall: float) -> None:
    """The next step is queued before, except where a first token is waited for.

    A sequence that ends is computed once more at most, and never beyond its limit.
    """
    asks = [Ask(prompt, 10, PARAMS["greedy"](0)) for prompt in prompts(3, longest=6)]
    service = Service(tiny, rows=3, stall=stall)
    for ask in asks:
        ask.submit(service, tiny)
    online = math.isfinite(stall)
    for step in range(3):
        assert {len(ask.tokens) for ask in asks} == {step if online or not step else step - 1}
        service.step()
        online = online and step == 0
    play(service)
    decoded = service.batch.computed - sum(len(ask.prompt) for ask in asks)
    assert decoded == sum(ask.limit - 1 for ask in asks)
    figures = service.figures
    assert (figures.slots, figures.wasted) == (service.batch.computed, 0)
    assert figures.steps == 10


def test_how_much_is_read_at_once_is_learnt_from_steps(tiny: Any) -> None:
    """Where any delay is too long, what follows the first step is read token by token."""
    ask = Ask([5, 6, 7, 8] * 50, 1, PARAMS["greedy"](0))
    service = Service(tiny, rows=1, stall=1e-9, beside=64)
    ask.submit(service, tiny)
    play(service)
    assert service.figures.steps == 1 + 200 - 64
    assert ask.tokens == alone(tiny, ask)


def test_one_bad_sequence_fails_alone(tmp_path: Path) -> None:
    bad = np.ones((VOCABULARY + 160, 32), np.float32) * 0.1
    bad[9] = np.inf
    model = Tiny(hidden=32, ffn=48, vocab=VOCABULARY + 160, weights={"token_embd.weight": bad})
    loaded = load_model(read_gguf(model.write(tmp_path / "x.gguf")), dtype="float32").model
    fine = Ask([3, 4, 5], 5, PARAMS["greedy"](0), end=None)
    poor = Ask([3, 9, 5], 5, PARAMS["greedy"](0))
    service = Service(loaded, rows=2)
    for ask in (fine, poor):
        ask.submit(service, loaded)
    play(service)
    assert isinstance(poor.got[-1], NumericError)
    assert fine.tokens == alone(loaded, fine)


def test_deadlines_priorities_and_refusals(tiny: Any) -> None:
    service = Service(tiny, rows=1, queue=2, memory=100)
    late, first, second = (Ask([5, 6], 400, PARAMS["greedy"](0)) for _ in range(3))
    late.submit(service, tiny, deadline=0.05)
    service.step()
    second.limit = first.limit = 2
    second.submit(service, tiny)
    first.submit(service, tiny, priority=1)
    with pytest.raises(QueueFullError):
        late.submit(service, tiny)
    play(service)
    assert late.reason == "deadline"
    assert late.tokens == alone(tiny, Ask([5, 6], len(late.tokens), late.params))
    assert first.tokens == second.tokens
    request = Request([5], SamplingParams(), 1)
    reply: Any = Counted(1)
    job = Job(request, Sampler(request.params, VOCABULARY), reply, 1, [], 0, first.got.append)
    with pytest.raises(MemoryLimitError):
        service.submit(job, cost=101)


def test_memory_does_not_grow_with_requests(tiny: Any) -> None:
    service = Service(tiny, rows=4)

    def serve(count: int) -> int:
        for prompt in prompts(count, longest=12, seed=count):
            Ask(prompt, 3, PARAMS["mixed"](count)).submit(service, tiny)
        play(service)
        mx.clear_cache()
        return mx.get_active_memory()

    serve(20)
    before = serve(20)
    after = serve(100)
    assert after - before < 10 * 1024
