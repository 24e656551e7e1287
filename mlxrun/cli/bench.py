"""``mlxrun bench``: how fast a model runs here, alone, together, and next to other runtimes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxrun.bench.workload import Workload, behind, counts, fitting, plan, ragged
from mlxrun.cli.adapters import Adapters
from mlxrun.cli.console import Bar, note
from mlxrun.cli.loading import load_model, located, with_loading
from mlxrun.errors import ParameterError

if TYPE_CHECKING:
    from mlxrun.bench.results import Results
    from mlxrun.bench.runner import Subject
    from mlxrun.llm import LLM

INTERRUPTED = 130
RIVALS = ("mlx-lm", "llama-bench")


class _Counts(click.ParamType[tuple[int, ...]]):
    """A list of numbers, checked before anything is loaded."""

    name = "LIST"

    def __init__(self, least: int = 0) -> None:
        self._least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return counts("the list", value, least=self._least)
        except ParameterError as error:
            self.fail(str(error), param, ctx)


@click.command("bench")
@click.argument("model")
@click.option(
    "-p",
    "--n-prompt",
    type=_Counts(),
    default="128,512",
    show_default=True,
    help="Lengths of prompts to read; 0 for none.",
)
@click.option(
    "-n",
    "--n-predict",
    type=_Counts(),
    default="128",
    show_default=True,
    help="Numbers of tokens to draw; 0 for none.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Runs of each test, after one that warms up.",
)
@click.option(
    "--parallel",
    type=_Counts(1),
    default="1",
    help="Numbers of sequences that decode together, such as 1,2,4,8,16,20.  [default: 1]",
)
@click.option(
    "--context",
    "contexts",
    type=_Counts(),
    default="0",
    help="Tokens that are in the cache before, such as 0,1k,4k.  [default: 0]",
)
@click.option(
    "--ragged",
    "mixed",
    is_flag=True,
    help="Also serve 20 requests of many lengths together and one at a time, and a short request "
    "behind a long prompt.",
)
@click.option(
    "--against",
    "rivals",
    type=click.Choice(RIVALS),
    multiple=True,
    help="Also measure another runtime with the same weights, taking turns: mlx-lm in this "
    "process, llama.cpp's llama-bench if it is on the path. May be given twice.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@with_loading
def command(
    model: str,
    n_prompt: tuple[int, ...],
    n_predict: tuple[int, ...],
    repetitions: int,
    parallel: tuple[int, ...],
    contexts: tuple[int, ...],
    mixed: bool,
    rivals: tuple[str, ...],
    as_json: bool,
    as_csv: bool,
    dtype: str | None,
    policy: str | None,
    adapter: Adapters,
    wired: bool,
    verbose: bool,
) -> None:
    """Measure how fast a model runs on this machine.

    Tests are named as llama-bench names them: pp128 reads a prompt of 128 tokens, tg128 draws 128
    tokens one by one, x8 in each of 8 sequences together, and @ d1024 does so behind 1024 tokens.
    Prompts are random tokens, drawing is greedy and goes on past ends of turn. Rates are medians.
    Ctrl-C ends early and prints what was measured by then.

    \b
    Examples:
      mlxrun bench model.gguf --context 0,1k,4k
      mlxrun bench model.gguf --parallel 1,2,4,8,16,20 --against mlx-lm
      mlxrun bench model.gguf --n-prompt 0 --ragged --json > measured.json
    """
    if as_json and as_csv:
        raise click.UsageError("Give --json or --csv, not both.")
    if adapter and rivals:
        raise click.UsageError("--against measures the same weights, which an --adapter changes.")
    wanted = plan(n_prompt, n_predict, contexts, parallel)
    if not wanted and not mixed:
        raise click.UsageError("There is nothing to measure.")
    path = located(model)
    llama = _llama_bench(path) if "llama-bench" in rivals else None
    started = time.perf_counter()
    llm = load_model(
        str(path), dtype=dtype, policy=policy, adapter=adapter, wired=wired, verbose=verbose
    )
    loaded = time.perf_counter() - started
    if mixed:
        wanted += [ragged(llm.context_length), *behind(llm.context_length)]
    workloads, left_out = fitting(wanted, llm.context_length)
    _check_memory(llm, workloads)
    subjects = _subjects(llm, loaded, mixed=mixed)
    with _mlx_lm(llm, path, wanted="mlx-lm" in rivals) as theirs:
        subjects += [*theirs, *([llama] if llama else [])]
        results, about = _measured(subjects, workloads, repetitions)
    about = {"model": model, **about, "left_out": [workload.name for workload in left_out]}
    _print(results, about, as_json=as_json, as_csv=as_csv)
    if about["interrupted"]:
        raise SystemExit(INTERRUPTED)


def _subjects(llm: LLM, loaded: float, *, mixed: bool) -> list[Subject]:
    from mlxrun.bench.subjects.ours import OneAtATime, Ours

    subjects: list[Subject] = [Ours(llm, loaded)]
    if mixed:
        subjects.append(OneAtATime(llm, loaded))
    return subjects


def _llama_bench(path: Path) -> Subject:
    from mlxrun.bench.subjects.llama_bench import LlamaBench

    return LlamaBench(path)


@contextmanager
def _mlx_lm(llm: LLM, path: Path, *, wanted: bool) -> Iterator[list[Subject]]:
    """mlx-lm with the same weights, if it is wanted: imported only then."""
    if not wanted:
        yield []
        return
    from mlxrun.bench.subjects.mlx_lm import opened

    with opened(llm, path) as theirs:
        yield [theirs]


def _check_memory(llm: LLM, workloads: Sequence[Workload]) -> None:
    """Refuse what memory cannot hold before anything is measured."""
    from mlxrun.planning.source import plan_loaded

    memory = plan_loaded(llm.model, llm.config)
    for workload in workloads:
        memory.check(workload.length, workload.parallel)


def _measured(
    subjects: Sequence[Subject], workloads: Sequence[Workload], repetitions: int
) -> tuple[Results, dict[str, Any]]:
    """What was measured, and what it was measured on."""
    from mlxrun.bench.machine import Watch, machine
    from mlxrun.bench.results import Results
    from mlxrun.bench.runner import measure
    from mlxrun.bench.subjects.ours import OneAtATime

    results, watch, interrupted = Results(), Watch(), False
    try:
        with Bar("Measuring", count="runs") as bar:
            measure(subjects, workloads, repetitions, results, progress=bar, after=watch.look)
    except KeyboardInterrupt:
        note("interrupted")
        interrupted = True
    about = {
        "machine": machine(_packages(subjects)),
        "other_use": watch.facts(),
        "repetitions": repetitions,
        "runtimes": [
            {"name": s.name, "about": s.about, "load_seconds": s.load_seconds}
            for s in subjects
            if not isinstance(s, OneAtATime)  # shares its model with the first
        ],
        "interrupted": interrupted,
    }
    return results, about


def _packages(subjects: Sequence[Subject]) -> list[str]:
    """Packages whose versions matter."""
    return ["mlxrun", "mlx", *(["mlx-lm"] if any(s.name == "mlx-lm" for s in subjects) else [])]


def _print(results: Results, about: dict[str, Any], *, as_json: bool, as_csv: bool) -> None:
    from mlxrun.bench.report import facts, flat
    from mlxrun.cli.bench_tables import print_results

    if as_json:
        print(json.dumps(facts(results, about)))
    elif as_csv:
        sys.stdout.write(flat(facts(results, about)))
    else:
        print_results(results, about)
