"""Numbers of tokens and sequences on the command line: 4096, 4k, 1e3, or lists of such."""

from __future__ import annotations

import re
from typing import Any

import click

# Beyond it arithmetic would leave the floats.
MOST = 10**18
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def number(text: str) -> int | None:
    """The value of ``128``, ``4k`` or ``1e3``, k being 1024; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,19})(?:e([0-9]{1,2})|([km]?))", text.strip().lower())
    if not match:
        return None
    return int(match[1]) * (10 ** int(match[2]) if match[2] else _UNITS[match[3]])


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


class CountList(click.ParamType[tuple[int, ...]]):
    """Distinct numbers such as ``128,512`` or ``1k,4k``."""

    name = "LIST"

    def __init__(self, least: int = 0, most: int = 1 << 24) -> None:
        self._least, self._most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = [number(part) for part in value.split(",")]
        counts = [n for n in found if n is not None and self._least <= n <= self._most]
        if len(counts) < len(found):
            allowed = f"numbers from {self._least} to {self._most} such as 128,512 or 1k"
            self.fail(f"{value!r} is not {allowed}.", param, ctx)
        return tuple(dict.fromkeys(counts))
