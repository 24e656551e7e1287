"""From lengths of prompts and outputs to what a benchmark should read, draw and run at once.

Arithmetic only: knows neither files nor models. What memory holds and how fast some sequences
decode together, it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxrun.bench.lengths import Lengths, Summary, percentile
from mlxrun.bench.workload import Decode, Prefill, Workload

# How much of prompts, and of outputs, a benchmark covers: per cent.
LEVELS: Mapping[str, int] = {"conservative": 75, "recommended": 90, "comprehensive": 99}
# A shorter test measures its beginning rather than a rate.
LEAST = 16
# Sequences that answer somebody who waits: each keeps this part of the rate that it has alone.
INTERACTIVE = 0.5
# Sequences that only have to be done: together they reach this part of the best rate.
OFFLINE = 0.9
# Numbers of sequences that are tried, and how many tokens each draws.
TRIED, TRIED_TOKENS = (1, 2, 4, 8, 16, 32), 32


@dataclass(frozen=True)
class Size:
    """What a benchmark reads and draws to cover so much.

    Attributes:
        level: its name.
        percent: of prompts that ``prompt`` covers, and of outputs that ``predict`` covers.
        prompt, predict: tokens, powers of two.
        both: the share of exchanges whose prompt and output are both covered.
    """

    level: str
    percent: int
    prompt: int
    predict: int
    both: float

    @property
    def length(self) -> int:
        """Tokens of a sequence that reads and draws so much."""
        return self.prompt + self.predict


@dataclass(frozen=True)
class Workers:
    """How many sequences to run at once.

    Attributes:
        interactive: where somebody waits for each.
        offline: where only the whole counts.
    """

    interactive: int
    offline: int


def rounded(length: int) -> int:
    """The next power of two, as lengths of benchmarks are; at least LEAST."""
    return max(LEAST, 1 << (length - 1).bit_length())


def sizes(lengths: Lengths) -> list[Size]:
    """What to read and draw for each level; needs a prompt and an output."""
    made = []
    for level, percent in LEVELS.items():
        prompt = rounded(percentile(lengths.prompts, percent))
        predict = rounded(percentile(lengths.drawn, percent))
        made.append(Size(level, percent, prompt, predict, lengths.both(prompt, predict)))
    return made


def workers(rates: Mapping[int, float], most: int) -> Workers | None:
    """How many sequences to run at once, of the numbers that were measured.

    Offline is the fewest that together reach OFFLINE of the best rate: more only take memory.
    Interactive is the most at which each still has INTERACTIVE of the rate that it has alone, and
    no more than offline.

    Args:
        rates: tokens a second of all sequences together, by their number; one alone among them.
        most: sequences that memory holds.

    Returns:
        None where memory holds not even one, or one alone was not measured.
    """
    held = {count: rate for count, rate in sorted(rates.items()) if count <= most}
    if 1 not in held:
        return None
    offline = next(n for n, rate in held.items() if rate >= OFFLINE * max(held.values()))
    kept = [n for n, rate in held.items() if n <= offline and rate / n >= INTERACTIVE * rates[1]]
    return Workers(max(kept, default=1), offline)


@dataclass(frozen=True)
class Advice:
    """What to measure for one level.

    Attributes:
        size: tokens to read and to draw.
        held: sequences of that size that memory holds.
        workers: how many to run; None where none fits, or none was measured.
    """

    size: Size
    held: int
    workers: Workers | None

    @property
    def workloads(self) -> list[Workload]:
        """A prompt, and replies to it: alone, interactive and offline."""
        size, together = self.size, {1}
        if self.workers:
            together |= {self.workers.interactive, self.workers.offline}
        replies = [Decode(size.predict, size.prompt, count) for count in sorted(together)]
        return [Prefill(size.prompt), *replies]


def tried(size: Size, counts: Sequence[int], context: int) -> list[Workload]:
    """Short replies to prompts of a size, by several numbers of sequences and by one.

    Args:
        size: how long prompts are, as far as the model's context holds them.
        counts: of sequences.
        context: of the model, in tokens.
    """
    drawn = max(1, min(TRIED_TOKENS, context // 2))
    depth = max(0, min(size.prompt, context - drawn - 1))
    return [Decode(drawn, depth, count) for count in sorted({1, *counts})]


def advise(
    found: Sequence[Size], rates: Mapping[int, float], held: Callable[[int], int]
) -> list[Advice]:
    """What to measure for each level.

    Args:
        found: tokens to read and to draw.
        rates: tokens a second of all sequences together, by their number.
        held: from tokens of a sequence to how many of them memory holds.
    """
    most = [held(size.length) for size in found]
    return [
        Advice(size, count, workers(rates, count)) for size, count in zip(found, most, strict=True)
    ]


def facts(lengths: Lengths, advices: Sequence[Advice]) -> dict[str, Any]:
    """All of it, as JSON types."""
    return {
        "prompts": asdict(Summary.of(lengths.prompts)),
        "outputs": asdict(Summary.of(lengths.drawn)),
        "levels": {advice.size.level: asdict(advice) for advice in advices},
        "rules": {"interactive": INTERACTIVE, "offline": OFFLINE},
    }
