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
from mlxrun.errors import ParameterError

if TYPE_CHECKING:
    from mlxrun.cli.terminal import TerminalChat


@dataclass(frozen=True)
class Command:
    """A row of the table: how it is written, what it does, and the function that does it."""

    usage: str
    help: str
    run: Callable[[TerminalChat, str], None]


# What begins with a slash and is no path: letters, and then a space or nothing.
_COMMAND = re.compile(r"/([a-z?]*!?)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)


def run(chat: TerminalChat, line: str) -> bool:
    """Run a line if it is a command; says whether it is.

    Raises:
        MlxrunError: it looks like a command and is none, or the command fails.
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
    chat.say('A message that begins with a space or stands in """ is never a command')
    chat.say("Ctrl-C stops a reply or clears the line; Ctrl-D on an empty line leaves")


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
        conversation.set({name: setting.read(_words(name, written))})
    else:
        whose = origin(name, settings[name], model)
        about = f"  ({whose}. {setting.help})"
    chat.say(f"{name}: {setting.show(conversation.settings[name])}{about}")


def _list_settings(chat: TerminalChat) -> None:
    settings, model = chat.conversation.settings, chat.conversation.llm.defaults
    width = max(map(len, settings))
    groups: dict[str, list[str]] = {"yours": []}
    for name, value in settings.items():
        line = f"{name:{width}}  {SETTINGS[name].show(value)}"
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
    """Words as a shell would read them, except that backslashes outside quotes stay."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConversationError(f"{name}: {str(error).lower()} in {text}") from error


def _save(chat: TerminalChat, text: str) -> None:
    remembered.save(chat.conversation, _path(text), chat.say)


def _replace(chat: TerminalChat, text: str) -> None:
    remembered.save(chat.conversation, _path(text), chat.say, force=True)


def _load(chat: TerminalChat, text: str) -> None:
    remembered.load(chat.conversation, _path(text), chat.say)
    chat.show_last()


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
            f"prefix cache: {kept.nbytes / 1e6:.1f} of {kept.budget / 1e6:.0f} MB, "
            f"{kept.hits} hits, {kept.tokens} tokens reused"
        )


def _exit(chat: TerminalChat, _: str) -> None:
    raise EOFError


COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/system": Command(
        "/system [TEXT]", "show or set the system message; none removes it", _system
    ),
    "/set": Command(
        "/set [NAME [VALUE]]", "show all settings, show one, or set it (default: as at first)", _set
    ),
    "/save": Command("/save FILE", "write the conversation to a file", _save),
    "/save!": Command("/save! FILE", "the same, over another saved conversation", _replace),
    "/load": Command("/load FILE", "continue a saved conversation", _load),
    "/undo": Command("/undo", "take the last exchange back", _undo),
    "/retry": Command("/retry", "another reply to the last message", _retry),
    "/clear": Command("/clear", "forget the conversation", _clear),
    "/stats": Command("/stats", "show what each reply costs, or stop to", _stats),
    "/exit": Command("/exit", "leave", _exit),
    "/quit": Command("/quit", "leave", _exit),
}
