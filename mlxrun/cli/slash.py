"""The commands of a chat: ``/help``, ``/set`` and so on, as one table.

A command gets the chat and what follows its name. It speaks through ``chat.say`` and fails with a
``MlxrunError``, which the chat prints as one line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from mlxrun.cli import remembered
from mlxrun.cli.conversation import ConversationError
from mlxrun.cli.settings import SETTINGS, origin

if TYPE_CHECKING:
    from mlxrun.cli.terminal import TerminalChat


@dataclass(frozen=True)
class Command:
    """A row of the table: how it is written, what it does, and the function that does it."""

    usage: str
    help: str
    run: Callable[[TerminalChat, str], None]


def run(chat: TerminalChat, line: str) -> None:
    """Run a line that begins with a slash.

    Raises:
        MlxrunError: there is no such command, or it cannot do what it is asked for.
    """
    name, _, rest = line.partition(" ")
    name = name.strip()
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        nearest = f"Did you mean {near[0]}?" if near else "/help lists all."
        raise ConversationError(f"there is no command {name}", hint=nearest)
    COMMANDS[name].run(chat, rest.strip())


def _help(chat: TerminalChat, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.say(f"{command.usage:{width}}  {command.help}")
    chat.say('Alt-Enter, a \\ at the end of a line, or """ around a text: several lines')
    chat.say("Ctrl-C stops a reply or clears the line; Ctrl-D leaves")


def _system(chat: TerminalChat, text: str) -> None:
    conversation = chat.conversation
    if text:
        conversation.system = None if text == "none" else text
    chat.say(f"system: {'none' if conversation.system is None else conversation.system}")


def _set(chat: TerminalChat, text: str) -> None:
    settings, model = chat.conversation.settings, chat.conversation.llm.defaults
    if not text:
        width = max(map(len, settings))
        groups: dict[str, list[str]] = {"yours": []}
        for name, value in settings.items():
            line = f"{name:{width}}  {SETTINGS[name].show(value)}"
            groups.setdefault(origin(name, value, model), []).append(line)
        for whose, lines in groups.items():
            for line in [f"{whose}:", *lines] if lines else ():
                chat.say(line)
        return
    name, written = [*re.split(r"\s*=\s*|\s+", text, maxsplit=1), ""][:2]
    name = name.replace("-", "_")
    if name not in settings:
        near = get_close_matches(name, settings, n=1, cutoff=0.5)
        nearest = f"Did you mean {near[0]}?" if near else "/set lists all."
        raise ConversationError(f"there is no setting {name}", hint=nearest)
    setting = SETTINGS[name]
    if written:
        settings[name] = setting.read(_words(name, written))
        chat.say(f"{name}: {setting.show(settings[name])}")
    else:
        value = settings[name]
        whose = origin(name, value, model)
        chat.say(f"{name}: {setting.show(value)}  ({whose}. {setting.help})")


def _words(name: str, text: str) -> list[str]:
    """Words as a shell would read them, except that backslashes outside quotes stay."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConversationError(f"{name}: {str(error).lower()} in {text}") from error


def _save(chat: TerminalChat, text: str) -> None:
    remembered.save(chat.conversation, _path(text), chat.say)


def _load(chat: TerminalChat, text: str) -> None:
    remembered.load(chat.conversation, _path(text), chat.say)


def _path(text: str) -> Path:
    if not text:
        raise ConversationError("no file is named", hint="Write its name after the command.")
    return Path(text).expanduser()


def _undo(chat: TerminalChat, _: str) -> None:
    chat.say(f"taken back: {chat.conversation.undo()}")


def _retry(chat: TerminalChat, _: str) -> None:
    chat.retry()


def _clear(chat: TerminalChat, _: str) -> None:
    chat.conversation.clear()
    chat.say("a new conversation")


def _stats(chat: TerminalChat, _: str) -> None:
    chat.stats = not chat.stats
    chat.say(f"stats: {'on' if chat.stats else 'off'}")
    if chat.stats:
        kept = chat.conversation.llm.prefix_cache.figures
        chat.say(
            f"beginnings kept: {kept.nbytes / 1e6:.1f} of {kept.budget / 1e6:.0f} MB, "
            f"used {kept.hits} times, {kept.tokens} tokens saved"
        )


def _exit(chat: TerminalChat, _: str) -> None:
    raise EOFError


COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/system": Command(
        "/system [TEXT]", "show or set the system message; none removes it", _system
    ),
    "/set": Command("/set [NAME [VALUE]]", "show all settings, show one, or set it", _set),
    "/save": Command("/save FILE", "write the conversation to a file", _save),
    "/load": Command("/load FILE", "continue a saved conversation", _load),
    "/undo": Command("/undo", "take the last exchange back", _undo),
    "/retry": Command("/retry", "another reply to the last message", _retry),
    "/clear": Command("/clear", "forget the conversation", _clear),
    "/stats": Command("/stats", "show what each reply costs, or stop to", _stats),
    "/exit": Command("/exit", "leave", _exit),
    "/quit": Command("/quit", "leave", _exit),
}
