"""What a saved conversation's session remembers, in a file beside it.

Without that file, or with one that is of no use, a conversation goes on all the same: the model
reads it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxrun.errors import CacheError

if TYPE_CHECKING:
    from mlxrun.cli.conversation import Conversation

Say = Callable[[str], None]


def beside(path: Path) -> Path:
    """The file of the memory that belongs to a conversation's."""
    return path.with_name(path.name + ".cache")


def save(conversation: Conversation, path: Path, say: Say) -> None:
    """Write a conversation and its memory, and say so.

    Raises:
        ConversationError: the conversation cannot be written.
    """
    conversation.save(path)
    say(f"saved {len(conversation.messages)} messages to {path}")
    conversation.forget_unsaid()
    session, file = conversation.session, beside(path)
    if not session.tokens:
        return
    try:
        session.save(file)
    except CacheError as error:
        say(f"the model will have to read them again: {error}")
    else:
        size = file.stat().st_size / 1e6
        say(f"and the model's memory of {len(session.tokens)} tokens, {size:.1f} MB, to {file}")


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
        conversation.session = recalled
