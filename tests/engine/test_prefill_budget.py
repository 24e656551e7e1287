"""Prefill budget and scheduler together on a machine whose steps take a time by formula."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrun.engine.scheduler import MIN_SHARE, SLOWDOWN, WINDOW, PrefillBudget, Scheduler

MOST = 64


@dataclass(eq=False)
class Prompt:
    """A sequence that ends with its first token."""

    started: float
    num_tokens: int
    priority: int = 0
    deadline: float | None = None
    arrival: int = 0
    num_computed: int = 0
    num_reusable: int = 0
    waits_for_prefix: bool = False
    awaits_progress: bool = False
    reserved: int = 0
    reserved_slots: int = 0
    can_decode: bool = False

    @property
    def num_slots(self) -> int:
        return self.num_computed + 1

    def cost(self, slots: int) -> int:
        return slots


@dataclass
class Machine:
    """Seconds of a step, of a token in it, and of a token of context before that."""

    step: float = 3.5e-3
    token: float = 0.19e-3
    context: float = 0.57e-6

    def seconds(self, chunks: Collection[tuple[int, int]]) -> float:
        """Of a step that prefills chunks of (context, tokens)."""
        return self.step + sum(
            count * (self.token + self.context * (start + count / 2)) for start, count in chunks
        )


class World:
    """Serves prompts, each at the time at which it arrives.

    Attributes:
        steps: seconds of each.
        counts: tokens of each.
    """

    def __init__(self, machine: Machine, stall: float = 0.1) -> None:
        self.machine, self.budget = machine, PrefillBudget(stall, MOST)
        self.scheduler: Scheduler[Prompt] = Scheduler(self.budget, rows=100)
        self.now = 0.0
        self.steps: list[float] = []
        self.counts: list[int] = []

    def serve(self, arrivals: list[tuple[float, int]]) -> list[float]:
        """Seconds that each of (arrival, tokens) waits for its first token."""
        prompts = [Prompt(*arrival) for arrival in arrivals]
        coming = sorted(prompts, key=lambda prompt: prompt.started, reverse=True)
        waited: dict[Prompt, float] = {}
        while len(waited) < len(prompts):
            while coming and coming[-1].started <= self.now:
                self.scheduler.add(coming.pop())
            chunks = self.scheduler.schedule().prefill
            if not chunks:
                self.now = coming[-1].started
                continue
            self.step([(prompt.num_computed, count) for prompt, count in chunks])
            for prompt, count in chunks:
                prompt.num_computed += count
                if prompt.num_computed == prompt.num_tokens:
                    self.scheduler.finish(prompt)
                    waited[prompt] = self.now - prompt.started
        return [waited[prompt] for prompt in prompts]

    def step(self, chunks: Collection[tuple[int, int]]) -> None:
        seconds = self.machine.seconds(chunks)
        self.now += seconds
        self.steps.append(seconds)
        self.counts.append(sum(count for _, count in chunks))
        self.budget.observe(chunks, seconds, decoding=False)


def learned_world(machine: Machine, long: int = 1800) -> World:
    """A world that has prefilled prompts before, at time 0."""
    world = World(machine)
    world.serve([(0.0, long)])
    world.serve([(world.now, MOST)])
    world.now = 0.0
    world.steps.clear()
    world.counts.clear()
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
    (idle,) = learned_world(machine).serve([(0.0, MOST)])
    waited = []
    for _ in range(count):
        at = rng.uniform(0, 1800 * machine.token)
        _, short = learned_world(machine).serve([(0.0, 1800), (at, MOST)])
        waited.append(short / idle)
    return waited


def test_a_short_prompt_behind_a_long_one_waits_less_than_twice_as_long_as_alone() -> None:
    assert median(ratios(Machine(), 100, seed=1)) < 1.9


@given(machines, st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_it_waits_for_one_step_at_most_on_any_machine(machine: Machine, seed: int) -> None:
    assert max(ratios(machine, 8, seed)) < 1 + 1.3 * SLOWDOWN


def test_a_long_prompt_that_is_alone_is_not_much_slower_for_it() -> None:
    machine = Machine()
    (paced,) = learned_world(machine).serve([(0.0, 1800)])
    fixed = World(machine, stall=math.inf)
    (fast,) = fixed.serve([(0.0, 1800)])
    assert paced < fast / 0.9
    assert set(fixed.counts[:-1]) == {MOST}


def test_steps_take_no_longer_where_the_context_is_long_down_to_a_least_chunk() -> None:
    machine = Machine()
    world = learned_world(machine)
    world.serve([(0.0, 3000)])
    first = machine.seconds([(0, MOST)])
    assert world.counts[0] == MOST
    least = int(MOST * MIN_SHARE)
    assert min(world.counts[:-1]) == least
    longest = 1.3 * SLOWDOWN * first
    assert all(s < longest for s, n in zip(world.steps, world.counts, strict=True) if n > least)


def test_a_prompt_after_a_long_one_is_prefilled_in_one_step() -> None:
    world = learned_world(Machine())
    world.serve([(0.0, 3000)])
    world.serve([(world.now, MOST)])
    assert world.counts[-1] == MOST


@pytest.mark.parametrize("times", [50.0, 0.1])
def test_a_few_disturbed_steps_change_nothing(times: float) -> None:
    world = learned_world(Machine())
    before = world.budget.tokens
    chunks = [(0, MOST)]
    for _ in range(WINDOW // 2):
        world.budget.observe(chunks, times * world.machine.seconds(chunks), decoding=False)
    for _ in range(WINDOW - 1):
        world.step(chunks)
    assert world.budget.tokens == before


def test_where_others_decode_a_step_prefills_no_more_than_the_stall_allows() -> None:
    budget = PrefillBudget(stall=0.1, most=64)
    assert budget.tokens == 64
    for _ in range(20):
        budget.observe([], 0.01, decoding=True)
        budget.observe([(0, 40)], 0.41, decoding=True)  # a hundred tokens a second
        budget.observe([(0, 10)], 0.11, decoding=True)
    assert budget.tokens == budget.tokens_after(0) == 10
    slow = PrefillBudget(stall=0.001, most=64)
    slow.observe([(0, 64)], 64.0, decoding=False)
    assert slow.tokens == slow.tokens_after(1000) == 1


def test_where_only_throughput_counts_steps_are_as_large_as_they_may() -> None:
    budget = PrefillBudget(stall=math.inf, most=256)
    for _ in range(20):
        budget.observe([(1000, 256)], 10.0, decoding=False)
    assert budget.tokens_after(5000) == 256
