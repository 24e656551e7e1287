"""``mlxrun compare``: how far one model, or form of one, is from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.adapters import Adapters, strengths
from mlxrun.cli.caches import CacheType
from mlxrun.cli.completion import ModelName
from mlxrun.cli.console import Output, json_of, table
from mlxrun.cli.loading import DTYPES, POLICIES, PRODUCTS_HELP, load_model, located
from mlxrun.cli.scoring import read_on, read_text, scored, shown, with_windows
from mlxrun.config import CacheConfig
from mlxrun.errors import ConversionError
from mlxrun.products import PLANES

if TYPE_CHECKING:
    from mlxrun.llm import LLM
    from mlxrun.quality.divergence import Comparison

Command = Callable[..., None]

# What may be said of A and of B: option, what it takes, and for what.
_SAID: Mapping[str, dict[str, Any]] = {
    "policy": {"type": click.Choice(POLICIES), "help": "How the tensors of a GGUF become MLX's."},
    "products": {"type": click.Choice(tuple(PLANES)), "help": PRODUCTS_HELP},
    "dtype": {"type": click.Choice(DTYPES), "help": "Type of the activations."},
    "adapter": {
        "multiple": True,
        "callback": strengths,
        "metavar": "PATH[:SCALE]",
        "help": "Apply a LoRA adapter.",
    },
    "cache-type-k": {"type": CacheType(), "metavar": "TYPE", "help": "How keys are stored."},
    "cache-type-v": {"type": CacheType(), "metavar": "TYPE", "help": "How values are stored."},
}


def with_sides(command: Command) -> Command:
    """Give a command ``--a-policy``, ``--b-policy`` and so on."""
    for side in ("b", "a"):
        for name, said in reversed(list(_SAID.items())):
            more = said | {"help": f"Of {side.upper()}: {said['help']}"}
            command = click.option(f"--{side}-{name}", **more)(command)
    return command


@dataclass(frozen=True)
class Side:
    """One of the two: a model, how it is loaded, how it stores keys and values."""

    source: str
    policy: str | None
    products: str | None
    dtype: str | None
    adapter: Adapters
    cache_type_k: str | None
    cache_type_v: str | None

    def loads_as(self, other: Side) -> bool:
        """Whether the same weights serve both."""
        loading = ("source", "policy", "products", "dtype", "adapter")
        return all(getattr(self, name) == getattr(other, name) for name in loading)

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(cache_type_k=self.cache_type_k, cache_type_v=self.cache_type_v)

    def load(self, *, wired: bool, verbose: bool) -> LLM:
        return load_model(
            self.source,
            dtype=self.dtype,
            policy=self.policy,
            products=self.products,
            adapter=self.adapter,
            wired=wired,
            verbose=verbose,
            cache_types=(self.cache_type_k, self.cache_type_v),
        )


@click.command("compare")
@click.argument("a", type=ModelName())
@click.argument("b", type=ModelName())
@click.argument("file")
@with_windows
@with_sides
@click.option("--wired", is_flag=True, help="Keep the models' memory from being swapped out.")
@click.option("-v", "--verbose", is_flag=True, help="Tell what was chosen and what it cost.")
def compare_command(
    a: str, b: str, file: str, as_json: bool, wired: bool, verbose: bool, **options: Any
) -> None:
    """Measure how far model B is from model A.

    Both read FILE (UTF-8 text, - is standard input) in the windows of 'mlxrun perplexity'. For each
    scored token, the Kullback-Leibler divergence D(A||B) = sum p_A ln(p_A / p_B) says how many nats
    are lost by predicting with B what A predicts; 0 is the same prediction. A is the reference, and
    both must have the same vocabulary. They may be one model in two forms: what differs is said
    with options for A and for B, which mean what they mean in 'mlxrun perplexity'. Both are in
    memory at once, and once only where the same weights serve both. Ctrl-C ends early and prints
    what was measured by then.

    \b
    Examples:
      mlxrun compare model.gguf model-mlx wiki.test.raw
      mlxrun compare model.gguf model.gguf wiki.test.raw --a-policy exact --b-policy compact
      mlxrun compare model.gguf model.gguf wiki.test.raw --b-cache-type-k q8 --b-cache-type-v q4
    """
    from mlxrun.quality.measure import Comparing

    names = [name.replace("-", "_") for name in _SAID]
    one, other = (
        Side(source, **{name: options.pop(f"{side}_{name}") for name in names})
        for side, source in (("a", a), ("b", b))
    )
    text = read_text(file)
    _check_memory(one, other)
    first = one.load(wired=wired, verbose=verbose)
    second = first if one.loads_as(other) else other.load(wired=wired, verbose=verbose)
    comparing = Comparing(
        first,
        second,
        text,
        cache_a=one.cache,
        cache_b=other.cache,
        **options,
    )
    interrupted = read_on(comparing, "Comparing", "divergence")
    result = comparing.result()
    if as_json:
        about = {"a": asdict(one), "b": asdict(other), "file": file, "interrupted": interrupted}
        print(json_of(about | asdict(result)))
    else:
        _print(result)
    if interrupted:
        raise click.Abort


def _check_memory(a: Side, b: Side) -> None:
    """Refuse models that memory cannot hold at once before they are loaded."""
    from mlxrun.loader import open_model
    from mlxrun.memory.plan import plan_source
    from mlxrun.quality.memory import check_memory
    from mlxrun.quality.windows import SMALLEST

    if a.loads_as(b):
        return  # loading refuses what is too large alone
    try:
        sources = [open_model(located(side.source)) for side in (a, b)]
        held = [
            source.storage(dtype=side.dtype, policy=side.policy)
            for source, side in zip(sources, (a, b), strict=True)
        ]
        first, second = map(plan_source, sources, held)
    except ConversionError:  # loading will tell what is wrong with the model
        return
    alike = ("source", "policy", "dtype")
    if all(getattr(a, name) == getattr(b, name) for name in alike):  # what is mapped serves both
        second = replace(second, weights=second.weights - held[1].mapped)
    check_memory([first, second], SMALLEST)


def _print(result: Comparison) -> None:
    levels = ", ".join(f"{level}%: {x:.3g}" for level, x in result.percentiles.items())
    rows = [
        ("KL divergence D(A||B), nats a token", shown(result.divergence)),
        ("KL divergence of single tokens", f"{levels}, most: {result.largest:.3g}"),
        ("same likeliest token", shown(result.agreement, 100, "%")),
        ("perplexity of A", shown(result.perplexity_a)),
        ("perplexity of B", shown(result.perplexity_b)),
        ("ln(B's / A's)", shown(result.log_ratio)),
        ("probability of the right token, B - A", shown(result.change, 100, "%")),
        ("root mean square of B - A", shown(result.rms_change, 100, "%")),
        ("scored", scored(result)),
    ]
    Output().print(table("", ("", ""), rows, header=False))
