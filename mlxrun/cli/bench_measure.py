"""What ``mlxrun bench`` measures with: the runtimes, what memory holds, and what was around."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrun.bench.workload import Decode, Workload, fitting
from mlxrun.cli.console import Bar, note
from mlxrun.errors import MlxrunError

if TYPE_CHECKING:
    from mlxrun.bench.runner import Subject
    from mlxrun.llm import LLM
    from mlxrun.memory.plan import MemoryPlan

Facts = dict[str, Any]
Cache = dict[str, Any]


def subjects(llm: LLM, loaded: float, cache: Cache, *, mixed: bool) -> list[Subject]:
    """mlxrun with a model that took ``loaded`` seconds; twice where requests are mixed."""
    from mlxrun.bench.subjects.ours import OneAtATime, Ours

    made: list[Subject] = [Ours(llm, loaded, cache)]
    if mixed:
        made.append(OneAtATime(llm, loaded, cache))
    return made


def memory_plan(llm: LLM, cache: Cache) -> MemoryPlan:
    """What sequences with such caches take."""
    from mlxrun.admission import Options
    from mlxrun.memory.plan import plan_loaded

    return plan_loaded(llm.model, llm.config, cache=Options(**cache).wanted())


def llama_bench(path: Path, *, wanted: bool) -> list[Subject]:
    """llama.cpp with a file, if it is wanted.

    Raises:
        RivalError: it is not on the path.
        ParameterError: the model is a directory.
    """
    if not wanted:
        return []
    from mlxrun.bench.subjects.llama_bench import LlamaBench

    return [LlamaBench(path)]


@contextmanager
def mlx_lm(llm: LLM, path: Path, *, wanted: bool) -> Iterator[list[Subject]]:
    """mlx-lm with the same weights, if it is wanted: imported only then."""
    if not wanted:
        yield []
        return
    from mlxrun.bench.subjects.mlx_lm import opened

    with opened(llm, path) as theirs:
        yield [theirs]


def chosen(
    llm: LLM, memory: MemoryPlan, wanted: Sequence[Workload]
) -> tuple[list[Workload], dict[str, list[str]]]:
    """Workloads that the model's context and the memory hold, and the others' names by reason.

    Raises:
        ContextLengthError, MemoryLimitError: there is none left.
    """
    short, too_long = fitting(wanted, llm.context_length)
    fit, too_large = affordable(memory, short)
    return fit, {"context": [w.name for w in too_long], "memory": [w.name for w in too_large]}


def affordable(
    memory: MemoryPlan, workloads: Sequence[Workload]
) -> tuple[list[Workload], list[Workload]]:
    """Workloads that memory holds by the plan, and those that it does not.

    Raises:
        MemoryLimitError: it holds none of them.
    """
    terms = {w: memory.terms(w.length, w.parallel) for w in workloads}
    fit = [workload for workload in workloads if terms[workload].fits]
    if workloads and not fit:
        least = min(workloads, key=lambda workload: terms[workload].total)
        memory.check(least.length, least.parallel)
    return fit, [workload for workload in workloads if not terms[workload].fits]


def rooms(llm: LLM, memory: MemoryPlan, wanted: Sequence[Workload]) -> list[Facts]:
    """What each of several sequences has room for by the plan, for those that decode together."""
    together = sorted({w.parallel for w in wanted if isinstance(w, Decode) and w.parallel > 1})
    longest = llm.context_length
    return [{"parallel": n, "context": min(longest, memory.context_for(n))} for n in together]


class Measuring:
    """Measurements on one machine, one list of workloads after the other.

    Args:
        ours: mlxrun's own runtime.
        repetitions: runs of each that count.

    Attributes:
        results: what was measured so far.
        interrupted: by Ctrl-C, after which nothing more is measured.
        failure: what somebody failed with, after which nothing more is measured either.
    """

    def __init__(self, ours: Sequence[Subject], repetitions: int) -> None:
        from mlxrun.bench.machine import Watch
        from mlxrun.bench.results import Results

        self._runtimes, self._repetitions = list(ours), repetitions
        self._ours, self._watch = tuple(ours), Watch()
        self.results, self.interrupted = Results(), False
        self.failure: MlxrunError | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is measured."""
        return self.interrupted or self.failure is not None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep what was measured when Ctrl-C or a failure ends the block.

        Raises:
            MlxrunError: the failure, if nothing was measured before.
        """
        try:
            yield
        except KeyboardInterrupt:
            note("interrupted")
            self.interrupted = True
        except MlxrunError as error:
            if not self.results.items:
                raise
            self.failure = error

    def run(
        self,
        workloads: Sequence[Workload],
        label: str = "Measuring",
        *,
        rivals: Sequence[Subject] = (),
    ) -> None:
        """Run workloads, with a progress bar; Ctrl-C or a failure ends it, see :meth:`guarded`.

        Args:
            rivals: who takes turns with mlxrun.
        """
        from mlxrun.bench.runner import measure

        self._runtimes += rivals
        if self.ended:
            return
        turns, results, look = [*self._ours, *rivals], self.results, self._watch.look
        with self.guarded(), Bar(label, count="runs") as bar:
            measure(turns, workloads, self._repetitions, results, progress=bar, after=look)

    def about(self) -> Facts:
        """What it was measured on."""
        from mlxrun.bench.machine import machine
        from mlxrun.bench.subjects.ours import OneAtATime

        rivals = any(runtime.name == "mlx-lm" for runtime in self._runtimes)
        return {
            "machine": machine(["mlxrun", "mlx", *(["mlx-lm"] if rivals else [])]),
            "other_use": self._watch.facts(),
            "repetitions": self._repetitions,
            "runtimes": [
                {"name": s.name, "about": s.about, "load_seconds": s.load_seconds}
                for s in self._runtimes
                if not isinstance(s, OneAtATime)  # shares its model with the first
            ],
            "interrupted": self.interrupted,
        }
