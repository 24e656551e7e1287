"""Many requests at once: plan, step, read, deliver.

:class:`Service` is the loop, one step at a time in the caller's thread. It joins the scheduler,
which decides, the batch, which computes, and replies, which make text. The loop of a sequence that
is alone is in ``generation.engine``.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlxrun.errors import MlxrunError
from mlxrun.generation.batch import Batch, Drawn, Live
from mlxrun.generation.engine import PREFILL_CHUNK, no_numbers
from mlxrun.generation.pace import Pace
from mlxrun.generation.reply import Reply
from mlxrun.generation.sampling import Sampler
from mlxrun.generation.scheduler import Plan, Scheduler
from mlxrun.generation.sharing import Sharing
from mlxrun.kernels.device import device
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.model import Model
from mlxrun.outputs import Chunk, FinishReason, Request

Listener = Callable[[Chunk | MlxrunError], None]

# Times the device's prefill budget where nobody waits for a first token: a step's own cost is
# spread over more of them.
OFFLINE = 4
# Seconds that a step may take longer because prompts are read beside decoding.
STALL = 0.1


@dataclass(frozen=True)
class Job:
    """What a service is asked for.

    Attributes:
        request: the prompt and what is wanted of it.
        sampler: draws its tokens.
        reply: makes its text.
        limit: the most tokens to draw.
        cache: empty, or holding the first tokens of the prompt.
        held: how many it holds.
        listener: called with every chunk, the last of which has a reason, or with an error.
    """

    request: Request
    sampler: Sampler
    reply: Reply
    limit: int
    cache: Sequence[KVCache]
    held: int
    listener: Listener


@dataclass(frozen=True)
class Figures:
    """What a service has computed so far.

    Attributes:
        steps: forward passes over everybody.
        slots: places for tokens in them.
        wasted: those among them that nobody had a token for: rows of who had left.
        reused: tokens of prompts that were known from others and not computed.
    """

    steps: int
    slots: int
    wasted: int
    reused: int


class Service:
    """Serves jobs together, step by step.

    Args:
        model: whose weights they share.
        rows: the most sequences that are live at once.
        queue: the most that wait.
        memory: bytes that live sequences may take together.
        deterministic: compute each sequence alone, with the operations it would see alone.
        stall: seconds by which reading prompts may delay a step of others; infinite where nobody
            waits for a first token, so that only the whole counts.
        beside: the most tokens of prompts in a step; by default :func:`most_beside`.
        prefixes: what they share of their beginnings; None for nothing.
    """

    def __init__(
        self,
        model: Model[KVCache],
        *,
        rows: int,
        queue: int = 1024,
        memory: int | None = None,
        deterministic: bool = False,
        stall: float = STALL,
        beside: int | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.batch = Batch(model, joint=not deterministic)
        chunk = PREFILL_CHUNK if deterministic else None
        self._patient = math.isinf(stall)
        self.scheduler = Scheduler(rows, queue, memory, chunk, self._patient)
        self._sharing = Sharing(prefixes or PrefixCache(0), exact=deterministic)
        self._later: frozenset[int] = frozenset()
        self._pace = Pace(stall, beside or most_beside())
        self._jobs: dict[int, tuple[Job, Live]] = {}
        self._keys = itertools.count()
        self._pending: Drawn | None = None
        self._steps = self._reused = 0

    def submit(self, job: Job, *, cost: int = 0, waited: float = 0.0) -> int:
        """Queue a job; returns its key.

        Args:
            cost: bytes that it takes at its longest.
            waited: seconds since it was asked for, which its deadline counts.

        Raises:
            QueueFullError, MemoryLimitError: as the scheduler raises them.
        """
        key, request = next(self._keys), job.request
        due = None
        if request.deadline is not None:
            due = time.monotonic() + request.deadline - waited
        self.scheduler.submit(
            key,
            len(request.prompt) - job.held,
            cost=cost,
            priority=request.priority,
            deadline=due,
        )
        live = Live(key, request.prompt, job.sampler, job.limit, list(job.cache), job.held)
        # Once the sequence has a row, nothing may keep the caches that it read its prompt into.
        self._jobs[key] = replace(job, cache=()), live
        return key

    def cancel(self, key: int) -> bool:
        """End a job with what there is; whether it was there."""
        if key not in self._jobs:
            return False
        self.scheduler.cancel(key)
        self._finish(key, "cancelled")
        return True

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._jobs)

    @property
    def figures(self) -> Figures:
        """What it has computed so far."""
        return Figures(self._steps, self.batch.computed, self.batch.wasted, self._reused)

    def step(self) -> None:
        """Compute one step and deliver what the step before it drew."""
        started = time.monotonic()
        for key in self.scheduler.expire(started):
            self._finish(key, "deadline")
        self._admit()
        plan = self.scheduler.plan(self._pace.budget, self._later)
        live = {key: self._jobs[key] for key in plan.decode}
        # Tokens are read one step late: those that are enough must not be drawn over.
        decoding = [sequence for job, sequence in live.values() if sequence.steps < job.limit]
        pieces = self._pieces(plan)
        behind = sum(count * sequence.read for sequence, count in pieces)
        drawn = self.batch.step(decoding, pieces) if decoding or pieces else None
        self._steps += bool(decoding or pieces)
        before, self._pending = self._pending, drawn
        if before is not None:
            self._deliver(before)
        if drawn is not None and len(drawn.sequences) > len(decoding) and not self._patient:
            # A first token is read before the next step is queued, lest it wait for that as well.
            self._pending = None
            self._deliver(drawn)
        for sequence, _ in pieces:
            if sequence.key in self._jobs:
                self._sharing.read(sequence)
                self._spare(sequence)
        tokens = sum(count for _, count in pieces)
        self._pace.note(tokens, behind, time.monotonic() - started, beside=bool(decoding))

    def _admit(self) -> None:
        """Let those begin for whom there is room, and find out who had better wait still."""
        admitted = self.scheduler.admit()
        for key in admitted:
            self._sharing.admit(self._jobs[key][1])
        before = self._later
        self._later = frozenset(sequence.key for sequence in self._sharing.waiting())
        for key in ({*admitted, *before} - self._later) & self._jobs.keys():
            self.scheduler.expect(key, self._sharing.reach(self._jobs[key][1]))

    def _pieces(self, plan: Plan) -> list[tuple[Live, int]]:
        """What to read of prompts, less what is known of them."""
        pieces = []
        for piece in plan.prefill:
            job, sequence = self._jobs[piece.key]
            if sequence in self._sharing.waiting():
                continue
            if found := self._sharing.begin(sequence):
                self.scheduler.read(piece.key, found)
                job.reply.cached = found
                self._reused += found
                self._spare(sequence)
            count = min(piece.count, len(sequence.prompt) - sequence.read)
            count = self._sharing.piece(sequence, count)
            self.scheduler.read(piece.key, count)
            pieces.append((sequence, count))
        return pieces

    def _spare(self, sequence: Live) -> None:
        """Count what a sequence holds together with others once for all of them."""
        self.scheduler.spare(sequence.key, self._sharing.spared(sequence))
        self.scheduler.common = self._sharing.nbytes

    def close(self) -> None:
        """Cancel everything, telling those who listen."""
        for key in list(self._jobs):
            self.cancel(key)
        self._pending = None

    def abandon(self) -> None:
        """Forget everything, telling nobody."""
        for key in list(self._jobs):
            self.scheduler.cancel(key)
            self._remove(key)
        self._pending = None

    def _deliver(self, drawn: Drawn) -> None:
        steps = drawn.read()
        self.batch.model.check()
        for sequence, step in steps:
            key = sequence.key
            if key not in self._jobs:  # ended meanwhile
                continue
            job, _ = self._jobs[key]
            if step is None:
                self._fail(key, no_numbers(self.batch.model))
                continue
            self._sharing.drew(sequence, step.token)
            chunk = job.reply.add(step.token, step.logprobs)
            if chunk is not None:
                job.listener(chunk)
            if job.reply.reason is not None and key in self._jobs:
                self.scheduler.ended(key)
                self._finish(key)

    def _finish(self, key: int, reason: FinishReason | None = None) -> None:
        sequence = self._jobs[key][1]
        self._sharing.end(sequence, self.batch.memories(sequence))
        job = self._remove(key)
        peak = mx.get_peak_memory() + self.batch.model.mapped
        job.listener(job.reply.finish(reason, peak_memory=peak))

    def _fail(self, key: int, error: MlxrunError) -> None:
        self.scheduler.cancel(key)
        self._remove(key).listener(error)

    def _remove(self, key: int) -> Job:
        job, sequence = self._jobs.pop(key)
        self._sharing.leave(sequence)
        self.scheduler.common = self._sharing.nbytes
        self.batch.leave(sequence)
        if not self._jobs:
            self.batch.rest()
        return job


def most_beside(*, offline: bool = False) -> int:
    """The most tokens of prompts in a step, beside decoding.

    Args:
        offline: nobody waits for a first token; only the whole counts.
    """
    most = device().prefill_budget
    return OFFLINE * most if offline else most
