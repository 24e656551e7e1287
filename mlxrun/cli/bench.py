"""``mlxrun bench``: how fast a model runs here, alone, together, and next to other runtimes."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxrun.bench.workload import behind, plan, ragged
from mlxrun.cli.bench_options import Asked, with_dataset, with_rivals, with_telling, with_tests
from mlxrun.cli.caches import with_attention, with_cache_types
from mlxrun.cli.completion import ModelName
from mlxrun.cli.console import json_of, note
from mlxrun.cli.loading import load_model, located, with_loading
from mlxrun.cli.roofline import print_roofline, roofline_facts, with_roofline
from mlxrun.cli.sections import Command

if TYPE_CHECKING:
    from mlxrun.bench.results import Results
    from mlxrun.cli.bench_dataset import Dataset, Study


@click.command("bench", cls=Command)
@click.argument("model", type=ModelName())
@with_tests
@with_dataset
@with_rivals
@with_roofline
@with_telling
@with_attention
@with_cache_types
@with_loading
def bench_command(model: str, **options: Any) -> None:
    """Measure how fast a model runs on this machine.

    Tests are named as llama-bench names them: pp128 reads a prompt of 128 tokens, tg128 draws 128
    tokens one by one, x8 in each of 8 sequences together, and @ d1024 does so behind 1024 tokens.
    Prompts are random tokens, drawing is greedy and goes on past ends of turn. Rates are medians.
    Ctrl-C ends early and prints what was measured by then.

    \b
    Examples:
      mlxrun bench model.gguf --context 0,1k,4k
      mlxrun bench model.gguf --parallel 1,2,4,8,16,20 --against mlx-lm
      mlxrun bench model.gguf --parallel 1,8 --roofline
      mlxrun bench model.gguf --context 8k,32k --attention blocks:32x64
      mlxrun bench model.gguf --n-prompt 0 --ragged --json > measured.json
      mlxrun bench model.gguf --dataset chats.jsonl --run recommended
    """
    asked = Asked.taken(options)
    wanted = plan(asked.n_prompt, asked.n_predict, asked.contexts, asked.parallel or (1,))
    if not wanted and not asked.mixed:
        raise click.UsageError("There is nothing to measure.")
    dataset = _dataset(asked)
    path = located(model)
    from mlxrun.cli.bench_measure import (
        Measuring,
        chosen,
        llama_bench,
        memory_plan,
        mlx_lm,
        rooms,
        subjects,
    )

    llama = llama_bench(path, wanted="llama-bench" in asked.rivals)
    import_module("mlxrun.llm")  # what is imported does not count as loading
    started = time.perf_counter()
    types = (asked.cache_type_k, asked.cache_type_v)
    llm = load_model(str(path), cache_types=types, **options)
    ours = subjects(llm, time.perf_counter() - started, asked.cache, mixed=asked.mixed)
    bench, memory = Measuring(ours, asked.repetitions), memory_plan(llm, asked.cache)
    study = dataset.study(llm, memory, bench, asked.parallel) if dataset else None
    if study:
        wanted = study.workloads(asked.level) if asked.level else []
    elif asked.mixed:
        wanted += [ragged(llm.context_length), *behind(llm.context_length)]
    workloads, left_out = chosen(llm, memory, wanted)
    rival = "mlx-lm" in asked.rivals and not bench.ended
    with bench.guarded(), mlx_lm(llm, path, wanted=rival) as theirs:
        bench.run(workloads, rivals=[*theirs, *llama])
    limits: dict[str, Any] = {}
    if asked.roofline and not bench.ended:
        with bench.guarded():
            policy = options["policy"]
            limits["roofline"] = roofline_facts(llm, path, bench.results, policy, asked.cache)
    room = rooms(llm, memory, wanted)
    about = {"model": model, **bench.about(), "room": room, "left_out": left_out, **limits}
    _print(bench.results, about, study, asked)
    if bench.failure:
        raise bench.failure
    if bench.interrupted:
        raise click.Abort


def _dataset(asked: Asked) -> Dataset | None:
    """The data set that is asked for: read early, for what is wrong with it to be told early."""
    if asked.dataset is None:
        return None
    from mlxrun.cli.bench_dataset import Dataset

    return Dataset(asked.dataset)


def _print(results: Results, about: dict[str, Any], study: Study | None, asked: Asked) -> None:
    from mlxrun.bench.report import facts, flat
    from mlxrun.cli.bench_tables import print_results

    if study:
        about["dataset"] = study.facts()
    found = facts(results, about)
    if asked.as_json:
        print(json_of(found))
    elif asked.as_csv:
        sys.stdout.write(flat(found))
    else:
        if study:
            study.print()
        print_results(results, about)
        if "roofline" in about:
            print_roofline(about["roofline"])
    if asked.plot:
        _plot(found, asked.plot)


def _plot(found: dict[str, Any], path: Path) -> None:
    from mlxrun.bench.plot import draw

    note(f"drawn: {path}" if draw(found, path) else f"nothing was measured to draw in {path}")
