"""The scheduler without a model: every schedule is played out by a naive world that checks it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.errors import MemoryLimitError, ParameterError, QueueFullError
from mlxrun.generation.scheduler import LEAD, OLDEST_TURN, Budget, Plan, Scheduler


@dataclass
class Wanted:
    """A request of the world.

    Attributes:
        tokens: of its prompt.
        draws: how many tokens it will draw.
        known: tokens of the prompt that need not be computed, it seems.
        kept: whether that will be so when it is read.
    """

    tokens: int
    draws: int
    cost: int = 0
    priority: int = 0
    known: int = 0
    kept: bool = True


@dataclass
class World:
    """Plays a scheduler's plans and asserts what must hold in every one of them."""

    scheduler: Scheduler
    budget: Budget
    wanted: dict[int, Wanted] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, int] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    ended: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    expected: dict[int, int] = field(default_factory=dict)
    passed: int = 0

    def submit(self, key: int, wanted: Wanted) -> None:
        self.scheduler.submit(key, wanted.tokens, cost=wanted.cost, priority=wanted.priority)
        self.wanted[key] = wanted
        self.read[key] = self.drawn[key] = 0

    def step(self) -> Plan:
        before = set(self.live)
        admitted = self.scheduler.admit()
        assert not set(admitted) & before
        self.live |= set(admitted)
        self.admitted.extend(admitted)
        for key in admitted:
            self.scheduler.expect(key, self.wanted[key].known)
            self.expected[key] = min(self.wanted[key].known, self.wanted[key].tokens - 1)
        plan = self.scheduler.plan(self.budget)
        assert len(self.live) <= self.scheduler.rows
        assert self.live <= set(self.wanted)
        cost = sum(self.wanted[key].cost for key in self.live)
        assert cost == self.scheduler.used
        assert self.scheduler.memory is None or cost <= self.scheduler.memory
        self._check_prefill(plan)
        whole = {key for key in before if self.read[key] == self.wanted[key].tokens}
        assert set(plan.decode) == whole, "who has its prompt decodes in every step"
        assert plan.idle == (not plan.prefill and not plan.decode)
        for piece in plan.prefill:
            # What was expected to be known may be gone by now.
            if found := self.expected.pop(piece.key, 0) * self.wanted[piece.key].kept:
                self.scheduler.read(piece.key, found)
            self.scheduler.read(piece.key, piece.count)
            self.read[piece.key] += found + piece.count
            if self.read[piece.key] == self.wanted[piece.key].tokens:
                self._draw(piece.key)
        for key in plan.decode:
            self._draw(key)
        return plan

    def _check_prefill(self, plan: Plan) -> None:
        keys = [piece.key for piece in plan.prefill]
        assert len(keys) == len(set(keys))
        assert set(keys) <= self.live
        for piece in plan.prefill:
            assert piece.start == self.read[piece.key] + self.expected.get(piece.key, 0)
            assert 1 <= piece.count <= self.wanted[piece.key].tokens - piece.start
        rest = {
            k: n
            for k in self.live
            if (n := self.wanted[k].tokens - self.read[k] - self.expected.get(k, 0))
        }
        assert bool(plan.prefill) == bool(rest)
        if plan.prefill:
            self._check_turns(plan)
            self._check_budget(plan, rest)

    def _check_turns(self, plan: Plan) -> None:
        """The oldest of them goes first often enough."""
        reading = [k for k in self.live if self.read[k] < self.wanted[k].tokens]
        oldest = min(reading, key=list(self.wanted).index)
        self.passed = 0 if plan.prefill[0].key == oldest else self.passed + 1
        assert self.passed < OLDEST_TURN

    def _check_budget(self, plan: Plan, rest: dict[int, int]) -> None:
        """A step takes no longer than may be, and not less while there is work that it may do."""
        if self.scheduler.chunk is not None:
            (piece,) = plan.prefill
            assert piece.count == min(rest[piece.key], self.scheduler.chunk)
            return
        shares = [piece.count / self.budget.at(piece.start) for piece in plan.prefill]
        assert sum(shares) < 1 + 1e-6
        ends = [piece.count == rest[piece.key] for piece in plan.prefill]
        if not self.scheduler.patient and len(ends) > 1:
            assert all(ends), "one that ends shares its step with one that reads on"
        full = abs(sum(shares) - 1) < 1e-6 or len(ends) == len(rest)
        if self.budget.weight == 0 and (self.scheduler.patient or not ends[0]):
            assert full, "some of the budget is left lying while there is work"

    def _draw(self, key: int) -> None:
        self.drawn[key] += 1
        if self.drawn[key] == self.wanted[key].draws:
            assert self.scheduler.ended(key)
            self.forget(key)
            self.ended.append(key)

    def forget(self, key: int) -> None:
        self.live.discard(key)
        for table in (self.wanted, self.read, self.drawn, self.expected):
            table.pop(key, None)


requests = st.builds(
    Wanted,
    tokens=st.integers(1, 40),
    draws=st.integers(1, 6),
    cost=st.integers(0, 10),
    priority=st.integers(-2, 2),
    known=st.just(0) | st.integers(0, 50),
    kept=st.booleans(),
)


@given(
    data=st.data(),
    rows=st.integers(1, 4),
    budget=st.builds(
        Budget, st.integers(1, 20), st.just(0.0) | st.floats(0, 0.5), st.integers(1, 4)
    ),
    memory=st.none() | st.integers(10, 25),
    chunk=st.none() | st.integers(1, 16),
    patient=st.booleans(),
    coming=st.lists(requests, max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_any_interleaving_serves_everyone(
    data: st.DataObject,
    rows: int,
    budget: Budget,
    memory: int | None,
    chunk: int | None,
    patient: bool,
    coming: list[Wanted],
) -> None:
    world = World(Scheduler(rows, 100, memory, chunk, patient), budget)
    left, cancelled = list(enumerate(coming)), set()
    for _ in range(2000):
        action = (
            data.draw(st.sampled_from(["submit", "step", "step", "cancel"])) if left else "step"
        )
        if action == "submit":
            world.submit(*left.pop(0))
        elif action == "cancel" and world.wanted:
            key = data.draw(st.sampled_from(sorted(world.wanted)))
            assert world.scheduler.cancel(key)
            assert not world.scheduler.cancel(key)
            world.forget(key)
            cancelled.add(key)
        else:
            plan = world.step()
            if plan.idle and not left:
                break
    assert sorted(world.ended) == sorted(set(range(len(coming))) - cancelled)
    assert world.scheduler.live == world.scheduler.waiting == world.scheduler.used == 0


def play(world: World, most: int = 10_000) -> None:
    for _ in range(most):
        if world.step().idle:
            return
    raise AssertionError("somebody starves")


def test_equals_are_admitted_in_order_of_arrival() -> None:
    world = World(Scheduler(2), Budget(8))
    for key in range(10):
        world.submit(key, Wanted(5, 3))
    play(world)
    assert world.admitted == list(range(10))


def test_a_higher_priority_goes_first_and_no_lower_one_starves() -> None:
    world = World(Scheduler(1), Budget(8))
    world.submit(0, Wanted(1, 1, priority=-1))
    for key in range(1, 200):  # a stream without end of more important ones
        world.submit(key, Wanted(1, 1))
        world.step()
        if 0 in world.ended:
            break
    assert 1 in world.ended[:2]
    assert len(world.ended) == LEAD, "it waits for those that its priority yields to, no longer"


def test_a_short_prompt_passes_a_long_one() -> None:
    world = World(Scheduler(4), Budget(8))
    world.submit(0, Wanted(1000, 1))
    world.step()
    world.submit(1, Wanted(6, 1))
    world.step()
    assert world.ended == [1]


def test_who_arrives_behind_one_that_was_alone_is_read_next_and_by_itself() -> None:
    """However many steps the long prompt has had before, its turn has not come yet."""
    for steps in range(1, 2 * OLDEST_TURN):
        world = World(Scheduler(4), Budget(8))
        world.submit(0, Wanted(1000, 1))
        for _ in range(steps):
            world.step()
        world.submit(1, Wanted(5, 1))
        assert [piece.key for piece in world.step().prefill] == [1]


def test_prompts_are_ranked_by_what_is_left_to_compute() -> None:
    """A long conversation of which all but a few tokens are known is a short prompt."""
    world = World(Scheduler(4), Budget(8))
    world.submit(0, Wanted(1000, 1))
    world.step()
    world.submit(1, Wanted(2000, 1, known=1995))
    assert [(piece.key, piece.count) for piece in world.step().prefill] == [(1, 5)]
    assert world.ended == [1]


def test_where_nobody_waits_for_a_first_token_steps_are_filled() -> None:
    world = World(Scheduler(4, patient=True), Budget(8))
    world.submit(0, Wanted(1000, 1))
    world.submit(1, Wanted(5, 1))
    assert [(piece.key, piece.count) for piece in world.step().prefill] == [(1, 5), (0, 3)]


@given(
    st.integers(1, 100),
    st.floats(0, 1),
    st.integers(1, 100),
    st.floats(1, 3),
    st.integers(0, 10_000),
)
def test_a_budget_shrinks_with_the_context(
    tokens: int, weight: float, least: int, longer: float, context: int
) -> None:
    budget = Budget(tokens, weight, least, longer)
    assert budget.at(0) == tokens
    assert min(tokens, least) <= budget.at(context + 1) <= budget.at(context) <= tokens
    count = budget.at(context)
    if count > least:
        assert count * (1 + weight * context) <= longer * tokens * (1 + 1e-9)


def test_a_long_prompt_gets_on_under_a_stream_of_short_ones() -> None:
    budget = 16
    world = World(Scheduler(1000), Budget(budget))
    world.submit(0, Wanted(400, 1))
    steps = 0
    while 0 not in world.ended:
        world.submit(steps + 1, Wanted(budget, 1))
        world.step()
        steps += 1
    assert steps <= OLDEST_TURN * (400 / budget + 1)


def test_one_that_does_not_fit_yet_holds_back_those_behind_it() -> None:
    world = World(Scheduler(4, memory=10), Budget(100))
    world.submit(0, Wanted(1, 5, cost=6))
    world.submit(1, Wanted(1, 1, cost=8))
    world.submit(2, Wanted(1, 1, cost=1))
    play(world)
    assert world.admitted == [0, 1, 2]


def test_what_never_fits_is_refused_with_both_numbers() -> None:
    scheduler = Scheduler(4, memory=10)
    with pytest.raises(MemoryLimitError) as caught:
        scheduler.submit(0, 1, cost=11)
    assert (caught.value.needed, caught.value.available) == (11, 10)
    assert scheduler.waiting == 0


def test_a_full_queue_refuses_and_takes_again_when_one_is_gone() -> None:
    scheduler = Scheduler(1, queue=2)
    scheduler.submit(0, 1)
    scheduler.admit()
    for key in (1, 2):
        scheduler.submit(key, 1)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        scheduler.submit(3, 1)
    assert scheduler.cancel(1)
    scheduler.submit(3, 1)
    assert scheduler.waiting == 2


def test_deadlines_end_waiting_and_live_requests() -> None:
    scheduler = Scheduler(1)
    scheduler.submit(0, 5, deadline=2.0)
    scheduler.submit(1, 5, deadline=1.0)
    scheduler.submit(2, 5)
    assert scheduler.expire(0.0) == []
    assert scheduler.admit() == [0]
    assert scheduler.expire(1.0) == [1]
    assert scheduler.expire(2.0) == [0]
    assert scheduler.admit() == [2]
    assert not scheduler.cancel(0)


def test_a_fixed_chunk_cuts_prompts_as_they_are_cut_alone() -> None:
    world = World(Scheduler(3, chunk=4), budget=Budget(1000))
    for key, tokens in enumerate((10, 4, 9)):
        world.submit(key, Wanted(tokens, 1))
    pieces: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while not (plan := world.step()).idle:
        assert len(plan.prefill) <= 1
        for piece in plan.prefill:
            pieces[piece.key].append(piece.count)
    assert pieces == {0: [4, 4, 2], 1: [4], 2: [4, 4, 1]}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rows", lambda: Scheduler(0)),
        ("queue", lambda: Scheduler(1, queue=0)),
        ("tokens", lambda: Scheduler(1).submit(0, 0)),
    ],
)
def test_nonsense_is_refused(name: str, make: object) -> None:
    with pytest.raises(ParameterError, match=f"{name} must be at least 1"):
        make()  # type: ignore[operator]


def test_a_number_is_of_one_request_only() -> None:
    scheduler = Scheduler(1)
    scheduler.submit(7, 1)
    with pytest.raises(ParameterError, match="key must be one that no live request has"):
        scheduler.submit(7, 1)
