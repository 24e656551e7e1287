"""Output in a notebook: tables of values, and a progress bar of loading."""

from __future__ import annotations

import html
import sys
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
def progress_bar(
    label: str, unit: str, *, shown: bool, delay: float | None = None
) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, as text: a notebook shows it without an extension for widgets.

    Args:
        shown: whether it appears at all.
        delay: seconds before it appears.

    Yields:
        A function of (done, total) that updates it.
    """
    if not shown:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    delay = PATIENCE if delay is None else delay
    bar = tqdm(desc=label, unit=unit, unit_scale=unit == "B", delay=delay, leave=False)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()
