"""A chat on a terminal: messages, slash commands, Ctrl-C."""

from __future__ import annotations

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
from threading import Event
from typing import Any

from mlxrun.cli.console import (
    Bar,
    Writer,
    complain,
    dim,
    noticing_interrupts,
    size,
    visible,
    wrapped,
)
from mlxrun.cli.conversation import (
    Answer,
    Conversation,
    ConversationError,
    load_cache,
    load_messages,
    save_chat,
)
from mlxrun.cli.line_editor import unfold
from mlxrun.cli.loading import usage_line
from mlxrun.cli.options import SETTINGS, THINK, Values, parse, show
from mlxrun.cli.thinking import Think
from mlxrun.errors import ContextLengthError, MlxrunError

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

    @property
    def settings(self) -> Values:
        return {**self.conversation.settings, "think": self.think}

    @property
    def defaults(self) -> Values:
        return {**self.conversation.defaults, "think": "show"}

    def set(self, values: Values) -> None:
        self.conversation.set({name: v for name, v in values.items() if name != "think"})
        self.think = values.get("think", self.think)

    def origin(self, name: str) -> str:
        """``"yours"`` for a setting that was changed, else whose default it is."""
        if self.settings[name] != self.defaults[name]:
            return "yours"
        return self.conversation.llm.defaults.origin(name)

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

    def _show(self, answer: Callable[..., Answer], *args: str, **options: Any) -> None:
        writer = Writer(self.think)
        bar = Bar("Prefilling", unit="tokens")

        def stopping() -> None:
            writer.end_line()
            self.say("stopping ...")

        with catching_interrupt() as stopped, noticing_interrupts(stopping), bar:
            spans = answer(*args, stopped=stopped, progress=bar, **options)
            try:
                with closing(spans), suppress(KeyboardInterrupt):
                    for text, thought in spans:
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
            context = f"{len(conversation.session.tokens)}/{conversation.llm.context_length}"
            self.say(f"[{usage_line(conversation.usage)}, context {context}]")

    def _limit(self) -> str:
        conversation = self.conversation
        usage, limit = conversation.usage, conversation.settings["max_tokens"]
        if usage and limit and usage.completion_tokens >= limit:
            return f"max_tokens is {limit}; /set max_tokens N allows more"
        return f"the context is full. {ROOM}"


@contextmanager
def catching_interrupt() -> Iterator[Callable[[], bool]]:
    """While it is entered, the first Ctrl-C only sets a flag; a second one interrupts.

    Yields a function that returns the flag. The model can so finish its step, and the session's
    cache stays valid.
    """
    pressed = Event()

    def press(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


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


# --- slash commands ------------------------------------------------------------------------------

Run = Callable[[TerminalChat, str], None]


@dataclass(frozen=True)
class SlashCommand:
    """A command of a chat; ``run`` gets the chat and the text after the name."""

    usage: str
    help: str
    run: Run


COMMANDS: dict[str, SlashCommand] = {}


def command(usage: str, help: str) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        COMMANDS[usage.split()[0]] = SlashCommand(usage, help, run)
        return run

    return add


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


@command("/help", "this list")
def _help(chat: TerminalChat, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.say(f"{command.usage:{width}}  {command.help}")
    chat.say('Alt-Enter, a \\ at the end of a line, or """ around a text: several lines')
    chat.say('A message that begins with a space or is in """ is never a command')
    chat.say("Ctrl-C stops an answer or clears the line; Ctrl-D on an empty line leaves")


@command("/system [TEXT]", "show or set the system message; none removes it")
def _system(chat: TerminalChat, text: str) -> None:
    conversation = chat.conversation
    if text:
        conversation.system = None if text == "none" else text
    chat.say(f"system: {'none' if conversation.system is None else conversation.system}")


@command("/set [NAME [VALUE]]", "show all settings, show one, or set it (default: as at first)")
def _set(chat: TerminalChat, text: str) -> None:
    if text in ("", "reset"):
        if text:
            chat.set(chat.defaults)
        _list_settings(chat)
        return
    name, written = [*re.split(r"\s*=\s*|\s+", text, maxsplit=1), ""][:2]
    name = name.replace("-", "_")
    if name not in chat.settings:
        near = get_close_matches(name, chat.settings, n=1, cutoff=0.5)
        nearest = f"Did you mean {near[0]}?" if near else "/set lists all."
        raise ConversationError(f"there is no setting {name}", hint=nearest)
    declared, about = THINK if name == "think" else SETTINGS[name], ""
    if written == "default":
        chat.set({name: chat.defaults[name]})
    elif written:
        chat.set({name: parse(name, declared, _words(name, written))})
    else:
        about = f"  ({chat.origin(name)}. {declared.help})"
    chat.say(f"{name}: {show(chat.settings[name])}{about}")


def _list_settings(chat: TerminalChat) -> None:
    width = max(map(len, chat.settings))
    groups: dict[str, list[str]] = {"yours": []}
    for name, value in chat.settings.items():
        groups.setdefault(chat.origin(name), []).append(f"{name:{width}}  {show(value)}")
    for whose, lines in groups.items():
        for line in [f"{whose}:", *lines] if lines else ():
            chat.say(line)


def _words(name: str, text: str) -> list[str]:
    """Words as a shell would split them, except that backslashes outside quotes stay."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConversationError(f"{name}: {str(error).lower()} in {text}") from error


@command("/save FILE", "write the conversation to a file")
def _save(chat: TerminalChat, text: str) -> None:
    save_chat(chat.conversation, _path(text), chat.say)


@command("/save! FILE", "the same, over another saved conversation")
def _replace(chat: TerminalChat, text: str) -> None:
    save_chat(chat.conversation, _path(text), chat.say, force=True)


@command("/load FILE", "continue a saved conversation")
def _load(chat: TerminalChat, text: str) -> None:
    path = _path(text)
    load_messages(chat.conversation, path, chat.say)
    load_cache(chat.conversation, path, chat.say)
    chat.show_last()


def _path(text: str) -> Path:
    if not text:
        raise ConversationError("no file is named", hint="Write its name after the command.")
    return Path(text).expanduser()


@command("/undo", "remove the last exchange")
def _undo(chat: TerminalChat, _: str) -> None:
    chat.say(f"removed: {chat.conversation.undo()}")


@command("/retry", "another answer to the last message")
def _retry(chat: TerminalChat, _: str) -> None:
    chat.retry()


@command("/clear", "start a new conversation")
def _clear(chat: TerminalChat, _: str) -> None:
    chat.conversation.clear()
    chat.say("a new conversation")


@command("/stats", "turn the cost of each answer on or off")
def _stats(chat: TerminalChat, _: str) -> None:
    chat.stats = not chat.stats
    chat.say(f"stats: {'on' if chat.stats else 'off'}")
    if chat.stats:
        stats = chat.conversation.llm.prefix_cache.figures
        chat.say(
            f"prefix cache: {size(stats.nbytes)} of {size(stats.budget)}, "
            f"{stats.hits} hits, {stats.tokens} tokens reused"
        )


@command("/quit", "leave")
@command("/exit", "leave")
def _exit(chat: TerminalChat, _: str) -> None:
    raise EOFError
