"""Pace and scheduler together on a machine whose every step takes a time that is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.generation.pace import LEAST, LONGER, MEMORY, Pace
from mlxrun.generation.scheduler import Piece, Scheduler

MOST = 64


@dataclass
class Machine:
    """Seconds of a step, of a token in it, of a token of context before that, of one decoding."""

    step: float = 3.5e-3
    token: float = 0.19e-3
    context: float = 0.57e-6
    row: float = 0.5e-3

    def seconds(self, pieces: tuple[Piece, ...], rows: int = 0) -> float:
        reading = sum(
            p.count * (self.token + self.context * (p.start + p.count / 2)) for p in pieces
        )
        return self.step + reading + rows * self.row


@dataclass
class World:
    """Serves prompts, each at the time at which it arrives; notes when its last token was read."""

    machine: Machine
    pace: Pace
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(100))
    now: float = 0.0
    steps: list[float] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)

    def serve(self, arrivals: list[tuple[float, int]]) -> list[float]:
        """Seconds that each of (arrival, tokens) waits for its first token."""
        coming = sorted(enumerate(arrivals), key=lambda item: item[1][0], reverse=True)
        waited = [math.nan] * len(arrivals)
        while any(map(math.isnan, waited)):
            while coming and coming[-1][1][0] <= self.now:
                key, (_, tokens) = coming.pop()
                self.scheduler.submit(key, tokens)
            self.scheduler.admit()
            plan = self.scheduler.plan(self.pace.budget)
            if plan.idle:
                self.now = coming[-1][1][0]
                continue
            self.step(plan.prefill)
            for piece in plan.prefill:
                self.scheduler.read(piece.key, piece.count)
                if piece.start + piece.count == arrivals[piece.key][1]:
                    self.scheduler.ended(piece.key)
                    waited[piece.key] = self.now - arrivals[piece.key][0]
        return waited

    def step(self, pieces: tuple[Piece, ...]) -> None:
        seconds = self.machine.seconds(pieces)
        self.now += seconds
        self.steps.append(seconds)
        self.pieces.append(sum(piece.count for piece in pieces))
        behind = sum(piece.count * piece.start for piece in pieces)
        self.pace.note(sum(p.count for p in pieces), behind, seconds, beside=False)


def learnt(machine: Machine, long: int = 1800) -> World:
    """A world that has read prompts before, from the time 0 on."""
    world = World(machine, Pace(stall=0.1, most=MOST))
    world.serve([(0.0, long)])
    world.serve([(world.now, MOST)])
    world.now = 0.0
    world.steps.clear()
    world.pieces.clear()
    return world


machines = st.builds(
    Machine,
    step=st.floats(0, 5e-3),
    token=st.floats(0.1e-3, 0.5e-3),
    context=st.floats(0, 1e-6),
)


def ratios(machine: Machine, count: int, seed: int) -> list[float]:
    """How much longer prompts wait that arrive behind a long one than on an idle machine."""
    rng = Random(seed)
    (idle,) = learnt(machine).serve([(0.0, MOST)])
    waited = []
    for _ in range(count):
        at = rng.uniform(0, 1800 * machine.token)
        _, short = learnt(machine).serve([(0.0, 1800), (at, MOST)])
        waited.append(short / idle)
    return waited


def test_a_short_prompt_behind_a_long_one_waits_less_than_twice_as_long_as_alone() -> None:
    assert median(ratios(Machine(), 100, seed=1)) < 1.9


@given(machines, st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_it_waits_for_one_step_at_most_on_any_machine(machine: Machine, seed: int) -> None:
    assert max(ratios(machine, 8, seed)) < 1 + 1.3 * LONGER


def test_a_long_prompt_that_is_alone_is_not_much_slower_for_it() -> None:
    machine = Machine()
    (paced,) = learnt(machine).serve([(0.0, 1800)])
    fixed = World(machine, Pace(stall=math.inf, most=MOST))
    (fast,) = fixed.serve([(0.0, 1800)])
    assert paced < fast / 0.9
    assert set(fixed.pieces[:-1]) == {MOST}


def test_steps_take_no_longer_where_the_context_is_long_down_to_a_least_piece() -> None:
    machine = Machine()
    world = learnt(machine)
    world.serve([(0.0, 3000)])
    first = machine.seconds((Piece(0, 0, MOST),))
    assert world.pieces[0] == MOST
    least = MOST // LEAST
    assert min(world.pieces[:-1]) == least
    longest = 1.3 * LONGER * first
    assert all(s < longest for s, n in zip(world.steps, world.pieces, strict=True) if n > least)


def test_a_prompt_after_a_long_one_is_read_in_one_step() -> None:
    world = learnt(Machine())
    world.serve([(0.0, 3000)])
    world.serve([(world.now, MOST)])
    assert world.pieces[-1] == MOST


@pytest.mark.parametrize("times", [50.0, 0.1])
def test_a_few_disturbed_steps_change_nothing(times: float) -> None:
    world = learnt(Machine())
    before = world.pace.budget
    for _ in range(MEMORY // 2):
        world.pace.note(MOST, 0, times * world.machine.seconds((Piece(0, 0, MOST),)), beside=False)
    for _ in range(MEMORY - 1):
        world.step((Piece(0, 0, MOST),))
    assert world.pace.budget.tokens == before.tokens


def test_beside_decoding_a_step_reads_no_more_than_the_stall_allows() -> None:
    pace = Pace(stall=0.1, most=64)
    assert pace.budget.tokens == 64
    for _ in range(20):
        pace.note(0, 0, 0.01, beside=True)
        pace.note(40, 0, 0.41, beside=True)  # a hundred tokens a second
        pace.note(10, 0, 0.11, beside=True)
    assert pace.budget.tokens == 10
    slow = Pace(stall=0.001, most=64)
    slow.note(64, 0, 64.0, beside=False)
    assert slow.budget.tokens == 1


def test_where_nobody_waits_steps_are_as_large_as_they_may() -> None:
    pace = Pace(stall=math.inf, most=256)
    for _ in range(20):
        pace.note(256, 256 * 1000, 10.0, beside=False)
    assert pace.budget.at(5000) == 256
