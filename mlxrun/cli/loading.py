"""What commands load: a model, with progress, hints and the lines of ``-v``; and texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from mlxrun.cli.console import Bar, note, size
from mlxrun.config import DEFAULT_CACHE, LoadOptions, StorageConfig
from mlxrun.errors import ContextLengthError

if TYPE_CHECKING:
    from mlxrun.llm import LLM
    from mlxrun.outputs import Usage
    from mlxrun.sampling_params import SamplingDefaults

# Weights from which a slow BLAS matters.
LARGE = 50_000_000

# Bytes: ten million tokens, the longest context that a model claims, at ten bytes each.
LONGEST_TEXT = 100_000_000

MISSED = (
    "slower and larger in memory than it could be, for its blocks cannot be multiplied as they are"
)


def located(source: str) -> Path:
    """The local file or directory of a model, downloaded if necessary."""
    from mlxrun.hub import resolve

    with Bar(f"Downloading {source}") as bar:
        return resolve(source, progress=bar, notify=note)


def refuse_policy(path: Path, policy: str | None) -> None:
    """Raise UsageError for a policy of a directory."""
    if policy and path.is_dir():
        raise click.UsageError(
            f"A policy is for GGUF files; {path.name} is a model directory, converted already."
        )


def load_model(
    source: str,
    *,
    verbose: bool = False,
    cache: StorageConfig = DEFAULT_CACHE,
    defaults: SamplingDefaults | None = None,
    **options: Unpack[LoadOptions],
) -> LLM:
    """Load a model, with a progress bar on a terminal.

    Args:
        verbose: print the choices made for it.
        cache: of the command, for ``verbose``.
        defaults: sampling parameters if the model's files recommend none.
    """
    path = located(source)
    refuse_policy(path, options.get("policy"))
    with Bar(f"Loading {path.name}", delay=0) as bar:
        from mlxrun import llm as models
        from mlxrun.kernels import blas

        advice = blas.advice()
        model = models.load(path, progress=bar, **options)
    if defaults and not model.defaults.names:
        model.defaults = defaults
    _warn_of_strays(model)
    if verbose:
        _describe(model, cache)
    _hint_speed(model, advice, always=verbose)
    return model


def _warn_of_strays(llm: LLM) -> None:
    """Warn of tensors that the architecture does not have: the file may name a wrong one."""
    from converters.architectures.mapping import NO_PLACE

    skipped = llm.report.skipped if llm.report else []
    strays = [entry["name"] for entry in skipped if entry["reason"] == NO_PLACE]
    if strays:
        note(
            f"warning: left out {_some(strays, 4)}: {NO_PLACE}; "
            "if the model needs them, its text is wrong"
        )


def _some(names: Sequence[str], count: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _describe(llm: LLM, cache: StorageConfig) -> None:
    summary = llm.model.summary
    note(
        f"model: {llm.source}, {summary.name}, {summary.layers} layers, "
        f"{size(llm.model.nbytes)}, context {llm.context_length}"
    )
    for line in str(llm.choices.storing(*cache.types)).splitlines():
        note(line)
    if llm.report:
        note(f"conversion: {llm.report}")
        for skipped in llm.report.skipped:
            note(f"skipped: {skipped['name']} ({skipped['type']}): {skipped['reason']}")
        for line in llm.report.notes():
            note(f"note: {line}")
    if llm.unused:
        note(f"unused: {_some(llm.unused, 8)}")


def _hint_speed(llm: LLM, advice: str | None, *, always: bool) -> None:
    """Print hints about slow products, for large models on a terminal or if ``always``.

    A BLAS that was named and cannot be loaded is always reported.
    """
    from mlxrun.kernels import blas

    weights = llm.report.elements if llm.report else llm.model.nbytes // 2
    large = weights > LARGE and sys.stderr.isatty()
    if llm.storage.missed and (always or large):
        note(f"hint: {MISSED}: {llm.storage.missed}")
    slow = not llm.storage.native and (always or large)
    if advice and (slow or blas.problem):
        note(f"hint: {advice}")


def read_text(name: str) -> str:
    """The text of a file, or of standard input for ``-``, without the newline at its end."""
    source = "Standard input" if name == "-" else name
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
            data = file.read(LONGEST_TEXT + 1)  # /dev/zero and some pipes never end
    except OSError as error:
        raise click.FileError(name, error.strerror) from None
    if len(data) > LONGEST_TEXT:
        raise ContextLengthError(
            f"{source} holds more than {size(LONGEST_TEXT)}, which no model's context does",
            hint="Give a shorter text",
        )
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        wrong = f"{source} is not UTF-8 text: {error.reason} at {error.start}."
        raise click.ClickException(wrong) from None


def usage_line(usage: Usage) -> str:
    """The cost of a completion on one line."""
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
