"""Runs of workloads by runtimes in turns, and the rates and ratios of their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlxrun.bench.workloads import Decode, FirstToken, Workload

OURS = "mlxrun"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """One run of a workload: wall time, and bytes of memory, 0 where unknown."""

    seconds: float
    kv_bytes: int = 0  # allocated for keys and values at the end
    peak: int = 0  # of MLX's memory, weights included
    average: int = 0


class Runtime(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...  # form of its weights, for people

    @property
    def load_seconds(self) -> float | None: ...  # None where unknown

    def can(self, workload: Workload) -> bool:
        """Whether it can run a workload."""

    def run(self, workload: Workload) -> Run:
        """Run a workload; its preparation, such as filling caches, is not timed."""


@dataclass(frozen=True)
class Spread:
    """Median, range, mean and standard deviation."""

    median: float
    low: float
    high: float
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        middle, mean = statistics.median(values), statistics.fmean(values)
        return cls(middle, min(values), max(values), mean, deviation)


@dataclass
class Result:
    """All runs of one workload by one runtime, in order."""

    workload: Workload
    runtime: str
    runs: list[Run] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens/s of each run, over all sequences."""
        return [self.workload.tokens / max(run.seconds, 1e-9) for run in self.runs]

    @property
    def rate(self) -> Spread:
        return Spread.of(self.rates)

    @property
    def seconds(self) -> Spread:
        return Spread.of([run.seconds for run in self.runs])


@dataclass
class Results:
    """Results so far, in order, each with at least one run."""

    items: list[Result] = field(default_factory=list)

    def add(self, workload: Workload, runtime: str, run: Run) -> None:
        result = self.find(workload, runtime)
        if result is None:
            result = Result(workload, runtime)
            self.items.append(result)
        result.runs.append(run)

    def remove(self, workload: Workload) -> None:
        self.items = [result for result in self.items if result.workload != workload]

    def find(self, workload: Workload, runtime: str = OURS) -> Result | None:
        return next(
            (r for r in self.items if r.workload == workload and r.runtime == runtime), None
        )

    def speedup(self, result: Result) -> float | None:
        """Rate of parallel sequences over that of one alone, by the same runtime."""
        workload = result.workload
        if not isinstance(workload, Decode):
            return None
        alone = self.find(Decode(workload.predict, workload.context), result.runtime)
        return result.rate.median / alone.rate.median if alone else None

    def delay(self, result: Result) -> float | None:
        """Time to first token behind another prompt over that on an idle engine."""
        workload = result.workload
        if not isinstance(workload, FirstToken) or not workload.behind:
            return None
        idle = self.find(FirstToken(workload.prompt), result.runtime)
        return result.seconds.median / idle.seconds.median if idle else None

    def ratio(self, result: Result, other: str) -> float | None:
        """Rate over that of another runtime: the median of the ratios of neighboring runs.

        The load of the machine changes slowly, so that it weighs equally on both of a pair.
        """
        theirs = self.find(result.workload, other)
        if theirs is None:
            return None
        pairs = zip(result.rates, theirs.rates, strict=False)  # an interrupt may leave one alone
        return statistics.median(a / b for a, b in pairs)


def measure(
    runtimes: Sequence[Runtime],
    workloads: Sequence[Workload],
    repetitions: int,
    results: Results,
    *,
    progress: Progress | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Run every workload with every runtime that can.

    Each warms up once on each workload. Then they take turns, in an order that is reversed from one
    repetition to the next, so that the load of the machine weighs on all equally.

    Args:
        repetitions: runs of each that count.
        results: gets each run as it ends, so that an interrupt keeps those before it.
        progress: called with (runs done, runs in all), warm-ups included.
        after: called after each run.
    """
    able = [[r for r in runtimes if r.can(workload)] for workload in workloads]
    total = sum(map(len, able)) * (1 + repetitions)
    done = 0
    for workload, turn in zip(workloads, able, strict=True):
        for repetition in range(-1, repetitions):
            if repetition == 0:  # runs of an earlier list took no turns with these
                results.remove(workload)
            for runtime in turn if repetition % 2 == 0 else reversed(turn):
                run = runtime.run(workload)
                if repetition >= 0:
                    results.add(workload, runtime.name, run)
                done += 1
                if progress:
                    progress(done, total)
                if after:
                    after()
