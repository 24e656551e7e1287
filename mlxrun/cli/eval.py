"""``mlxrun perplexity``, ``compare`` and ``check-batch``: how good a model's output is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, Table, json_of, note, show
from mlxrun.cli.loading import load_model, located, read_text
from mlxrun.cli.options import (
    Command,
    ModelName,
    Values,
    take,
    with_cache_types,
    with_json,
    with_loading,
    with_options,
    with_sides,
    with_verbose,
)
from mlxrun.config import CacheConfig, CacheTypeOptions, LoadConfig, names_of, options_of
from mlxrun.errors import ConversionError, ParameterError
from mlxrun.eval.windows import SMALLEST, WindowConfig

if TYPE_CHECKING:
    from mlxrun.eval.kl_divergence import Comparison, DivergenceScorer
    from mlxrun.eval.perplexity import Estimate, Perplexity, PerplexityScorer
    from mlxrun.llm import LLM

Rows = list[tuple[str, str]]


_WINDOWS = {name: option for name, option in options_of(WindowConfig).items() if name != "bos"}
_NO_BOS = click.option(
    "--no-bos",
    "bos",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Begin windows with a token of their own instead of the tokenizer's prefix.",
)
_PARSE_SPECIAL = click.option(
    "--parse-special",
    is_flag=True,
    help="Let <|markers|> in the text be control tokens, as in recorded chats.",
)


def with_windows(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of windows, and ``--json``."""
    command = _NO_BOS(_PARSE_SPECIAL(with_json(command)))
    return with_options(_WINDOWS, "Options")(command)


@click.command("perplexity", cls=Command)
@click.argument("model", type=ModelName())
@click.argument("file")
@with_windows
@with_cache_types
@with_loading
def perplexity_command(model: str, file: str, as_json: bool, **options: Any) -> None:
    """Measure how well a model predicts a text.

    Perplexity is exp of the mean negative log-likelihood of the text's tokens: 1 is certainty, and
    less is better. Perplexities of different texts or vocabularies cannot be compared. FILE is
    UTF-8 text, - is standard input. It is cut into windows as by llama.cpp's llama-perplexity, and
    the same context and weights give the same figure. All tokens of a window attend to each other
    as the cache stores them, so that --cache-type-k and --cache-type-v have their full effect. The
    standard error assumes independent tokens. Ctrl-C ends early and prints the result so far.

    \b
    Examples:
      mlxrun perplexity model.gguf wiki.test.raw
      mlxrun perplexity model.gguf wiki.test.raw --context 2048 --chunks 20
      mlxrun perplexity model.gguf wiki.test.raw --cache-type-k q8 --cache-type-v q4
    """
    from mlxrun.eval.perplexity import PerplexityScorer

    text, cache = _text(file), CacheConfig(**take(options, CacheConfig))
    loading = {"verbose": options.pop("verbose"), **take(options, LoadConfig)}
    llm = load_model(model, cache=cache, **loading)
    scorer = PerplexityScorer(llm, text, cache=cache, **options)
    about = {"model": model, "file": file}
    _evaluate(scorer, "Scoring", "perplexity", about, _perplexity_rows, as_json=as_json)


def _perplexity_rows(result: Perplexity) -> Rows:
    return [
        ("perplexity", _shown(result.perplexity)),
        ("nats per token", _shown(result.surprise)),
        ("scored", _scored(result)),
    ]


@dataclass(frozen=True)
class Side:
    source: str
    loading: Values
    cache: CacheConfig

    def load(self, **more: Any) -> LLM:
        return load_model(self.source, cache=self.cache, **self.loading, **more)

    def to_dict(self) -> Values:
        types = dict(zip(names_of(CacheTypeOptions), self.cache.types, strict=True))
        return {"source": self.source, **self.loading, **types}

    def shares_weights(self, other: Side) -> bool:
        return (self.source, self.loading) == (other.source, other.loading)


@click.command("compare")
@click.argument("a", type=ModelName())
@click.argument("b", type=ModelName())
@click.argument("file")
@with_windows
@with_sides
@with_options({"wired": options_of(LoadConfig)["wired"]}, "Options")
@with_verbose
def compare_command(
    a: str, b: str, file: str, as_json: bool, wired: bool, verbose: bool, **options: Any
) -> None:
    """Measure how far model B is from model A.

    Both score FILE (UTF-8 text, - is standard input) in the windows of 'mlxrun perplexity'. For
    each scored token, the Kullback-Leibler divergence D(A||B) = sum p_A ln(p_A / p_B) is the loss
    in nats of predicting with B instead of A; 0 is the same prediction. A is the reference, and
    both must have the same vocabulary. They may be one model in two forms: options for A and for B
    are those of 'mlxrun perplexity'. Both are in memory at once, and once only if they share their
    weights. Ctrl-C ends early and prints the result so far.

    \b
    Examples:
      mlxrun compare model.gguf model-mlx wiki.test.raw
      mlxrun compare model.gguf model.gguf wiki.test.raw --a-policy exact --b-policy compact
      mlxrun compare model.gguf model.gguf wiki.test.raw --b-cache-type-k q8 --b-cache-type-v q4
    """
    from mlxrun.eval.kl_divergence import DivergenceScorer

    one, other = (
        Side(
            source,
            take(options, LoadConfig, f"{side}_"),
            CacheConfig(**take(options, CacheConfig, f"{side}_")),
        )
        for side, source in (("a", a), ("b", b))
    )
    text = _text(file)
    _check_memory(one, other)
    first = one.load(wired=wired, verbose=verbose)
    shared = one.shares_weights(other)
    second = first if shared else other.load(wired=wired, verbose=verbose)
    scorer = DivergenceScorer(
        first, second, text, cache_a=one.cache, cache_b=other.cache, **options
    )
    about = {"a": one.to_dict(), "b": other.to_dict(), "file": file}
    _evaluate(scorer, "Comparing", "divergence", about, _comparison_rows, as_json=as_json)


def _comparison_rows(result: Comparison) -> Rows:
    levels = ", ".join(f"{level}%: {x:.3g}" for level, x in result.percentiles.items())
    return [
        ("KL divergence D(A||B), nats per token", _shown(result.divergence)),
        ("KL divergence of single tokens", f"{levels}, most: {result.largest:.3g}"),
        ("same likeliest token", _shown(result.agreement, 100, "%")),
        ("perplexity of A", _shown(result.perplexity_a)),
        ("perplexity of B", _shown(result.perplexity_b)),
        ("ln(B's / A's)", _shown(result.log_ratio)),
        ("probability of the right token, B - A", _shown(result.change, 100, "%")),
        ("root mean square of B - A", _shown(result.rms_change, 100, "%")),
        ("scored", _scored(result)),
    ]


def _check_memory(a: Side, b: Side) -> None:
    """Refuse models that do not fit into memory together, before they are loaded."""
    from mlxrun.eval.perplexity import check_memory
    from mlxrun.loader import open_model
    from mlxrun.memory.plan import plan_source

    if a.shares_weights(b):
        return  # loading refuses a model that is too large alone
    names = ("dtype", "policy")
    choices = [{name: side.loading[name] for name in names} for side in (a, b)]
    try:
        sources = [open_model(located(side.source)) for side in (a, b)]
        storages = [source.storage(**own) for source, own in zip(sources, choices, strict=True)]
        first, second = map(plan_source, sources, storages)
    except ConversionError:  # loading reports it
        return
    if a.source == b.source and choices[0] == choices[1]:  # a mapped file serves both
        second = replace(second, weights=second.weights - storages[1].mapped)
    check_memory([first, second], SMALLEST)


@click.command("check-batch", cls=Command)
@click.argument("model", type=ModelName())
@click.option(
    "--requests", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many."
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    help="The most tokens to generate per request.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 1024),
    default=20,
    show_default=True,
    help="The most sequences that run at once.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and lengths.")
@with_json
@with_loading
def check_batch_command(
    model: str,
    requests: int,
    tokens: int,
    parallel: int,
    seed: int,
    as_json: bool,
    **loading: Any,
) -> None:
    """Compare requests served together with each alone.

    Random prompts of 4 to 300 tokens are continued one at a time, then together: by default in one
    forward pass for all, whose rounding may decide between tokens of nearly equal probability, and
    deterministic, which computes each sequence by itself. No prefix is reused. Ends with exit code
    1 if the deterministic tokens ever differ.

    \b
    Examples:
      mlxrun check-batch model.gguf
      mlxrun check-batch model.gguf --requests 100 --parallel 32 --json
    """
    from mlxrun.eval.batch_invariance import check_batch

    llm = load_model(model, **loading)
    with Bar("Serving", unit="requests") as bar:
        results = check_batch(
            llm, requests=requests, tokens=tokens, parallel=parallel, seed=seed, progress=bar
        )
    if as_json:
        print(json.dumps({"model": model, "ways": [asdict(each) for each in results]}))
    else:
        rows = [
            {
                "way": each.name,
                "#equal": f"{each.equal} of {each.requests}",
                "#differences per token": f"{(each.requests - each.equal) / max(1, each.same):.2g}",
                "#tokens/s": f"{each.tokens / each.seconds:.0f}",
                "#x one at a time": f"{each.alone / each.seconds:.2f}",
            }
            for each in results
        ]
        show(Table.of("", rows))
    if any(each.equal < each.requests for each in results if "deterministic" in each.name):
        click.get_current_context().exit(1)


def _text(name: str) -> str:
    text = read_text(name)
    if not text:
        raise ParameterError("FILE", name, "a text that is not empty")
    return text


def _evaluate(
    scorer: PerplexityScorer | DivergenceScorer,
    label: str,
    figure: str,
    about: Values,
    rows: Callable[[Any], Rows],
    *,
    as_json: bool,
) -> None:
    """Score all windows, or those until Ctrl-C, and print the result."""
    done, count, interrupted = 0, scorer.windows.count, False
    try:
        with Bar(label, unit="windows") as bar:
            bar(0, count)
            for done in scorer:
                bar(done, count)
                bar.label(f"{figure} {_shown(scorer.estimate())}")
    except KeyboardInterrupt:
        if not done:
            raise
        note(f"interrupted after {done} of {count} windows")
        interrupted = True
    result = scorer.result()
    if as_json:
        print(json_of(about | {"interrupted": interrupted} | asdict(result)))
    else:
        show(Table(rows=rows(result)))
    if interrupted:
        raise click.Abort


def _shown(estimate: Estimate, scale: float = 1, unit: str = "") -> str:
    """An estimate with its standard error."""
    value, error = scale * estimate.value, scale * estimate.error
    spread = "" if math.isnan(error) else f" ± {error:.2g}{unit}"
    return f"{value:.5g}{unit}{spread}"


def _scored(result: Perplexity | Comparison) -> str:
    windows = f"each of {result.windows} windows" if result.windows > 1 else "one window"
    tokens = f"{result.tokens} token{'s' * (result.tokens > 1)}"
    return f"{tokens}: the last {result.scored} of {windows} of {result.context}"
