"""A chat on a terminal: read a message, stream the reply, obey commands, survive Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlxrun.cli import slash
from mlxrun.cli.console import Bar, complain, dim, visible
from mlxrun.cli.conversation import ROOM, Conversation, Pieces
from mlxrun.errors import MlxrunError

if TYPE_CHECKING:
    from mlxrun.generation.request import Usage


class TerminalChat:
    """A conversation in which someone types.

    Args:
        conversation: it may hold messages already.
        read: the next message; raises KeyboardInterrupt and EOFError as ``Editor.read`` does.
        stats: whether to show what each reply costs.

    Attributes:
        stats: the same, as it is now.
    """

    def __init__(
        self, conversation: Conversation, read: Callable[[], str], *, stats: bool = False
    ) -> None:
        self.conversation, self.stats = conversation, stats
        self._read = read
        self._retries = 0

    def run(self) -> None:
        """Go on until the user leaves."""
        interrupted = False
        while True:
            try:
                text = self._read()
                self._handle(text)
                interrupted = False
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self.say("(Ctrl-C once more, or Ctrl-D, leaves)")

    def _handle(self, text: str) -> None:
        try:
            if text.startswith("/"):
                slash.run(self, text)
            elif text.strip():
                self._show(self.conversation.ask, text)
        except (MlxrunError, OSError, RuntimeError, ValueError) as error:
            complain(str(error))  # of a path, say: no reason to lose what was said

    def say(self, text: str) -> None:
        """Print a line that is no part of the conversation."""
        print(dim(visible(text)), flush=True)

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

    def _show(self, reply: Callable[..., Pieces], *args: str, **options: Any) -> None:
        begun = False
        with Interrupt() as stopped, Bar("Reading the conversation", count="tokens") as bar:
            pieces = reply(*args, stopped=stopped, progress=bar, **options)
            with closing(pieces), suppress(KeyboardInterrupt):
                for text in pieces:
                    bar.stop()
                    begun = begun or bool(text)
                    sys.stdout.write(visible(text))
                    sys.stdout.flush()
        print(flush=True)
        self._explain(begun)

    def _explain(self, begun: bool) -> None:
        """Say why a reply ended early, and what it cost."""
        conversation = self.conversation
        if conversation.finish_reason == "cancelled":
            self.say("[stopped]" if begun else "[stopped before the reply: nothing was kept]")
        elif conversation.finish_reason == "length":
            self.say(f"[cut off: {self._limit()}]")
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
