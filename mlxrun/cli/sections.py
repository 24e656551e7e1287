"""Commands whose help lists options under headings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Callback = Callable[..., None]


class Option(click.Option):
    """An option that stands under a heading of its own in the help text."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose options stand under their headings, in the order in which these first occur.

    Plain options stand under "Options", first.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and record is not None:
                section = getattr(parameter, "section", "Options")
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def option_in(section: str) -> Callable[..., Callable[[Callback], Callback]]:
    """``click.option`` for options under a heading."""

    def make(*names: str, **settings: Any) -> Callable[[Callback], Callback]:
        return click.option(*names, cls=Option, section=section, **settings)

    return make
