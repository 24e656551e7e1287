"""The options that say how keys and values are stored, and which of them are attended to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlxrun.cli.sections import option_in
from mlxrun.errors import ParameterError
from mlxrun.kv_cache.options import NAMES, PER_CHANNEL, cache_type, pattern

Command = Callable[..., None]


class CacheType(click.ParamType[str]):
    """A type of cache by its name, checked before anything is loaded.

    Args:
        names: what a shell completes.
    """

    name = "TYPE"

    def __init__(self, names: Sequence[str] = NAMES) -> None:
        self._names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            cache_type(value, "the type of a cache")
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._names if name.startswith(incomplete)]


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
    return option_in("KV cache")(
        "--attention",
        type=_Attention(),
        metavar="PATTERN",
        help="What each new token attends to: dense is all; window:1024+4 the last 1024 tokens and "
        "the first 4, forgetting others; strided:512/8 the last 512 and every 8th before; "
        "blocks:32x64 the 32 blocks of 64 tokens that look best.  [default: dense]",
    )(command)


def with_cache_types(command: Command) -> Command:
    """Give a command ``--cache-type-k`` and ``--cache-type-v``."""
    keys = (*NAMES, *PER_CHANNEL)
    for letter, what, names, more in (
        ("v", "values", NAMES, ""), ("k", "keys", keys, "; by channel, q4c")
    ):  # fmt: skip
        command = option_in("KV cache")(
            f"--cache-type-{letter}",
            type=CacheType(names),
            metavar="TYPE",
            help=f"How the cache stores {what}: {', '.join(NAMES)}, or with a group, q4/32{more}.  "
            "[default: as activations]",
        )(command)
    return command
