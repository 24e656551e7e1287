"""The options that say how keys and values are stored, and which of them are attended to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mlxrun.cache.sparsity import pattern
from mlxrun.cache.types import NAMES, cache_type
from mlxrun.errors import ParameterError

Command = Callable[..., None]


class CacheType(click.ParamType[str]):
    """A type of cache by its name, checked before anything is loaded."""

    name = "TYPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            cache_type(value, "the type of a cache")
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class _Attention(click.ParamType[str]):
    """A pattern of attention, checked before anything is loaded."""

    name = "PATTERN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            pattern(value)
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def with_attention(command: Command) -> Command:
    """Give a command ``--attention``."""
    return click.option(
        "--attention",
        type=_Attention(),
        metavar="PATTERN",
        help="What each new token attends to: dense is all; window:1024+4 the last 1024 tokens and "
        "the first 4, forgetting others; strided:512/8 the last 512 and every 8th before; "
        "blocks:32x64 the 32 blocks of 64 tokens that look best.  [default: dense]",
    )(command)


def with_cache_types(command: Command) -> Command:
    """Give a command ``--cache-type-k`` and ``--cache-type-v``."""
    for letter, what, more in (("v", "values", ""), ("k", "keys", "; by channel, q4c")):
        command = click.option(
            f"--cache-type-{letter}",
            type=CacheType(),
            metavar="TYPE",
            help=f"How the cache stores {what}: {', '.join(NAMES)}, or with a group, q4/32{more}.  "
            "[default: as activations]",
        )(command)
    return command
