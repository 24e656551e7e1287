"""A chat on a terminal: wrapping, messages, slash commands, Ctrl-C."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.cells import cell_len

from mlxrun.cli.console import Bar, complain, dim, noticing_interrupts, obeys_escapes, visible
from mlxrun.cli.conversation import (
    Conversation,
    ConversationError,
    TextStream,
    Think,
    load_chat,
    save_chat,
)
from mlxrun.cli.line_editor import unfold
from mlxrun.cli.options import SETTINGS, origin, parse, show
from mlxrun.errors import ContextLengthError, MlxrunError, ParameterError

if TYPE_CHECKING:
    from mlxrun.outputs import Usage

# --- screen --------------------------------------------------------------------------------------


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
        self.column = 0
        self._word, self._cells = "", 0

    def feed(self, text: str, width: int) -> str:
        """The text for a terminal of so many columns."""
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
    """A text for standard output, wrapped if that is a terminal."""
    breaks = sys.stdout.isatty() and obeys_escapes()
    return Wrap().feed(text, _width()) if breaks else text


class Writer:
    """Writes streamed text to standard output, wrapped on a terminal.

    Thinking is dim, and on lines of its own.

    Args:
        think: whether thinking is shown.

    Attributes:
        begun: whether there was any text, shown or not.
        all_hidden: whether there was text and all of it was hidden.
    """

    def __init__(self, think: Think) -> None:
        self.begun = self.all_hidden = False
        self._hides = think == "hide"
        self._terminal = sys.stdout.isatty()
        self._wraps = self._terminal and obeys_escapes()
        self._wrap = Wrap()
        self._thought = False

    def write(self, text: str, thought: bool) -> None:
        """Write text without escape sequences; ``thought``: it is thinking."""
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
        """Separate thinking from answer."""
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
    """Keep text that is typed between two prompts, unshown, for the next prompt.

    Keys that send signals still do, and discard nothing that was typed before.
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


# --- chat ----------------------------------------------------------------------------------------


# The hint for a full context.
ROOM = "/undo removes the last exchange, /clear starts anew, chat --window N evicts old messages"
# Exchanges of a loaded conversation that are shown.
RECALLED = 2


class TerminalChat:
    """A conversation on a terminal.

    Args:
        conversation: it may have messages already.
        read: returns the next line as typed; raises KeyboardInterrupt and EOFError as
            ``LineEditor.read`` does.
        stats: whether to show the cost of each answer.
        think: whether to show the model's thinking.
    """

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        *,
        stats: bool = False,
        think: Think = "show",
    ) -> None:
        self.conversation, self.stats = conversation, stats
        self.think: Think = think
        self._read = read
        self._retries = 0

    def run(self) -> None:
        """Loop until the user leaves."""
        with typing_waits():
            while True:
                try:
                    self._handle(self._read())
                except EOFError:
                    return
                except KeyboardInterrupt:
                    self.say("(Ctrl-D leaves)")

    def _handle(self, typed: str) -> None:
        try:
            if not run_command(self, typed) and (text := unfold(typed)).strip():
                self._show(self.conversation.ask, text)
        except ContextLengthError as error:
            complain(f"{error.message}. {ROOM}")
        except (MlxrunError, OSError, RuntimeError, ValueError) as error:
            complain(str(error))  # such as an impossible path: no reason to end the chat

    def say(self, text: str) -> None:
        """Print a line that is not part of the conversation."""
        print(dim(wrapped(visible(text))), flush=True)

    def retry(self) -> None:
        """Show another answer to the last message."""
        settings = self.conversation.settings
        seed = settings["seed"]
        if settings["temperature"] == 0 and self.conversation.messages:
            self.say("temperature is 0: the answer stays the same")
        if seed is not None:
            self._retries += 1
            seed = (seed + self._retries) % 2**64
        self._show(self.conversation.retry, seed=seed)

    def show_last(self) -> None:
        """Show the last exchanges of a conversation that was loaded."""
        messages = self.conversation.messages
        shown = messages[-2 * RECALLED :]
        if len(shown) < len(messages):
            self.say(f"[{len(messages) - len(shown)} messages before these]")
        for message in shown:
            if message["role"] == "user":
                self.say(f"> {message['content']}")
            else:
                writer = Writer("hide")
                writer.write(visible(self.conversation.thinking.answer(message["content"])), False)
                writer.end_line()

    def _show(self, stream: Callable[..., TextStream], *args: str, **options: Any) -> None:
        writer = Writer(self.think)
        bar = Bar("Prefilling", count="tokens")

        def stopping() -> None:
            writer.end_line()
            self.say("stopping ...")

        with Interrupt() as stopped, noticing_interrupts(stopping), bar:
            pieces = stream(*args, stopped=stopped, progress=bar, **options)
            try:
                with closing(pieces), suppress(KeyboardInterrupt):
                    for text, thought in self.conversation.spans(pieces):
                        bar.stop()
                        writer.write(visible(text), thought)
            finally:
                with suppress(OSError):  # a terminal that is gone
                    writer.end_line()
        self._explain(writer)

    def _explain(self, writer: Writer) -> None:
        """Print why the answer ended early, and its cost."""
        conversation = self.conversation
        if conversation.finish_reason == "cancelled":
            kept = "" if writer.begun else " before the answer: nothing was kept"
            self.say(f"[stopped{kept}]")
        elif conversation.finish_reason == "length":
            self.say(f"[cut off: {self._limit()}]")
        if writer.all_hidden:
            self.say("[all of it was thinking; /set think show shows that]")
        if self.stats and conversation.usage:
            self.say(f"[{self._cost(conversation.usage)}]")

    def _limit(self) -> str:
        conversation = self.conversation
        usage, limit = conversation.usage, conversation.settings["max_tokens"]
        if usage and limit and usage.completion_tokens >= limit:
            return f"max_tokens is {limit}; /set max_tokens N allows more"
        return f"the context is full. {ROOM}"

    def _cost(self, usage: Usage) -> str:
        used = len(self.conversation.session.tokens)
        return (
            f"{usage.speed + ', ' if usage.speed else ''}"
            f"first after {usage.time_to_first_token:.2f} s, "
            f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached, "
            f"context {used}/{self.conversation.llm.context_length}"
        )


class Interrupt:
    """While it is entered, the first Ctrl-C only sets a flag; a second one interrupts.

    Call it for the flag. The model can so finish its step, and the session's cache stays valid.
    """

    def __init__(self) -> None:
        self._noted = False

    def __call__(self) -> bool:
        return self._noted

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True


# --- slash commands ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlashCommand:
    """A command of a chat; ``run`` gets the chat and the text after the name."""

    usage: str
    help: str
    run: Callable[[TerminalChat, str], None]


# Not a path: letters, and then a space or nothing.
_COMMAND = re.compile(r"/([a-z?]*!?)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)


def run_command(chat: TerminalChat, line: str) -> bool:
    """Run a line if it is a command; returns whether it is.

    Raises:
        MlxrunError: there is no such command, or it fails.
    """
    found = _COMMAND.fullmatch(line)
    if not found:
        return False
    name, rest = f"/{found[1]}", (found[2] or "").strip()
    command = COMMANDS.get(name.lower())
    if command is None:
        near = get_close_matches(found[1], [known[1:] for known in COMMANDS], n=1)
        if rest and not near:
            return False
        nearest = f"Did you mean /{near[0]}?" if near else "/help lists all."
        hint = f"{nearest} To send it as a message, begin with a space"
        raise ConversationError(f"there is no command {name}", hint=hint)
    command.run(chat, rest)
    return True


def _help(chat: TerminalChat, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.say(f"{command.usage:{width}}  {command.help}")
    chat.say('Alt-Enter, a \\ at the end of a line, or """ around a text: several lines')
    chat.say('A message that begins with a space or is in """ is never a command')
    chat.say("Ctrl-C stops an answer or clears the line; Ctrl-D on an empty line leaves")


def _system(chat: TerminalChat, text: str) -> None:
    conversation = chat.conversation
    if text:
        conversation.system = None if text == "none" else text
    chat.say(f"system: {'none' if conversation.system is None else conversation.system}")


def _set(chat: TerminalChat, text: str) -> None:
    conversation = chat.conversation
    settings, model = conversation.settings, conversation.llm.defaults
    if text in ("", "reset"):
        if text:
            conversation.set(conversation.defaults)
            chat.think = "show"
        _list_settings(chat)
        return
    name, written = [*re.split(r"\s*=\s*|\s+", text, maxsplit=1), ""][:2]
    name = name.replace("-", "_")
    if name == "think":
        _think(chat, written)
        return
    if name not in settings:
        near = get_close_matches(name, [*settings, "think"], n=1, cutoff=0.5)
        nearest = f"Did you mean {near[0]}?" if near else "/set lists all."
        raise ConversationError(f"there is no setting {name}", hint=nearest)
    setting, about = SETTINGS[name], ""
    if written == "default":
        conversation.set({name: conversation.defaults[name]})
    elif written:
        conversation.set({name: parse(name, setting, _words(name, written))})
    else:
        whose = origin(name, settings[name], model)
        about = f"  ({whose}. {setting.help})"
    chat.say(f"{name}: {show(conversation.settings[name])}{about}")


def _list_settings(chat: TerminalChat) -> None:
    settings, model = chat.conversation.settings, chat.conversation.llm.defaults
    width = max(map(len, settings))
    groups: dict[str, list[str]] = {"yours": []}
    for name, value in settings.items():
        line = f"{name:{width}}  {show(value)}"
        groups.setdefault(origin(name, value, model), []).append(line)
    whose = "mlxrun's" if chat.think == "show" else "yours"
    groups.setdefault(whose, []).append(f"{'think':{width}}  {chat.think}")
    for whose, lines in groups.items():
        for line in [f"{whose}:", *lines] if lines else ():
            chat.say(line)


def _think(chat: TerminalChat, written: str) -> None:
    if written not in ("", "show", "hide", "default"):
        raise ParameterError("think", written, "show or hide")
    if written:
        chat.think = "hide" if written == "hide" else "show"
    chat.say(f"think: {chat.think}")


def _words(name: str, text: str) -> list[str]:
    """Words as a shell would split them, except that backslashes outside quotes stay."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConversationError(f"{name}: {str(error).lower()} in {text}") from error


def _save(chat: TerminalChat, text: str) -> None:
    save_chat(chat.conversation, _path(text), chat.say)


def _replace(chat: TerminalChat, text: str) -> None:
    save_chat(chat.conversation, _path(text), chat.say, force=True)


def _load(chat: TerminalChat, text: str) -> None:
    load_chat(chat.conversation, _path(text), chat.say)
    chat.show_last()


def _path(text: str) -> Path:
    if not text:
        raise ConversationError("no file is named", hint="Write its name after the command.")
    return Path(text).expanduser()


def _undo(chat: TerminalChat, _: str) -> None:
    chat.say(f"removed: {chat.conversation.undo()}")


def _retry(chat: TerminalChat, _: str) -> None:
    chat.retry()


def _clear(chat: TerminalChat, _: str) -> None:
    chat.conversation.clear()
    chat.say("a new conversation")


def _stats(chat: TerminalChat, _: str) -> None:
    chat.stats = not chat.stats
    chat.say(f"stats: {'on' if chat.stats else 'off'}")
    if chat.stats:
        stats = chat.conversation.llm.prefix_cache.figures
        chat.say(
            f"prefix cache: {stats.nbytes / 1e6:.1f} of {stats.budget / 1e6:.0f} MB, "
            f"{stats.hits} hits, {stats.tokens} tokens reused"
        )


def _exit(chat: TerminalChat, _: str) -> None:
    raise EOFError


COMMANDS = {
    "/help": SlashCommand("/help", "this list", _help),
    "/system": SlashCommand(
        "/system [TEXT]", "show or set the system message; none removes it", _system
    ),
    "/set": SlashCommand(
        "/set [NAME [VALUE]]", "show all settings, show one, or set it (default: as at first)", _set
    ),
    "/save": SlashCommand("/save FILE", "write the conversation to a file", _save),
    "/save!": SlashCommand("/save! FILE", "the same, over another saved conversation", _replace),
    "/load": SlashCommand("/load FILE", "continue a saved conversation", _load),
    "/undo": SlashCommand("/undo", "remove the last exchange", _undo),
    "/retry": SlashCommand("/retry", "another answer to the last message", _retry),
    "/clear": SlashCommand("/clear", "start a new conversation", _clear),
    "/stats": SlashCommand("/stats", "turn the cost of each answer on or off", _stats),
    "/exit": SlashCommand("/exit", "leave", _exit),
    "/quit": SlashCommand("/quit", "leave", _exit),
}
