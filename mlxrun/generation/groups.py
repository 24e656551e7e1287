"""Sampling for many requests at once: rows whose plans are alike share one graph.

A row's tokens do not depend on the rows beside it: its noise comes from its own seed, and every
stage works row by row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import mlx.core as mx

from mlxrun.generation.plan import Settings, State
from mlxrun.generation.sampling import Sampled, Sampler, next_token


class _Group:
    """Samplers whose plans and shapes are alike, as one; it holds their states meanwhile."""

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self.samplers = list(samplers)
        self._settings = Settings(*_joined([s.settings for s in samplers]))
        self._state = State(*_joined([s.state for s in samplers]))

    def sample(self, logits: mx.array) -> Sampled:
        plan = self.samplers[0].plan
        sampled, self._state = next_token(plan, self._settings, self._state, logits)
        for sampler in self.samplers:
            sampler.tokens += 1
        return sampled

    def dissolve(self) -> None:
        for row, sampler in enumerate(self.samplers):
            sampler.state = State(*(array[row : row + 1] for array in self._state))


def _joined(rows: Sequence[tuple[mx.array, ...]]) -> list[mx.array]:
    return [mx.concatenate(list(arrays)) for arrays in zip(*rows, strict=True)]


class SamplerGroups:
    """The samplers of a batch's rows, grouped anew only when rows come or go."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._rows: list[list[int]] = []
        self._index: list[mx.array] = []
        self._place = mx.array(0)
        self._members: list[Sampler] = []

    def sample(
        self, samplers: Sequence[Sampler], logits: mx.array
    ) -> tuple[mx.array, list[tuple[Sampled, list[int]]]]:
        """Draw a token for each row.

        Args:
            samplers: of the rows, in order.
            logits: (B, V).

        Returns:
            The tokens of all rows, (B,), and what each group drew with the rows it drew for; all
            unevaluated.
        """
        members = list(samplers)
        if members != self._members or any(sampler.full for sampler in members):
            self._regroup(members)
        if len(self._groups) == 1:
            sampled = self._groups[0].sample(logits)
            return sampled.token, [(sampled, self._rows[0])]
        drawn = [
            (group.sample(logits[index]), rows)
            for group, index, rows in zip(self._groups, self._index, self._rows, strict=True)
        ]
        return mx.concatenate([sampled.token for sampled, _ in drawn])[self._place], drawn

    def _regroup(self, members: list[Sampler]) -> None:
        for group in self._groups:
            group.dissolve()
        alike: dict[object, list[int]] = defaultdict(list)
        for row, sampler in enumerate(members):
            if sampler.full:
                sampler.widen()
            alike[sampler.shape].append(row)
        self._rows = list(alike.values())
        self._groups = [_Group([members[row] for row in rows]) for rows in self._rows]
        self._index = [mx.array(rows) for rows in self._rows]
        order = [row for rows in self._rows for row in rows]
        self._place = mx.array(sorted(range(len(order)), key=order.__getitem__))
        self._members = members
