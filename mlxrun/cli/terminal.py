"""A chat on a terminal: read a message, stream the reply, obey commands, survive Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlxrun.cli import slash
from mlxrun.cli.console import Bar, complain, dim, noticing_interrupts, visible
from mlxrun.cli.conversation import Conversation, Pieces
from mlxrun.cli.editor import unfold
from mlxrun.cli.screen import Writer, typing_waits, wrapped
from mlxrun.errors import ContextLengthError, MlxrunError

if TYPE_CHECKING:
    from mlxrun.cli.thinking import Think
    from mlxrun.outputs import Usage

# What to do about a full context.
ROOM = "/undo takes back the last exchange, /clear starts anew, chat --window N forgets as it goes"
# Exchanges of a loaded conversation that are shown.
RECALLED = 2


class TerminalChat:
    """A conversation in which someone types.

    Args:
        conversation: it may hold messages already.
        read: the next message as it was typed; raises KeyboardInterrupt and EOFError as
            ``Editor.read`` does.
        stats: whether to show what each reply costs.
        think: whether to show what the model thinks before it replies.

    Attributes:
        stats, think: the same, as they are now.
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
        """Go on until the user leaves."""
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
            if not slash.run(self, typed) and (text := unfold(typed)).strip():
                self._show(self.conversation.ask, text)
        except ContextLengthError as error:
            complain(f"{error.message}. {ROOM}")
        except (MlxrunError, OSError, RuntimeError, ValueError) as error:
            complain(str(error))  # of a path, say: no reason to lose what was said

    def say(self, text: str) -> None:
        """Print a line that is no part of the conversation."""
        print(dim(wrapped(visible(text))), flush=True)

    def retry(self) -> None:
        """Show another reply to the last message."""
        settings = self.conversation.settings
        seed = settings["seed"]
        if settings["temperature"] == 0 and self.conversation.messages:
            self.say("temperature is 0: the reply stays the same")
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

    def _show(self, reply: Callable[..., Pieces], *args: str, **options: Any) -> None:
        writer = Writer(self.think)
        bar = Bar("Reading the conversation", count="tokens")

        def stopping() -> None:
            writer.end_line()
            self.say("stopping ...")

        with Interrupt() as stopped, noticing_interrupts(stopping), bar:
            pieces = reply(*args, stopped=stopped, progress=bar, **options)
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
        """Say why a reply ended early, and what it cost."""
        conversation = self.conversation
        if conversation.finish_reason == "cancelled":
            kept = "" if writer.begun else " before the reply: nothing was kept"
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
    """While it is entered, the first Ctrl-C is only noted; a second one interrupts.

    Call it to ask whether there was one. Not interrupting lets the model finish its step, so that
    its memory of the conversation stays whole.
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
