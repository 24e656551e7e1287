"""Open a model for a command: options, progress, and what ``-v`` tells about it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxrun.cli.adapters import Adapters, adapter_option
from mlxrun.cli.console import Bar, note, size
from mlxrun.cli.sections import option_in
from mlxrun.products import DEFAULT, PLANES

if TYPE_CHECKING:
    from mlxrun.llm import LLM
    from mlxrun.outputs import Chunk, Usage
    from mlxrun.sampling_defaults import SamplingDefaults

POLICIES = ("exact", "near", "compact")
DTYPES = ("float32", "float16", "bfloat16")
PRODUCTS_HELP = (
    "Bits of activations where they are multiplied with a GGUF's own blocks, on the CPU: "
    + ", ".join(f"{name} {8 * planes}" for name, planes in PLANES.items())
    + "."
)
# A model this large makes a slow BLAS felt.
LARGE = 50_000_000

# What it means where a file's own blocks cannot be multiplied.
MISSED = (
    "slower and larger in memory than it could be, for its blocks cannot be multiplied as they are"
)

Command = Callable[..., None]


def with_loading(command: Command) -> Command:
    """Give a command the options that say how a model is loaded."""
    for option in (
        click.option(
            "-v", "--verbose", is_flag=True, help="Tell what was chosen and what it cost."
        ),
        option_in("Loading")(
            "--policy",
            type=click.Choice(POLICIES),
            help="How the tensors of a GGUF become MLX's.  [default: on the CPU they stay as they "
            "are in the file; else near]",
        ),
        option_in("Loading")(
            "--products",
            type=click.Choice(tuple(PLANES)),
            help=f"{PRODUCTS_HELP}  [default: {DEFAULT}]",
        ),
        option_in("Loading")(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Type of the activations.  [default: float32 on the CPU, half precision on a GPU]",
        ),
        option_in("Loading")(
            "--wired",
            is_flag=True,
            help="Keep the model's memory from being swapped out, as far as the device recommends "
            "(Metal only).",
        ),
        adapter_option("Apply"),
    ):
        command = option(command)
    return command


def located(source: str) -> Path:
    """The local file or directory of a model, downloaded if need be.

    Raises:
        SourceError, OutOfSpaceError: as :func:`mlxrun.hub.resolve` raises them.
    """
    from mlxrun.hub import resolve

    with Bar(f"Downloading {source}") as bar:
        return resolve(source, progress=bar, tell=note)


def refuse_policy(path: Path, policy: str | None) -> None:
    """Let no policy be given for what is converted already.

    Raises:
        UsageError: one is.
    """
    if policy and path.is_dir():
        raise click.UsageError(
            f"A policy is for GGUF files; {path.name} is a model directory, converted already."
        )


def load_model(
    source: str,
    *,
    dtype: str | None = None,
    policy: str | None = None,
    products: str | None = None,
    adapter: Adapters | None = None,
    wired: bool = False,
    verbose: bool = False,
    cache_types: tuple[str | None, str | None] = (None, None),
    defaults: SamplingDefaults | None = None,
) -> LLM:
    """Load a model, with a progress bar on a terminal.

    Args:
        cache_types: of keys and values, as the command will use them; for ``verbose`` to tell.
        defaults: sampling parameters where the model's files recommend none.

    Raises:
        UsageError: a policy for what is converted already.
        MlxrunError: the model cannot be loaded.
    """
    path = located(source)
    refuse_policy(path, policy)
    with Bar(f"Loading {path.name}", delay=0) as bar:
        from mlxrun import llm as models
        from mlxrun.kernels import blas

        advice = blas.advice()
        model = models.load(
            path,
            dtype=dtype,
            policy=policy,
            products=products,
            adapter=adapter or (),
            wired=wired,
            progress=bar,
        )
    if defaults and not model.defaults.names:
        model.defaults = defaults
    _warn_of_strays(model)
    if verbose:
        _describe(model, cache_types)
    _hint_speed(model, advice, always=verbose)
    return model


def _warn_of_strays(llm: LLM) -> None:
    """Tensors that the architecture does not have may mean that it is not what the file says."""
    from converters.gguf.names import NO_PLACE

    skipped = llm.report.skipped if llm.report else []
    strays = [entry["name"] for entry in skipped if entry["reason"] == NO_PLACE]
    if strays:
        more = f" and {len(strays) - 4} more" if len(strays) > 4 else ""
        note(
            f"warning: left out {', '.join(strays[:4])}{more}: {NO_PLACE}; "
            "if the model needs them, its text is wrong"
        )


def _describe(llm: LLM, cache_types: tuple[str | None, str | None]) -> None:
    summary = llm.model.summary
    note(
        f"model: {llm.source}, {summary.name}, {summary.layers} layers, "
        f"{size(llm.model.nbytes)}, context {llm.context_length}"
    )
    for line in llm.choices.storing(*cache_types).lines():
        note(line)
    if llm.report:
        note(f"conversion: {llm.report}")
        for skipped in llm.report.skipped:
            note(f"skipped: {skipped['name']} ({skipped['type']}): {skipped['reason']}")
        for line in llm.report.notes():
            note(f"note: {line}")
    if llm.unused:
        more = f" and {len(llm.unused) - 8} more" if len(llm.unused) > 8 else ""
        note(f"unused: {', '.join(llm.unused[:8])}{more}")


def _hint_speed(llm: LLM, advice: str | None, *, always: bool) -> None:
    """Tell what makes products slow whom it will slow down: not scripts, nor who runs a tiny model.

    Who named a BLAS that cannot be had is told always.

    Args:
        advice: about the BLAS, which kernels do without.
    """
    from mlxrun.kernels import blas

    weights = llm.report.elements if llm.report else llm.model.nbytes // 2
    large = weights > LARGE and sys.stderr.isatty()
    if llm.missed and (always or large):
        note(f"hint: {MISSED}: {llm.missed}")
    slow = not llm.native and (always or large)
    if advice and (slow or blas.problem):
        note(f"hint: {advice}")


def reading(start: Callable[[Bar], Iterator[Chunk]]) -> Iterator[Chunk]:
    """The chunks of a reply, with a progress bar while a long prompt is read."""
    with Bar("Reading the prompt", count="tokens") as bar:
        chunks = start(bar)
        first = next(chunks)
    yield first
    yield from chunks


def usage_line(usage: Usage) -> str:
    """What a reply cost, on one line."""
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    count, speed = usage.completion_tokens, f" at {usage.speed}" if usage.speed else ""
    rate = usage.prompt_tokens_per_second
    prefill = "" if rate is None else f" at {rate:.1f} tokens/s"
    return (
        f"{count} token{'s' * (count != 1)}{speed}, "
        f"first after {usage.time_to_first_token:.2f} s, "
        f"prompt {usage.prompt_tokens} tokens{cached}{prefill}, "
        f"peak memory {size(usage.peak_memory)}"
    )
