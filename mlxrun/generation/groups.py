"""Batched sampling: rows with equal plans share one graph.

A row's tokens do not depend on the other rows: its noise comes from its own seed, and every stage
works row by row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from mlxrun.generation.plan import Group, Settings, State
from mlxrun.generation.sampling import Sampler


class _Alike:
    """Samplers of equal plan and shapes, stacked; it holds their states meanwhile."""

    def __init__(self, samplers: Sequence[Sampler], index: mx.array | None) -> None:
        self._samplers = list(samplers)
        plan = samplers[0].plan
        settings = Settings(*_joined([s.settings for s in samplers]))
        self.group = Group(plan, settings, State(*_joined([s.state for s in samplers])), index)

    def advance(self, state: State) -> None:
        self.group = self.group._replace(state=state)
        for sampler in self._samplers:
            sampler.tokens += 1

    def dissolve(self) -> None:
        for row, sampler in enumerate(self._samplers):
            sampler.state = State(*(array[row : row + 1] for array in self.group.state))


def _joined(rows: Sequence[tuple[mx.array, ...]]) -> list[mx.array]:
    return [mx.concatenate(list(arrays)) for arrays in zip(*rows, strict=True)]


class SamplerGroups:
    """The samplers of a batch's rows, regrouped only when rows come or go.

    Attributes:
        rows: the rows of each group.
        order: index of each row's token in the concatenated groups; None if in order.
    """

    def __init__(self) -> None:
        self._alike: list[_Alike] = []
        self._members: list[Sampler] = []
        self.rows: list[list[int]] = []
        self.order: mx.array | None = None

    def of(self, samplers: Sequence[Sampler]) -> Self:
        """These groups, arranged for the samplers, one per row."""
        members = list(samplers)
        if members != self._members or any(sampler.full for sampler in members):
            self._regroup(members)
        return self

    @property
    def groups(self) -> Sequence[Group]:
        return [alike.group for alike in self._alike]

    def advance(self, states: Sequence[State]) -> None:
        for alike, state in zip(self._alike, states, strict=True):
            alike.advance(state)

    def dissolve(self) -> None:
        """Hand states back to their samplers."""
        for alike in self._alike:
            alike.dissolve()
        self._members, self._alike = [], []

    def _regroup(self, members: list[Sampler]) -> None:
        self.dissolve()
        places: dict[object, list[int]] = defaultdict(list)
        for row, sampler in enumerate(members):
            if sampler.full:
                sampler.widen()
            places[sampler.shape].append(row)
        self.rows = list(places.values())
        several = len(self.rows) > 1
        self._alike = [
            _Alike([members[row] for row in rows], mx.array(rows) if several else None)
            for rows in self.rows
        ]
        order = [row for rows in self.rows for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        self.order = mx.array(back) if several else None
        self._members = members
