"""Batch invariance: whether a batch gives each request the tokens that it gets alone, measured.

Products of many rows round differently from products of one. Where two tokens are nearly as likely,
that may decide between them; how often it does depends on model, dtype and device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxrun.config import EngineConfig
from mlxrun.outputs import completed

if TYPE_CHECKING:
    from mlxrun.llm import LLM

Progress = Callable[[int, int], None]
# Control tokens are most often at the start of a vocabulary.
_FIRST_TOKEN = 3


@dataclass(frozen=True)
class BatchInvariance:
    """How one way of serving requests compares with serving each alone."""

    name: str  # of the way
    requests: int
    equal: int  # requests with just the same tokens
    tokens: int  # sampled in all
    same: int  # sampled before the first difference of each request
    seconds: float
    alone: float  # seconds of the same requests one after the other


def check_batch(
    llm: LLM,
    *,
    requests: int = 20,
    tokens: int = 64,
    parallel: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[BatchInvariance]:
    """Serve random requests alone and together, greedy and seeded, and compare the tokens.

    Every prompt is prefilled whole: no prefix is reused.

    Args:
        requests: how many, with prompts of 4 to 300 random tokens.
        tokens: the most that each samples; lengths differ.
        parallel: the most sequences at once.
        seed: of prompts and lengths.
        progress: called with (requests served, requests in all).
    """
    rng, last = random.Random(seed), llm.model.vocab_size - 1
    longest = max(5, min(300, llm.context_length - tokens - 1))
    prompts = [
        [rng.randint(min(_FIRST_TOKEN, last), last) for _ in range(rng.randint(4, longest))]
        for _ in range(requests)
    ]
    limits = [rng.randint(max(1, tokens // 4), tokens) for _ in range(requests)]
    done = 0

    def served(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, 6 * requests)

    results = []
    engine = llm.make_engine(EngineConfig(parallel=1, prefix_bytes=0), "direct")
    for kind, temperature in (("greedy", 0.0), ("seeded", 0.8)):
        started, alone = time.perf_counter(), []
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            request = llm.inputs.request(
                prompt, max_tokens=limit, ignore_eos=True, temperature=temperature, seed=number
            )
            chunks = engine.stream(engine.prepare(request, streams=False))
            alone.append(completed(list(chunks)).tokens)
            served(1)
        seconds_alone = time.perf_counter() - started
        for deterministic in (False, True):
            started = time.perf_counter()
            completions = llm.batch(
                prompts,
                max_tokens=limits,
                ignore_eos=True,
                parallel=parallel,
                deterministic=deterministic,
                prefix_bytes=0,
                progress=False,
                temperature=temperature,
                seed=list(range(requests)),
            )
            seconds = time.perf_counter() - started
            name = f"{kind}, {'deterministic' if deterministic else 'default'}"
            together = [completion.tokens for completion in completions]
            results.append(_compared(name, alone, together, seconds, seconds_alone))
            served(requests)
    return results


def _compared(
    name: str,
    alone: Sequence[Sequence[int]],
    together: Sequence[Sequence[int]],
    seconds: float,
    seconds_alone: float,
) -> BatchInvariance:
    equal = same = 0
    for a, b in zip(alone, together, strict=True):
        equal += list(a) == list(b)
        differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        same += next(differ, len(b))
    sampled = sum(map(len, together))
    return BatchInvariance(name, len(together), equal, sampled, same, seconds, seconds_alone)
