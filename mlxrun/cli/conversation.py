"""A conversation with a model, without a terminal: messages, settings, memory, file.

The whole conversation lives in one session, so that a turn computes only what is new. Knows nothing
of how messages are typed or shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlxrun.cli.respell import respell
from mlxrun.cli.settings import Values, chat_defaults, parse_settings, store_settings
from mlxrun.cli.thinking import Span, Splitter, Thinking
from mlxrun.errors import ContextLengthError, MlxrunError
from mlxrun.files import check_regular, check_writable, replacing

if TYPE_CHECKING:
    from mlxrun.generation.engine import Progress, Session
    from mlxrun.llm import LLM
    from mlxrun.outputs import Chunk, FinishReason, Usage

# A reply, piece by piece; closing it stops the reply.
Pieces = Generator[str, None, None]

FORMAT = "mlxrun-chat"
# No conversation comes near it; a model's file is not read to be told from one.
_LARGEST_FILE = 64 << 20
# Size and time of change.
Stamp = tuple[int, int]
# A reply that was stopped is marked with this key; templates never see it.
STOPPED = "stopped"
# What to do about a full context.
ROOM = "Say less, or start anew; chat --window N forgets as it goes"


class ConversationError(MlxrunError):
    """A conversation cannot be saved, read, taken back or continued."""


class _StoppedError(Exception):
    """The user stopped the model before its reply began."""


class Conversation:
    """Messages, and a session that remembers what the model has seen of them.

    Args:
        llm: the model.
        session: its memory, empty.
        system: a message that stands before all others.
        settings: a value for each setting that may be changed; see ``settings.py``.
        template: variables for the chat template.

    Attributes:
        messages: ``{"role": "user" | "assistant", "content": str}`` in turn.
        defaults: the settings at the beginning.
        usage: what the latest reply cost; None if it was stopped.
        finish_reason: of the latest reply; ``"cancelled"`` if it was stopped.
    """

    def __init__(
        self,
        llm: LLM,
        session: Session,
        *,
        system: str | None = None,
        settings: Values,
        template: Values | None = None,
    ) -> None:
        self.llm, self.session = llm, session
        self.template = template or {}
        self.system, self.settings = system, dict(settings)
        self.defaults = dict(settings)
        self.messages: list[dict[str, Any]] = []
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        self._unsaid = False
        # The files that hold this conversation, and what they were when it last read or wrote them.
        self._files: dict[Path, Stamp] = {}
        self._splitter = Splitter({})

    @cached_property
    def thinking(self) -> Thinking:
        """How the model marks its thinking."""
        return Thinking(self.llm.tokenizer)

    def set(self, values: Values) -> None:
        """Change settings.

        Raises:
            ParameterError: a value that this model cannot have, such as a token outside its
                vocabulary; nothing has changed then.
        """
        settings = self.settings | values
        asker = self.llm.asker
        asker.sampler(asker.request([0], **settings))
        self.settings = settings

    def ask(
        self,
        text: str,
        *,
        stopped: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Pieces:
        """Add a message and stream the reply to it.

        The reply joins the messages when the iterator ends, or what there is of it when ``stopped``
        says so or the iterator is closed. Without any reply the message is taken back.

        Args:
            stopped: asked after each piece of text, and while a long prompt is read.
            progress: called with (tokens done, tokens in all) while a long prompt is read.
            settings: for this reply only.

        Raises:
            MlxrunError: the model cannot reply; the message is taken back.
            KeyboardInterrupt: what there is of a reply is kept, the session's memory is not.
        """

        def reading(done: int, total: int) -> None:
            if stopped():
                raise _StoppedError
            if progress:
                progress(done, total)

        self.messages.append({"role": "user", "content": text})
        self.usage, self.finish_reason = None, "cancelled"
        reply: list[str] = []
        try:
            prompt = self.prompt()
            self._splitter = self.thinking.splitter(prompt)
            chunks = self.llm.stream(
                prompt, session=self.session, progress=reading, **self.settings | settings
            )
            yield from self._collect(chunks, reply, stopped)
        except _StoppedError:
            pass
        except ContextLengthError as error:
            raise ContextLengthError(error.message, hint=ROOM) from error
        except KeyboardInterrupt:
            # It may have struck between the caches of two layers.
            self.session.reset()
            raise
        finally:
            self._close(reply)

    def _collect(
        self, chunks: Iterator[Chunk], reply: list[str], stopped: Callable[[], bool]
    ) -> Pieces:
        # Closing makes the session hold what was yielded and no more.
        with closing(cast("Generator[Chunk, None, None]", chunks)):
            for chunk in chunks:
                self._unsaid = False  # to read the prompt, the session went back to what is said
                text = self.thinking.spell(chunk)
                reply.append(text)
                if chunk.finish_reason:
                    self.usage, self.finish_reason = chunk.usage, chunk.finish_reason
                yield text
                if stopped():
                    break

    def spans(self, reply: Pieces) -> Iterator[Span]:
        """The reply that :meth:`ask` or :meth:`retry` streams, cut into thinking and answer."""
        for text in reply:
            yield from self._splitter.add(text)
        yield from self._splitter.finish()

    def _close(self, reply: Sequence[str]) -> None:
        text = "".join(reply)
        if not text and self.finish_reason == "cancelled":
            self.messages.pop()
            return
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.finish_reason == "cancelled":
            message[STOPPED] = True
        self.messages.append(message)

    def retry(self, **options: Any) -> Pieces:
        """Stream another reply to the last message; takes the options of :meth:`ask`.

        The old exchange comes back where there is no new one.

        Raises:
            ConversationError: there is nothing to reply to.
            MlxrunError: the model cannot reply.
        """
        before = list(self.messages)
        text = self.undo()
        kept = len(self.messages)
        try:
            yield from self.ask(text, **options)
        finally:
            if len(self.messages) == kept:
                self.messages = before

    def prompt(self) -> list[int]:
        """Token ids of the conversation so far, spelled as the session remembers them."""
        tokenizer = self.llm.tokenizer
        ids = tokenizer.encode_chat(self.template_messages(), **self.template)
        return respell(self.session.tokens, ids, tokenizer)

    def template_messages(self) -> list[dict[str, str]]:
        """What the chat template gets: the system message and all others."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        shown = [{"role": m["role"], "content": m["content"]} for m in self.messages]
        return [*system, *shown]

    def undo(self) -> str:
        """Take the last exchange back; returns what the user had said.

        Raises:
            ConversationError: there is none.
        """
        if not self.messages:
            raise ConversationError("there is nothing to take back")
        self._unsaid = True
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        return str(self.messages.pop()["content"])

    def forget_unsaid(self) -> None:
        """Let the session forget what was taken back."""
        if self._unsaid:
            from mlxrun.kv_cache.prefix_cache import common_prefix_len

            said = self.prompt() if self.messages else []
            self.session.rewind(common_prefix_len(tuple(self.session.tokens), tuple(said)))
            self._unsaid = False

    def clear(self) -> None:
        """Forget all messages; the system message and the settings stay."""
        self.messages.clear()
        self.session.reset()
        self._files.clear()

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write messages, and settings other than the defaults, as JSON, all or nothing.

        Args:
            force: replace another saved conversation, too.

        Raises:
            ConversationError: it cannot be written, or there is another conversation or another
                kind of file.
        """
        from mlxrun.text.tokenizer import valid

        check_replaceable(path)
        if path.exists() and not force and self._files.get(path.resolve()) != _stamp(path):
            raise ConversationError(
                f"{path} was not replaced: it holds another conversation",
                hint="Name another file; /save! replaces this one",
            )
        defaults = chat_defaults(self.llm.defaults.params)
        own = {name: v for name, v in self.settings.items() if v != defaults[name]}
        text = json.dumps(
            {
                "format": FORMAT,
                "version": 1,
                "model": self.llm.source,
                "system": self.system,
                "settings": store_settings(own),
                "messages": self.messages,
            },
            ensure_ascii=False,
            indent=1,
        )
        try:
            with replacing(path) as partial:
                # A terminal's odd bytes arrive as lone surrogates, which no file can hold.
                partial.write_text(valid(text) + "\n", encoding="utf-8")
            self._files[path.resolve()] = _stamp(path)
        except OSError as error:
            raise ConversationError(f"cannot write {path}: {error.strerror or error}") from error

    def load(self, path: Path) -> str | None:
        """Continue a saved conversation: messages, system message and settings.

        Returns:
            Where the model came from with which it was saved.

        Raises:
            ConversationError: the file cannot be read or is damaged; nothing has changed then.
            ParameterError: it holds a setting outside its range; nothing has changed then.
        """
        try:
            stamp, stored = _stamp(path), _read(path, str(path))
        except OSError as error:
            raise ConversationError(f"cannot read {path}: {error.strerror or error}") from error
        settings = parse_settings(stored["settings"], self.settings)
        self.system, self.messages = stored["system"], stored["messages"]
        self.settings |= settings
        self._files = {path.resolve(): stamp}
        self._unsaid = bool(self.session.tokens)  # they are of the conversation before
        return cast("str | None", stored["model"])

    def recall(self, session: Session) -> None:
        """Go on with another session, which remembers what was said."""
        self.session, self._unsaid = session, False


def check_replaceable(path: Path) -> None:
    """Refuse to write over what is no saved conversation, or where nothing can be written.

    Raises:
        ConversationError: it is something else, or there is no writing there.
    """
    try:
        check_writable(path)
        if path.exists():
            _read(path, f"{path} was not replaced: it")
    except OSError as error:
        raise ConversationError(f"cannot write {path}: {error.strerror or error}") from error


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path, it: str) -> dict[str, Any]:
    """A saved conversation, checked: ``system``, ``settings`` and ``messages``.

    Args:
        it: the subject of the sentences that say what is wrong.
    """
    check_regular(path)  # a pipe or a device may have no end
    if path.stat().st_size > _LARGEST_FILE:
        raise ConversationError(f"{it} is no saved conversation: it is too large for one")
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{it} is no saved conversation") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ConversationError(f"{it} is no saved conversation")
    version = stored.get("version")
    if not isinstance(version, int) or version < 1:
        raise ConversationError(f"{it} is damaged: it has no version")
    if version > 1:
        raise ConversationError(f"{it} was saved by a newer mlxrun")
    system, settings = stored.get("system"), stored.get("settings", {})
    messages = stored.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(settings, dict):
        raise ConversationError(f"{it} is damaged: its system message or settings")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ConversationError(f"{it} is damaged: its messages")
    if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise ConversationError(f"{it} is damaged: user and assistant do not take turns")
    model = stored.get("model")
    return {
        "system": system,
        "settings": settings,
        "messages": messages,
        "model": model if isinstance(model, str) else None,
    }


def _is_message(message: object) -> bool:
    return (
        isinstance(message, Mapping)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )
