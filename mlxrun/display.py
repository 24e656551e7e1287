"""What a notebook shows: tables of values, and the progress of loading."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

# Seconds before a progress bar appears.
PATIENCE = 0.5


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def table(rows: Mapping[str, object]) -> str:
    """Names and values as HTML."""
    cells = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_text(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def table_of(value: Any) -> str:
    """The fields of a dataclass as HTML."""
    names = (field.name for field in fields(value))
    return table({name.replace("_", " "): getattr(value, name) for name in names})


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items())
    return str(value)


@contextmanager
def shown_progress(
    progress: Callable[[int, int], None] | None,
) -> Iterator[Callable[[int, int], None] | None]:
    """A callback for (bytes done, bytes in all): the caller's, or in a notebook a bar's."""
    if progress is not None or not in_notebook():
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress("Loading", *columns, console=Console(stderr=True), transient=True)
    task, begun = bar.add_task("", total=None), time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - begun >= PATIENCE:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
