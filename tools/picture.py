"""The README's picture: a chat typed into a real terminal, recorded, and rendered as animated SVG.

::

    python -m tools.picture             # record docs/pictures/chat.cast, then render it
    python -m tools.picture --render    # render the recording that is there

The recording is an asciicast (https://docs.asciinema.org/manual/asciicast/v2/): a header, then
``[seconds, "o", output]`` a line. A terminal emulator replays it; the SVG shows each line of the
screen from when it appeared to when it changed, in real time. Where nothing is animated it shows
the end.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
COLUMNS, ROWS = 84, 14
COMMAND = ("mlxrun", "chat", "--seed", "1")
MESSAGES = (
    "What is the capital of France?",
    "And what is the city famous for?",
    "Write one sentence about the sea.",
)
PROMPT = "> "
# Seconds: between keys, before a message is typed, between frames, and at the end.
KEY, PAUSE, FRAME, HOLD = 0.05, 0.7, 0.08, 5.0
PATIENCE = 60.0

Event = tuple[float, str]
# A line of a screen: texts with a color and whether they are bold.
Line = tuple[tuple[str, str, bool], ...]

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "background": "#ffffff",
        "border": "#d0d7de",
        "default": "#1f2328",
        "brightblack": "#6e7781",
        "green": "#116329",
        "red": "#cf222e",
        "cyan": "#1b7c83",
        "magenta": "#8250df",
    },
    "dark": {
        "background": "#0d1117",
        "border": "#30363d",
        "default": "#e6edf3",
        "brightblack": "#8b949e",
        "green": "#7ee787",
        "red": "#ff7b72",
        "cyan": "#56d4dd",
        "magenta": "#d2a8ff",
    },
}


class Recorder:
    """A program in a terminal of its own, and everything that it prints, with times."""

    def __init__(self, command: Iterable[str], environment: Mapping[str, str]) -> None:
        self.events: list[Event] = []
        self.screen = Screen(self._answer)
        self._started = time.monotonic()
        words = list(command)
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execvpe(words[0], words, dict(environment))
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    def type(self, text: str) -> None:
        """Type a line as a person does."""
        self.watch(PAUSE)
        for key in [*text, "\r"]:
            self._answer(key)
            self.watch(KEY)

    def wait(self) -> None:
        """Until the program asks for a message.

        Raises:
            TimeoutError: it does not.
        """
        end = time.monotonic() + PATIENCE
        while not self.screen.asks():
            if time.monotonic() > end:
                raise TimeoutError(f"no prompt after {PATIENCE:.0f} s:\n{self.screen}")
            self.watch(FRAME)

    def watch(self, seconds: float) -> None:
        """Take in what is printed for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._terminal], [], [], left)[0]:
                return
            try:
                data = os.read(self._terminal, 1 << 16)
            except OSError:  # the program has ended
                time.sleep(left)
                return
            text = data.decode("utf-8", "replace")
            self.events.append((time.monotonic() - self._started, text))
            self.screen.feed(text)

    def close(self) -> None:
        """End the program."""
        os.kill(self._pid, signal.SIGHUP)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)

    def _answer(self, text: str) -> None:
        os.write(self._terminal, text.encode())


class Screen:
    """A terminal's screen, as :mod:`pyte` emulates it; answers what programs ask of terminals."""

    def __init__(self, answer: Callable[[str], None] = lambda text: None) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._screen.write_process_input = answer
        self._stream = pyte.Stream(self._screen)

    def feed(self, text: str) -> None:
        """Print to the screen. Faint text is bright black: the emulator knows no faint."""
        self._stream.feed(text.replace("\x1b[2m", "\x1b[90m").replace("\x1b[22m", "\x1b[39m"))

    def asks(self) -> bool:
        """Whether the cursor stands behind an empty prompt."""
        cursor = self._screen.cursor
        return bool(cursor.x == len(PROMPT) and self._screen.display[cursor.y].rstrip() == ">")

    def lines(self) -> list[Line]:
        """What is on the screen."""
        return [self._line(row) for row in range(ROWS)]

    def _line(self, row: int) -> Line:
        cells = [self._screen.buffer[row][column] for column in range(COLUMNS)]
        runs = groupby(cells, key=lambda cell: (cell.fg, cell.bold))
        parts = [("".join(cell.data for cell in run), fg, bold) for (fg, bold), run in runs]
        while parts and not parts[-1][0].strip():
            parts.pop()
        if parts:
            text, color, bold = parts[-1]
            parts[-1] = text.rstrip(), color, bold
        return tuple(parts)

    def __str__(self) -> str:
        return "\n".join(self._screen.display)


def record() -> list[Event]:
    """The chat, typed, and what the terminal showed."""
    with tempfile.TemporaryDirectory() as home:
        # No history of this user's, and a program that is found as in the user's own shell.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"PATH": path, "XDG_STATE_HOME": home, "TERM": "xterm-256color"}
        recorder = Recorder(COMMAND, {**os.environ, **own})
        try:
            recorder.wait()
            for message in MESSAGES:
                recorder.type(message)
                recorder.wait()
            recorder.watch(PAUSE)
        finally:
            recorder.close()
    return recorder.events


@dataclass(frozen=True)
class Shown:
    """A line that a row of the screen shows from one time to another; None for to the end."""

    row: int
    line: Line
    start: float
    end: float | None


def shown(events: Iterable[Event]) -> tuple[list[Shown], float]:
    """All lines that the screen shows, and how long it all takes."""
    begun: dict[int, tuple[Line, float]] = {}
    found: list[Shown] = []
    last = 0.0
    for last, lines in _frames(events):
        for row, line in enumerate(lines):
            before, start = begun.get(row, ((), last))
            if line == before:
                continue
            if before:
                found.append(Shown(row, before, start, last))
            begun[row] = (line, last)
    found += [Shown(row, line, start, None) for row, (line, start) in begun.items() if line]
    return sorted(found, key=lambda each: (each.start, each.row)), last + HOLD


def _frames(events: Iterable[Event]) -> Iterator[tuple[float, list[Line]]]:
    """The screen at the end of each frame in which something is printed."""
    screen = Screen()
    for frame, group in groupby(events, key=lambda event: int(event[0] / FRAME)):
        for _, text in group:
            screen.feed(text)
        yield frame * FRAME, screen.lines()


WIDTH, HEIGHT, MARGIN = 8.4, 19.0, 16.0


def svg(lines: Iterable[Shown], seconds: float, colors: Mapping[str, str]) -> str:
    """The picture in one theme."""
    width, height = COLUMNS * WIDTH + 2 * MARGIN, ROWS * HEIGHT + 2 * MARGIN
    font = "font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
    body = "\n".join(_text(each, seconds, colors) for each in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="A chat with mlxrun in a terminal">\n'
        f"<style>text {{ {font}; white-space: pre; fill: {colors['default']} }}</style>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8" '
        f'fill="{colors["background"]}" stroke="{colors["border"]}"/>\n{body}\n</svg>\n'
    )


def _text(each: Shown, seconds: float, colors: Mapping[str, str]) -> str:
    x, y = MARGIN, MARGIN + (each.row + 0.75) * HEIGHT
    spans, column = [], 0
    for text, color, bold in each.line:
        style = f' fill="{_paint(color, colors)}"' if color != "default" else ""
        style += ' font-weight="bold"' if bold else ""
        # Placed and stretched: a reader's font may be of another width.
        place = f'x="{x + column * WIDTH:.1f}" textLength="{len(text) * WIDTH:.1f}"'
        spans.append(f"<tspan {place}{style}>{escape(text, quote=False)}</tspan>")
        column += len(text)
    times, values = [0.0, each.start / seconds], [0, 1]
    if each.end is not None:
        times, values = [*times, each.end / seconds], [*values, 0]
    if each.start == 0:
        times, values = times[1:], values[1:]
    final = "" if each.end is None else ' opacity="0"'
    animation = (
        f'<animate attributeName="opacity" calcMode="discrete" dur="{seconds:.2f}s" '
        f'repeatCount="indefinite" keyTimes="{";".join(f"{t:.4f}" for t in times)}" '
        f'values="{";".join(map(str, values))}"/>'
    )
    return f'<text y="{y:.1f}"{final}>{"".join(spans)}{animation}</text>'


def _paint(color: str, colors: Mapping[str, str]) -> str:
    """A color of the emulator's: a name, or six hexadecimal digits."""
    return colors.get(color, f"#{color}")


def write_cast(path: Path, events: Iterable[Event]) -> None:
    """Write a recording."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "command": " ".join(COMMAND)}
    lines = [json.dumps(header), *(json.dumps([round(t, 3), "o", text]) for t, text in events)]
    path.write_text("\n".join(lines) + "\n")


def read_cast(path: Path) -> list[Event]:
    """Read a recording."""
    _, *lines = path.read_text().splitlines()
    return [(seconds, text) for seconds, _, text in map(json.loads, lines)]


def main() -> None:
    """Record and render, or render only."""
    parser = argparse.ArgumentParser(description="Make the README's picture.")
    parser.add_argument("--render", action="store_true", help="render the recording that is there")
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    cast = PICTURES / "chat.cast"
    if not options.render:
        if shutil.which("mlxrun", path=str(Path(sys.executable).parent)) is None:
            parser.error("mlxrun is not installed beside this Python")
        write_cast(cast, record())
    lines, seconds = shown(read_cast(cast))
    for theme, colors in THEMES.items():
        target = PICTURES / f"chat-{theme}.svg"
        target.write_text(svg(lines, seconds, colors))
        print(f"{target.relative_to(PICTURES.parent.parent)}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
