"""What a saved conversation's session remembers, in a file beside it.

Without that file, or with one that is of no use, a conversation goes on all the same: the model
reads it again.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlxrun.cli.conversation import ConversationError, check_replaceable
from mlxrun.errors import CacheError, MlxrunError
from mlxrun.files import remove
from mlxrun.kv_cache import storage

if TYPE_CHECKING:
    from mlxrun.cli.conversation import Conversation

Say = Callable[[str], None]


def beside(path: Path) -> Path:
    """The file of the memory that belongs to a conversation's."""
    return path.with_name(path.name + ".cache")


def check_target(path: Path, loaded: Path | None) -> None:
    """Whether a chat could be saved to a file; best asked before anything is said.

    Args:
        loaded: the file that the chat continues.

    Raises:
        ConversationError, CacheError: it could not; the message says why.
    """
    check_replaceable(path)
    storage.check_replaceable(beside(path))
    if path.exists() and (loaded is None or path.resolve() != loaded.resolve()):
        raise ConversationError(
            f"{path} was not replaced: it holds another conversation",
            hint="Continue it with --load, or name another file",
        )


def save(conversation: Conversation, path: Path, say: Say, *, force: bool = False) -> None:
    """Write a conversation and its memory, and say so.

    Args:
        force: replace another saved conversation, too.

    Raises:
        ConversationError, CacheError: it was not written: there is something else, or the disk
            refuses.
    """
    file = beside(path)
    storage.check_replaceable(file)
    conversation.save(path, force=force)
    say(f"saved {len(conversation.messages)} messages to {path}")
    conversation.forget_unsaid()
    session = conversation.session
    if not session.tokens:
        _remove(file, say)
        return
    try:
        session.save(file)
    except CacheError as error:
        say(f"the model will have to read them again: {error}")
    else:
        size = file.stat().st_size / 1e6
        say(f"and the model's memory of {len(session.tokens)} tokens, {size:.1f} MB, to {file}")


def _remove(file: Path, say: Say) -> None:
    """Remove the memory of a conversation that is no longer there."""
    try:
        remove(file)
    except OSError as error:
        say(f"{file} still holds what was said before: {error.strerror or error}")


def save_at_the_end(conversation: Conversation, path: Path, say: Say) -> None:
    """As :func:`save`; a conversation that cannot be written there is written elsewhere.

    One without messages is not, as after /clear: there is nothing to lose.

    Raises:
        ConversationError: it is not where it should be; the message says where it is.
    """
    try:
        save(conversation, path, say)
    except MlxrunError as error:
        if not conversation.messages:
            say(f"there is nothing to save; {error.message}")
            return
        spare = _written_elsewhere(conversation, path)
        where = f"It was written to {spare} instead" if spare else "Nor could it be anywhere else"
        raise ConversationError(f"the chat was not saved: {error.message}", hint=where) from error


def _written_elsewhere(conversation: Conversation, path: Path) -> Path | None:
    """A new file that holds the conversation, in the first place that takes it."""
    # Where all disks are full, Linux still has memory.
    folders = [str(path.parent), "~", os.environ.get("TMPDIR", "/tmp"), "/dev/shm"]
    for folder in folders:
        spare = Path(folder).expanduser() / f"{path.stem}-{secrets.token_hex(3)}.json"
        with suppress(ConversationError, OSError, RuntimeError):
            conversation.save(spare)
            return spare
    return None


def load(conversation: Conversation, path: Path, say: Say) -> None:
    """Continue a saved conversation, and say so.

    Raises:
        ConversationError, ParameterError: as ``Conversation.load`` raises them.
    """
    read(conversation, path, say)
    recall(conversation, path, say)


def read(conversation: Conversation, path: Path, say: Say) -> None:
    """Take over the messages of a saved conversation, and say so; raises as :func:`load`."""
    model, ours = conversation.load(path), conversation.llm.source
    say(f"loaded {len(conversation.messages)} messages from {path}")
    if model and Path(model).name != Path(ours).name:
        say(f"they were saved with {model}; {Path(ours).name} goes on")


def recall(conversation: Conversation, path: Path, say: Say) -> None:
    """Take over the memory that was saved beside a conversation, if there is one."""
    file = beside(path)
    if not file.exists():
        return
    session = conversation.session
    recalled = conversation.llm.sessions.load(file, say, **session.options)
    if recalled.tokens:
        conversation.recall(recalled)
