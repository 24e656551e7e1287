"""What a caller holds of a request that is served in another thread. Standard library only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from mlxrun.generation.request import Chunk, Completion, completed


class Handle:
    """A reply that is on its way: iterate over its chunks, or wait for the whole.

    Any number of threads and tasks may read it, each from its beginning, with ``for``, with
    ``async for`` or through :meth:`result`.
    """

    def __init__(self, cancel: Callable[[Handle], None]) -> None:
        self._cancel = cancel
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._tasks: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        """Whether the reply is complete, or has failed."""
        return self._ended

    def cancel(self) -> None:
        """End the reply soon, with what there is by then."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Completion:
        """The whole reply.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is not complete by then.
            MlxrunError: what the request failed with.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the reply is not complete after {timeout:g} s")
        return completed(list(self))

    def __iter__(self) -> Iterator[Chunk]:
        seen = 0
        while True:
            with self._changed:
                while len(self._chunks) == seen and not self._ended:
                    self._changed.wait()
            if seen == len(self._chunks):
                break
            yield self._chunks[seen]
            seen += 1
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        seen = 0
        while True:
            news = self._news(seen)
            if news is not None:
                await news
            if seen == len(self._chunks):
                if self._ended:
                    break
                continue
            yield self._chunks[seen]
            seen += 1
        if self._error is not None:
            raise self._error

    def _news(self, seen: int) -> asyncio.Future[None] | None:
        """What to await for more than ``seen`` chunks; None if there are more already."""
        loop = asyncio.get_running_loop()
        with self._changed:
            if len(self._chunks) > seen or self._ended:
                return None
            future = loop.create_future()
            self._tasks.append((loop, future))
            return future

    def put(self, item: Chunk | BaseException) -> None:
        """Add a chunk, or what the request failed with; the server's side."""
        with self._changed:
            if self._ended:
                return
            if isinstance(item, Chunk):
                self._chunks.append(item)
                self._ended = item.finish_reason is not None
            else:
                self._error, self._ended = item, True
            self._changed.notify_all()
            tasks, self._tasks = self._tasks, []
        for loop, future in tasks:
            with suppress(RuntimeError):  # a loop that has been closed: nobody waits there
                loop.call_soon_threadsafe(_wake, future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
