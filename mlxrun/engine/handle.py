"""A caller's side of a request that an engine serves in its own thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlxrun.lock import check_process
from mlxrun.outputs import Chunk, Completion, completed

if TYPE_CHECKING:
    import asyncio

    from mlxrun.engine.sequence import Sequence


class Handle:
    """A request in flight: iterate over its chunks, or wait for its completion.

    Any number of threads and tasks may read it, each from its first chunk, with ``for``, with
    ``async for`` or through :meth:`result`.

    A request that has no reader left is cancelled, so that a client who goes away costs nothing:
    when an ``async for`` ends early (its task is cancelled, an exception, ``break``) and no other
    reader is at work, when a ``with`` or ``async with`` block over the handle ends, and when the
    handle itself is garbage. Keep the handle as long as the completion is of use.
    """

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._readers = 0

    @property
    def done(self) -> bool:
        """Whether the request has ended, or has failed."""
        return self._sequence.finished

    def cancel(self) -> None:
        """End the request soon, with the output it has by then."""
        if (engine := self._sequence.engine) is not None:
            engine.abort(self._sequence)

    def result(self, timeout: float | None = None) -> Completion:
        """The completion.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: the request has not ended by then.
            MlxrunError: the request failed.
        """
        sequence = self._sequence
        with self._reading(), sequence.changed:
            if not sequence.changed.wait_for(lambda: sequence.finished, timeout):
                raise TimeoutError(f"the completion is not there after {timeout:g} s")
        return completed(list(self))

    def __iter__(self) -> Iterator[Chunk]:
        sequence, seen = self._sequence, 0
        with self._reading():
            while True:
                with sequence.changed:
                    while len(sequence.chunks) == seen and not sequence.finished:
                        sequence.changed.wait()
                if seen == len(sequence.chunks):
                    break
                yield sequence.chunks[seen]
                seen += 1
        if sequence.error is not None:
            raise sequence.error

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        sequence, seen = self._sequence, 0
        try:
            with self._reading():
                while True:
                    news = self._news(seen)
                    if news is not None:
                        await news
                    if seen == len(sequence.chunks):
                        if sequence.finished:
                            break
                        continue
                    yield sequence.chunks[seen]
                    seen += 1
        finally:  # a task that was cancelled keeps its frames, and so the handle, alive
            if not self._readers:
                self.cancel()
        if sequence.error is not None:
            raise sequence.error

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
        sequence = self._sequence
        count = sum(len(chunk.tokens) for chunk in list(sequence.chunks))
        tokens = f"{count} token{'s' * (count != 1)}"
        if not sequence.finished:
            return f"Handle({tokens} so far)"
        if sequence.error is not None:
            return f"Handle({tokens}, failed: {sequence.error})"
        return f"Handle({tokens}, {sequence.chunks[-1].finish_reason})"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        check_process()  # no thread serves it in a forked process
        with self._sequence.changed:
            self._readers += 1
        try:
            yield
        finally:
            with self._sequence.changed:
                self._readers -= 1

    def _news(self, seen: int) -> asyncio.Future[None] | None:
        """Set once there are more than ``seen`` chunks; None if there are already."""
        import asyncio

        loop, sequence = asyncio.get_running_loop(), self._sequence
        with sequence.changed:
            if len(sequence.chunks) > seen or sequence.finished:
                return None
            future = loop.create_future()

            def wake() -> None:
                with suppress(RuntimeError):  # a loop that has been closed
                    loop.call_soon_threadsafe(_set, future)

            sequence.listeners.append(wake)
            return future


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
