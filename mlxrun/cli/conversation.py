"""A conversation without its terminal: messages, settings, KV cache, files.

All of it is in one session, so that a turn computes its new tokens only.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlxrun.cli.console import size
from mlxrun.cli.options import Values, chat_defaults, parse_settings, store_settings
from mlxrun.cli.thinking import Span, Thinking
from mlxrun.errors import CacheError, MlxrunError
from mlxrun.files import check_regular, check_writable, remove, replacing
from mlxrun.kv_cache import storage

if TYPE_CHECKING:
    from mlxrun.engine.engine import Progress
    from mlxrun.engine.sequence import Session
    from mlxrun.llm import LLM
    from mlxrun.outputs import Chunk, FinishReason, Usage
    from mlxrun.tokenizer.tokenizer import Tokenizer

# An answer as it is streamed; closing it stops the model.
Answer = Generator[Span, None, None]
Print = Callable[[str], None]

# The key of an answer that was stopped; templates never see it.
STOPPED = "stopped"
_FORMAT = "mlxrun-chat"
# Larger files, such as models, are refused unread.
_LARGEST_FILE = 64 << 20


class ConversationError(MlxrunError):
    """A conversation cannot be saved, loaded, undone or continued."""


class _StoppedError(Exception):
    """The user stopped the model during prefill."""


class Conversation:
    """Messages, and the session with their KV cache.

    Args:
        session: empty.
        settings: those that differ from the model's defaults.
        template: variables for the chat template.

    Attributes:
        messages: ``{"role": "user" | "assistant", "content": str}`` in turn.
        defaults: the model's value of every setting.
        usage: of the latest completion; None if it was stopped.
        finish_reason: of the latest completion; ``"cancelled"`` if it was stopped.
    """

    def __init__(
        self,
        llm: LLM,
        session: Session,
        *,
        system: str | None = None,
        settings: Values | None = None,
        template: Values | None = None,
    ) -> None:
        self.llm, self.session = llm, session
        self.system, self.template = system, template or {}
        self.defaults = chat_defaults(llm.defaults.params)
        self.settings = self.defaults | (settings or {})
        self.messages: list[dict[str, Any]] = []
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        # Files of this conversation, with their size and modification time when last read or
        # written.
        self._files: dict[Path, tuple[int, int]] = {}

    @cached_property
    def thinking(self) -> Thinking:
        return Thinking(self.llm.tokenizer)

    def set(self, values: Values) -> None:
        """Change settings; a value that this model cannot have changes nothing."""
        settings = self.settings | values
        inputs = self.llm.inputs
        inputs.sampler(inputs.request([0], **settings))
        self.settings = settings

    def ask(
        self,
        text: str,
        *,
        stopped: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Answer:
        """Add a message and stream the answer to it, split into thinking and answer.

        The answer is added when the iterator ends or is closed, or when ``stopped()`` is true. If
        it is empty, the message is removed.

        Args:
            stopped: called after each chunk, and during a long prefill.
            progress: called with (tokens done, tokens in all) during a long prefill.
            settings: for this answer only.

        Raises:
            MlxrunError: the model cannot answer; the message is removed.
            KeyboardInterrupt: the answer so far is kept, the session's cache is not.
        """

        def prefilling(done: int, total: int) -> None:
            if stopped():
                raise _StoppedError
            if progress:
                progress(done, total)

        self.messages.append({"role": "user", "content": text})
        self.usage, self.finish_reason = None, "cancelled"
        answer: list[str] = []
        try:
            prompt = self.prompt()
            splitter = self.thinking.splitter(prompt)
            chunks = self.llm.stream(
                prompt, session=self.session, progress=prefilling, **self.settings | settings
            )
            # Closing truncates the session to the text that was yielded.
            with closing(cast("Generator[Chunk, None, None]", chunks)):
                for chunk in chunks:
                    answer.append(self.thinking.text(chunk))
                    if chunk.finish_reason:
                        self.usage, self.finish_reason = chunk.usage, chunk.finish_reason
                    yield from splitter.add(answer[-1])
                    if stopped():
                        break
            yield from splitter.finish()
        except _StoppedError:
            pass
        except KeyboardInterrupt:
            # It may have struck between the caches of two layers.
            self.session.reset()
            raise
        finally:
            self._close("".join(answer))

    def _close(self, answer: str) -> None:
        if not answer and self.finish_reason == "cancelled":
            self.messages.pop()
            return
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if self.finish_reason == "cancelled":
            message[STOPPED] = True
        self.messages.append(message)

    def retry(self, **options: Any) -> Answer:
        """Stream another answer to the last message; takes the options of :meth:`ask`.

        Without a new answer the old exchange is restored.
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
        """Token ids of the conversation, with the session's own where the bytes are equal."""
        tokenizer = self.llm.tokenizer
        ids = tokenizer.encode_chat(self.template_messages(), **self.template)
        return keep_tokens(self.session.tokens, ids, tokenizer)

    def template_messages(self) -> list[dict[str, str]]:
        """The messages for the chat template, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *({"role": m["role"], "content": m["content"]} for m in self.messages)]

    def undo(self) -> str:
        """Remove the last exchange; returns the user's message."""
        if not self.messages:
            raise ConversationError("there is nothing to take back")
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        return str(self.messages.pop()["content"])

    def truncate_session(self) -> None:
        """Remove tokens from the session that are not of the messages."""
        from mlxrun.kv_cache.prefix_cache import common_prefix_len

        prompt = self.prompt() if self.messages else []
        self.session.rewind(common_prefix_len(tuple(self.session.tokens), tuple(prompt)))

    def clear(self) -> None:
        """Remove all messages; the system message and the settings stay."""
        self.messages.clear()
        self.session.reset()
        self._files.clear()

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write messages, and settings other than the defaults, as JSON, atomically.

        Args:
            force: replace another saved conversation, too.
        """
        from mlxrun.tokenizer.tokenizer import valid

        check_replaceable(path)
        if path.exists() and not force and self._files.get(path.resolve()) != _stamp(path):
            raise ConversationError(
                f"{path} was not replaced: it holds another conversation",
                hint="Name another file; /save! replaces this one",
            )
        own = {name: v for name, v in self.settings.items() if v != self.defaults[name]}
        stored = {
            "format": _FORMAT,
            "version": 1,
            "model": self.llm.source,
            "system": self.system,
            "settings": store_settings(own),
            "messages": self.messages,
        }
        # A terminal's odd bytes arrive as lone surrogates, which no file can hold.
        text = valid(json.dumps(stored, ensure_ascii=False, indent=1))
        try:
            with replacing(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
            self._files[path.resolve()] = _stamp(path)
        except OSError as error:
            raise ConversationError(f"cannot write {path}: {error.strerror or error}") from error

    def load(self, path: Path) -> str | None:
        """Continue a saved conversation: messages, system message and settings.

        A damaged file changes nothing.

        Returns:
            The source of the model that it was saved with.
        """
        try:
            stamp, stored = _stamp(path), _read(path, str(path))
        except OSError as error:
            raise ConversationError(f"cannot read {path}: {error.strerror or error}") from error
        settings = parse_settings(stored["settings"], self.settings)
        self.system, self.messages = stored["system"], stored["messages"]
        self.settings |= settings
        self._files = {path.resolve(): stamp}
        model = stored["model"]
        return model if isinstance(model, str) else None


def keep_tokens(cached: Sequence[int], prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """``prompt`` with as much of its prefix as possible in the tokens of a session.

    A model may sample other tokens for a text than the tokenizer would encode. Encoding the
    conversation anew would then differ from the cached tokens and cost a prefill from there on.
    Where both have the same bytes, the cached tokens stay. Control tokens match only themselves.

    Returns:
        ``cached[:i] + prompt[j:]``, where ``cached[:i]`` and ``prompt[:j]`` have the same bytes.
    """
    i = j = 0  # tokens taken
    agreed = (0, 0)
    ahead, behind = b"", b""  # bytes of one that the other lacks: one of them is empty
    while True:
        if not ahead and not behind:
            agreed = i, j
            if i == len(cached) or j == len(prompt):
                break
            if cached[i] == prompt[j]:
                i, j = i + 1, j + 1
                continue
        if len(ahead) <= len(behind):
            if i == len(cached) or tokenizer.is_control(cached[i]):
                break
            ahead, i = ahead + tokenizer.token_bytes(cached[i]), i + 1
        else:
            if j == len(prompt) or tokenizer.is_control(prompt[j]):
                break
            behind, j = behind + tokenizer.token_bytes(prompt[j]), j + 1
        common = min(len(ahead), len(behind))
        if ahead[:common] != behind[:common]:
            break
        ahead, behind = ahead[common:], behind[common:]
    return [*cached[: agreed[0]], *prompt[agreed[1] :]]


# --- files ---------------------------------------------------------------------------------------


def check_replaceable(path: Path) -> None:
    """Raise ConversationError unless the file can be written and holds nothing else."""
    try:
        check_writable(path)
        if path.exists():
            _read(path, f"{path} was not replaced: it")
    except OSError as error:
        raise ConversationError(f"cannot write {path}: {error.strerror or error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path, it: str) -> dict[str, Any]:
    """A saved conversation, checked.

    Args:
        it: the subject of error messages.
    """
    check_regular(path)  # a pipe or a device may have no end
    if path.stat().st_size > _LARGEST_FILE:
        raise ConversationError(f"{it} is no saved conversation: it is too large for one")
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{it} is no saved conversation") from error
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise ConversationError(f"{it} is no saved conversation")
    stored = {"model": None, "system": None, "settings": {}, **stored}
    version: object = stored.get("version")
    messages: Any = stored.get("messages")
    if not isinstance(version, int) or version < 1:
        raise ConversationError(f"{it} is damaged: it has no version")
    if version > 1:
        raise ConversationError(f"{it} was saved by a newer mlxrun")
    if not isinstance(stored["system"], str | None) or not isinstance(stored["settings"], dict):
        raise ConversationError(f"{it} is damaged: its system message or settings")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ConversationError(f"{it} is damaged: its messages")
    if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise ConversationError(f"{it} is damaged: user and assistant do not take turns")
    return stored


def _is_message(message: object) -> bool:
    return (
        isinstance(message, Mapping)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )


def cache_path(path: Path) -> Path:
    """The file with the session of a saved conversation."""
    return path.with_name(path.name + ".cache")


def check_target(path: Path, loaded: Path | None) -> None:
    """Raise ConversationError or CacheError if a chat could not be saved to a file.

    Args:
        loaded: the file that the chat continues.
    """
    check_replaceable(path)
    storage.check_replaceable(cache_path(path))
    if path.exists() and (loaded is None or path.resolve() != loaded.resolve()):
        raise ConversationError(
            f"{path} was not replaced: it holds another conversation",
            hint="Continue it with --load, or name another file",
        )


def save_chat(conversation: Conversation, path: Path, say: Print, *, force: bool = False) -> None:
    """Write a conversation and its session, and print a line about each.

    Args:
        force: replace another saved conversation, too.
    """
    file = cache_path(path)
    storage.check_replaceable(file)
    conversation.save(path, force=force)
    say(f"saved {len(conversation.messages)} messages to {path}")
    conversation.truncate_session()
    session = conversation.session
    if session.tokens:
        try:
            session.save(file)
        except CacheError as error:
            say(f"their KV cache was not saved: {error}")
        else:
            nbytes = size(file.stat().st_size)
            say(f"and the KV cache of {len(session.tokens)} tokens, {nbytes}, to {file}")
        return
    try:
        remove(file)  # the session of an earlier version of the conversation
    except OSError as error:
        say(f"{file} still has the earlier conversation: {error.strerror or error}")


def save_at_exit(conversation: Conversation, path: Path, say: Print) -> None:
    """As :func:`save_chat`; a conversation that cannot be written there is written elsewhere."""
    try:
        save_chat(conversation, path, say)
    except MlxrunError as error:
        if not conversation.messages:
            say(f"there is nothing to save; {error.message}")
            return
        spare = _save_elsewhere(conversation, path)
        where = f"It was written to {spare} instead" if spare else "Nor could it be anywhere else"
        raise ConversationError(f"the chat was not saved: {error.message}", hint=where) from error


def _save_elsewhere(conversation: Conversation, path: Path) -> Path | None:
    """A new file with the conversation, in the first folder that can be written."""
    # /dev/shm is memory: it works when all disks are full.
    folders = [str(path.parent), "~", os.environ.get("TMPDIR", "/tmp"), "/dev/shm"]
    for folder in folders:
        spare = Path(folder).expanduser() / f"{path.stem}-{secrets.token_hex(3)}.json"
        with suppress(ConversationError, OSError, RuntimeError):
            conversation.save(spare)
            return spare
    return None


def load_messages(conversation: Conversation, path: Path, say: Print) -> None:
    """Continue a saved conversation, and print a line about it; raises as ``load`` does."""
    model, ours = conversation.load(path), conversation.llm.source
    say(f"loaded {len(conversation.messages)} messages from {path}")
    if model and Path(model).name != Path(ours).name:
        say(f"they were saved with {model}; {Path(ours).name} continues")


def load_cache(conversation: Conversation, path: Path, say: Print) -> None:
    """Use the saved session of a conversation; without one the model prefills again."""
    file = cache_path(path)
    if file.exists():
        config = conversation.session.config
        session = conversation.llm.restore_session(file, say, config)
        if session.tokens:
            conversation.session = session
