"""Engine: a model that serves many callers at once, from a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, Unpack

from mlxrun.admission import Accepted, Front
from mlxrun.computing import COMPUTING, check_process
from mlxrun.config import EngineConfig, EngineOptions
from mlxrun.display import table
from mlxrun.errors import EngineClosedError, ParameterError, QueueFullError
from mlxrun.generation.handle import Handle
from mlxrun.kv_cache import prefix_cache
from mlxrun.outputs import Chunk, Request, RequestOptions

if TYPE_CHECKING:
    from mlxrun.asking import Prompt
    from mlxrun.llm import LLM


# Sequences at once where nobody says.
PARALLEL = 16


class Figures(NamedTuple):
    """An engine in numbers.

    Attributes:
        parallel: sequences that it was sized for.
        context: tokens that there is room for in each of so many, prompt and reply.
        live: sequences that read their prompts or decode now.
        waiting: requests that have not begun.
        computed: token slots that went through the model.
        wasted: idle ones among them.
        prefixes: what beginnings that requests share are worth.
    """

    parallel: int
    context: int
    live: int
    waiting: int
    computed: int
    wasted: int
    prefixes: prefix_cache.PrefixCacheStats


class Engine:
    """Serves requests from any thread or task, many in one forward pass.

    Requests join at any step and leave as soon as they end; none gets other tokens because of its
    neighbors in the batch. Close the engine, or use it in a ``with`` or ``async with`` statement;
    one that is dropped ends with its last request.

    Args:
        llm: the model and its tokenizer.
        options: see :class:`mlxrun.config.EngineConfig`; :attr:`figures` has the sizes chosen.

    Raises:
        ParameterError, CacheError: no option of that name, a value outside its range, or a cache
            that the model cannot have.
        MemoryLimitError: there is no room for what is asked for, or for a single token.
    """

    def __init__(self, llm: LLM, **options: Unpack[EngineOptions]) -> None:
        config = EngineConfig.of(options)
        self._llm, self._queue = llm, config.queue
        with COMPUTING:
            # What waits for the thread counts as waiting, too: the service's own bound is not met.
            self._front = Front(llm, config, most=PARALLEL, queue=2 * config.queue)
        self._service = self._front.service
        self._keys: dict[weakref.ref[Handle], int] = {}
        self._outbox: _Outbox = deque()
        self._inbox = _Inbox()
        weakref.finalize(self, self._inbox.close).atexit = False
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self), self._inbox), name="mlxrun-engine", daemon=True
        )
        self._thread.start()

    def submit(self, request: Request | Prompt, **options: Unpack[RequestOptions]) -> Handle:
        """Queue a request, to be served as long as its handle is there or read from.

        Args:
            request: a :class:`Request`, taken as it is, or a prompt with the options of
                :meth:`LLM.stream`, a ``priority`` and a ``deadline``. Types of cache and a pattern
                of attention that it does not name are the engine's.

        Raises:
            QueueFullError: as many wait already as may.
            EngineClosedError: the engine has been closed.
            MemoryLimitError: there is never room for it.
            ProcessError: this process was forked from the engine's.
            ParameterError, ContextLengthError, CacheError: as :meth:`LLM.stream` raises them.
        """
        check_process()
        started = time.perf_counter()
        asker = self._llm.asker
        if not isinstance(request, Request):
            request = asker.request(request, **options)
        elif options:
            raise ParameterError("options", options, "left out where a Request is given")
        asker.checked(request.prompt)
        asker.check_bias(request.params)
        accepted = self._front.accept(request)
        handle = Handle(self.cancel)
        with self._inbox.changed:
            if self._inbox.closed:
                raise EngineClosedError("the engine has been closed")
            if self.waiting >= self._queue:
                raise QueueFullError(self._queue)
            self._inbox.put(_Arrival(weakref.ref(handle), accepted, started))
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request with what there is; one that has ended stays as it is."""
        self._inbox.put(handle)

    @property
    def waiting(self) -> int:
        """Requests that wait to begin."""
        return len(self._inbox.arrivals) + self._service.scheduler.waiting

    @property
    def figures(self) -> Figures:
        """What it was sized for, and what it has done so far."""
        done, room = self._service.figures, self._front.room
        return Figures(
            room.parallel,
            room.context,
            self._service.scheduler.live,
            self.waiting,
            done.slots,
            done.wasted,
            self._front.prefixes.figures,
        )

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        self._inbox.close()
        # At the end of the process the thread waits for ever.
        if threading.current_thread() is not self._thread and not COMPUTING.kept:
            self._thread.join()

    def __repr__(self) -> str:
        if self._inbox.closed:
            return f"Engine({self._llm.source!r}, closed)"
        figures = self.figures
        return (
            f"Engine({self._llm.source!r}, {figures.live} of {figures.parallel} sequences live, "
            f"{figures.waiting} waiting, context {figures.context})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        figures = self.figures._asdict()
        prefixes = figures.pop("prefixes")._asdict()
        return table({"model": self._llm.source, **figures, "prefix cache": prefixes})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    def _work(self) -> bool:
        """Serve until there is nothing left to do; whether to wait for more."""
        while not self._inbox.closed:
            if not (self._inbox.items or self._service.busy):
                return True
            try:
                with COMPUTING:
                    self._take_in()
                    if self._service.busy:
                        self._service.step()
                self._deliver()
            except Exception as error:  # all callers get it, and the thread ends
                self._end(error)
                return False
        self._end(EngineClosedError("the engine was closed before the reply had begun"))
        return False

    def _take_in(self) -> None:
        while self._inbox.items:
            item = self._inbox.items.popleft()
            if isinstance(item, Handle):
                self._service.cancel(self._keys.get(weakref.ref(item), -1))
            elif (handle := item.handle()) is not None:  # alive until it has a key: only then is
                # a request that is dropped found, and the hash of a dead reference is an error.
                listener = partial(_collect, self._outbox, item.handle)
                try:
                    self._keys[item.handle] = self._front.submit(
                        item.accepted, item.started, listener
                    )
                except Exception as error:
                    listener(error)
                del handle
        for ref, key in list(self._keys.items()):
            handle = ref()
            if handle is None:  # dropped by its caller
                self._service.cancel(key)
            if handle is None or handle.done:
                del self._keys[ref]

    def _deliver(self) -> None:
        """Pass chunks and errors on to their handles; not while computing.

        The garbage collector may have a thread that holds a handle's lock wait for COMPUTING.
        """
        while self._outbox:
            ref, item = self._outbox.popleft()
            if (handle := ref()) is not None:  # not dropped by its caller
                handle.put(item)

    def _end(self, error: Exception) -> None:
        with self._inbox.changed:
            self._inbox.closed = True
            arrived = self._inbox.arrivals
            self._inbox.items.clear()
        try:
            with COMPUTING:
                try:
                    if isinstance(error, EngineClosedError):
                        self._service.close()  # replies that have begun end with what there is
                finally:
                    self._service.abandon()
        except Exception as failure:  # nor does that keep anybody waiting
            error = failure
        finally:
            for handle in arrived:
                handle.put(error)
            for ref in self._keys:
                _collect(self._outbox, ref, error)
            self._deliver()


# Chunks and errors that no handle has yet, in the order of their making.
_Outbox = deque[tuple[weakref.ref[Handle], Chunk | Exception]]


def _collect(outbox: _Outbox, ref: weakref.ref[Handle], item: Chunk | Exception) -> None:
    """The listener of a request."""
    outbox.append((ref, item))


class _Arrival(NamedTuple):
    """A request, its handle, which the caller may have dropped, and when it came."""

    handle: weakref.ref[Handle]
    accepted: Accepted
    started: float


class _Inbox:
    """What callers ask of an engine's thread, which holds nothing else of the engine while idle.

    Attributes:
        changed: to be held to change it, and notified then.
        items: requests that have arrived, and handles of those to cancel.
        closed: whether the thread is to end.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.items: deque[_Arrival | Handle] = deque()
        self.closed = False

    def put(self, item: _Arrival | Handle) -> None:
        """Add something to do."""
        with self.changed:
            self.items.append(item)
            self.changed.notify()

    def close(self) -> None:
        """Have the thread end."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    @property
    def arrivals(self) -> list[Handle]:
        """Handles of requests that have arrived and that somebody still has."""
        arrived = [item.handle() for item in list(self.items) if isinstance(item, _Arrival)]
        return [handle for handle in arrived if handle is not None]


def _serve(engine: weakref.ref[Engine], inbox: _Inbox) -> None:
    """Run an engine's thread, which keeps the engine alive only while it works."""
    more = True
    while more:
        with inbox.changed:
            inbox.changed.wait_for(lambda: inbox.items or inbox.closed)
        serving = engine()
        more = serving is not None and serving._work()
        del serving
