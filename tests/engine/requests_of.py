"""Requests of tests, of tokens rather than text, and engines that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conformance.skeleton as conformance
import mlx.core as mx
import numpy as np

from converters.gguf.reader import read_gguf
from mlxrun.config import DEFAULT_CACHE, CacheConfig, EngineConfig
from mlxrun.engine.engine import Engine, Mode
from mlxrun.engine.input import InputProcessor
from mlxrun.engine.sequence import Sequence, Session
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.loader import load_model
from mlxrun.outputs import FinishReason, Request
from mlxrun.sampling.sampler import Sampler
from mlxrun.sampling_params import SamplingParams

VOCABULARY = 128
#: The token that ends a request which has an end.
END = 7


class NoText:
    """Stands for a tokenizer: every token is no text."""

    eog_ids = frozenset({END})
    vocab_size = VOCABULARY

    def token_bytes(self, token: int) -> bytes:
        return b""

    def detokenizer(self, **_: Any) -> Any:
        return SimpleNamespace(add=lambda token: "", finish=lambda: "")


class Unlimited(InputProcessor):
    """Requests that no model's context limits."""

    def limit(self, request: Request, **_: Any) -> int:
        return request.max_tokens or 1


def engine_of(
    model: Any,
    *,
    rows: int = 4,
    prefixes: PrefixCache | None = None,
    mode: Mode = "online",
    prefill: int | None = None,
    memory: int | None = None,
    queue: int = 1024,
    deterministic: bool = False,
    stall: float | None = None,
) -> Engine:
    """An engine that a test steps."""
    tokenizer: Any = NoText()
    config = EngineConfig(parallel=rows, queue=queue, deterministic=deterministic, stall=stall)
    cache = PrefixCache(0) if prefixes is None else prefixes
    inputs = Unlimited(model, tokenizer)
    engine = Engine(inputs, cache, config, mode=mode, prefill=prefill)
    engine.scheduler.memory = memory
    return engine


@dataclass
class Ask:
    """A request of a test, and its output."""

    prompt: list[int]
    limit: int
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    end: int | None = None
    sequence: Sequence | None = None

    def submit(
        self,
        engine: Engine,
        cache: CacheConfig = DEFAULT_CACHE,
        plan: Callable[[int], int] | None = None,
        session: Session | None = None,
        **more: Any,
    ) -> Sequence:
        ignore = self.end is None
        request = Request(self.prompt, self.params, self.limit, ignore_eos=ignore, **more)
        self.sequence = engine.prepare(request, session=session, cache_config=cache)
        if plan is not None:
            self.sequence.kv_cost = plan
        engine._inbox.put(self.sequence)
        return self.sequence

    @property
    def tokens(self) -> list[int]:
        chunks = self.sequence.chunks if self.sequence else []
        return [token for chunk in chunks for token in chunk.tokens]

    @property
    def reason(self) -> FinishReason | None:
        chunks = self.sequence.chunks if self.sequence else []
        return chunks[-1].finish_reason if chunks else None

    @property
    def cached(self) -> int:
        assert self.sequence is not None and self.sequence.output_processor is not None
        return self.sequence.output_processor.num_cached


def alone(model: Any, ask: Ask, cache: CacheConfig = DEFAULT_CACHE) -> list[int]:
    """The tokens of a request by a naive loop: one pass for the prompt, one for each token."""
    caches = model.make_cache(cache)
    for layer in caches:
        layer.prompt = len(ask.prompt)
    sampler = Sampler(ask.params, model.vocab_size, context_tokens=ask.prompt)
    logits = model(mx.array([ask.prompt]), caches, last_only=True)[:, -1]
    tokens: list[int] = []
    while len(tokens) < ask.limit and tokens[-1:] != [ask.end]:
        tokens.append(int(sampler.sample(logits).token.item()))
        logits = model(mx.array([tokens[-1:]]), caches)[:, -1]
    return tokens


def play(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine never ends")


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, rng.integers(1, longest)).tolist() for _ in range(count)]


def model_of(name: str, folder: Path) -> Any:
    path = conformance.read(name).write(folder / f"{name}.gguf")
    return load_model(read_gguf(path), dtype="float32").model
