"""Which sequences are in the next step: admission, preemption, chunked prefill, decoding.

Standard library only. Rules:

* Every running sequence whose prompt is computed decodes one token in every step.
* Prompts are prefilled in chunks under the step's budget, in the same step. The shortest remainder
  goes first, so that a short prompt does not wait behind a long one; after three steps in which
  others did, the oldest does, so that a long prompt gets on under any stream of short ones.
* A step that completes a prompt prefills no other only in part: the first token would wait for it.
* Requests are admitted in order of arrival, a point of priority counting as ``PRIORITY_LEAD``
  earlier arrivals: a higher priority goes first, and none starves.
* A sequence is admitted when its prompt and the next growth of its KV cache fit into memory. Where
  growing caches no longer fit, the lowest in that order is preempted: it waits again, and later
  recomputes what the prefix cache no longer holds.
* A request that does not fit yet holds back those behind it, rather than starve.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from statistics import median
from typing import Generic, NamedTuple, Protocol, TypeVar

from mlxrun.errors import ParameterError

# Earlier arrivals that a point of priority is worth.
PRIORITY_LEAD = 32
# The oldest prompt goes first at least once in that many steps that prefill.
OLDEST_TURN = 4
# Slots by which memory is reserved: the smallest growth of a KV cache.
GROWTH = 256
# The share of the budget's tokens that is prefilled at least, however long the context.
MIN_SHARE = 1 / 4
# Allowed slowdown of a step, relative to one without context: longer steps are fewer for a long
# prompt, but a request that arrives meanwhile waits half a step on average.
SLOWDOWN = 1.5
# Steps in the medians, which disregard those that other load of the machine slowed down.
WINDOW = 9


class Schedulable(Protocol):
    """A sequence, as the scheduler sees it.

    Attributes:
        priority: higher goes first.
        num_tokens: to compute before it samples: the prompt and, once preempted, its output.
        deadline: time at which it ends, or None.
        arrival: its number, set by the scheduler.
        num_computed: tokens in its KV cache.
        num_reusable: tokens that the prefix cache is expected to supply.
        waits_for_prefix: another sequence is prefilling their prefix.
        awaits_progress: it looks up its prefix, but does not prefill yet.
        reserved: bytes, and ``reserved_slots`` the cache slots they are for; set by the scheduler.
    """

    @property
    def priority(self) -> int: ...

    deadline: float | None
    arrival: int
    num_tokens: int
    num_computed: int
    num_reusable: int
    waits_for_prefix: bool
    awaits_progress: bool
    reserved: int
    reserved_slots: int

    @property
    def num_slots(self) -> int:
        """Cache slots that it needs in the next step."""

    @property
    def can_decode(self) -> bool:
        """Whether it may sample one more token."""

    def cost(self, slots: int) -> int:
        """Bytes of a KV cache with that many slots."""


S = TypeVar("S", bound=Schedulable)
C = TypeVar("C", bound=Schedulable, contravariant=True)


class PrefillChunk(NamedTuple, Generic[S]):
    """The next ``tokens`` tokens of a sequence's prompt."""

    sequence: S
    tokens: int


class Batch(NamedTuple, Generic[S]):
    """The parts of a step, or only the sequences that have to leave it first."""

    decode: list[S]
    prefill: list[PrefillChunk[S]]
    preempted: list[S]


class Prefixes(Protocol[C]):
    """The scheduler's view of the prefix cache."""

    @property
    def shared_nbytes(self) -> int:
        """Bytes of prefixes that running sequences hold in common."""

    def estimate(self, prefilling: Iterable[C]) -> None:
        """Set ``num_reusable`` and ``waits_for_prefix``."""

    def load_prefix(self, sequence: C) -> bool:
        """Load the cached prefix, once per sequence; whether its cost has changed."""

    def chunk(self, sequence: C, count: int) -> int:
        """A chunk of at most ``count`` tokens that ends at a length to store."""


class PrefillBudget:
    """Prompt tokens of a step, as many as take a time rather than a number of them.

    A step takes at most about ``SLOWDOWN`` times what ``most`` tokens without context take. The
    cost of context is measured.

    Args:
        stall: seconds by which prefill may delay the tokens of decoding sequences; infinite where
            only throughput counts.
        most: tokens, however short the delay.
    """

    def __init__(self, stall: float, most: int) -> None:
        self._stall, self.most = stall, most
        self._decoding = 0.0  # seconds of a step without prefill, smoothed
        # Seconds of a token without context, and the cost of one of context as a share of that.
        self._costs: deque[float] = deque(maxlen=WINDOW)
        self._context_costs: deque[float] = deque(maxlen=WINDOW)

    @property
    def tokens(self) -> int:
        """Tokens where there is no context."""
        if math.isinf(self._stall) or not self._costs:
            return self.most
        return max(1, int(min(self.most, self._stall / median(self._costs))))

    @property
    def context_cost(self) -> float:
        """Cost of attending to one token of context, as a share of a token's cost without."""
        return median(self._context_costs) if self._context_costs else 0.0

    def tokens_after(self, context: int) -> int:
        """Tokens of a step after so much context; at least one."""
        tokens = self.tokens
        if math.isinf(self._stall):
            return tokens
        light = int(tokens * SLOWDOWN / (1 + self.context_cost * context))
        return min(tokens, max(1, light, int(self.most * MIN_SHARE)))

    def observe(
        self, chunks: Collection[tuple[int, int]], seconds: float, *, decoding: bool
    ) -> None:
        """Learn from a step.

        Args:
            chunks: (context, tokens) of each chunk that it prefilled.
            seconds: its duration.
            decoding: whether other sequences decoded in it.
        """
        tokens = sum(count for _, count in chunks)
        if not tokens:
            self._decoding = seconds if not self._decoding else 0.7 * self._decoding + 0.3 * seconds
            return
        context = sum(start * count for start, count in chunks)
        seconds = max(seconds - (self._decoding if decoding else 0.0), 1e-6)
        if context < tokens * self.most:
            if 2 * tokens >= self.tokens:  # fewer measure a step's cost, not a token's
                self._costs.append(seconds / tokens)
        elif self._costs:
            self._context_costs.append(max(0.0, seconds / median(self._costs) - tokens) / context)


class Scheduler(Generic[S]):
    """Decides; computes nothing.

    Args:
        budget: prompt tokens of a step.
        rows: the most sequences that run at once.
        memory: bytes for the KV caches of all running sequences; None for no limit.
        chunk: prefill one sequence at a time, in chunks of that length; None for the budget's.
        alone_chunk: the same while no sequence decodes.
        always_fill: fill every step's budget, as no one waits for a first token.
        prefixes: the prefix cache, if any.
    """

    def __init__(
        self,
        budget: PrefillBudget,
        *,
        rows: int,
        memory: int | None = None,
        chunk: int | None = None,
        alone_chunk: int | None = None,
        always_fill: bool = False,
        prefixes: Prefixes[S] | None = None,
    ) -> None:
        if rows < 1:
            raise ParameterError("rows", rows, "at least 1")
        self.budget, self.rows, self.memory = budget, rows, memory
        self._chunk, self._alone_chunk, self._always_fill = chunk, alone_chunk, always_fill
        self._prefixes = prefixes
        self._queue: list[tuple[int, int, S]] = []  # heap of (rank, arrival, sequence)
        self._waiting: dict[S, None] = {}
        self._prefilling: dict[S, None] = {}
        self._decoding: dict[S, None] = {}
        self._deadlines: dict[S, float] = {}
        self._arrivals = 0
        self._reserved = 0
        self._steps_since_oldest = 0  # since the oldest prompt went first

    def __contains__(self, sequence: S) -> bool:
        states = self._waiting, self._prefilling, self._decoding
        return any(sequence in state for state in states)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> list[S]:
        """Sequences that have been admitted, in order of admission."""
        return [*self._decoding, *self._prefilling]

    @property
    def prefilling(self) -> Collection[S]:
        """Running sequences whose prompt is not yet computed."""
        return self._prefilling.keys()

    @property
    def sequences(self) -> list[S]:
        return [*self.running, *self._waiting]

    @property
    def used(self) -> int:
        """Bytes reserved for running sequences."""
        shared = self._prefixes.shared_nbytes if self._prefixes is not None else 0
        return self._reserved + shared

    def add(self, sequence: S) -> None:
        """Queue a sequence."""
        sequence.arrival = self._arrivals
        self._arrivals += 1
        if sequence.deadline is not None:
            self._deadlines[sequence] = sequence.deadline
        self._enqueue(sequence)

    def finish(self, sequence: S) -> None:
        """Remove a sequence, wherever it is."""
        self._waiting.pop(sequence, None)
        self._deadlines.pop(sequence, None)
        self._stop(sequence)

    def expired(self, now: float) -> list[S]:
        """Sequences whose deadline has passed."""
        return [s for s, deadline in self._deadlines.items() if deadline <= now]

    def schedule(self, on_admit: Callable[[S], None] | None = None) -> Batch[S]:
        """The parts of the next step; called again once preempted sequences have left.

        Args:
            on_admit: called with each sequence that is admitted.
        """
        for sequence in [s for s in self._prefilling if s.num_computed >= s.num_tokens]:
            del self._prefilling[sequence]
            self._decoding[sequence] = None
        if preempted := self._make_room():
            return Batch([], [], preempted)
        self._admit(on_admit)
        if self._prefilling and self._prefixes is not None:
            self._prefixes.estimate(self._prefilling)
        chunks = list(self._chunks()) if self._prefilling else []
        return Batch([s for s in self._decoding if s.can_decode], chunks, [])

    def limit_memory(self, memory: int | None) -> None:
        """Limit the bytes of KV caches from now on."""
        self.memory = memory
        for sequence in self.running:
            slots = max(sequence.num_slots, sequence.num_tokens + 1)
            self._reserve(sequence, _rounded_up(slots))

    def preempt(self, sequence: S) -> None:
        """Put a running sequence back into the queue."""
        self._stop(sequence)
        self._enqueue(sequence)

    def _enqueue(self, sequence: S) -> None:
        self._waiting[sequence] = None
        heapq.heappush(self._queue, (_rank(sequence), sequence.arrival, sequence))

    def _stop(self, sequence: S) -> None:
        if sequence in self._prefilling or sequence in self._decoding:
            self._prefilling.pop(sequence, None)
            self._decoding.pop(sequence, None)
            self._reserved -= sequence.reserved
            sequence.reserved = sequence.reserved_slots = 0

    def _admit(self, on_admit: Callable[[S], None] | None) -> None:
        while self._queue and self.num_running < self.rows:
            sequence = self._queue[0][2]
            if sequence in self._waiting:
                slots = _rounded_up(sequence.num_tokens + 1)
                if not self._has_room(sequence, slots):
                    return
                del self._waiting[sequence]
                self._prefilling[sequence] = None
                self._reserve(sequence, slots)
                if on_admit is not None:
                    on_admit(sequence)
            heapq.heappop(self._queue)

    def _has_room(self, sequence: S, slots: int) -> bool:
        if self.memory is None or not self.num_running:  # one alone always runs
            return True
        # With room to grow once, lest it be preempted soon.
        return self.used + sequence.cost(slots + GROWTH) <= self.memory

    def _make_room(self) -> list[S]:
        """Reserve memory for caches that grow in the next step; returns the preempted."""
        if self.memory is None:
            return []
        for sequence in self._decoding:
            if sequence.num_slots > sequence.reserved_slots:
                self._reserve(sequence, _rounded_up(sequence.num_slots))
        preempted: list[S] = []
        while self.num_running > 1 and self.used > self.memory:
            last = max(self.running, key=lambda s: (_rank(s), s.arrival))
            self.preempt(last)
            preempted.append(last)
        return preempted

    def _reserve(self, sequence: S, slots: int) -> None:
        cost = sequence.cost(slots) if self.memory is not None else 0
        self._reserved += cost - sequence.reserved
        sequence.reserved, sequence.reserved_slots = cost, slots

    def _chunks(self) -> Iterator[PrefillChunk[S]]:
        ready = [s for s in self._prefilling if not s.waits_for_prefix]
        for sequence in [s for s in ready if s.awaits_progress]:
            self._load_prefix(sequence)
            ready.remove(sequence)
        if not ready:
            return
        order = self._order(ready)
        chunk = self._chunk
        if chunk is None and self._alone_chunk is not None and not self._decoding:
            chunk = self._alone_chunk
        if chunk is not None:
            yield self._chunk_of(order[0], chunk)
            return
        left = 1.0  # of the budget
        for place, sequence in enumerate(order):
            most = self.budget.tokens_after(_computed(sequence))
            share = min(_remaining(sequence), int(left * most + 1e-9))
            if not share or (place and share < _remaining(sequence) and not self._always_fill):
                return
            yield self._chunk_of(sequence, share)
            left -= share / most

    def _chunk_of(self, sequence: S, count: int) -> PrefillChunk[S]:
        if self._prefixes is not None:
            self._load_prefix(sequence)
            count = self._prefixes.chunk(sequence, min(count, _remaining(sequence)))
        return PrefillChunk(sequence, min(count, _remaining(sequence)))

    def _load_prefix(self, sequence: S) -> None:
        if self._prefixes is not None and self._prefixes.load_prefix(sequence):
            self._reserve(sequence, sequence.reserved_slots)
        sequence.num_reusable = 0

    def _order(self, prefilling: Collection[S]) -> list[S]:
        """The shortest remainder first, or the oldest sequence where it is its turn."""
        order = sorted(prefilling, key=lambda s: (_remaining(s), s.arrival))
        oldest = min(prefilling, key=lambda s: s.arrival)
        self._steps_since_oldest = 0 if order[0] is oldest else self._steps_since_oldest + 1
        if self._steps_since_oldest == OLDEST_TURN:
            self._steps_since_oldest = 0
            order.sort(key=lambda s: s is not oldest)
        return order


def _rank(sequence: Schedulable) -> int:
    return sequence.arrival - PRIORITY_LEAD * sequence.priority


def _computed(sequence: Schedulable) -> int:
    return max(sequence.num_computed, min(sequence.num_reusable, sequence.num_tokens - 1))


def _remaining(sequence: Schedulable) -> int:
    return sequence.num_tokens - _computed(sequence)


def _rounded_up(slots: int) -> int:
    return -(-slots // GROWTH) * GROWTH
