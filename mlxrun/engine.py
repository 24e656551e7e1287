"""Engine: a model that serves many callers at once, from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from mlxrun.admission import Accepted, Front, Options
from mlxrun.cache import prefix
from mlxrun.computing import COMPUTING
from mlxrun.errors import EngineClosedError, ParameterError, QueueFullError
from mlxrun.generation.handle import Handle
from mlxrun.generation.parameters import Range
from mlxrun.generation.request import Request

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
    prefixes: prefix.Figures


class Engine:
    """Serves requests from any thread or task, many in one forward pass.

    Requests join at any step and leave as soon as they end; none gets other tokens because of who
    sits beside it. Close the engine, or use it in a ``with`` statement.

    Args:
        llm: the model and its tokenizer.
        parallel: the most sequences that are live at once; by default as many as there is room for
            with that ``context``, up to 16.
        context: tokens of each, prompt and reply; by default whatever there is room for, up to the
            model's context. :attr:`figures` says what was chosen.
        queue: the most requests that wait beside them.
        options: those of :class:`mlxrun.admission.Options`.

    Raises:
        ParameterError, CacheError: no option of that name, a value outside its range, or a cache
            that the model cannot have.
        MemoryLimitError: there is no room for what is asked for, or for a single token.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        parallel: int | None = None,
        context: int | None = None,
        queue: int = 1024,
        **options: Any,
    ) -> None:
        self._llm, self._queue = llm, int(Range(1, whole=True).check("queue", queue))
        shared = Options.of(options, "parallel", "context", "queue")
        with COMPUTING:
            # What waits for the thread counts as waiting, too: the service's own bound is not met.
            self._front = Front(
                llm, shared, parallel=parallel, context=context, most=PARALLEL, queue=2 * queue
            )
        self._service = self._front.service
        self._inbox: deque[tuple[Handle, Accepted, float] | Handle] = deque()
        self._keys: dict[Handle, int] = {}
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="mlxrun-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request | Prompt, **options: Any) -> Handle:
        """Queue a request.

        Args:
            request: a :class:`Request`, taken as it is, or a prompt with the options of
                :meth:`LLM.stream`, a ``priority`` and a ``deadline``. Types of cache and a pattern
                of attention that it does not name are the engine's.

        Raises:
            QueueFullError: as many wait already as may.
            EngineClosedError: the engine has been closed.
            MemoryLimitError: there is never room for it.
            ParameterError, ContextLengthError, CacheError: as :meth:`LLM.stream` raises them.
        """
        started = time.perf_counter()
        asker = self._llm.asker
        if not isinstance(request, Request):
            request = asker.request(request, **options)
        elif options:
            raise ParameterError("options", options, "left out where a Request is given")
        asker.checked(request.prompt)
        accepted = self._front.accept(request)
        handle = Handle(self.cancel)
        with self._news:
            if self._closed:
                raise EngineClosedError("the engine has been closed")
            if self.waiting >= self._queue:
                raise QueueFullError(self._queue)
            self._inbox.append((handle, accepted, started))
            self._news.notify()
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request with what there is; one that has ended stays as it is."""
        with self._news:
            self._inbox.append(handle)
            self._news.notify()

    @property
    def waiting(self) -> int:
        """Requests that wait to begin."""
        arriving = sum(not isinstance(item, Handle) for item in list(self._inbox))
        return arriving + self._service.scheduler.waiting

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
        with self._news:
            self._closed = True
            self._news.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._inbox or self._closed or self._service.busy)
                if self._closed:
                    break
            try:
                with COMPUTING:
                    self._take_in()
                    if self._service.busy:
                        self._service.step()
            except Exception as error:  # all are told, and the thread ends
                self._end(error)
                return
        self._end(EngineClosedError("the engine was closed before the reply had begun"))

    def _take_in(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Handle):
                self._service.cancel(self._keys.get(item, -1))
                continue
            handle, accepted, started = item
            try:
                self._keys[handle] = self._front.submit(accepted, started, handle.put)
            except Exception as error:
                handle.put(error)
        for handle in [handle for handle in self._keys if handle.done]:
            del self._keys[handle]

    def _end(self, error: Exception) -> None:
        with self._news:
            self._closed = True
            arriving = [item[0] for item in self._inbox if not isinstance(item, Handle)]
            self._inbox.clear()
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
            for handle in (*arriving, *self._keys):
                handle.put(error)
