"""``mlxrun bench``: how fast a model runs here, alone, together, and next to other runtimes."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mlxrun.bench.workload import behind, fitting, plan, ragged
from mlxrun.cli.bench_options import with_rivals, with_telling, with_tests
from mlxrun.cli.loading import load_model, located, with_loading

if TYPE_CHECKING:
    from mlxrun.bench.results import Results

INTERRUPTED = 130


@click.command("bench")
@click.argument("model")
@with_tests
@with_rivals
@with_telling
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
    **loading: Any,
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
    from mlxrun.cli.bench_measure import affordable, llama_bench, measured, mlx_lm, subjects

    if as_json and as_csv:
        raise click.UsageError("Give --json or --csv, not both.")
    if loading["adapter"] and rivals:
        raise click.UsageError("--against measures the same weights, which an --adapter changes.")
    wanted = plan(n_prompt, n_predict, contexts, parallel)
    if not wanted and not mixed:
        raise click.UsageError("There is nothing to measure.")
    path = located(model)
    llama = llama_bench(path, wanted="llama-bench" in rivals)
    started = time.perf_counter()
    llm = load_model(str(path), **loading)
    loaded = time.perf_counter() - started
    if mixed:
        wanted += [ragged(llm.context_length), *behind(llm.context_length)]
    short, too_long = fitting(wanted, llm.context_length)
    workloads, too_large = affordable(llm, short)
    with mlx_lm(llm, path, wanted="mlx-lm" in rivals) as theirs:
        runtimes = [*subjects(llm, loaded, mixed=mixed), *theirs, *llama]
        results, about = measured(runtimes, workloads, repetitions)
    left_out = {"context": [w.name for w in too_long], "memory": [w.name for w in too_large]}
    about = {"model": model, **about, "left_out": left_out}
    _print(results, about, as_json=as_json, as_csv=as_csv)
    if about["interrupted"]:
        raise SystemExit(INTERRUPTED)


def _print(results: Results, about: dict[str, Any], *, as_json: bool, as_csv: bool) -> None:
    from mlxrun.bench.report import facts, flat
    from mlxrun.cli.bench_tables import print_results

    if as_json:
        print(json.dumps(facts(results, about)))
    elif as_csv:
        sys.stdout.write(flat(facts(results, about)))
    else:
        print_results(results, about)
