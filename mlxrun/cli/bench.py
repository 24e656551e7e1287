"""``mlxrun bench``: how fast a model runs here, alone, together, and next to other runtimes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from mlxrun.analysis.dataset import LEVELS
from mlxrun.bench.workloads import Decode, Workload, behind, fitting, plan, ragged
from mlxrun.cli.console import Bar, json_of, note
from mlxrun.cli.loading import load_model, located
from mlxrun.cli.options import (
    Command,
    CountList,
    ModelName,
    take,
    with_attention,
    with_cache_types,
    with_loading,
)
from mlxrun.cli.roofline import print_roofline, roofline_facts
from mlxrun.config import CacheConfig, StorageOptions
from mlxrun.errors import MlxrunError

if TYPE_CHECKING:
    from mlxrun.analysis.dataset import Exchange, Profile
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
    """The file of a plot, checked before anything is loaded."""
    if path is not None and not context.resilient_parsing:
        from mlxrun.analysis.plot import check

        check(path)
    return path


OPTIONS: tuple[Callable[[Callable[..., None]], Callable[..., None]], ...] = (
    click.option(
        "-p",
        "--n-prompt",
        type=CountList(),
        default="128,512",
        show_default=True,
        help="Lengths of prompts to prefill; 0 for none.",
    ),
    click.option(
        "-n",
        "--n-predict",
        type=CountList(),
        default="128",
        show_default=True,
        help="Numbers of tokens to decode; 0 for none.",
    ),
    click.option(
        "-r",
        "--repetitions",
        type=click.IntRange(1, 1000),
        default=5,
        show_default=True,
        help="Runs of each test, after one that warms up.",
    ),
    click.option(
        "--parallel",
        type=CountList(1),
        help="Numbers of sequences that decode together, such as 1,2,4,8,16,20.  [default: 1]",
    ),
    click.option(
        "--context",
        "contexts",
        type=CountList(),
        default="0",
        help="Tokens in the KV cache before each test, such as 0,1k,4k.  [default: 0]",
    ),
    click.option(
        "--ragged",
        "mixed",
        is_flag=True,
        help="Also serve 20 requests of many lengths together and one at a time, and a short "
        "request behind a long prompt.",
    ),
    click.option(
        "--dataset",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE.jsonl",
        help="Count the tokens of prompts and outputs in a file (messages, conversations, "
        "prompt and response, and the like) and recommend what to measure: lengths, and "
        "numbers of sequences after trying some, those of --parallel if they are given.",
    ),
    click.option(
        "--run",
        "level",
        type=click.Choice(tuple(LEVELS)),
        help="Measure the recommendation for the --dataset: "
        + ", ".join(f"{level} covers {percent}%" for level, percent in LEVELS.items())
        + " of prompts and of outputs.",
    ),
    click.option(
        "--against",
        type=click.Choice(BASELINES),
        multiple=True,
        help="Also measure another runtime with the same weights, taking turns: mlx-lm in this "
        "process, llama.cpp's llama-bench if it is on the path. May be given twice.",
    ),
    click.option(
        "--roofline",
        is_flag=True,
        help="Also measure this device, and show each rate as a fraction of its limit, which limit "
        "binds, and the limits of other chips. Not with --csv.",
    ),
    click.option(
        "--plot",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        callback=_plottable,
        metavar="FILE",
        help="Plot rates by the number of sequences and by context into a .png, .svg, .pdf or "
        ".html file; needs pip install 'mlxrun[plot]'.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values."),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command("bench", cls=Command)
@click.argument("model", type=ModelName())
@_with_options
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
    Prompts are random tokens, sampling is greedy and goes on past ends of turn. Rates are medians.
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
    _check_usage(click.get_current_context(), adapted=bool(loading["adapter"]))
    workloads = plan(n_prompt, n_predict, contexts, parallel or (1,))
    if not workloads and not mixed:
        raise click.UsageError("There is nothing to measure.")
    exchanges = _read_dataset(dataset) if dataset else None
    path = located(model)
    baselines: list[Runtime] = []
    if "llama-bench" in against:
        from mlxrun.bench.baselines import LlamaBenchRuntime

        baselines.append(LlamaBenchRuntime(path))
    import_module("mlxrun.llm")  # imports do not count as loading
    started = time.perf_counter()
    stored = take(loading, CacheConfig)
    llm = load_model(str(path), cache=CacheConfig(**stored), **loading)
    load_seconds = time.perf_counter() - started
    stored = {name: value for name, value in stored.items() if value is not None}
    cache = cast(StorageOptions, stored)
    bench, memory = Bench(llm, load_seconds, cache, repetitions, mixed=mixed), _memory(llm, cache)
    profile = None
    if dataset and exchanges:
        profile = _profile(dataset, *exchanges, llm, memory, bench, parallel)
        workloads = profile.workloads(level) if level else []
    elif mixed:
        workloads += [ragged(llm.context_length), *behind(llm.context_length)]
    fit, left_out = _fitting(llm, memory, workloads)
    with bench.guarded(), _mlx_lm(llm, path, "mlx-lm" in against and not bench.ended) as mlx_lm:
        bench.run(fit, baselines=[*mlx_lm, *baselines])
    limits: Facts = {}
    if roofline and not bench.ended:
        with bench.guarded():
            policy = loading["policy"]
            limits["roofline"] = roofline_facts(llm, path, bench.results, policy, cache)
    about = {
        "model": model,
        **bench.about(),
        "room": _room(llm, memory, workloads),
        "left_out": left_out,
        **limits,
        **({"dataset": profile.facts()} if profile else {}),
    }
    _print(bench, about, profile, as_json=as_json, as_csv=as_csv, plot=plot)
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
        (level and not dataset, "--run chooses what to measure for a --dataset: name one."),
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
        results: what was measured so far.
        interrupted: by Ctrl-C, after which nothing more is measured.
        failure: an error after which nothing more is measured either.
    """

    def __init__(
        self, llm: LLM, load_seconds: float, cache: StorageOptions, repetitions: int, *, mixed: bool
    ) -> None:
        from mlxrun.analysis.background_load import BackgroundLoad
        from mlxrun.bench.runner import Results
        from mlxrun.bench.runtimes import MlxrunRuntime, SerialRuntime

        own = MlxrunRuntime(llm, load_seconds, cache)
        self._own: list[Runtime] = [own]
        if mixed:
            self._own.append(SerialRuntime(llm, load_seconds, cache))
        self._about: list[Runtime] = [own]
        self._repetitions, self._load = repetitions, BackgroundLoad()
        self.results, self.interrupted = Results(), False
        self.failure: MlxrunError | None = None

    @property
    def ended(self) -> bool:
        return self.interrupted or self.failure is not None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep results when Ctrl-C or a failure ends the block.

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
        baselines: Sequence[Runtime] = (),
    ) -> None:
        """Measure workloads, in turns with baselines, under a progress bar."""
        from mlxrun.bench.runner import measure

        self._about += baselines
        if self.ended:
            return
        turns, look = [*self._own, *baselines], self._load.look
        with self.guarded(), Bar(label, count="runs") as bar:
            measure(turns, workloads, self._repetitions, self.results, progress=bar, after=look)

    def about(self) -> Facts:
        """Machine, load and runtimes."""
        from mlxrun.bench.machine import machine

        packages = ["mlxrun", "mlx"]
        packages += ["mlx-lm"] * any(runtime.name == "mlx-lm" for runtime in self._about)
        return {
            "machine": machine(packages),
            "other_use": self._load.facts(),
            "repetitions": self._repetitions,
            "runtimes": [
                {"name": r.name, "about": r.about, "load_seconds": r.load_seconds}
                for r in self._about
            ],
            "interrupted": self.interrupted,
        }


@contextmanager
def _mlx_lm(llm: LLM, path: Path, asked: bool) -> Iterator[list[Runtime]]:
    """mlx-lm with the same weights, if it was asked for: imported only then."""
    if not asked:
        yield []
        return
    from mlxrun.bench.baselines import mlx_lm_runtime

    with mlx_lm_runtime(llm, path) as runtime:
        yield [runtime]


def _memory(llm: LLM, cache: StorageOptions) -> MemoryPlan:
    from mlxrun.memory.plan import plan_loaded

    return plan_loaded(llm.model, llm.config, cache=CacheConfig(**cache))


def _fitting(
    llm: LLM, memory: MemoryPlan, workloads: Sequence[Workload]
) -> tuple[list[Workload], dict[str, list[str]]]:
    """Workloads that fit context and memory, and the names of the others by reason.

    Raises:
        ContextLengthError, MemoryLimitError: none is left.
    """
    short, too_long = fitting(workloads, llm.context_length)
    fit, too_large = _affordable(memory, short)
    return fit, {"context": [w.name for w in too_long], "memory": [w.name for w in too_large]}


def _affordable(
    memory: MemoryPlan, workloads: Sequence[Workload]
) -> tuple[list[Workload], list[Workload]]:
    """Workloads that fit in memory by the plan, and the others.

    Raises:
        MemoryLimitError: none fits.
    """
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


def _read_dataset(path: Path) -> tuple[list[Exchange], int]:
    from mlxrun.analysis.dataset import read

    with Bar(f"Reading {path.name}", count="exchanges"):
        return read(path, MOST_EXCHANGES)


def _profile(
    path: Path,
    exchanges: list[Exchange],
    count: int,
    llm: LLM,
    memory: MemoryPlan,
    bench: Bench,
    parallel: Sequence[int] | None,
) -> Profile:
    """Count tokens, try numbers of sequences, and advise what to measure."""
    from mlxrun.analysis.dataset import TRIED, Profile, advise, sizes, token_lengths, trials

    with Bar("Counting tokens", count="exchanges") as bar:
        lengths = token_lengths(path, exchanges, llm.tokenizer, bar)
    found = sizes(lengths)
    recommended = next(size for size in found if size.level == "recommended")
    tried, _ = _affordable(memory, trials(recommended, parallel or TRIED, llm.context_length))
    bench.run(tried, "Trying numbers of sequences")
    if bench.ended:  # the best of a part says nothing
        tried = []
    results = [bench.results.find(workload) for workload in tried]
    rates = {result.workload.parallel: result.rate.median for result in results if result}
    advices = advise(found, rates, memory.parallel_for)
    return Profile(path.name, count, len(exchanges), lengths, advices, tried, llm.context_length)


def _print(
    bench: Bench,
    about: Facts,
    profile: Profile | None,
    *,
    as_json: bool,
    as_csv: bool,
    plot: Path | None,
) -> None:
    from mlxrun.bench.report import facts, flat
    from mlxrun.cli.bench_tables import print_profile, print_results

    found = facts(bench.results, about)
    if as_json:
        print(json_of(found))
    elif as_csv:
        sys.stdout.write(flat(found))
    else:
        if profile:
            print_profile(profile)
        print_results(bench.results, about)
        if "roofline" in about:
            print_roofline(about["roofline"])
    if plot:
        from mlxrun.analysis.plot import draw

        drawn = draw(found, plot)
        note(f"drawn: {plot}" if drawn else f"nothing was measured to draw in {plot}")
