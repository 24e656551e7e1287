"""A conversation without its terminal: messages, settings, thinking, session, files.

The whole conversation lives in one session, so that a turn computes its new tokens only.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from mlxrun.cli.options import Values, chat_defaults, parse_settings, store_settings
from mlxrun.errors import CacheError, ContextLengthError, MlxrunError
from mlxrun.files import check_regular, check_writable, remove, replacing
from mlxrun.kv_cache import storage

if TYPE_CHECKING:
    from mlxrun.engine.engine import Progress
    from mlxrun.engine.sequence import Session
    from mlxrun.llm import LLM
    from mlxrun.outputs import Chunk, FinishReason, Usage
    from mlxrun.text.tokenizer import Tokenizer

# --- thinking ------------------------------------------------------------------------------------


# Opening to closing marker: DeepSeek R1, Qwen3, GLM-4.5 and most others; Magistral; Seed-OSS.
MARKERS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}
# Tokens in which an opening marker and the whitespace after it fit.
_OPENING = 16

Think = Literal["show", "hide"]
# Text, and whether it is thinking.
Span = tuple[str, bool]


class Thinking:
    """How one model marks its thinking.

    Args:
        tokenizer: the model's.

    Attributes:
        markers: opening to closing marker; empty if the model does not think.
        controls: markers that are control tokens, which are not part of a chunk's text, by id.

    Raises:
        TemplateError: the model's chat template does not parse.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        sources = [template.source for template in tokenizer.chat_templates.values()]

        def token(text: str) -> int | None:
            ids = tokenizer.encode(text, add_special=False, parse_special=True)
            return ids[0] if len(ids) == 1 else None

        self.markers = {
            opening: closing
            for opening, closing in MARKERS.items()
            if token(opening) is not None or any(closing in source for source in sources)
        }
        ids = {token(text): text for pair in self.markers.items() for text in pair}
        self.controls = {
            index: text
            for index, text in ids.items()
            if index is not None and tokenizer.is_control(index)
        }

    def text(self, chunk: Chunk) -> str:
        """A chunk's text, with markers that are control tokens."""
        if not self.controls:
            return chunk.text
        return "".join(self.controls.get(token, "") for token in chunk.tokens) + chunk.text

    def answer(self, completion: str) -> str:
        """A completion without its thinking."""
        opened = None
        for opening, end in self.markers.items():
            before, found, _ = completion.partition(end)
            if found and opening not in before:  # the prompt had opened it
                opened = end
        splitter = Splitter(self.markers, opened)
        spans = [*splitter.add(completion), *splitter.finish()]
        return "".join(text for text, thought in spans if not thought)

    def splitter(self, prompt: Sequence[int]) -> Splitter:
        """A splitter for the completion of a prompt."""
        end = self._tokenizer.decode(prompt[-_OPENING:]).rstrip() if self.markers else ""
        closing = (self.markers[opening] for opening in self.markers if end.endswith(opening))
        return Splitter(self.markers, next(closing, None))


class Splitter:
    """Splits streamed text into thinking and answer, without markers.

    An opening marker counts before the answer only: an answer may be about markers. Thinking that
    is never closed lasts to the end. Whitespace after a marker is dropped.

    Args:
        markers: opening to closing marker.
        closing: the marker that closes thinking opened by the prompt, if it does.

    Attributes:
        closing: the marker that would close the current thinking; None outside.
    """

    def __init__(self, markers: Mapping[str, str], closing: str | None = None) -> None:
        self._markers, self.closing = markers, closing
        self._pending = ""
        self._answered = False  # whether the answer has begun, whitespace apart
        self._trims = closing is not None

    def add(self, text: str) -> list[Span]:
        """The non-empty spans that this text completes."""
        self._pending += text
        spans: list[Span] = []
        while (found := self._next()) is not None:
            at, marker = found
            self._emit(spans, self._pending[:at])
            self._pending = self._pending[at + len(marker) :]
            self.closing = None if self.closing else self._markers[marker]
            self._trims = True
        keep = self._unsure()
        self._emit(spans, self._pending[: len(self._pending) - keep])
        self._pending = self._pending[len(self._pending) - keep :]
        return spans

    def finish(self) -> list[Span]:
        """The last spans."""
        spans: list[Span] = []
        self._emit(spans, self._pending)
        self._pending = ""
        return spans

    def _next(self) -> tuple[int, str] | None:
        """Position and text of the next marker."""
        if self.closing:
            at = self._pending.find(self.closing)
            return None if at < 0 else (at, self.closing)
        if self._answered:
            return None
        text = self._pending.lstrip()
        opening = next((marker for marker in self._markers if text.startswith(marker)), None)
        return None if opening is None else (len(self._pending) - len(text), opening)

    def _unsure(self) -> int:
        """Pending characters at the end that may begin a marker."""
        if self.closing is None:
            text = self._pending.lstrip()
            opens = any(marker.startswith(text) for marker in self._markers)
            return len(text) if opens and not self._answered else 0
        lengths = range(1, min(len(self.closing), len(self._pending) + 1))
        return max((n for n in lengths if self._pending.endswith(self.closing[:n])), default=0)

    def _emit(self, spans: list[Span], text: str) -> None:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        if not text:
            return
        self._answered |= self.closing is None and not text.isspace()
        spans.append((text, self.closing is not None))


# --- tokens of the session -----------------------------------------------------------------------


class TokenBytes(Protocol):
    """The part of a tokenizer that :func:`keep_tokens` needs."""

    def token_bytes(self, token_id: int) -> bytes: ...
    def is_control(self, token_id: int) -> bool: ...


def keep_tokens(cached: Sequence[int], prompt: Sequence[int], tokenizer: TokenBytes) -> list[int]:
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


# --- conversation --------------------------------------------------------------------------------


# Streamed text of a completion; closing it stops the model.
TextStream = Generator[str, None, None]

FORMAT = "mlxrun-chat"
# Larger files, such as models, are refused unread.
_LARGEST_FILE = 64 << 20
# Size and modification time of a file.
Stamp = tuple[int, int]
# The key of an answer that was stopped; templates never see it.
STOPPED = "stopped"
# The hint for a full context.
ROOM = "Say less, or start anew; chat --window N evicts old messages"


class ConversationError(MlxrunError):
    """A conversation cannot be saved, loaded, undone or continued."""


class _StoppedError(Exception):
    """The user stopped the model during prefill."""


class Conversation:
    """Messages, and the session with their KV cache.

    Args:
        llm: the model.
        session: empty.
        system: the system message.
        settings: the value of every setting.
        template: variables for the chat template.

    Attributes:
        messages: ``{"role": "user" | "assistant", "content": str}`` in turn.
        defaults: the settings at first.
        usage: of the latest completion; None if it was stopped.
        finish_reason: of the latest completion; ``"cancelled"`` if it was stopped.
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
        self._stale = False
        # The files of this conversation, as it last read or wrote them.
        self._files: dict[Path, Stamp] = {}
        self._splitter = Splitter({})

    @cached_property
    def thinking(self) -> Thinking:
        """The model's markers of thinking."""
        return Thinking(self.llm.tokenizer)

    def set(self, values: Values) -> None:
        """Change settings.

        Raises:
            ParameterError: a value that this model cannot have, such as a token outside its
                vocabulary; then nothing changes.
        """
        settings = self.settings | values
        asker = self.llm.inputs
        asker.sampler(asker.request([0], **settings))
        self.settings = settings

    def ask(
        self,
        text: str,
        *,
        stopped: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> TextStream:
        """Add a message and stream the answer to it.

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
            self._splitter = self.thinking.splitter(prompt)
            chunks = self.llm.stream(
                prompt, session=self.session, progress=prefilling, **self.settings | settings
            )
            yield from self._collect(chunks, answer, stopped)
        except _StoppedError:
            pass
        except ContextLengthError as error:
            raise ContextLengthError(error.message, hint=ROOM) from error
        except KeyboardInterrupt:
            # It may have struck between the caches of two layers.
            self.session.reset()
            raise
        finally:
            self._close(answer)

    def _collect(
        self, chunks: Iterator[Chunk], answer: list[str], stopped: Callable[[], bool]
    ) -> TextStream:
        # Closing truncates the session to the text that was yielded.
        with closing(cast("Generator[Chunk, None, None]", chunks)):
            for chunk in chunks:
                self._stale = False  # prefill has truncated the session
                text = self.thinking.text(chunk)
                answer.append(text)
                if chunk.finish_reason:
                    self.usage, self.finish_reason = chunk.usage, chunk.finish_reason
                yield text
                if stopped():
                    break

    def spans(self, stream: TextStream) -> Iterator[Span]:
        """The text of :meth:`ask` or :meth:`retry`, split into thinking and answer."""
        for text in stream:
            yield from self._splitter.add(text)
        yield from self._splitter.finish()

    def _close(self, answer: Sequence[str]) -> None:
        text = "".join(answer)
        if not text and self.finish_reason == "cancelled":
            self.messages.pop()
            return
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.finish_reason == "cancelled":
            message[STOPPED] = True
        self.messages.append(message)

    def retry(self, **options: Any) -> TextStream:
        """Stream another answer to the last message; takes the options of :meth:`ask`.

        Without a new answer the old exchange is restored.

        Raises:
            ConversationError: there is no message.
            MlxrunError: the model cannot answer.
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
        shown = [{"role": m["role"], "content": m["content"]} for m in self.messages]
        return [*system, *shown]

    def undo(self) -> str:
        """Remove the last exchange; returns the user's message.

        Raises:
            ConversationError: there is none.
        """
        if not self.messages:
            raise ConversationError("there is nothing to take back")
        self._stale = True
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        return str(self.messages.pop()["content"])

    def truncate_session(self) -> None:
        """Truncate the session to the messages, after :meth:`undo` or :meth:`load`."""
        if self._stale:
            from mlxrun.kv_cache.prefix_cache import common_prefix_len

            prompt = self.prompt() if self.messages else []
            self.session.rewind(common_prefix_len(tuple(self.session.tokens), tuple(prompt)))
            self._stale = False

    def clear(self) -> None:
        """Remove all messages; the system message and the settings stay."""
        self.messages.clear()
        self.session.reset()
        self._files.clear()

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write messages, and settings other than the defaults, as JSON, atomically.

        Args:
            force: replace another saved conversation, too.

        Raises:
            ConversationError: it cannot be written, or would replace another conversation or
                another kind of file.
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
            The source of the model that it was saved with.

        Raises:
            ConversationError: the file cannot be read or is damaged; then nothing changes.
            ParameterError: it has a setting outside its range; then nothing changes.
        """
        try:
            stamp, stored = _stamp(path), _read(path, str(path))
        except OSError as error:
            raise ConversationError(f"cannot read {path}: {error.strerror or error}") from error
        settings = parse_settings(stored["settings"], self.settings)
        self.system, self.messages = stored["system"], stored["messages"]
        self.settings |= settings
        self._files = {path.resolve(): stamp}
        self._stale = bool(self.session.tokens)  # of the previous conversation
        return cast("str | None", stored["model"])

    def use(self, session: Session) -> None:
        """Continue with another session, which has the cache of these messages."""
        self.session, self._stale = session, False


def check_replaceable(path: Path) -> None:
    """Raise ConversationError unless the file can be written and holds nothing else."""
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
        it: the subject of error messages.
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


# --- files ---------------------------------------------------------------------------------------


Print = Callable[[str], None]


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

    Raises:
        ConversationError, CacheError: it cannot be written, or would replace another file.
    """
    file = cache_path(path)
    storage.check_replaceable(file)
    conversation.save(path, force=force)
    say(f"saved {len(conversation.messages)} messages to {path}")
    conversation.truncate_session()
    session = conversation.session
    if not session.tokens:
        _remove(file, say)
        return
    try:
        session.save(file)
    except CacheError as error:
        say(f"their KV cache was not saved: {error}")
    else:
        size = file.stat().st_size / 1e6
        say(f"and the KV cache of {len(session.tokens)} tokens, {size:.1f} MB, to {file}")


def _remove(file: Path, say: Print) -> None:
    """Remove the session of an earlier version of the conversation."""
    try:
        remove(file)
    except OSError as error:
        say(f"{file} still holds what was said before: {error.strerror or error}")


def save_at_exit(conversation: Conversation, path: Path, say: Print) -> None:
    """As :func:`save_chat`; a conversation that cannot be written there is written elsewhere.

    Raises:
        ConversationError: it was written elsewhere; the message says where.
    """
    try:
        save_chat(conversation, path, say)
    except MlxrunError as error:
        if not conversation.messages:
            say(f"there is nothing to save; {error.message}")
            return
        spare = _written_elsewhere(conversation, path)
        where = f"It was written to {spare} instead" if spare else "Nor could it be anywhere else"
        raise ConversationError(f"the chat was not saved: {error.message}", hint=where) from error


def _written_elsewhere(conversation: Conversation, path: Path) -> Path | None:
    """A new file with the conversation, in the first folder that can be written."""
    # /dev/shm is memory: it works when all disks are full.
    folders = [str(path.parent), "~", os.environ.get("TMPDIR", "/tmp"), "/dev/shm"]
    for folder in folders:
        spare = Path(folder).expanduser() / f"{path.stem}-{secrets.token_hex(3)}.json"
        with suppress(ConversationError, OSError, RuntimeError):
            conversation.save(spare)
            return spare
    return None


def load_chat(conversation: Conversation, path: Path, say: Print) -> None:
    """Continue a saved conversation and its session, and print a line about it.

    Raises:
        ConversationError, ParameterError: as ``Conversation.load`` raises them.
    """
    load_messages(conversation, path, say)
    load_cache(conversation, path, say)


def load_messages(conversation: Conversation, path: Path, say: Print) -> None:
    """The first half of :func:`load_chat`."""
    model, ours = conversation.load(path), conversation.llm.source
    say(f"loaded {len(conversation.messages)} messages from {path}")
    if model and Path(model).name != Path(ours).name:
        say(f"they were saved with {model}; {Path(ours).name} goes on")


def load_cache(conversation: Conversation, path: Path, say: Print) -> None:
    """The second half of :func:`load_chat`; without a usable file the model prefills again."""
    file = cache_path(path)
    if not file.exists():
        return
    session = conversation.session
    loaded = conversation.llm.restore_session(file, say, session.config)
    if loaded.tokens:
        conversation.use(loaded)
