"""What ``mlxrun bench`` measures with: the runtimes, what memory holds, and what was around."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrun.bench.workload import Workload
from mlxrun.cli.console import Bar, note

if TYPE_CHECKING:
    from mlxrun.bench.results import Results
    from mlxrun.bench.runner import Subject
    from mlxrun.llm import LLM

Facts = dict[str, Any]


def subjects(llm: LLM, loaded: float, *, mixed: bool) -> list[Subject]:
    """mlxrun with a model that took ``loaded`` seconds; twice where requests are mixed."""
    from mlxrun.bench.subjects.ours import OneAtATime, Ours

    made: list[Subject] = [Ours(llm, loaded)]
    if mixed:
        made.append(OneAtATime(llm, loaded))
    return made


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


def affordable(llm: LLM, workloads: Sequence[Workload]) -> tuple[list[Workload], list[Workload]]:
    """Workloads that memory holds by the plan, and those that it does not.

    Raises:
        MemoryLimitError: it holds none of them.
    """
    from mlxrun.planning.source import plan_loaded

    memory = plan_loaded(llm.model, llm.config)
    terms = {w: memory.terms(w.length, w.parallel) for w in workloads}
    fit = [workload for workload in workloads if terms[workload].fits]
    if workloads and not fit:
        least = min(workloads, key=lambda workload: terms[workload].total)
        memory.check(least.length, least.parallel)
    return fit, [workload for workload in workloads if not terms[workload].fits]


def measured(
    runtimes: Sequence[Subject], workloads: Sequence[Workload], repetitions: int
) -> tuple[Results, Facts]:
    """What was measured, and what it was measured on."""
    from mlxrun.bench.machine import Watch, machine
    from mlxrun.bench.results import Results
    from mlxrun.bench.runner import measure
    from mlxrun.bench.subjects.ours import OneAtATime

    results, watch, interrupted = Results(), Watch(), False
    try:
        with Bar("Measuring", count="runs") as bar:
            measure(runtimes, workloads, repetitions, results, progress=bar, after=watch.look)
    except KeyboardInterrupt:
        note("interrupted")
        interrupted = True
    about = {
        "machine": machine(_packages(runtimes)),
        "other_use": watch.facts(),
        "repetitions": repetitions,
        "runtimes": [
            {"name": s.name, "about": s.about, "load_seconds": s.load_seconds}
            for s in runtimes
            if not isinstance(s, OneAtATime)  # shares its model with the first
        ],
        "interrupted": interrupted,
    }
    return results, about


def _packages(runtimes: Sequence[Subject]) -> list[str]:
    """Packages whose versions matter."""
    return ["mlxrun", "mlx", *(["mlx-lm"] if any(s.name == "mlx-lm" for s in runtimes) else [])]
