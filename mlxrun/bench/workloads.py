"""Workloads of a benchmark, as values."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlxrun.errors import ContextLengthError

# Control tokens are most often at the start of a vocabulary.
_FIRST_TOKEN = 3


@dataclass(frozen=True)
class Prefill:
    """Prefill ``prompt`` tokens behind ``context`` others, up to the first sampled token."""

    prompt: int
    context: int = 0
    parallel: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"pp{self.prompt}{_depth(self.context)}"

    @property
    def tokens(self) -> int:
        return self.prompt

    @property
    def length(self) -> int:
        return self.context + self.prompt


@dataclass(frozen=True)
class Decode:
    """Sample ``predict`` tokens in each of ``parallel`` sequences with ``context`` tokens each."""

    predict: int
    context: int = 0
    parallel: int = 1

    @property
    def name(self) -> str:
        together = f" x{self.parallel}" if self.parallel > 1 else ""
        return f"tg{self.predict}{together}{_depth(self.context)}"

    @property
    def tokens(self) -> int:
        return self.predict * self.parallel

    @property
    def length(self) -> int:
        return self.context + 1 + self.predict


@dataclass(frozen=True)
class Ragged:
    """Requests of many lengths that arrive at once: tokens of each prompt and completion."""

    prompts: tuple[int, ...]
    completions: tuple[int, ...]

    @property
    def parallel(self) -> int:
        return len(self.prompts)

    @property
    def name(self) -> str:
        return f"ragged{self.parallel}"

    @property
    def tokens(self) -> int:
        """Of the completions, which a user waits for."""
        return sum(self.completions)

    @property
    def length(self) -> int:
        return max(p + c for p, c in zip(self.prompts, self.completions, strict=True))


@dataclass(frozen=True)
class FirstToken:
    """First token of a short prompt that arrives during the prefill of one of ``behind`` tokens.

    ``behind`` 0: an idle engine.
    """

    prompt: int
    behind: int = 0
    tokens: ClassVar[int] = 1

    @property
    def parallel(self) -> int:
        return 2 if self.behind else 1

    @property
    def name(self) -> str:
        return f"first{self.prompt}" + (f" behind {self.behind}" if self.behind else "")

    @property
    def length(self) -> int:
        return max(self.prompt, self.behind) + 1


Workload = Prefill | Decode | Ragged | FirstToken


def _depth(context: int) -> str:
    return f" @ d{context}" if context else ""


def plan(
    prompts: Iterable[int],
    predicts: Iterable[int],
    contexts: Iterable[int],
    parallel: Iterable[int],
) -> list[Workload]:
    """Every combination of prefills and decodes at each context; zeros are left out."""
    together = sorted({1, *parallel})
    planned: list[Workload] = []
    for context in contexts:
        planned += [Prefill(n, context) for n in prompts if n]
        planned += [Decode(n, context, rows) for n in predicts if n for rows in together]
    return planned


def fitting(workloads: Sequence[Workload], length: int) -> tuple[list[Workload], list[Workload]]:
    """Workloads that fit a context of ``length`` tokens, and those that do not."""
    fit = [workload for workload in workloads if workload.length <= length]
    rest = [workload for workload in workloads if workload.length > length]
    if workloads and not fit:
        least = min(rest, key=lambda workload: workload.length)
        raise ContextLengthError(
            f"{least.name} needs {least.length} tokens, the model's context holds {length}",
            hint="Ask for fewer tokens",
        )
    return fit, rest


def ragged(length: int, *, requests: int = 20, seed: int = 0) -> Ragged:
    """Prompts of 4 to 300 tokens and completions of 16 to 160, less in a short context."""
    rng = random.Random(seed)
    completion = max(1, min(160, length // 3))
    prompt = max(1, min(300, length - completion))
    prompts = tuple(rng.randint(min(4, prompt), prompt) for _ in range(requests))
    completions = tuple(rng.randint(min(16, completion), completion) for _ in range(requests))
    return Ragged(prompts, completions)


def behind(length: int) -> list[Workload]:
    """First token of a short prompt: on an idle engine, and behind the prefill of a long one."""
    long = max(1, min(2048, length - 1))
    short = max(1, min(16, long // 4))
    return [FirstToken(short), FirstToken(short, long)]


def token_ids(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random token ids, the same for the same seed."""
    last = vocabulary - 1
    rng = random.Random(seed)
    return [rng.randint(min(_FIRST_TOKEN, last), last) for _ in range(count)]
