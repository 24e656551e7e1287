"""The options of ``mlxrun bench``: what is measured, against whom, and how it is told.

Everything is checked here, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import click
from click.core import ParameterSource

from mlxrun.bench.coverage import LEVELS
from mlxrun.bench.workload import counts
from mlxrun.errors import ParameterError

RIVALS = ("mlx-lm", "llama-bench")

Command = Callable[..., None]


@dataclass(frozen=True)
class Asked:
    """What a user asks for, besides how the model is loaded; named as the options are."""

    n_prompt: tuple[int, ...]
    n_predict: tuple[int, ...]
    repetitions: int
    parallel: tuple[int, ...] | None
    contexts: tuple[int, ...]
    mixed: bool
    dataset: Path | None
    level: str | None
    rivals: tuple[str, ...]
    roofline: bool
    plot: Path | None
    as_json: bool
    as_csv: bool
    attention: str | None
    cache_type_k: str | None
    cache_type_v: str | None

    @classmethod
    def taken(cls, options: dict[str, Any]) -> Self:
        """Out of all options of a command, which loses those that are taken.

        Raises:
            UsageError: some of them exclude each other.
        """
        asked = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        asked._check(adapted=bool(options["adapter"]))
        return asked

    @property
    def cache(self) -> dict[str, str]:
        """What is asked of caches, as ``LLM.session`` takes it."""
        names = ("cache_type_k", "cache_type_v", "attention")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _check(self, *, adapted: bool) -> None:
        only_one = "Give --json or --csv, not both."
        same = "--against measures the same weights, which an --adapter changes."
        of_dataset = "--run chooses what to measure for a --dataset: name one."
        levels = " or ".join(LEVELS)
        measured = f"With --dataset, --against, --roofline and --csv need --run {levels}."
        no_rows = "--roofline is told in tables or with --json."
        none_drawn = "--parallel is of tokens to draw: give --n-predict."
        only_read = self.dataset is not None and self.level is None
        for wrong, message in (
            (self.as_json and self.as_csv, only_one),
            (adapted and self.rivals, same),
            (self.level and self.dataset is None, of_dataset),
            (only_read and (self.rivals or self.roofline or self.as_csv), measured),
            (self.roofline and self.as_csv, no_rows),
            (self.parallel and not any(self.n_predict) and not self.dataset, none_drawn),
        ):
            if wrong:
                raise click.UsageError(message)
        context = click.get_current_context()
        for name in ("n_prompt", "n_predict", "contexts", "mixed") if self.dataset else ():
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    "A --dataset says how much to read and draw: leave it to it."
                )


class _Counts(click.ParamType[tuple[int, ...]]):
    """A list of numbers."""

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


def with_tests(command: Command) -> Command:
    """Give a command the options that say what is measured."""
    options = (
        click.option(
            "-p",
            "--n-prompt",
            type=_Counts(),
            default="128,512",
            show_default=True,
            help="Lengths of prompts to read; 0 for none.",
        ),
        click.option(
            "-n",
            "--n-predict",
            type=_Counts(),
            default="128",
            show_default=True,
            help="Numbers of tokens to draw; 0 for none.",
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
            type=_Counts(1),
            help="Numbers of sequences that decode together, such as 1,2,4,8,16,20.  [default: 1]",
        ),
        click.option(
            "--context",
            "contexts",
            type=_Counts(),
            default="0",
            help="Tokens that are in the cache before, such as 0,1k,4k.  [default: 0]",
        ),
        click.option(
            "--ragged",
            "mixed",
            is_flag=True,
            help="Also serve 20 requests of many lengths together and one at a time, and a short "
            "request behind a long prompt.",
        ),
    )
    return _given(command, options)


def with_dataset(command: Command) -> Command:
    """Give a command the options that take what is measured from a data set."""
    options = (
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
            help="Measure what is recommended for the --dataset: "
            + ", ".join(f"{level} covers {percent}%" for level, percent in LEVELS.items())
            + " of prompts and of outputs.",
        ),
    )
    return _given(command, options)


def with_rivals(command: Command) -> Command:
    """Give a command ``--against``."""
    return click.option(
        "--against",
        "rivals",
        type=click.Choice(RIVALS),
        multiple=True,
        help="Also measure another runtime with the same weights, taking turns: mlx-lm in this "
        "process, llama.cpp's llama-bench if it is on the path. May be given twice.",
    )(command)


def with_telling(command: Command) -> Command:
    """Give a command the options that say how results are told."""
    options = (
        click.option(
            "--plot",
            type=click.Path(dir_okay=False, writable=True, path_type=Path),
            callback=_drawable,
            metavar="FILE",
            help="Draw rates by the number of sequences and by context into a .png, .svg, .pdf or "
            ".html file; needs pip install 'mlxrun[plot]'.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values."),
    )
    return _given(command, options)


def _drawable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """A file for a picture, checked before anything is loaded."""
    if path is not None and not context.resilient_parsing:
        from mlxrun.bench.plot import check

        check(path)
    return path


def _given(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):  # the help names them in the order in which they stand here
        command = option(command)
    return command
