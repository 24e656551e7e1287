"""The terminal under a chat: text that comes in pieces and is wrapped, and typing that waits."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.cells import cell_len

from mlxrun.cli.console import dim, obeys_escapes

if TYPE_CHECKING:
    from mlxrun.cli.thinking import Think

_TAB = 8


class Wrap:
    """Breaks text that comes in pieces between words, so that it stays within a width.

    A word is shown as it grows; one that turns out too long for the line is taken back and goes on
    in the next. Longer ones than a line, and wide characters (Chinese, emoji), break anywhere. The
    last column stays free: terminals differ in where the cursor is after it.

    Attributes:
        column: where the cursor is, from 0.
    """

    def __init__(self) -> None:
        self.column = 0
        self._word, self._cells = "", 0

    def feed(self, text: str, width: int) -> str:
        """The text as the terminal is to get it, which is so many columns wide."""
        room = max(2, width - 1)
        return "".join(self._one(char, room) for char in text)

    def _one(self, char: str, room: int) -> str:
        if char == "\n":
            self.column = 0
            self._word, self._cells = "", 0
            return char
        if char in " \t":
            self._word, self._cells = "", 0
            cells = 1 if char == " " else _TAB - self.column % _TAB
            fits = self.column + cells <= room
            self.column = min(room, self.column + cells)
            return char if fits else ""  # the line ends here
        cells = cell_len(char)
        if self.column + cells <= room:
            return self._put(char, cells)
        word, taken = self._word, self._cells
        if not 0 < taken < self.column or taken + cells > room:  # it fills the line
            self.column = 0
            self._word, self._cells = "", 0
            return "\n" + self._put(char, cells)
        self.column = taken
        return f"\x1b[{taken}D\x1b[K\n{word}{self._put(char, cells)}"

    def _put(self, char: str, cells: int) -> str:
        self.column += cells
        if cells or self._word:  # an accent belongs to the character before it
            self._word, self._cells = self._word + char, self._cells + cells
        if cells > 1:
            self._word, self._cells = "", 0
        return char


def wrapped(text: str) -> str:
    """A whole text as standard output is to get it: on a terminal broken between words."""
    breaks = sys.stdout.isatty() and obeys_escapes()
    return Wrap().feed(text, _width()) if breaks else text


class Writer:
    """Writes a reply that comes in parts to standard output, on a terminal wrapped.

    Thinking stands apart from the answer, in a fainter shade.

    Args:
        think: whether thinking is shown.

    Attributes:
        begun: whether there was anything, shown or not.
        all_hidden: whether there was something and nothing of it was shown.
    """

    def __init__(self, think: Think) -> None:
        self.begun = self.all_hidden = False
        self._hides = think == "hide"
        self._terminal = sys.stdout.isatty()
        self._wraps = self._terminal and obeys_escapes()
        self._wrap = Wrap()
        self._thought = False

    def write(self, text: str, thought: bool) -> None:
        """Show a part: harmless text, and whether it is thinking."""
        if thought != self._thought:
            self._turn(thought)
        hidden = thought and self._hides
        self.all_hidden = hidden and (self.all_hidden or not self.begun)
        self.begun = True
        if not hidden:
            self._put(text, faint=thought)

    def end_line(self) -> None:
        """Go on in a new line, unless this is one."""
        if self._wrap.column:
            self._put("\n")

    def _turn(self, thought: bool) -> None:
        """From thinking to an answer, or back."""
        self.end_line()
        self._thought = thought
        if self._hides:
            if thought and self._terminal:
                self._put("thinking ...", faint=True)
        elif self.begun:
            self._put("\n")

    def _put(self, text: str, *, faint: bool = False) -> None:
        shown = self._wrap.feed(text, _width() if self._wraps else sys.maxsize)
        sys.stdout.write(dim(shown) if faint else shown)
        sys.stdout.flush()


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


@contextmanager
def typing_waits() -> Iterator[None]:
    """What is typed between two prompts is not shown, and waits as it is for the next prompt.

    Keys that send signals keep doing so, and take back nothing that was typed before them.
    """
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    waiting = [*before[:6], list(before[6])]
    waiting[0] &= ~termios.ICRNL
    waiting[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    waiting[3] |= termios.NOFLSH
    waiting[6][termios.VMIN], waiting[6][termios.VTIME] = 1, 0

    def wait(*_: object) -> None:
        termios.tcsetattr(terminal, termios.TCSANOW, waiting)

    wait()
    continued = signal.signal(signal.SIGCONT, wait)  # a shell sets its own modes meanwhile
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, continued)
        with suppress(termios.error):  # of a terminal that has been closed
            termios.tcsetattr(terminal, termios.TCSANOW, before)
