"""What ``perplexity`` and ``compare`` share: options, the text, and reading on until Ctrl-C."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, note, size
from mlxrun.cli.counts import TokenCount
from mlxrun.errors import ParameterError

if TYPE_CHECKING:
    from mlxrun.quality.estimates import Estimate
    from mlxrun.quality.measure import Comparing, Scoring

# Bytes: a hundred times the texts that perplexities are published for.
LONGEST_TEXT = 100_000_000

Command = Callable[..., None]


def with_windows(command: Command) -> Command:
    """Give a command the options that say which tokens of a text are scored, and ``--json``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--parse-special",
            is_flag=True,
            help="Let <|markers|> in the text be control tokens, as in recorded chats.",
        ),
        click.option(
            "--no-bos",
            "bos",
            is_flag=True,
            flag_value=False,
            default=True,
            help="Let windows begin with a token of their own, not with what the tokenizer puts "
            "before a text.",
        ),
        click.option(
            "--chunks", type=click.IntRange(1), metavar="N", help="Read no more than N windows."
        ),
        click.option(
            "--stride",
            type=TokenCount(),
            metavar="N",
            help="Let windows begin N tokens apart, and score the last N of each.  [default: "
            "windows side by side; the second half of each is scored]",
        ),
        click.option(
            "--context",
            type=TokenCount(),
            metavar="N",
            help="Tokens of a window, such as 4096 or 4k.  [default: 512, or the model's context "
            "if that is less]",
        ),
    ):
        command = option(command)
    return command


def read_text(name: str) -> str:
    """The text of a file, or of standard input for ``-``, without one newline at its end.

    Raises:
        FileError: it cannot be read.
        ParameterError: it holds no text.
    """
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
            data = file.read(LONGEST_TEXT + 1)  # /dev/zero and some pipes never end
    except OSError as error:
        raise click.FileError(name, error.strerror) from None
    if len(data) > LONGEST_TEXT:
        raise ParameterError("FILE", name, f"no longer than {size(LONGEST_TEXT)}")
    try:
        text = data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        found = f"UTF-8 text ({error.reason} at byte {error.start})"
        raise ParameterError("FILE", name, found) from None
    if not text:
        raise ParameterError("FILE", name, "a text that is not empty")
    return text


def read_on(run: Scoring | Comparing, label: str, figure: str) -> bool:
    """Read all windows, or as many as there are until Ctrl-C; returns whether it came.

    Raises:
        KeyboardInterrupt: it came before the first window was read.
    """
    done = 0
    try:
        with Bar(label, count="windows") as bar:
            bar(0, run.plan.count)
            for done in run:
                bar(done, run.plan.count)
                bar.label(f"{figure} {shown(run.estimate())}")
    except KeyboardInterrupt:
        if not done:
            raise
        note(f"interrupted after {done} of {run.plan.count} windows")
        return True
    return False


def shown(estimate: Estimate, scale: float = 1, unit: str = "") -> str:
    """An estimate for people: as many digits as its error leaves sense to, and one more."""
    value, error = scale * estimate.value, scale * estimate.error
    spread = "" if math.isnan(error) else f" ± {error:.2g}{unit}"
    return f"{value:.5g}{unit}{spread}"


def scored(result: Any) -> str:
    """Which tokens a result is of."""
    windows = f"each of {result.windows} windows" if result.windows > 1 else "one window"
    tokens = f"{result.tokens} token{'s' * (result.tokens > 1)}"
    return f"{tokens}: the last {result.scored} of {windows} of {result.context}"
