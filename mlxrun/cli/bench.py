"""``mlxrun bench``: how fast a model runs here, alone, together, and next to other runtimes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from mlxrun.analysis.dataset import (
    LEVELS,
    TRIED,
    advise,
    profile_facts,
    read,
    sizes,
    token_lengths,
    trials,
)
from mlxrun.bench.report import facts, flat
from mlxrun.bench.runner import Results, measure
from mlxrun.bench.workloads import Decode, Workload, behind, fitting, plan, ragged
from mlxrun.cli.bench_tables import print_profile, print_results
from mlxrun.cli.console import Bar, json_of, note
from mlxrun.cli.loading import load_model, located
from mlxrun.cli.options import (
    Command,
    CountList,
    ModelName,
    take,
    with_attention,
    with_cache_types,
    with_json,
    with_loading,
)
from mlxrun.cli.roofline import measured_device, print_roofline
from mlxrun.config import CacheConfig, StorageOptions
from mlxrun.errors import MlxrunError

if TYPE_CHECKING:
    from mlxrun.analysis.dataset import Advice, Exchange
    from mlxrun.bench.runner import Runtime
    from mlxrun.llm import LLM
    from mlxrun.memory.plan import MemoryPlan

Facts = dict[str, Any]

BASELINES = ("mlx-lm", "llama-bench")
# Exchanges whose tokens are counted; percentiles of so many are as good as those of all.
MOST_EXCHANGES = 10_000


def _plottable(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    if path is not None and not context.resilient_parsing:
        from mlxrun.analysis.plot import check

        check(path)
    return path


@click.command("bench", cls=Command)
@click.argument("model", type=ModelName())
@click.option(
    "-p",
    "--n-prompt",
    type=CountList(),
    default="128,512",
    show_default=True,
    help="Lengths of prompts to prefill; 0 for none.",
)
@click.option(
    "-n",
    "--n-predict",
    type=CountList(),
    default="128",
    show_default=True,
    help="Numbers of tokens to decode; 0 for none.",
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
    type=CountList(1),
    help="Numbers of sequences that decode together, such as 1,2,4,8,16,20.  [default: 1]",
)
@click.option(
    "--context",
    "contexts",
    type=CountList(),
    default="0",
    help="Tokens in the KV cache before each test, such as 0,1k,4k.  [default: 0]",
)
@click.option(
    "--ragged",
    "mixed",
    is_flag=True,
    help="Also serve 20 requests of many lengths together and one at a time, and a short "
    "request behind a long prompt.",
)
@click.option(
    "--dataset",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help="Count the tokens of prompts and outputs in a file (messages, conversations, "
    "prompt and response, and the like) and recommend what to measure: lengths, and "
    "numbers of sequences after trying some, those of --parallel if they are given.",
)
@click.option(
    "--run",
    "level",
    type=click.Choice(tuple(LEVELS)),
    help="Measure the recommendation for the --dataset: "
    + ", ".join(f"{level} covers {percent}%" for level, percent in LEVELS.items())
    + " of prompts and of outputs.",
)
@click.option(
    "--against",
    type=click.Choice(BASELINES),
    multiple=True,
    help="Also measure another runtime with the same weights, taking turns: mlx-lm in this "
    "process, llama.cpp's llama-bench if it is on the path. May be given twice.",
)
@click.option(
    "--roofline",
    is_flag=True,
    help="Also measure this device, and show each rate as a fraction of its limit, which limit "
    "binds, and the limits of other chips. Not with --csv.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_plottable,
    metavar="FILE",
    help="Plot rates by the number of sequences and by context into a .png, .svg, .pdf or "
    ".html file; needs pip install 'mlxrun[plot]'.",
)
@with_json
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@with_attention
@with_cache_types
@with_loading
def bench_command(
    model: str,
    *,
    n_prompt: tuple[int, ...],
    n_predict: tuple[int, ...],
    repetitions: int,
    parallel: tuple[int, ...] | None,
    contexts: tuple[int, ...],
    mixed: bool,
    dataset: Path | None,
    level: str | None,
    against: tuple[str, ...],
    roofline: bool,
    plot: Path | None,
    as_json: bool,
    as_csv: bool,
    **loading: Any,
) -> None:
    """Measure how fast a model runs on this machine.

    Tests are named as llama-bench names them: pp128 prefills a prompt of 128 tokens, tg128 decodes
    128 tokens one by one, x8 in each of 8 sequences together, and @ d1024 behind 1024 tokens.
    Prompts are random tokens, sampling is greedy and ignores ends of turn. Rates are medians.
    Ctrl-C ends early and prints the results so far.

    \b
    Examples:
      mlxrun bench model.gguf --context 0,1k,4k
      mlxrun bench model.gguf --parallel 1,2,4,8,16,20 --against mlx-lm
      mlxrun bench model.gguf --parallel 1,8 --roofline
      mlxrun bench model.gguf --context 8k,32k --attention blocks:32x64
      mlxrun bench model.gguf --n-prompt 0 --ragged --json > measured.json
      mlxrun bench model.gguf --dataset chats.jsonl --run recommended
    """
    _check_usage(click.get_current_context(), adapted=bool(loading["adapter"]))
    workloads = plan(n_prompt, n_predict, contexts, parallel or (1,))
    if not workloads and not mixed:
        raise click.UsageError("There is nothing to measure.")
    exchanges = None
    if dataset:
        with Bar(f"Reading {dataset.name}", unit="exchanges"):
            exchanges = read(dataset, MOST_EXCHANGES)
    path = located(model)
    baselines: list[Runtime] = []
    if "llama-bench" in against:
        from mlxrun.bench.baselines import LlamaBenchRuntime

        baselines.append(LlamaBenchRuntime(path))
    from mlxrun.memory.plan import plan_loaded

    import_module("mlxrun.llm")  # imports do not count as loading
    started = time.perf_counter()
    stored = {k: v for k, v in take(loading, CacheConfig).items() if v is not None}
    cache = CacheConfig(**stored)
    llm = load_model(str(path), cache=cache, **loading)
    load_seconds = time.perf_counter() - started
    bench = Bench(llm, load_seconds, cast(StorageOptions, stored), repetitions, mixed=mixed)
    memory = plan_loaded(llm.model, llm.config, llm.storage, cache=cache)
    profile: Facts = {}
    if dataset and exchanges:
        advices, profile["dataset"] = _profile(dataset, *exchanges, llm, memory, bench, parallel)
        workloads = [w for each in advices if each.size.level == level for w in each.workloads]
    elif mixed:
        workloads += [ragged(llm.context_length), *behind(llm.context_length)]
    short, too_long = fitting(workloads, llm.context_length)
    fit, too_large = affordable(memory, short)
    with bench.guarded(), ExitStack() as stack:
        if "mlx-lm" in against and not bench.ended:
            from mlxrun.bench.baselines import mlx_lm_runtime

            baselines.insert(0, stack.enter_context(mlx_lm_runtime(llm, path)))
        bench.run(fit, baselines=baselines)
    limits: Facts = {}
    if roofline and not bench.ended:
        from mlxrun.analysis.chips import CHIPS
        from mlxrun.analysis.roofline import bench_facts

        with bench.guarded():
            device, policy = measured_device(), loading["policy"]
            measured = bench_facts(llm, path, bench.results, device, policy, cache, CHIPS)
            limits["roofline"] = measured
    about = {
        "model": model,
        **bench.about(),
        "room": _room(llm, memory, workloads),
        "left_out": {"context": [w.name for w in too_long], "memory": [w.name for w in too_large]},
        **limits,
        **profile,
    }
    found = facts(bench.results, about)
    if as_json:
        print(json_of(found))
    elif as_csv:
        sys.stdout.write(flat(found))
    else:
        _print_tables(found)
    if plot:
        from mlxrun.analysis.plot import draw

        plotted = draw(found, plot)
        note(f"plotted: {plot}" if plotted else f"nothing was measured to plot in {plot}")
    if bench.failure:
        raise bench.failure
    if bench.interrupted:
        raise click.Abort


def _check_usage(context: click.Context, *, adapted: bool) -> None:
    """Refuse options that exclude each other."""
    given = context.params
    dataset, level, against = given["dataset"], given["level"], given["against"]
    needs_level = against or given["roofline"] or given["as_csv"]
    levels = " or ".join(LEVELS)
    for wrong, message in (
        (given["as_json"] and given["as_csv"], "Give --json or --csv, not both."),
        (adapted and against, "--against measures the same weights, which an --adapter changes."),
        (level and not dataset, "--run chooses lengths from a --dataset: name one."),
        (
            dataset and not level and needs_level,
            f"With --dataset, --against, --roofline and --csv need --run {levels}.",
        ),
        (
            given["roofline"] and given["as_csv"],
            "--roofline is shown in tables or with --json.",
        ),
        (
            given["parallel"] and not any(given["n_predict"]) and not dataset,
            "--parallel is of tokens to decode: give --n-predict.",
        ),
    ):
        if wrong:
            raise click.UsageError(message)
    for name in ("n_prompt", "n_predict", "contexts", "mixed") if dataset else ():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError("A --dataset chooses lengths and depths: leave them out.")


class Bench:
    """Measurements of one model, one list of workloads after the other.

    Attributes:
        results: so far.
        interrupted: by Ctrl-C, after which nothing more is measured.
        failure: an error after which nothing more is measured either.
    """

    def __init__(
        self, llm: LLM, load_seconds: float, cache: StorageOptions, repetitions: int, *, mixed: bool
    ) -> None:
        from mlxrun.analysis.machine import BackgroundLoad
        from mlxrun.bench.runtimes import MlxrunRuntime, SerialRuntime

        kinds = (MlxrunRuntime, SerialRuntime) if mixed else (MlxrunRuntime,)
        self._own: list[Runtime] = [kind(llm, load_seconds, cache) for kind in kinds]
        self._loaded = self._own[:1]
        self._repetitions, self._load = repetitions, BackgroundLoad()
        self.results, self.interrupted = Results(), False
        self.failure: MlxrunError | None = None

    @property
    def ended(self) -> bool:
        return self.interrupted or self.failure is not None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep results when Ctrl-C or a failure ends the block; without any, raise the failure."""
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
        baselines: Sequence[Runtime] = (),
    ) -> None:
        """Measure workloads, in turns with baselines, under a progress bar."""
        self._loaded += baselines
        if self.ended:
            return
        turns, look = [*self._own, *baselines], self._load.look
        with self.guarded(), Bar(label, unit="runs") as bar:
            measure(turns, workloads, self._repetitions, self.results, progress=bar, after=look)

    def about(self) -> Facts:
        """Machine, load and runtimes."""
        from mlxrun.analysis.machine import machine

        against = ["mlx-lm"] * any(runtime.name == "mlx-lm" for runtime in self._loaded)
        return {
            "machine": machine(["mlxrun", "mlx", *against]),
            "other_use": self._load.facts(),
            "repetitions": self._repetitions,
            "runtimes": [
                {"name": r.name, "about": r.about, "load_seconds": r.load_seconds}
                for r in self._loaded
            ],
            "interrupted": self.interrupted,
        }


def affordable(
    memory: MemoryPlan, workloads: Sequence[Workload]
) -> tuple[list[Workload], list[Workload]]:
    """Workloads that fit in memory by the plan, and the others."""
    terms = {w: memory.terms(w.length, w.parallel) for w in workloads}
    fit = [workload for workload in workloads if terms[workload].fits]
    if workloads and not fit:
        least = min(workloads, key=lambda workload: terms[workload].total)
        memory.check(least.length, least.parallel)
    return fit, [workload for workload in workloads if not terms[workload].fits]


def _room(llm: LLM, memory: MemoryPlan, workloads: Sequence[Workload]) -> list[Facts]:
    """The longest context of each of several sequences that decode together."""
    together = {w.parallel for w in workloads if isinstance(w, Decode) and w.parallel > 1}
    longest = llm.context_length
    return [
        {"parallel": n, "context": min(longest, memory.context_for(n))} for n in sorted(together)
    ]


def _profile(
    path: Path,
    exchanges: list[Exchange],
    count: int,
    llm: LLM,
    memory: MemoryPlan,
    bench: Bench,
    parallel: Sequence[int] | None,
) -> tuple[list[Advice], Facts]:
    """Count tokens, try numbers of sequences, and recommend lengths and numbers."""
    with Bar("Counting tokens", unit="exchanges") as bar:
        lengths = token_lengths(path, exchanges, llm.tokenizer, bar)
    found = sizes(lengths)
    recommended = next(size for size in found if size.level == "recommended")
    tried, _ = affordable(memory, trials(recommended, parallel or TRIED, llm.context_length))
    bench.run(tried, "Trying numbers of sequences")
    if bench.ended:  # the best of a part says nothing
        tried = []
    results = filter(None, map(bench.results.find, tried))
    rates = {result.workload.parallel: result.rate.median for result in results}
    advices = advise(found, rates, memory.parallel_for)
    return advices, profile_facts(path, count, lengths, advices, tried, llm.context_length)


def _print_tables(found: Facts) -> None:
    if "dataset" in found:
        print_profile(found["dataset"])
    print_results(found)
    if "roofline" in found:
        print_roofline(found["roofline"])
