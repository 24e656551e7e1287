"""Terminal output: safe text, notes, streamed text, tables, progress bars.

Results go to standard output, everything else to standard error. Color and bars appear on a
terminal only.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, TextIO

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from tqdm import tqdm

    from mlxrun.cli.thinking import Think

# Control characters except newline and tab: C0 characters and DEL become their pictures, C1
# characters and those that change the direction of text (and can disguise a name or a command) the
# replacement character, and a carriage return vanishes.
_NEUTRAL = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
    | {ord("\r"): None}
)


def visible(text: str) -> str:
    """The text without control characters, which files and models may contain."""
    return text.translate(_NEUTRAL)


def dim(text: str) -> str:
    """The text, dim on a terminal that can show that."""
    plain = os.environ.get("NO_COLOR") or not obeys_escapes()
    return text if plain or not sys.stdout.isatty() else f"\x1b[2m{text}\x1b[22m"


def obeys_escapes() -> bool:
    """Whether a terminal would interpret escape sequences."""
    return os.environ.get("TERM", "dumb") != "dumb"


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def one_line(text: str) -> str:
    """The text on one line, without control characters."""
    return visible(" ".join(text.split()))


def complain(message: str) -> None:
    note(f"error: {message}")


def note(message: str) -> None:
    if Bar.shown is not None:
        Bar.shown.clear()
    print(one_line(message), file=sys.stderr, flush=True)


@contextmanager
def noticing_interrupts(notify: Callable[[], None], *, delay: float = 0.2) -> Iterator[None]:
    """While it is entered, acknowledge a Ctrl-C that has no effect for a moment.

    Python runs signal handlers between bytecodes of the main thread, which may be seconds apart in
    a forward pass. For the main thread.

    Args:
        notify: called at most once, from another thread.
        delay: seconds.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # required by set_wakeup_fd
    over = threading.Event()

    def watch() -> None:
        while signals := reader.recv(64):
            if signal.SIGINT in signals:
                if not over.wait(delay):
                    notify()
                return

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        writer.close()  # ends the watcher
        watcher.join()
        reader.close()


_TAB = 8


class Wrap:
    """Wraps streamed text between words.

    A word is shown as it grows; one that becomes too long for the line is erased and moves to the
    next. Longer ones than a line, and wide characters (Chinese, emoji), break anywhere. The last
    column stays free: terminals differ in where the cursor is after it.

    Attributes:
        column: where the cursor is, from 0.
    """

    def __init__(self) -> None:
        self._begin_word(0)

    def _begin_word(self, column: int) -> None:
        self.column, self._word, self._cells = column, "", 0

    def feed(self, text: str, width: int) -> str:
        """The text for a terminal of so many columns."""
        room = max(2, width - 1)
        return "".join(self._one(char, room) for char in text)

    def _one(self, char: str, room: int) -> str:
        if char == "\n":
            self._begin_word(0)
            return char
        if char in " \t":
            column = self.column + (1 if char == " " else _TAB - self.column % _TAB)
            self._begin_word(min(room, column))
            return char if column <= room else ""  # the line ends here
        cells = _cells(char)
        if self.column + cells <= room:
            return self._put(char, cells)
        word, taken = self._word, self._cells
        if not 0 < taken < self.column or taken + cells > room:  # it fills the line
            self._begin_word(0)
            return "\n" + self._put(char, cells)
        self.column = taken
        return f"\x1b[{taken}D\x1b[K\n{word}{self._put(char, cells)}"

    def _put(self, char: str, cells: int) -> str:
        self.column += cells
        if cells or self._word:  # an accent belongs to the character before it
            self._word, self._cells = self._word + char, self._cells + cells
        if cells > 1:
            self._begin_word(self.column)
        return char


def wrapped(text: str) -> str:
    """A text for standard output, wrapped if that is a terminal."""
    breaks = sys.stdout.isatty() and obeys_escapes()
    return Wrap().feed(text, _width(sys.stdout)) if breaks else text


class Writer:
    """Writes streamed text to standard output, wrapped on a terminal.

    Thinking is dim, and on lines of its own.

    Args:
        think: whether thinking is shown; by default it is on a terminal.

    Attributes:
        begun: there was text, shown or not.
        all_hidden: there was text, and all of it was hidden.
    """

    def __init__(self, think: Think | None = None) -> None:
        self.begun = self.all_hidden = False
        self._terminal = sys.stdout.isatty()
        self._hides = think == "hide" or (think is None and not self._terminal)
        self._wraps = self._terminal and obeys_escapes()
        self._wrap = Wrap()
        self._thought = False

    def write(self, text: str, thought: bool) -> None:
        """Write text without control characters, which is thinking or the answer."""
        if thought != self._thought:
            self._switch(thought)
        hidden = thought and self._hides
        self.all_hidden = hidden and (self.all_hidden or not self.begun)
        self.begun = True
        if not hidden:
            self._put(text, faint=thought)

    def end_line(self) -> None:
        """Begin a new line, unless the cursor is at the beginning of one."""
        if self._wrap.column:
            self._put("\n")

    def _switch(self, thought: bool) -> None:
        self.end_line()
        self._thought = thought
        if self._hides:
            if thought and self._terminal:
                self._put("thinking ...", faint=True)
        elif self.begun:
            self._put("\n")

    def _put(self, text: str, *, faint: bool = False) -> None:
        shown = self._wrap.feed(text, _width(sys.stdout) if self._wraps else sys.maxsize)
        sys.stdout.write(dim(shown) if faint else shown)
        sys.stdout.flush()


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))


# The smallest width of a column of text, whose cells wrap.
_LEAST_TEXT = 16
_GAP = 2


class Table:
    """A plain table; a column whose name begins with ``#`` has numbers.

    Args:
        columns: without any name there is no header.
        rows: values, which are shown on one line each.
    """

    def __init__(
        self,
        title: str = "",
        columns: Sequence[str] = ("", ""),
        rows: Iterable[Sequence[object]] = (),
    ) -> None:
        self.title, self.columns = title, tuple(columns)
        self.header = any(name.strip("#") for name in columns)
        self.rows = [[_cell(value) for value in row] for row in rows]

    @classmethod
    def of(cls, title: str, rows: Sequence[dict[str, Any]]) -> Table:
        """A table of rows with the same keys, the names of columns.

        A column without any text is one of numbers, in bytes if that is its name. Lists and
        mappings have no column.
        """
        nested = (list, tuple, Mapping)
        keys = [key for key, value in rows[0].items() if not isinstance(value, nested)]
        numeric = {
            key for key in keys if all(isinstance(row[key], int | float | None) for row in rows)
        }
        columns = [f"#{key}" if key in numeric else key for key in keys]
        sized = [row | {"bytes": size(row["bytes"])} if "bytes" in row else row for row in rows]
        return cls(title, columns, [[row[key] for key in keys] for row in sized])

    def within(self, width: int) -> list[Table]:
        """The table, or several one below the other, so that no number wraps.

        Each begins with the columns before the first number, the names of rows.
        """
        count = len(self.columns)
        taken = [self._least(at) + _GAP for at in range(count)]
        first = next((at for at in range(count) if self.columns[at].startswith("#")), count)
        room = width - sum(taken[:first]) + _GAP  # none after the last column
        parts: list[list[int]] = [[]]
        for at in range(first, count):
            if parts[-1] and sum(taken[other] for other in [*parts[-1], at]) > room:
                parts.append([])
            parts[-1].append(at)
        shown = [[*range(first), *part] for part in parts]
        return [
            Table(
                "" if number else self.title,
                [self.columns[at] for at in places],
                [[row[at] for at in places] for row in self.rows],
            )
            for number, places in enumerate(shown)
        ]

    def _least(self, at: int) -> int:
        name = self.columns[at]
        longest = max(map(_cells, [name.removeprefix("#"), *(row[at] for row in self.rows)]))
        return longest if name.startswith("#") else min(longest, _LEAST_TEXT)

    def rendered(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        title = self.title or None
        made = RichTable(title=title, title_justify="left", title_style="bold", box=None)
        made.show_header, made.pad_edge = self.header, False
        for name in self.columns:
            number = name.startswith("#")
            side: Literal["left", "right"] = "right" if number else "left"
            label = name.removeprefix("#")
            made.add_column(label, justify=side, overflow="fold", no_wrap=number)
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made


def show(*contents: str | Table) -> None:
    """Print lines and tables."""
    for content in contents:
        if isinstance(content, str):
            print(one_line(content))
        else:
            _show_table(content)


def _show_table(table: Table) -> None:
    """Print a table, without width or padding in a pipe."""
    from rich.console import Console

    piped = not sys.stdout.isatty()
    console = Console(width=1000 if piped else None, highlight=False, markup=False, emoji=False)
    if piped:
        with console.capture() as capture:
            console.print(table.rendered())
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))
        return
    for at, part in enumerate(table.within(console.width)):
        if at:
            console.print()
        console.print(part.rendered())


def size(nbytes: float) -> str:
    """A number of bytes such as 1.25 GB."""
    return in_thousands(nbytes, "B")


def in_thousands(count: float, unit: str) -> str:
    """A number such as 1.25 k, in powers of 1000."""
    for power in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {power}{unit}"
        count /= 1000
    return f"{count:.4g} T{unit}"


def json_of(facts: Mapping[str, Any]) -> str:
    """One JSON object; infinities and NaN are null."""
    return json.dumps(_finite(facts))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Bar:
    """A progress bar on standard error, if that is a terminal; call it with (done, total).

    Args:
        delay: seconds before it appears.
        unit: of what is counted; empty where nothing is.
    """

    #: The bar on the screen, which lines of :func:`note` interrupt.
    shown: ClassVar[tqdm[NoReturn] | None] = None

    def __init__(self, label: str, *, delay: float = 0.5, unit: str = "B") -> None:
        self._label, self._unit = one_line(label), unit
        self._done, self._total = 0, 0
        self._lock, self._over = threading.Lock(), False
        self._bar: tqdm[NoReturn] | None = None
        self._timer = threading.Timer(delay, self._appear)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            if self._timer.interval:
                self._timer.start()
            else:
                self._appear()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, done: int, total: int, *_: object) -> None:
        with self._lock:
            self._done, self._total = done, total
            if self._bar is not None:
                self._bar.total = total
                self._bar.update(done - self._bar.n)

    def label(self, text: str) -> None:
        with self._lock:
            self._label = one_line(text)
            if self._bar is not None:
                self._bar.set_description(self._label)

    def stop(self) -> None:
        """Remove the bar for good."""
        self._timer.cancel()
        with self._lock:
            self._over = True
            if self._bar is not None:
                self._bar.close()
                self._bar = Bar.shown = None

    def _appear(self) -> None:
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is for processes, and starts one on macOS
        with self._lock:
            if not self._over:
                self._bar = Bar.shown = tqdm(
                    desc=self._label,
                    initial=self._done,
                    total=self._total or None,
                    unit=self._unit if self._unit == "B" else f" {self._unit}",
                    unit_scale=self._unit == "B",
                    bar_format=None if self._unit else "{desc} ...",
                    ncols=_width(sys.stderr),  # some terminals have no size
                    nrows=24,
                    leave=False,
                )
