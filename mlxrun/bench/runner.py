"""Run workloads: warm up, take turns, note what was measured. Knows no runtime and no MLX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mlxrun.bench.results import Results, Run
from mlxrun.bench.workload import Workload

Progress = Callable[[int, int], None]


class Subject(Protocol):
    """A runtime with a model in it.

    Attributes:
        name: of the runtime.
        about: how it holds the model, for people.
        load_seconds: what loading took, if that can be told.
    """

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def load_seconds(self) -> float | None: ...

    def can(self, workload: Workload) -> bool:
        """Whether it can run a workload."""

    def run(self, workload: Workload) -> Run:
        """Run a workload; what comes before it, such as filling caches, is not timed."""


def measure(
    subjects: Sequence[Subject],
    workloads: Sequence[Workload],
    repetitions: int,
    results: Results,
    *,
    progress: Progress | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Run every workload with every subject that can.

    Each warms up once on each workload. Then they take turns, in an order that is reversed from one
    repetition to the next, so that what else uses the machine weighs on all alike.

    Args:
        subjects: who runs them.
        workloads: in this order.
        repetitions: runs of each that count.
        results: runs are noted here as they end: an interrupt leaves what there is.
        progress: called with (runs done, runs in all), warm-ups among them.
        after: called after each run.
    """
    able = [[s for s in subjects if s.can(workload)] for workload in workloads]
    total = sum(map(len, able)) * (1 + repetitions)
    done = 0
    for workload, turn in zip(workloads, able, strict=True):
        for repetition in range(-1, repetitions):
            if repetition == 0:  # runs of an earlier list took no turns with these
                results.forget(workload)
            for subject in turn if repetition % 2 == 0 else reversed(turn):
                run = subject.run(workload)
                if repetition >= 0:
                    results.add(workload, subject.name, run)
                done += 1
                if progress:
                    progress(done, total)
                if after:
                    after()
