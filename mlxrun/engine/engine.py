"""The engine: one loop that turns requests into tokens.

A thread that waits for a sequence steps the engine; threads that wait at the same time share its
steps. An engine may have a thread of its own instead (:meth:`Engine.start`).
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, Unpack

import mlx.core as mx

from mlxrun.config import CacheConfig, EngineConfig
from mlxrun.display import table
from mlxrun.engine.detokenize import OutputProcessor
from mlxrun.engine.input import InputProcessor
from mlxrun.engine.model_runner import InFlight, ModelRunner, not_finite
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK, PrefixReuse
from mlxrun.engine.scheduler import Batch, PrefillBudget, PrefillChunk, Scheduler
from mlxrun.engine.sequence import Sequence, SequenceOwner, Session
from mlxrun.errors import (
    EngineClosedError,
    MemoryLimitError,
    ParameterError,
    QueueFullError,
)
from mlxrun.kernels.device import device
from mlxrun.kv_cache import prefix_cache
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.lock import check_process, device_lock
from mlxrun.outputs import Chunk, FinishReason, Request, RequestOptions

if TYPE_CHECKING:
    from mlxrun.engine.handle import Handle
    from mlxrun.engine.input import Prompt
    from mlxrun.engine.kv_budget import KVBudget

# Sequences at once unless asked otherwise, and in a batch.
PARALLEL, BATCH_PARALLEL = 16, 32
# Seconds by which prefill may delay the next token of decoding sequences.
STALL = 0.1
# Times the device's prefill budget where only throughput counts: a step's own cost is spread.
BATCH_PREFILL_FACTOR = 4

# ``direct``: requests of ``generate`` and the like, each caller waiting for its own. ``online``:
# requests that arrive at any time; a first token is read before the next step is queued. ``batch``:
# only the time of the whole counts.
Mode = Literal["direct", "online", "batch"]
Progress = Callable[[int, int], None]


class EngineStats(NamedTuple):
    """An engine in numbers.

    Attributes:
        parallel: sequences that it was sized for.
        context: tokens that there is room for in each of so many, prompt and completion.
        live: sequences that prefill or decode now.
        waiting: requests that have not begun.
        computed: token slots that went through the model.
        wasted: idle ones among them.
        prefixes: statistics of the prefix cache.
        preempted: how often a running sequence had to wait again, for lack of memory.
    """

    parallel: int
    context: int
    live: int
    waiting: int
    computed: int
    wasted: int
    prefixes: prefix_cache.PrefixCacheStats
    preempted: int = 0


@dataclass(frozen=True, eq=False)
class Abort:
    """A request to end a sequence; ``output``: how many output tokens its session keeps."""

    sequence: Sequence
    output: int | None = None


class Inbox:
    """Arrivals and aborts from other threads; an idle engine's thread refers to nothing else."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.items: deque[Sequence | Abort] = deque()
        self.closed = False

    def put(self, item: Sequence | Abort) -> None:
        with self.changed:
            self.items.append(item)
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    @property
    def arrivals(self) -> list[Sequence]:
        return [item for item in list(self.items) if isinstance(item, Sequence)]


class Engine:
    """Runs requests of one model, many in one forward pass.

    Requests join at any step and leave as soon as they end; none gets other tokens because of its
    neighbors in the batch. ``llm.engine()`` makes one with a thread of its own, to be closed or
    used in a ``with`` or ``async with`` statement; one that is dropped ends with its last request.

    Args:
        inputs: the model, its tokenizer and its defaults.
        prefix_cache: prefixes that sequences share.
        config: its options.
        mode: what counts.
        plan_memory: makes the plan of memory for KV caches; called at once, or in direct mode when
            before a second sequence starts.
        prefill: prompt tokens of a step; None for the device's.
        source: the model's, to be shown.
    """

    def __init__(
        self,
        inputs: InputProcessor,
        prefix_cache: PrefixCache,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - immutable
        *,
        mode: Mode = "online",
        plan_memory: Callable[[], KVBudget] | None = None,
        prefill: int | None = None,
        source: str = "",
    ) -> None:
        self.inputs, self.model, self.source = inputs, inputs.model, source
        self.config, self._plan_memory = config, plan_memory
        self._kv_budget: KVBudget | None = None
        self.prefix_cache = prefix_cache
        stall = config.stall
        if stall is None:
            stall = math.inf if mode == "batch" else STALL
        self._mode = mode
        self._reads_first_tokens = mode == "online" and math.isfinite(stall)
        self.prefix_reuse = PrefixReuse(prefix_cache)
        self.runner = ModelRunner(self.model, batched=not config.deterministic)
        self._reuse_step = PREFILL_CHUNK if config.deterministic else 1
        self.scheduler: Scheduler[Sequence] = Scheduler(
            PrefillBudget(stall, prefill or prefill_budget(mode)),
            rows=config.parallel or PARALLEL,
            chunk=None if self.runner.batched else PREFILL_CHUNK,
            alone_chunk=PREFILL_CHUNK if mode == "direct" else None,
            always_fill=math.isinf(stall),
            prefixes=self.prefix_reuse,
        )
        if plan_memory is not None and mode != "direct":
            self._set_budget(plan_memory())
        self._inbox = Inbox()
        self._in_flight: InFlight | None = None
        self._completed = 0.0  # when the last step was, seconds of ``time.monotonic``
        self._news: deque[Sequence] = deque()  # with output that their readers wait for
        self._handles: dict[Sequence, weakref.ref[Handle]] = {}
        # Engines whose sequences ended because a session of theirs is used here.
        self._interrupted: list[SequenceOwner] = []
        self._stepping = False
        # Threads that wait for sequences: one of them steps.
        self._changed = threading.Condition()
        self._driven = False
        self._thread: threading.Thread | None = None
        self.num_steps = self.num_preempted = 0

    # Requests.

    def prepare(
        self,
        request: Request,
        *,
        session: Session | None = None,
        streams: bool = True,
        awaits_progress: bool = False,
        reuse_step: int | None = None,
        score_from: int | None = None,
        cache_config: CacheConfig | None = None,
        started: float | None = None,
    ) -> Sequence:
        """A sequence of this engine, not yet queued.

        Args:
            session: to continue; a request that runs on it ends.
            streams, awaits_progress, score_from: see :class:`Sequence`.
            reuse_step: prefixes are taken over at multiples of so many tokens.
            cache_config: of its KV cache, if it is not that of its request.
            started: arrival, seconds of ``time.perf_counter``.

        Raises:
            ContextLengthError: the prompt leaves no room in the context.
            MemoryLimitError: it could not run alone.
            ParameterError, CacheError: the model cannot have such caches.
        """
        started = time.perf_counter() if started is None else started
        if session is not None:
            cache_config = session.config
        elif cache_config is None:
            cache_config = self.config.cache.overridden(request)
        limit, output = 0, None
        if score_from is None:
            windowed = cache_config.window is not None
            limit = self.inputs.limit(request, windowed=windowed, context=self.config.context)
            output = OutputProcessor(request, self.inputs.tokenizer, limit, started)
        sequence = Sequence(
            request,
            limit,
            cache_config,
            output,
            session=session,
            streams=streams,
            awaits_progress=awaits_progress,
            score_from=score_from,
            reuse_step=self._reuse_step if reuse_step is None else reuse_step,
        )
        sequence.kv_cost = partial(self._cost, cache_config)
        if self._kv_budget is not None and self._mode != "direct":
            self._kv_budget.check(sequence.longest, cache_config)
        if request.deadline is not None:
            waited = time.perf_counter() - started
            sequence.deadline = time.monotonic() + request.deadline - waited
        if self._thread is None:
            sequence.changed = self._changed
        return sequence

    def submit(
        self,
        request: Request | Prompt,
        *,
        session: Session | None = None,
        **options: Unpack[RequestOptions],
    ) -> Handle:
        """Queue a request of an engine with a thread, to run as long as its handle is there.

        Args:
            request: a :class:`Request`, taken as it is, or a prompt with the options of
                :meth:`LLM.stream`, a ``priority`` and a ``deadline``. Types of cache and a pattern
                of attention that it does not name are the engine's.
            session: to continue, as :meth:`LLM.stream` does.

        Raises:
            QueueFullError: as many wait already as may.
            EngineClosedError: the engine has been closed.
            MemoryLimitError: there is never room for it.
            ProcessError: this process was forked from the engine's.
            ParameterError, ContextLengthError, CacheError: as :meth:`LLM.stream` raises them.
        """
        from mlxrun.engine.handle import Handle

        check_process()
        started = time.perf_counter()
        if not isinstance(request, Request):
            request = self.inputs.request(request, **options)
        elif options:
            raise ParameterError("options", options, "left out where a Request is given")
        else:
            self.inputs.check(request)
        self.inputs.check_session(request, session)
        sequence = self.prepare(request, session=session, started=started)
        sequence.engine = self
        handle = Handle(sequence)
        with self._inbox.changed:
            if self._inbox.closed:
                raise EngineClosedError("the engine has been closed")
            if self.waiting >= self.config.queue:
                raise QueueFullError(self.config.queue)
            self._handles[sequence] = weakref.ref(handle)
            self._inbox.put(sequence)
        return handle

    def abort(self, sequence: Sequence, output: int | None = None) -> None:
        """End a sequence with the output there is; one that has ended stays as it is.

        Args:
            output: how many output tokens its session keeps; None for all.
        """
        if sequence.finished:
            return
        self._inbox.put(Abort(sequence, output))
        if self._thread is None:
            with device_lock:
                if not self._stepping:  # the garbage collector may call this within a step
                    self._stepping = True
                    try:
                        self._take_in()
                    finally:
                        self._stepping = False
            self.notify()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox.arrivals) + self.scheduler.num_waiting

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._inbox.items or self.scheduler.num_running or self.scheduler.num_waiting)

    # The loop.

    def step(self) -> None:
        """Compute one step of all sequences, and read the tokens of the step before."""
        self._take_in()
        batch = self._schedule()
        in_flight = self.runner.run(batch.decode, batch.prefill)
        previous, self._in_flight = self._in_flight, in_flight
        self._process(previous)  # one step late: the device computes meanwhile
        if in_flight.sampled is None or (in_flight.sampled.firsts and self._reads_first_tokens):
            self._drain()  # complete; or a first token does not wait for the next step
        self._prefilled(batch.prefill)

    def _take_in(self) -> None:
        """Arrivals, aborts, dropped handles and deadlines."""
        inbox = self._inbox
        while inbox.items:
            item = inbox.items[0]  # taken out once that is done: an interrupt loses none
            if isinstance(item, Abort):
                self._abort(item)
            elif not item.finished and item not in self.scheduler:
                try:
                    self._limit_memory()
                    if item.session is not None:
                        self._interrupted += item.session.attach(self, item)
                    self.scheduler.add(item)
                except Exception as error:
                    self.fail(item, error)
            inbox.items.popleft()
        for sequence, handle in list(self._handles.items()):
            if handle() is None:
                self._finish(sequence, "cancelled")
        for sequence in self.scheduler.expired(time.monotonic()):
            self._finish(sequence, "deadline")

    def _limit_memory(self) -> None:
        """Plan memory before a second sequence runs: one alone always does."""
        if self._kv_budget is None and self._plan_memory is not None and self.scheduler.sequences:
            try:
                self._set_budget(self._plan_memory())
            except MemoryLimitError:
                self.scheduler.rows = 1  # as long as there is so little

    def _set_budget(self, budget: KVBudget) -> None:
        self._kv_budget = budget
        self.scheduler.rows = self.config.parallel or budget.room.parallel
        self.scheduler.limit_memory(budget.memory)

    def _cost(self, cache_config: CacheConfig, slots: int) -> int:
        return 0 if self._kv_budget is None else self._kv_budget.cost(slots, cache_config)

    def _abort(self, abort: Abort) -> None:
        sequence, output = abort.sequence, abort.output
        if output is not None and not sequence.finished:
            del sequence.ids[len(sequence.request.prompt) + output :]
        self._finish(sequence, "cancelled")

    def _begin(self, sequence: Sequence) -> None:
        """Give an admitted sequence its sampler and its caches."""
        try:
            if sequence.sampler is None and sequence.limit:
                sequence.sampler = self.inputs.sampler(sequence.request)
            if (session := sequence.session) is not None:
                length = session.common_len(sequence.ids[:-1])
                session.set_caches(session.cache, session.tokens[:length])
                sequence.caches, sequence.num_computed = session.cache, len(session.tokens)
            else:
                config = sequence.cache_config
                sequence.caches = list(self.model.make_cache(config))
            for cache in sequence.caches:
                cache.prompt = len(sequence.request.prompt)
        except Exception as error:  # only this request fails
            self.fail(sequence, error)
        else:
            if sequence.score_from is None:
                self.prefix_reuse.add(sequence)

    def _schedule(self) -> Batch[Sequence]:
        """The sequences of the next step; those that are preempted leave before."""
        while (batch := self.scheduler.schedule(self._begin)).preempted:
            self._drain()
            for sequence in batch.preempted:
                if not sequence.finished:
                    self._preempt(sequence)
        self._news += [
            sequence for sequence in self.scheduler.prefilling if sequence.awaits_progress
        ]
        return batch

    def _preempt(self, sequence: Sequence) -> None:
        """Free the caches of a sequence; their content goes to the prefix cache."""
        self.num_preempted += 1
        if not self.config.deterministic:
            sequence.reuse_step, sequence.num_stored = 1, 0  # all of it, at any length
            self.prefix_reuse.store_ended(sequence, self.runner.caches_of(sequence))
        if sequence.session is not None:
            sequence.session.reset_caches()
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """Free a sequence's caches: it prefills its prompt and output again.

        With ``deterministic`` the output is sampled again, too: its prefill would round otherwise.
        """
        self.runner.free(sequence)
        self.prefix_reuse.remove(sequence)
        if self.config.deterministic and sequence.sampler is not None:
            seeded = replace(sequence.request.params, seed=sequence.sampler.seed)
            sequence.sampler = self.inputs.sampler(replace(sequence.request, params=seeded))
            del sequence.ids[len(sequence.request.prompt) :]
        sequence.restart()

    def _drain(self) -> None:
        previous, self._in_flight = self._in_flight, None
        self._process(previous)

    def _process(self, in_flight: InFlight | None) -> None:
        """Read the tokens of a step: detokenize, stop, finish."""
        if in_flight is None:
            return
        tokens = [] if in_flight.sampled is None else in_flight.sampled.read()
        self._measure(in_flight)
        self.model.check()
        for sequence, token in tokens:
            if sequence.finished:
                continue
            if token is None:
                self.fail(sequence, not_finite(self.model))
                continue
            output = sequence.output_processor
            assert output is not None
            # One that is sampled again, after a deterministic preemption, has been delivered.
            if output.num_tokens == sequence.num_output:
                chunk = output.add(token.token, token.logprobs)
                if chunk is not None:
                    sequence.chunks.append(chunk)
                    if sequence.streams:
                        self._news.append(sequence)
            sequence.ids.append(token.token)
            if output.finish_reason is not None:
                self._finish(sequence)

    def _prefilled(self, prefill: list[PrefillChunk[Sequence]]) -> None:
        """Store prefixes, and end sequences that are scored."""
        for sequence, _ in prefill:
            if sequence.finished:
                continue
            if sequence.score_from is None:
                self.prefix_reuse.store_prefilled(sequence)
            elif sequence.is_prefilled:
                self._finish(sequence)
            if sequence.streams:
                self._news.append(sequence)

    def _measure(self, in_flight: InFlight) -> None:
        """Note how long the device took for a step that is complete."""
        now = time.monotonic()
        seconds = now - max(in_flight.queued, self._completed)
        self._completed = now
        if in_flight.decoding or in_flight.chunks:
            self.num_steps += 1
            self.scheduler.budget.observe(in_flight.chunks, seconds, decoding=in_flight.decoding)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error."""
        self._finish(sequence, error=error)

    def copies_of(self, sequence: Sequence) -> list[KVCache]:
        """Forks of the caches of a sequence."""
        return [cache.fork() for cache in self.runner.caches_of(sequence)]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason | None = None,
        *,
        error: Exception | None = None,
    ) -> None:
        """End a sequence: its caches go to its session, or are freed."""
        if sequence.finished:
            return
        session = sequence.session
        try:
            if session is not None:
                session.set_caches(self.runner.take_caches(sequence), sequence.ids)
                if error is None:
                    self.prefix_reuse.store_session(session.tokens, session.cache)
            elif error is None and sequence.is_prefilled and sequence.limit:
                self.prefix_reuse.store_ended(sequence, self.runner.caches_of(sequence))
        except Exception as failure:
            self._remove(sequence, failure)
            raise
        last: Chunk | BaseException | None = error
        if error is None and sequence.output_processor is not None:
            peak = mx.get_peak_memory() + self.model.mapped
            last = sequence.output_processor.finish(reason, peak_memory=peak)
        self._remove(sequence, last)

    def _remove(self, sequence: Sequence, last: Chunk | BaseException | None) -> None:
        """Let a sequence leave, with its last chunk or its error."""
        if sequence.session is not None:
            sequence.session.detach(sequence)
        self.runner.free(sequence)
        self.prefix_reuse.remove(sequence)
        self.scheduler.finish(sequence)
        self._handles.pop(sequence, None)
        sequence.end(last)
        sequence.sampler = None
        self._news.append(sequence)
        if not self.scheduler.sequences:
            self._in_flight = None
            self.runner.reset()

    def _recover(self) -> None:
        """After an interrupted step: tokens that were not read are sampled again."""
        self._in_flight = None
        running = self.scheduler.running
        for sequence in self.scheduler.sequences:
            self.runner.undo_sampling(sequence)
            if sequence.session is not None:
                sequence.session.set_caches(self.runner.take_caches(sequence), sequence.ids)
            output = sequence.output_processor
            if output is not None and output.finish_reason is not None:
                self._remove(sequence, output.finish())
                continue
            self._requeue(sequence)
            if sequence in running:
                self.scheduler.preempt(sequence)
        self.runner.reset()

    # Threads that step it.

    def _locked_step(self) -> None:
        """One step, while no other thread computes; notifies readers."""
        with device_lock:
            self._safe_step()
        self.notify()

    def _safe_step(self) -> None:
        """One step that leaves the engine sound if it is interrupted."""
        self._stepping = True
        try:
            self.step()
        except BaseException:
            self._recover()
            raise
        finally:
            self._stepping = False

    def notify(self) -> None:
        """Wake readers of new output.

        Not while computing: the garbage collector may have a thread that holds their lock wait for
        device_lock.
        """
        for waiting in (self._interrupted, self._news):
            with suppress(IndexError):  # another thread may take some
                while waiting:
                    waiting.pop().notify()

    def drive(self, ready: Callable[[], bool]) -> None:
        """Wait until a sequence is ready; one of the threads that wait steps the engine."""
        device_lock.prepare_thread()
        while not ready():
            driving = False
            try:
                with self._changed:
                    while self._driven and not ready():
                        self._changed.wait()
                    if ready():
                        return
                    driving = self._driven = True
                while not ready():
                    self._locked_step()
            finally:
                if driving:
                    with self._changed:
                        self._driven = False
                        self._changed.notify_all()

    def stream(self, sequence: Sequence, progress: Progress | None = None) -> Iterator[Chunk]:
        """Queue and drive a sequence, yielding its chunks; ends it when closed.

        Args:
            progress: called with (tokens prefilled, tokens of the prompt), in this thread, between
                steps.
        """
        read, reported, total = 0, -1, len(sequence.request.prompt)

        def news() -> bool:
            return sequence.finished or len(sequence.chunks) > read or due()

        def due() -> bool:
            done = sequence.num_computed
            return progress is not None and sequence.prefix_loaded and reported < done < total

        output = 0
        if not self.busy:
            mx.reset_peak_memory()
        self._inbox.put(sequence)
        try:
            while True:
                finished = sequence.finished
                while len(sequence.chunks) > read:
                    chunk = sequence.chunks[read]
                    read += 1
                    output += len(chunk.tokens)
                    yield chunk
                if finished:
                    break
                if due() and progress is not None:
                    reported = sequence.num_computed
                    progress(reported, total)
                    sequence.awaits_progress = False
                if sequence.streams or progress:
                    self.drive(news)
                else:
                    self.drive(lambda: sequence.finished)
        finally:
            self.abort(sequence, output)
        if sequence.error is not None:
            raise sequence.error

    def run(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Queue and drive sequences, yielding those with new output after each step."""
        for sequence in sequences:
            self._inbox.put(sequence)
        try:
            while self.busy:
                with device_lock:
                    self._safe_step()
                news = list(dict.fromkeys(self._news))
                self._news.clear()
                yield news
        finally:
            with device_lock:
                self._take_in()
                for sequence in self.scheduler.sequences:
                    self._remove(sequence, None)

    def scores(self, sequence: Sequence) -> Iterator[tuple[int, mx.array]]:
        """Queue and drive a scored sequence; yields (position, states (1, T, D)) of its chunks."""
        self._inbox.put(sequence)
        try:
            while not (sequence.finished and not sequence.states):
                self.drive(lambda: sequence.finished or bool(sequence.states))
                while sequence.states:
                    yield sequence.states.popleft()
        finally:
            self.abort(sequence)
        if sequence.error is not None:
            raise sequence.error

    # A thread of its own.

    def start(self) -> Self:
        """Give the engine a thread, which keeps it alive only while it works."""
        weakref.finalize(self, self._inbox.close).atexit = False
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self), self._inbox), name="mlxrun-engine", daemon=True
        )
        self._thread.start()
        return self

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        self._inbox.close()
        # At the end of the process the thread waits forever.
        thread = self._thread
        if thread and threading.current_thread() is not thread and not device_lock.kept:
            thread.join()

    def _work(self) -> bool:
        """Step until there is nothing left to do; whether to wait for more."""
        while not self._inbox.closed:
            if not self.busy:
                return True
            try:
                self._locked_step()
            except BaseException as error:  # all callers get it, and the thread ends
                self._end(error)
                return False
        self._end(EngineClosedError("the engine was closed before the request had begun"))
        return False

    def _end(self, error: BaseException) -> None:
        with self._inbox.changed:
            self._inbox.closed = True
            arrived = self._inbox.arrivals
            self._inbox.items.clear()
        try:
            with device_lock:
                if isinstance(error, EngineClosedError):
                    for sequence in self.scheduler.sequences:
                        self._finish(sequence, "cancelled")
        except Exception as failure:  # callers must not wait forever
            error = failure
        finally:
            with device_lock:
                for sequence in [*self.scheduler.sequences, *arrived]:
                    self._remove(sequence, error)
            self.notify()

    @property
    def figures(self) -> EngineStats:
        """Its size, and counts so far."""
        room = self._kv_budget.room if self._kv_budget else None
        return EngineStats(
            room.parallel if room else self.scheduler.rows,
            room.context if room else self.model.context_length,
            self.scheduler.num_running,
            self.waiting,
            self.runner.num_computed,
            self.runner.num_idle,
            self.prefix_cache.figures,
            self.num_preempted,
        )

    def __repr__(self) -> str:
        if self._inbox.closed:
            return f"Engine({self.source!r}, closed)"
        figures = self.figures
        return (
            f"Engine({self.source!r}, {figures.live} of {figures.parallel} sequences live, "
            f"{figures.waiting} waiting, context {figures.context})"
        )

    def _repr_html_(self) -> str:
        figures = self.figures._asdict()
        prefixes = figures.pop("prefixes")._asdict()
        return table({"model": self.source, **figures, "prefix cache": prefixes})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import asyncio

        await asyncio.to_thread(self.close)


def _serve(engine: weakref.ref[Engine], inbox: Inbox) -> None:
    """Run an engine's thread."""
    more = True
    while more:
        with inbox.changed:
            inbox.changed.wait_for(lambda: inbox.items or inbox.closed)
        serving = engine()
        more = serving is not None and serving._work()
        del serving


def prefill_budget(mode: Mode = "online") -> int:
    """The most prompt tokens of a step."""
    return device().prefill_budget * (BATCH_PREFILL_FACTOR if mode == "batch" else 1)
