"""Whether a model gives each request the tokens that it gets alone: measured, not promised.

Products of many rows round differently from products of one. Where two tokens are nearly as likely,
that may decide between them; how often it does depends on model, dtype and device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxrun.engine.engine import Engine
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.outputs import completed

if TYPE_CHECKING:
    from mlxrun.llm import LLM

Progress = Callable[[int, int], None]
# Control tokens are most often at the beginning of a vocabulary.
_FIRST_TOKEN = 3


@dataclass(frozen=True)
class Way:
    """How one way of serving requests compares with serving each alone.

    Attributes:
        name: of the way.
        requests: how many there were.
        equal: how many got just the same tokens.
        tokens: drawn in all.
        same: drawn before the first difference of each request.
        seconds: what it took.
        alone: seconds that the same requests took one after the other.
    """

    name: str
    requests: int
    equal: int
    tokens: int
    same: int
    seconds: float
    alone: float


def check_batch(
    llm: LLM,
    *,
    requests: int = 20,
    tokens: int = 64,
    parallel: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Way]:
    """Serve random requests alone and together, greedy and seeded, and compare the tokens.

    Every way computes the whole of every prompt: no beginnings are taken over.

    Args:
        requests: how many, with prompts of 4 to 300 random tokens.
        tokens: the most that each draws; lengths differ.
        parallel: the most that are live at once.
        seed: of prompts and lengths.
        progress: called with (requests served, requests in all).
    """
    rng = random.Random(seed)
    longest = max(5, min(300, llm.context_length - tokens - 1))
    prompts = [_prompt(llm, rng, rng.randint(4, longest)) for _ in range(requests)]
    limits = [rng.randint(max(1, tokens // 4), tokens) for _ in range(requests)]
    done = 0

    def served(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, 6 * requests)

    ways = []
    for kind in ("greedy", "seeded"):
        temperature = 0.0 if kind == "greedy" else 0.8
        started, alone = time.perf_counter(), []
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            request = llm.inputs.request(
                prompt, max_tokens=limit, ignore_eos=True, temperature=temperature, seed=number
            )
            # What is in the prefix cache would make this one look faster.
            engine = Engine(llm.inputs, PrefixCache(0), mode="direct")
            chunks = list(engine.stream(engine.prepare(request, streams=False)))
            alone.append(completed(chunks).tokens)
            served(1)
        seconds = time.perf_counter() - started
        for deterministic in (False, True):
            started = time.perf_counter()
            got = llm.batch(
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
            took = time.perf_counter() - started
            name = f"{kind}, {'deterministic' if deterministic else 'default'}"
            ways.append(_compared(name, alone, [reply.tokens for reply in got], took, seconds))
            served(requests)
    return ways


def _prompt(llm: LLM, rng: random.Random, length: int) -> list[int]:
    last = llm.model.vocab_size - 1
    return [rng.randint(min(_FIRST_TOKEN, last), last) for _ in range(length)]


def _compared(
    name: str,
    alone: Sequence[Sequence[int]],
    together: Sequence[Sequence[int]],
    seconds: float,
    took_alone: float,
) -> Way:
    pairs = list(zip(alone, together, strict=True))
    equal = sum(list(a) == list(b) for a, b in pairs)
    same = 0
    for a, b in pairs:
        differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        same += next(differ, len(b))
    drawn = sum(map(len, together))
    return Way(name, len(pairs), equal, drawn, same, seconds, took_alone)
