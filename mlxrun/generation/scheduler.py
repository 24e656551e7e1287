"""Who is served in the next step: admission, prefill in pieces, decoding, ending.

Standard library only: requests are numbers, memory is a count of bytes, time is told. What a
token is, and how long a step takes, is the engine's business.

Rules:

* Every live sequence that has its prompt decodes one token in every step.
* Prompts are read in pieces under the step's budget, beside decoding. The shortest rest goes first,
  so that a short prompt does not wait behind a long one; after three steps in which others did, the
  one that waits longest does, so that a long one gets on under any stream of short ones.
* A step in which a prompt ends reads of no other that does not: the first token would wait for it.
* Requests are admitted in the order of arrival, a point of priority counting as ``LEAD`` earlier
  arrivals: a higher priority goes first, and nothing waits for ever.
* One that does not fit into memory now holds back those behind it, rather than be passed by for
  ever; one that never can is refused at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field

from mlxrun.errors import MemoryLimitError, ParameterError, QueueFullError

# How many earlier arrivals a point of priority is worth.
LEAD = 32
# The oldest prompt goes first at least once in that many steps that read prompts.
OLDEST_TURN = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """What a step may read of prompts: tokens of equal cost, not equal numbers of them.

    Attributes:
        tokens: as many where there is no context yet.
        weight: what attending to one token of context costs, as a share of what a token costs
            there.
        least: tokens to read however long the context, as far as ``tokens`` go: below, a step's
            own cost would be most of it.
        longer: how many times as long as without context it may take.
    """

    tokens: int
    weight: float = 0.0
    least: int = 1
    longer: float = 1.0

    def at(self, context: int) -> int:
        """Tokens that may be read behind so many others; at least one."""
        light = int(self.tokens * self.longer / (1 + self.weight * context))
        return min(self.tokens, max(1, light, self.least))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt to read in this step: ``count`` tokens from ``start`` on."""

    key: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step does.

    Attributes:
        prefill: pieces of prompts.
        decode: requests that get one more token.
    """

    prefill: tuple[Piece, ...] = ()
    decode: tuple[int, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.prefill or self.decode)


@dataclass(slots=True)
class _Entry:
    key: int
    tokens: int  # of the prompt that are to be computed
    cost: int  # bytes
    deadline: float | None
    arrival: int
    done: int = 0
    spared: int = 0  # bytes of the cost that it does not need
    known: int = 0  # tokens that need not be computed, as far as one can tell

    @property
    def start(self) -> int:
        return max(self.done, self.known)

    @property
    def rest(self) -> int:
        return self.tokens - self.start


@dataclass
class Scheduler:
    """Decides; computes nothing.

    Args:
        rows: the most sequences that are live at once.
        queue: the most requests that wait.
        memory: bytes that all live sequences may take together; None for no limit.
        chunk: read prompts in pieces of just this length, one a step, whatever the budget: the
            pieces of a sequence that is alone.
        patient: nobody waits for a first token: every step is filled.

    Attributes:
        common: bytes that live sequences hold together, and that are in the cost of none.
    """

    rows: int
    queue: int = 1024
    memory: int | None = None
    chunk: int | None = None
    patient: bool = False
    common: int = field(default=0, init=False)
    _waiting: list[tuple[int, int]] = field(default_factory=list)  # heap of (rank, key)
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _prefilling: dict[int, _Entry] = field(default_factory=dict)
    _decoding: dict[int, _Entry] = field(default_factory=dict)
    _arrivals: int = 0
    _used: int = 0
    _passed: int = 0  # steps since the oldest prompt went first

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ParameterError("rows", self.rows, "at least 1")
        if self.queue < 1:
            raise ParameterError("queue", self.queue, "at least 1")

    def submit(
        self,
        key: int,
        tokens: int,
        *,
        cost: int = 0,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Put a request into the queue.

        Args:
            key: its number; not that of another live request.
            tokens: of its prompt that are to be computed, at least one.
            cost: bytes that it may take at its longest.
            priority: higher goes first.
            deadline: the time at which it is dropped, live or not.

        Raises:
            QueueFullError: as many wait already as may.
            MemoryLimitError: it could not run even alone.
        """
        if key in self._entries:
            raise ParameterError("key", key, "one that no live request has")
        if tokens < 1:
            raise ParameterError("tokens", tokens, "at least 1")
        if self.memory is not None and cost > self.memory:
            raise MemoryLimitError(cost, self.memory)
        if self.waiting >= self.queue:
            raise QueueFullError(self.queue)
        entry = _Entry(key, tokens, cost, deadline, self._arrivals)
        self._arrivals += 1
        self._entries[key] = entry
        heapq.heappush(self._waiting, (entry.arrival - LEAD * priority, key))

    def cancel(self, key: int) -> bool:
        """Forget a request, wherever it is; whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        if self._prefilling.pop(key, None) or self._decoding.pop(key, None):
            self._used -= entry.cost - entry.spared
        return True

    ended = cancel

    def spare(self, key: int, nbytes: int) -> None:
        """Set aside so many bytes less for a live sequence: it turned out not to need them."""
        entry = self._entries[key]
        self._used += entry.spared - nbytes
        entry.spared = nbytes

    def read(self, key: int, count: int) -> None:
        """Note that ``count`` more tokens of a prompt were computed."""
        entry = self._prefilling[key]
        entry.done, entry.known = entry.done + count, 0
        if not entry.rest:
            self._decoding[key] = self._prefilling.pop(key)

    def expect(self, key: int, known: int) -> None:
        """Note how many tokens of a prompt need not be computed, before any of it is read.

        It is ranked by what is left. What becomes of it is told by :meth:`read`.
        """
        if (entry := self._prefilling.get(key)) and not entry.done:
            entry.known = min(known, entry.tokens - 1)

    def expire(self, now: float) -> list[int]:
        """Forget the requests whose deadline has passed; returns them."""
        expired = [
            entry.key
            for entry in self._entries.values()
            if entry.deadline is not None and entry.deadline <= now
        ]
        for key in expired:
            self.cancel(key)
        return expired

    def admit(self) -> list[int]:
        """Let those begin for whom there is room; returns them."""
        admitted = []
        while self._waiting and self.live < self.rows:
            key = self._waiting[0][1]
            entry = self._entries.get(key)
            if entry is None:  # cancelled while it waited
                heapq.heappop(self._waiting)
                continue
            if self.memory is not None and self.used + entry.cost > self.memory:
                break
            heapq.heappop(self._waiting)
            self._used += entry.cost
            self._prefilling[key] = entry
            admitted.append(key)
        return admitted

    def plan(self, budget: Budget, later: Container[int] = ()) -> Plan:
        """What to do in the next step.

        Args:
            budget: what to read of prompts in it, beside one token for each decoding sequence.
            later: keys of requests that read nothing in this step.
        """
        return Plan(tuple(self._pieces(budget, later)), tuple(self._decoding))

    def _pieces(self, budget: Budget, later: Container[int]) -> Iterator[Piece]:
        """Shares of the budget, in the order of :meth:`_order`."""
        reading = [entry for entry in self._prefilling.values() if entry.key not in later]
        if not reading:
            return
        order = self._order(reading)
        if self.chunk is not None:
            yield Piece(order[0].key, order[0].start, min(order[0].rest, self.chunk))
            return
        left = 1.0  # of the budget
        for turn, entry in enumerate(order):
            most = budget.at(entry.start)
            share = min(entry.rest, int(left * most + 1e-9))
            if not share or (turn and share < entry.rest and not self.patient):
                return
            yield Piece(entry.key, entry.start, share)
            left -= share / most

    def _order(self, reading: Collection[_Entry]) -> list[_Entry]:
        """The shortest rests first, or the oldest where it is its turn."""
        order = sorted(reading, key=lambda entry: (entry.rest, entry.arrival))
        oldest = min(reading, key=lambda entry: entry.arrival)
        self._passed = 0 if order[0] is oldest else self._passed + 1
        if self._passed == OLDEST_TURN:
            self._passed = 0
            order.sort(key=lambda entry: entry is not oldest)
        return order

    @property
    def live(self) -> int:
        """Sequences that have been admitted and have not ended."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._entries) - self.live

    @property
    def used(self) -> int:
        """Bytes set aside for live sequences."""
        return self._used + self.common
