"""What was measured, and what follows from it: rates, spreads, ratios. Arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlxrun.bench.workload import Decode, FirstToken, Workload

OURS = "mlxrun"


@dataclass(frozen=True)
class Run:
    """One run of a workload.

    Attributes:
        seconds: what it took.
        kv_bytes: allocated for keys and values, at its end; 0 where it cannot be told.
        peak: the most bytes that MLX held meanwhile, weights included; 0 where it was not MLX.
        average: bytes that MLX held on average.
    """

    seconds: float
    kv_bytes: int = 0
    peak: int = 0
    average: int = 0


@dataclass(frozen=True)
class Spread:
    """The middle of some figures and how far they lie apart."""

    median: float
    low: float
    high: float
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one figure; a single one has no deviation."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        middle, mean = statistics.median(values), statistics.fmean(values)
        return cls(middle, min(values), max(values), mean, deviation)


@dataclass
class Result:
    """All runs of one workload by one runtime.

    Attributes:
        workload: what was run.
        runtime: who ran it.
        runs: in order; those of several runtimes took turns.
    """

    workload: Workload
    runtime: str
    runs: list[Run] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each run, over all sequences."""
        return [self.workload.tokens / max(run.seconds, 1e-9) for run in self.runs]

    @property
    def rate(self) -> Spread:
        """Tokens a second."""
        return Spread.of(self.rates)

    @property
    def seconds(self) -> Spread:
        """What a run took."""
        return Spread.of([run.seconds for run in self.runs])

    @property
    def per_token(self) -> float:
        """Seconds from a token of a sequence to its next one."""
        drawn = self.workload.predict if isinstance(self.workload, Decode) else self.workload.tokens
        return self.seconds.median / drawn

    @property
    def kv_bytes(self) -> int:
        return max(run.kv_bytes for run in self.runs)

    @property
    def peak(self) -> int:
        return max(run.peak for run in self.runs)

    @property
    def average(self) -> int:
        return int(statistics.median(run.average for run in self.runs))


@dataclass
class Results:
    """What has been measured so far, in order; only results that have a run."""

    items: list[Result] = field(default_factory=list)

    def add(self, workload: Workload, runtime: str, run: Run) -> None:
        """Note one run."""
        result = self.find(workload, runtime)
        if result is None:
            result = Result(workload, runtime)
            self.items.append(result)
        result.runs.append(run)

    def forget(self, workload: Workload) -> None:
        """Drop what was measured of a workload, which is measured anew."""
        self.items = [result for result in self.items if result.workload != workload]

    def find(self, workload: Workload, runtime: str = OURS) -> Result | None:
        """What a runtime did with a workload, if it has been measured."""
        return next(
            (r for r in self.items if r.workload == workload and r.runtime == runtime), None
        )

    def runtimes(self) -> list[str]:
        """Who was measured, in the order of their first run."""
        return list(dict.fromkeys(result.runtime for result in self.items))

    def speedup(self, result: Result) -> float | None:
        """How much faster sequences are together than one alone, by the same runtime."""
        workload = result.workload
        if not isinstance(workload, Decode):
            return None
        alone = self.find(Decode(workload.predict, workload.context), result.runtime)
        return result.rate.median / alone.rate.median if alone else None

    def delay(self, result: Result) -> float | None:
        """How many times as long a first token takes behind another prompt as on an idle engine."""
        workload = result.workload
        if not isinstance(workload, FirstToken) or not workload.behind:
            return None
        idle = self.find(FirstToken(workload.prompt), result.runtime)
        return result.seconds.median / idle.seconds.median if idle else None

    def ratio(self, result: Result, other: str) -> float | None:
        """How much faster a result is than what another runtime did with the workload."""
        theirs = self.find(result.workload, other)
        return faster(result, theirs) if theirs else None


def faster(mine: Result, other: Result) -> float:
    """The median ratio of rates, each taken between runs that followed one another.

    What else uses the machine changes slowly, so that it weighs on both of a pair alike.
    """
    return statistics.median(a / b for a, b in _pairs(mine.rates, other.rates))


def _pairs(mine: Sequence[float], other: Sequence[float]) -> Iterable[tuple[float, float]]:
    if not mine or not other:
        raise ValueError("a ratio needs a run of each")
    return zip(mine, other, strict=False)
