"""The options of ``mlxrun bench``: what is measured, against whom, and how it is told.

Everything is checked here, before a model is loaded. Standard library and click only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mlxrun.bench.workload import counts
from mlxrun.errors import ParameterError

RIVALS = ("mlx-lm", "llama-bench")

Command = Callable[..., None]


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
            default="1",
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
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values."),
    )
    return _given(command, options)


def _given(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):  # the help names them in the order in which they stand here
        command = option(command)
    return command
