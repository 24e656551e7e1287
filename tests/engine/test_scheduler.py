"""The scheduler without a model: every batch is checked and computed by a naive world."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.engine.scheduler import (
    MIN_SHARE,
    OLDEST_TURN,
    PRIORITY_LEAD,
    SLOWDOWN,
    Batch,
    PrefillBudget,
    Scheduler,
)
from mlxrun.errors import ParameterError

# Tokens that a step decodes for each sequence here, so that caches grow within a few steps.
STRIDE = 64


@dataclass(eq=False)
class Sequence:
    """A request of the world.

    Attributes:
        num_tokens: of its prompt; after preemption, of its output, too.
        steps: those that sample from it.
        slot_nbytes: bytes of a cache slot.
        known: tokens that the prefix cache seems to hold.
        kept: whether they are still there when it is prefilled.
    """

    num_tokens: int
    steps: int = 1
    slot_nbytes: int = 1
    priority: int = 0
    known: int = 0
    kept: bool = True
    deadline: float | None = None
    awaits_progress: bool = False
    waits_for_prefix: bool = False
    arrival: int = field(default=0, init=False)
    num_computed: int = field(default=0, init=False)
    num_reusable: int = field(default=0, init=False)
    reserved: int = field(default=0, init=False)
    reserved_slots: int = field(default=0, init=False)
    sampled: int = field(default=0, init=False)
    taken_over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.longest = self.num_tokens + STRIDE * self.steps

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= self.num_tokens

    @property
    def num_slots(self) -> int:
        return self.num_computed + STRIDE

    @property
    def can_decode(self) -> bool:
        return self.sampled < self.steps

    @property
    def rank(self) -> tuple[int, int]:
        return self.arrival - PRIORITY_LEAD * self.priority, self.arrival

    def cost(self, slots: int) -> int:
        return self.slot_nbytes * min(slots, self.longest)

    def restart(self) -> None:
        """Forget its cache, which stays in the prefix cache."""
        self.known = self.num_computed
        self.num_tokens = max(self.num_tokens, self.num_computed)
        self.num_computed = self.num_reusable = 0
        self.taken_over = False


class Prefixes:
    """A prefix cache; chunks end at multiples of ``grid``.

    Attributes:
        starts: where each sequence is prefilled from next, as far as is known.
    """

    shared_nbytes = 0

    def __init__(self, grid: int = 1) -> None:
        self.grid = grid
        self.starts: dict[Sequence, int] = {}

    def estimate(self, prefilling: Iterable[Sequence]) -> None:
        self.starts = {}
        for sequence in prefilling:
            if not sequence.taken_over:
                sequence.num_reusable = sequence.known
            known = min(sequence.num_reusable, sequence.num_tokens - 1)
            self.starts[sequence] = max(sequence.num_computed, known)

    def load_prefix(self, sequence: Sequence) -> bool:
        if not sequence.taken_over and sequence.kept:
            sequence.num_computed = min(sequence.known, sequence.num_tokens - 1)
        sequence.taken_over = True
        return False

    def chunk(self, sequence: Sequence, count: int) -> int:
        end = sequence.num_computed + count
        return max(end // self.grid * self.grid - sequence.num_computed, 1)


class World:
    """Executes the decisions of a scheduler, and asserts the invariants of every step.

    Args:
        budget: prompt tokens of a step, or a budget.
        options: of the scheduler.
    """

    def __init__(
        self,
        budget: int | PrefillBudget = 8,
        *,
        rows: int = 4,
        memory: int | None = None,
        chunk: int | None = None,
        fill: bool = False,
        alone_chunk: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.prefixes = prefixes or Prefixes()
        self.scheduler: Scheduler[Sequence] = Scheduler(
            learned(budget) if isinstance(budget, int) else budget,
            rows=rows,
            memory=memory,
            chunk=chunk,
            always_fill=fill,
            alone_chunk=alone_chunk,
            prefixes=self.prefixes,
        )
        self._chunk, self._alone_chunk, self._fill = chunk, alone_chunk, fill
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.ended: list[Sequence] = []
        self._passed = 0

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self) -> Batch[Sequence]:
        scheduler = self.scheduler
        batch = scheduler.schedule(self._begin)
        while batch.preempted:
            self._check_preempted(batch)
            for sequence in batch.preempted:
                sequence.restart()
            self.preempted += batch.preempted
            batch = scheduler.schedule(self._begin)
        self._check_memory()
        assert set(batch.decode) == {s for s in scheduler.running if s.is_prefilled}
        self._check_prefill(batch)
        for sequence, count in batch.prefill:
            sequence.num_computed += count
            if sequence.is_prefilled:
                self._sample(sequence)
        for sequence in batch.decode:
            sequence.num_computed += STRIDE
            self._sample(sequence)
        return batch

    def play(self) -> None:
        """Step until there is nothing to compute."""
        for _ in range(10_000):
            batch = self.step()
            if not (batch.decode or batch.prefill):
                assert not self.scheduler.sequences
                return
        raise AssertionError("a sequence starves")

    def _begin(self, sequence: Sequence) -> None:
        """It is the first of those that wait, preempted ones included."""
        waiting = set(self.scheduler.sequences) - set(self.scheduler.running)
        assert all(sequence.rank < other.rank for other in waiting)
        self.admitted.append(sequence)

    def _sample(self, sequence: Sequence) -> None:
        sequence.sampled += 1
        if not sequence.can_decode:
            self.scheduler.finish(sequence)
            self.ended.append(sequence)

    def _check_preempted(self, batch: Batch[Sequence]) -> None:
        """They are the last in order, wait, and hold no memory."""
        running = self.scheduler.running
        assert running, "the first in order is never preempted"
        for sequence in batch.preempted:
            assert all(other.rank < sequence.rank for other in running)
            assert sequence not in running
            assert sequence in self.scheduler.sequences
            assert sequence.reserved == 0
        assert not batch.decode
        assert not batch.prefill

    def _check_memory(self) -> None:
        scheduler, running = self.scheduler, self.scheduler.running
        assert len(running) == scheduler.num_running <= scheduler.rows
        assert scheduler.used == sum(s.reserved for s in running)
        if scheduler.memory is None:
            return
        assert scheduler.used <= scheduler.memory or len(running) == 1
        for sequence in running:
            needed = sequence.num_slots if sequence.is_prefilled else sequence.num_tokens
            assert sequence.reserved >= sequence.cost(needed)

    def _check_prefill(self, batch: Batch[Sequence]) -> None:
        prefilling = [s for s in self.scheduler.running if not s.is_prefilled]
        ready = [s for s in prefilling if not (s.waits_for_prefix or s.awaits_progress)]
        sequences = [sequence for sequence, _ in batch.prefill]
        assert len(sequences) == len(set(sequences))
        assert set(sequences) <= set(ready)
        assert bool(batch.prefill) == bool(ready)
        for sequence, count in batch.prefill:
            assert 1 <= count <= sequence.num_tokens - sequence.num_computed
        if batch.prefill:
            self._check_turns(sequences[0], ready)
            self._check_budget(batch, ready)

    def _check_turns(self, first: Sequence, ready: list[Sequence]) -> None:
        """The oldest goes first often enough."""
        oldest = min(ready, key=lambda s: s.arrival)
        self._passed = 0 if first is oldest else self._passed + 1
        assert self._passed < OLDEST_TURN

    def _check_budget(self, batch: Batch[Sequence], ready: list[Sequence]) -> None:
        """A step is within the budget, and uses all of it as far as it may."""
        if self.prefixes.grid > 1:
            return
        chunk = self._chunk
        if chunk is None and not batch.decode:
            chunk = self._alone_chunk
        if chunk is not None:
            ((sequence, count),) = batch.prefill
            assert count == min(sequence.num_tokens - sequence.num_computed, chunk)
            return
        budget, starts = self.scheduler.budget, self.prefixes.starts
        shares = [count / budget.tokens_after(starts[s]) for s, count in batch.prefill]
        assert sum(shares) < 1 + 1e-6
        ends = [starts[s] + count == s.num_tokens for s, count in batch.prefill]
        if not self._fill and len(ends) > 1:
            assert all(ends), "a prompt that ends shares its step with one that does not"
        full = abs(sum(shares) - 1) < 1e-6 or len(ends) == len(ready)
        if budget.context_cost == 0 and (self._fill or not ends[0]):
            assert full, "a part of the budget is left while there is work"


def learned(tokens: int, weight: float = 0.0, most: int | None = None) -> PrefillBudget:
    """A budget that has learned to prefill ``tokens``, with that cost of context."""
    most = tokens if most is None else most
    budget = PrefillBudget(stall=tokens + 0.5, most=most)
    budget.observe([(0, most)], float(most), decoding=False)
    budget.observe([(most, 1)], 1 + weight * most, decoding=False)
    assert budget.tokens == tokens
    assert budget.context_cost == pytest.approx(weight, abs=1e-6)
    return budget


# Sequences that take few steps, and such whose caches grow over many slots.
requests = st.builds(
    Sequence,
    num_tokens=st.integers(1, 40) | st.integers(200, 600),
    steps=st.integers(1, 12),
    slot_nbytes=st.integers(0, 2),
    priority=st.sampled_from([0, 0, -2, -1, 1, 2]),
    known=st.just(0) | st.integers(0, 650),
    kept=st.booleans(),
)
budgets = st.builds(
    learned, st.integers(8, 64), st.just(0.0) | st.floats(1e-3, 0.5), st.integers(64, 100)
)


@given(
    data=st.data(),
    rows=st.integers(1, 4),
    budget=budgets,
    memory=st.none() | st.integers(2800, 4500),
    chunk=st.none() | st.integers(8, 100),
    fill=st.booleans(),
    arriving=st.lists(requests, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_any_interleaving_serves_everyone(
    data: st.DataObject,
    rows: int,
    budget: PrefillBudget,
    memory: int | None,
    chunk: int | None,
    fill: bool,
    arriving: list[Sequence],
) -> None:
    world = World(budget, rows=rows, memory=memory, chunk=chunk, fill=fill)
    arrivals, cancelled = list(arriving), set()
    while arrivals:
        action = data.draw(st.sampled_from(["add", "step", "step", "cancel"]))
        if action == "add":
            world.add(arrivals.pop(0))
        elif action == "step":
            world.step()
        elif world.scheduler.sequences:
            sequence = data.draw(st.sampled_from(world.scheduler.sequences))
            for _ in range(2):  # the second time, it is gone
                world.scheduler.finish(sequence)
            assert sequence not in world.scheduler.sequences
            cancelled.add(sequence)
    world.play()
    assert set(world.ended) == set(arriving) - cancelled
    assert len(world.ended) == len(set(world.ended))
    assert world.scheduler.num_running == world.scheduler.num_waiting == world.scheduler.used == 0


@given(
    rows=st.integers(2, 6),
    memory=st.integers(1400, 3000),
    arriving=st.lists(
        st.builds(
            Sequence,
            num_tokens=st.integers(1, 600),
            steps=st.integers(4, 12),
            priority=st.integers(-1, 1),
            kept=st.booleans(),
        ),
        min_size=2,
        max_size=8,
    ),
)
@settings(max_examples=100, deadline=None)
def test_growing_caches_never_exceed_the_memory_and_all_are_served(
    rows: int, memory: int, arriving: list[Sequence]
) -> None:
    """The world checks memory, who is preempted, and where it waits, in each step."""
    world = World(256, rows=rows, memory=memory)
    world.add(*arriving)
    world.play()
    assert set(world.ended) == set(arriving)
    assert len(world.admitted) == len(arriving) + len(world.preempted)
    assert all(sequence.sampled == sequence.steps for sequence in arriving)


def test_equals_are_admitted_in_order_of_arrival() -> None:
    world = World(rows=2)
    sequences = [Sequence(5, 3) for _ in range(10)]
    world.add(*sequences)
    world.play()
    assert world.admitted == sequences


def test_a_higher_priority_goes_first_and_no_lower_one_starves() -> None:
    world = World(rows=1)
    low, first = Sequence(1, priority=-1), Sequence(1)
    world.add(low, first)
    world.step()
    while low not in world.ended:  # a stream without end of higher priority
        world.add(Sequence(1))
        world.step()
        assert len(world.ended) <= PRIORITY_LEAD
    assert world.ended[0] is first
    assert len(world.ended) == PRIORITY_LEAD, "it waits for as many as its priority says"


def test_a_short_prompt_passes_a_long_one() -> None:
    world = World()
    short = Sequence(6)
    world.add(Sequence(1000))
    world.step()
    world.add(short)
    world.step()
    assert world.ended == [short]


def test_who_arrives_behind_one_that_was_alone_is_prefilled_next_and_by_itself() -> None:
    """However many steps the long prompt has had before, its turn has not come yet."""
    for steps in range(1, 2 * OLDEST_TURN):
        world = World()
        world.add(Sequence(1000))
        for _ in range(steps):
            world.step()
        short = Sequence(5)
        world.add(short)
        assert world.step().prefill == [(short, 5)]


def test_prompts_are_ranked_by_their_remaining_tokens() -> None:
    """A long conversation of which all but a few tokens are known is a short prompt."""
    world = World()
    known = Sequence(2000, known=1995)
    world.add(Sequence(1000))
    world.step()
    world.add(known)
    assert world.step().prefill == [(known, 5)]
    assert world.ended == [known]


def test_where_no_first_token_is_waited_for_steps_are_filled() -> None:
    world = World(fill=True)
    long, short = Sequence(1000), Sequence(5)
    world.add(long, short)
    assert world.step().prefill == [(short, 5), (long, 3)]


def test_a_sequence_waits_for_another_that_prefills_its_prefix() -> None:
    world = World()
    first, second = Sequence(20), Sequence(9, waits_for_prefix=True)
    world.add(first, second)
    assert world.step().prefill == [(first, 8)]
    second.waits_for_prefix, second.known = False, 8
    assert world.step().prefill == [(second, 1)]


def test_a_sequence_that_holds_takes_its_prefix_over_and_is_not_prefilled() -> None:
    world = World()
    sequence = Sequence(9, known=6, awaits_progress=True)
    world.add(sequence)
    assert world.step().prefill == []
    assert sequence.num_computed == 6
    sequence.awaits_progress = False
    assert world.step().prefill == [(sequence, 3)]


def test_chunks_end_where_the_prefix_cache_stores() -> None:
    world = World(8, prefixes=Prefixes(grid=5))
    sequence = Sequence(18)
    world.add(sequence)
    assert [world.step().prefill[0].tokens for _ in range(3)] == [5, 5, 5]


def test_one_whose_last_token_is_in_flight_does_not_decode() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(learned(8), rows=2)
    sequence = Sequence(4, 2)
    scheduler.add(sequence)
    assert scheduler.schedule() == ([], [(sequence, 4)], [])
    sequence.num_computed, sequence.sampled = 4, 1
    assert scheduler.schedule() == ([sequence], [], [])
    sequence.sampled = 2
    assert scheduler.schedule() == ([], [], [])
    assert scheduler.running == [sequence]


@given(
    st.integers(1, 100),
    st.integers(0, 300),
    st.just(0.0) | st.floats(1e-3, 1),
    st.integers(0, 10_000),
)
def test_a_budget_shrinks_with_the_context(
    tokens: int, more: int, weight: float, context: int
) -> None:
    most = tokens + more
    budget = learned(tokens, weight, most)
    least = max(1, int(most * MIN_SHARE))
    assert budget.tokens_after(0) == tokens
    assert (
        min(tokens, least)
        <= budget.tokens_after(context + 1)
        <= budget.tokens_after(context)
        <= tokens
    )
    count = budget.tokens_after(context)
    if count > least:
        assert count * (1 + budget.context_cost * context) <= SLOWDOWN * tokens * (1 + 1e-9)


def test_a_long_prompt_gets_on_under_a_stream_of_short_ones() -> None:
    budget = 16
    world = World(budget, rows=1000)
    long, steps = Sequence(400), 0
    world.add(long)
    while long not in world.ended:
        world.add(Sequence(budget))
        world.step()
        steps += 1
    assert steps <= OLDEST_TURN * (400 / budget + 1)


def test_one_that_does_not_fit_yet_holds_back_those_behind_it() -> None:
    world = World(100, memory=1000)
    sequences = [Sequence(400, 5), Sequence(700), Sequence(1)]
    world.add(*sequences)
    world.step()
    assert world.scheduler.running == sequences[:1]
    world.play()
    assert world.admitted == sequences
    assert not world.preempted


def test_one_that_no_longer_fits_is_preempted_and_keeps_its_place_in_the_queue() -> None:
    world = World(1000, rows=2, memory=1500)
    first, second, third = (Sequence(200, 15) for _ in range(3))
    world.add(first, second, third)
    world.play()
    assert world.preempted[0] is second
    assert world.ended == [first, second, third]
    assert world.admitted[:3] == [first, second, second], "the third does not pass it"


def test_a_lower_priority_is_preempted_before_a_later_arrival() -> None:
    world = World(1000, rows=2, memory=1500)
    low, high = Sequence(200, 15, priority=-1), Sequence(200, 15)
    world.add(low)
    world.step()
    world.add(high)
    world.play()
    assert world.preempted == [low]
    assert world.ended == [high, low]


def test_one_alone_runs_however_its_cache_grows() -> None:
    world = World(1000, memory=300)
    sequence = Sequence(200, 15)
    world.add(sequence)
    world.play()
    assert world.ended == [sequence]
    assert not world.preempted


def test_preemption_costs_the_oldest_prompt_no_turn() -> None:
    world = World(8)
    oldest, short, last = Sequence(600), Sequence(100), Sequence(300)
    world.add(oldest, short, last)
    for _ in range(OLDEST_TURN - 1):
        assert world.step().prefill == [(short, 8)]
    world.scheduler.limit_memory(1000)
    assert world.step().prefill == [(oldest, 8)]
    assert world.preempted == [last]


def test_a_limit_that_is_set_while_prompts_are_prefilled_reserves_all_of_them() -> None:
    world = World(8)
    sequences = [Sequence(1000, 2), Sequence(1000, 2)]
    world.add(*sequences)
    world.step()
    assert world.scheduler.used == 0
    world.scheduler.limit_memory(1600)
    assert all(sequence.reserved >= 1000 for sequence in sequences)
    world.step()
    assert world.preempted == sequences[1:]
    world.play()
    assert world.ended == sequences


def test_deadlines_of_waiting_and_running_sequences_expire() -> None:
    world = World(rows=1)
    running, waiting = Sequence(50, deadline=2.0), Sequence(5, deadline=1.0)
    forever = Sequence(5)
    world.add(running, waiting, forever)
    scheduler = world.scheduler
    assert scheduler.expired(0.0) == []
    world.step()
    assert scheduler.expired(1.0) == [waiting]
    scheduler.finish(waiting)
    assert scheduler.expired(1.5) == []
    assert scheduler.expired(2.0) == [running]
    scheduler.finish(running)
    world.step()
    assert world.admitted == [running, forever]
    assert scheduler.expired(1e9) == []


def test_a_fixed_chunk_cuts_prompts_as_they_are_cut_alone() -> None:
    world = World(1000, chunk=4)
    sequences = [Sequence(10), Sequence(4), Sequence(9)]
    world.add(*sequences)
    counts: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    while batch := world.step().prefill:
        ((sequence, count),) = batch
        counts[sequence].append(count)
    assert list(counts.values()) == [[4, 4, 2], [4], [4, 4, 1]]


def test_chunks_are_longer_while_no_sequence_decodes() -> None:
    world = World(8, alone_chunk=32)
    first, second = Sequence(100), Sequence(40, steps=2)
    world.add(first)
    assert world.step().prefill == [(first, 32)]
    world.add(second)
    assert world.step().prefill == [(second, 32)]
    assert world.step().prefill == [(second, 8)]
    assert world.step() == ([second], [(first, 8)], [])
    assert world.step().prefill == [(first, 32)]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ParameterError, match="rows must be at least 1"):
        Scheduler(learned(8), rows=0)
