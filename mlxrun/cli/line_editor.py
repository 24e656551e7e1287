"""Line editing for a chat on a terminal: history, several lines, completion of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

FENCE = '"""'


class LineEditor:
    """Reads messages from a terminal.

    Args:
        commands: completed at the start of a line.
        settings: completed after ``/set``.
        history: file of past messages; None keeps them in memory.
    """

    def __init__(
        self,
        commands: Sequence[str],
        settings: Sequence[str],
        history: Path | None,
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            message="> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_bindings(),
            completer=_Completer(commands, settings),
            complete_while_typing=False,
            enable_suspend=True,
            history=_history(history),
            input=input,
            output=output,
        )

    def read(self) -> str:
        """The next message as it was typed, a fence around it included; see :func:`unfold`.

        Ctrl-C clears a line; on an empty one it is KeyboardInterrupt, and Ctrl-D EOFError.
        """
        return self._session.prompt()


def wants_more(text: str) -> bool:
    """Whether Enter continues a message."""
    if text.startswith(FENCE):
        return text.count(FENCE) < 2
    return text.endswith("\\")


def unfold(text: str) -> str:
    """A typed message without the fence around it."""
    if not text.startswith(FENCE):
        return text
    inner, _, after = text.removeprefix(FENCE).partition(FENCE)
    return inner.removeprefix("\n").removesuffix("\n") + after


_typing = has_focus(DEFAULT_BUFFER)  # and not in the history search


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not wants_more(buffer.text):
            buffer.validate_and_handle()
            return
        if not buffer.text.startswith(FENCE):  # the backslash has done its work
            buffer.text = buffer.text.removesuffix("\\")
            buffer.cursor_position = len(buffer.text)
        buffer.insert_text("\n")

    @bindings.add("<sigint>", filter=_typing)
    @bindings.add("c-c", filter=_typing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _Completer(Completer):
    """Commands at the start of a line, names of settings after ``/set``."""

    def __init__(self, commands: Sequence[str], settings: Sequence[str]) -> None:
        self._commands, self._settings = commands, settings

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        sets, typed = text.startswith("/set "), text.removeprefix("/set ")
        for word in (self._settings if sets else self._commands) if text.startswith("/") else ():
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))


def history_path() -> Path | None:
    """The file of past messages; None where ``MLXRUN_HISTORY`` is off or the user has no home."""
    if os.environ.get("MLXRUN_HISTORY", "").lower() in ("0", "off", "no"):
        return None
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        if state and Path(state).is_absolute():
            base = Path(state)
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Application Support"
        else:
            base = Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "mlxrun" / "chat_history"


class _PrivateHistory(FileHistory):
    """A history that a full or lost disk does not end."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.is_file():  # a link to /dev/null keeps no history, and stays as it is
            path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(path)
