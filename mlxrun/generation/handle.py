"""A caller's side of a request that is served in another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from mlxrun.computing import check_process
from mlxrun.outputs import Chunk, Completion, completed


class Handle:
    """A request on its way: iterate over its chunks, or wait for the whole reply.

    Any number of threads and tasks may read it, each from its first chunk, with ``for``, with
    ``async for`` or through :meth:`result`.

    A request that has no reader left is cancelled, so that a client who goes away costs nothing:
    when an ``async for`` ends early (its task is cancelled, an exception, ``break``) and no other
    reader is at work, when a ``with`` or ``async with`` block over the handle ends, and when the
    handle itself is garbage. Keep the handle as long as the reply is of use.
    """

    def __init__(self, cancel: Callable[[Handle], None]) -> None:
        # Until the end: whoever serves the request must live as long as somebody waits for it.
        self._cancel: Callable[[Handle], None] | None = cancel
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._ended = False
        self._readers = 0
        self._changed = threading.Condition()
        self._tasks: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        """Whether the reply is complete, or has failed."""
        return self._ended

    def cancel(self) -> None:
        """End the reply soon, with what there is by then."""
        if (cancel := self._cancel) is not None:
            cancel(self)

    def result(self, timeout: float | None = None) -> Completion:
        """The whole reply.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is not complete by then.
            MlxrunError: what the request failed with.
        """
        with self._reading(), self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the reply is not complete after {timeout:g} s")
        return completed(list(self))

    def __iter__(self) -> Iterator[Chunk]:
        seen = 0
        with self._reading():
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
        try:
            with self._reading():
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
        finally:  # a task that was cancelled keeps its frames, and so the handle, alive
            if not self._readers:
                self.cancel()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __repr__(self) -> str:
        count = sum(len(chunk.tokens) for chunk in list(self._chunks))
        tokens = f"{count} token{'s' * (count != 1)}"
        if not self._ended:
            return f"Handle({tokens} so far)"
        if self._error is not None:
            return f"Handle({tokens}, failed: {self._error})"
        return f"Handle({tokens}, {self._chunks[-1].finish_reason})"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Count a reader."""
        check_process()  # nobody serves it in a forked process
        with self._changed:
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1

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
            if self._ended:
                self._cancel = None
            self._changed.notify_all()
            tasks, self._tasks = self._tasks, []
        for loop, future in tasks:
            with suppress(RuntimeError):  # a loop that has been closed: nobody waits there
                loop.call_soon_threadsafe(_wake, future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
