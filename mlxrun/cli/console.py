"""What the commands share of a terminal: safe text, notes, tables, and progress bars.

Results go to standard output, everything else to standard error. Colour and bars appear only on a
terminal. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.table import Table

# A terminal obeys these characters; only newline and tab are harmless. C0 characters and DEL become
# their pictures, C1 characters the replacement character, and a carriage return vanishes.
_NEUTRAL = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    | {ord("\r"): None}
)


def visible(text: str) -> str:
    """The text without what a terminal would obey: files and models may write anything."""
    return text.translate(_NEUTRAL)


def dim(text: str) -> str:
    """The text in a fainter shade, on a terminal that has one and may show it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain or not sys.stdout.isatty() else f"\x1b[2m{text}\x1b[22m"


def one_line(text: str) -> str:
    """The text on a single, harmless line."""
    return visible(" ".join(text.split()))


def complain(message: str) -> None:
    """Print an error."""
    note(f"error: {message}")


def note(message: str) -> None:
    """Print a line beside the results."""
    print(one_line(message), file=sys.stderr, flush=True)


class Output:
    """Standard output for lines and tables; in a pipe as wide as they are, without padding."""

    def __init__(self) -> None:
        from rich.console import Console

        self._piped = not sys.stdout.isatty()
        width = 1000 if self._piped else None
        self._console = Console(width=width, highlight=False, markup=False, emoji=False)

    def print(self, content: str | Table = "") -> None:
        """Print a line, or a table."""
        if isinstance(content, str):
            print(one_line(content))
        elif self._piped:
            with self._console.capture() as capture:
                self._console.print(content)
            print("\n".join(line.rstrip() for line in capture.get().splitlines()))
        else:
            self._console.print(content)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    header: bool = True,
) -> Table:
    """A plain table; a column whose name begins with ``#`` holds numbers.

    Where it is wider than the terminal, cells go on in the next line: none is cut.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    made.show_header = header
    made.pad_edge = False
    for name in columns:
        made.add_column(
            name.removeprefix("#"),
            justify="right" if name.startswith("#") else "left",
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(one_line(str(cell))) for cell in row))
    return made


def size(nbytes: float) -> str:
    """A number of bytes for people, in powers of ten."""
    return in_thousands(nbytes, "B")


def in_thousands(count: float, unit: str) -> str:
    """A number for people, in powers of ten of a unit."""
    for power in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {power}{unit}"
        count /= 1000
    return f"{count:.4g} T{unit}"


def json_of(facts: Mapping[str, Any]) -> str:
    """One JSON object; a number that is infinite or none at all is null, as JSON has neither."""
    return json.dumps(_finite(facts))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Bar:
    """A progress bar on standard error, for work that turns out to be long.

    Call it with (done, total); until then it only shows that something goes on. Shows nothing where
    standard error is no terminal.

    Args:
        label: what is being done.
        delay: seconds before the bar appears.
        count: what is counted, where it is not bytes.
    """

    def __init__(self, label: str, *, delay: float = 0.5, count: str | None = None) -> None:
        self._label, self._count = one_line(label), count
        self._done, self._total = 0, 0
        self._lock = threading.Lock()
        self._bar: RichProgress | None = None
        self._over = False
        self._timer = threading.Timer(delay, self._appear)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __call__(self, done: int, total: int, *_: object) -> None:
        with self._lock:
            self._done, self._total = done, total
            if self._bar:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def label(self, text: str) -> None:
        """Show another label, such as what is known so far."""
        with self._lock:
            self._label = one_line(text)
            if self._bar:
                self._bar.update(self._bar.task_ids[0], description=self._label)

    def stop(self) -> None:
        """Take the bar away; it does not come back."""
        self._timer.cancel()
        with self._lock:
            self._over = True
            if self._bar:
                self._bar.stop()
                self._bar = None

    def _appear(self) -> None:
        bar = _progress(self._count)  # takes a while: imports rich
        with self._lock:
            if not self._over:
                bar.add_task(self._label, completed=self._done, total=self._total or None)
                bar.start()
                self._bar = bar


def _progress(count: str | None) -> RichProgress:
    from rich import progress
    from rich.console import Console

    counting = (
        [progress.MofNCompleteColumn(), progress.TextColumn(count)]
        if count
        else [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    )
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *counting,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
