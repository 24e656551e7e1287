"""The options that say how keys and values are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mlxrun.cache.types import NAMES, cache_type
from mlxrun.errors import ParameterError

Command = Callable[..., None]


class _CacheType(click.ParamType[str]):
    """A type of cache by its name, checked before anything is loaded."""

    name = "TYPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            cache_type(value, "the type of a cache")
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def with_cache_types(command: Command) -> Command:
    """Give a command ``--cache-type-k`` and ``--cache-type-v``."""
    for letter, what, more in (("v", "values", ""), ("k", "keys", "; by channel, q4c")):
        command = click.option(
            f"--cache-type-{letter}",
            type=_CacheType(),
            metavar="TYPE",
            help=f"How the cache stores {what}: {', '.join(NAMES)}, or with a group, q4/32{more}.  "
            "[default: as activations]",
        )(command)
    return command
