"""Numbers of tokens as users write them on the command line: 4096, or 4k."""

from __future__ import annotations

from typing import Any

import click

from mlxrun.bench.workloads import number

# Beyond it arithmetic would leave the floats.
MOST = 10**18


class TokenCount(click.ParamType[int]):
    """A number of tokens, checked before anything is loaded."""

    name = "N"

    def __init__(self, least: int = 1, most: int = MOST) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        count = value if isinstance(value, int) else number(value)
        if count is None or not self._least <= count <= self._most:
            allowed = f"a number from {self._least} to {self._most}, such as 4096 or 4k"
            self.fail(f"{value!r} is not {allowed}.", param, ctx)
        return count
