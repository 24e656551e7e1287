"""One more token for every row: model and samplers as one pure function, compiled.

Building the graph of a step takes Python longer than a small model takes to run. A step over
:mod:`~mlxrun.kv_cache.batch` caches is the same graph again and again, so MLX's compiler records
it once and replays it: at a bucket's edge, or when other rows come, it is recorded anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx

from mlxrun.generation.plan import Group, Plan, Settings, State
from mlxrun.generation.sampling import Sampled, Sampler, next_token
from mlxrun.kernels.compilation import avoid_fusion
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.batch import BatchCache, DecodeRows, DecodeSlots, LayerArrays, Part
from mlxrun.kv_cache.dense import RowCache
from mlxrun.model import JointModel, Model

Made = tuple[Any, Any, Any, mx.array]
Step = Callable[..., Made]

# Like steps before one is recorded, which takes about as long as building two.
PATIENCE = 4
# Kinds of steps to keep recorded.
KINDS = 16


class Samplers(Protocol):
    """What draws the tokens of a step's rows."""

    @property
    def groups(self) -> Sequence[Group]: ...

    @property
    def order(self) -> mx.array | None:
        """Where each row's token is among those of the groups; None for in order."""

    def advance(self, states: Sequence[State]) -> None:
        """Take over the states after a step."""


class Drawing(NamedTuple):
    """Tokens (B,) of a step's rows, and what each group drew; unevaluated."""

    tokens: mx.array
    groups: list[Sampled]

    @property
    def arrays(self) -> list[mx.array]:
        """All of it, to be queued."""
        return [self.tokens, *(a for own in self.groups for a in own if a is not None)]


def draw(samplers: Samplers, logits: mx.array) -> Drawing:
    """Sample each row of logits (B, V)."""
    drawing, states = _draw(samplers.groups, samplers.order, logits)
    samplers.advance(states)
    return drawing


def _draw(
    groups: Sequence[Group], order: mx.array | None, logits: mx.array
) -> tuple[Drawing, list[State]]:
    drawn, states = [], []
    for plan, settings, state, which in groups:
        own = logits if which is None else logits[which]
        sampled, state = next_token(plan, settings, state, own)
        drawn.append(sampled)
        states.append(state)
    tokens = drawn[0].token if len(drawn) == 1 else mx.concatenate([s.token for s in drawn])
    return Drawing(tokens if order is None else tokens[order], drawn), states


class Stepper:
    """Steps of one model.

    Args:
        model: whose weights they use.

    Attributes:
        patience: steps of a kind that are built before one is recorded.
        refusal: why MLX cannot record steps here, so that all are built; None if it can.
    """

    def __init__(self, model: Model[Any]) -> None:
        self.model = model
        self.patience = PATIENCE
        self.refusal = avoid_fusion()
        # A recorded function must not outlive the thread that recorded it: MLX aborts.
        self._of_thread = threading.local()

    @property
    def recorded(self) -> OrderedDict[Hashable, Step]:
        """What this thread has recorded, the latest used last."""
        mine: OrderedDict[Hashable, Step]
        mine = self._of_thread.__dict__.setdefault("recorded", OrderedDict())
        return mine

    def rows(self, caches: Sequence[KVCache]) -> DecodeRows | None:
        """Caches as a step takes them; None where a step cannot be a pure function of them."""
        if not (self.model.joint and DecodeRows.possible(caches)):
            return None
        return DecodeRows(cast(Sequence[RowCache], caches))

    def alone(
        self,
        token: mx.array,
        rows: DecodeRows | None,
        caches: Sequence[KVCache],
        sampler: Sampler,
        done: int,
    ) -> Drawing:
        """Queue one more token of a sequence by itself.

        Args:
            token: the last, (1,).
            rows: of its caches, as :meth:`rows` gives them.
            done: steps that it has made like this before: what its tokens are computed by depends
                on nothing else.
        """
        if rows is None:
            return draw(sampler, self.model(token[None], caches)[:, -1])
        return self(token, [rows], sampler, compiled=done >= self.patience)

    def __call__(
        self,
        tokens: mx.array,
        rows: Sequence[DecodeRows],
        samplers: Samplers,
        wanted: mx.array | None = None,
        *,
        compiled: bool = True,
    ) -> Drawing:
        """Queue one more token of each row.

        Args:
            tokens: the last of each, (N,), block by block.
            rows: the blocks they lie in; advanced by one.
            samplers: of those that are ``wanted``; advanced by one.
            wanted: rows that draw; None for all.
            compiled: replay a recording, made now if there is none.
        """
        for block in rows:
            block.prepare()
        groups, order = list(samplers.groups), samplers.order
        optional = [wanted, order, *(group.which for group in groups)]
        there = [one is not None for one in optional]
        arguments = (
            tokens,
            [block.offsets for block in rows],
            [block.arrays for block in rows],
            [block.fixed for block in rows],
            [[list(group.settings), list(group.state)] for group in groups],
            [one for one in optional if one is not None],
        )
        step = self._recorded if compiled and not self.refusal else self._built
        caches, drawn, states, out = step(rows, groups, there)(*arguments)
        for block, arrays in zip(rows, caches, strict=True):
            block.advance(arrays)
        samplers.advance([State(*state) for state in states])
        return Drawing(out, [Sampled(*own) for own in drawn])

    def _built(
        self, rows: Sequence[DecodeRows], groups: Sequence[Group], there: Sequence[bool]
    ) -> Step:
        """The step as Python makes it."""
        views, plans = [block.views for block in rows], [group.plan for group in groups]
        caches = [block.caches for block in rows]
        return _step(cast(JointModel, self.model), caches, views, plans, there)

    def _recorded(
        self, rows: Sequence[DecodeRows], groups: Sequence[Group], there: Sequence[bool]
    ) -> Step:
        """Its recording, new where there was none."""
        shapes = [group.settings.key.shape + group.state.window.shape for group in groups]
        plans = tuple(group.plan for group in groups)
        key = tuple(block.key for block in rows), plans, tuple(there), tuple(shapes)
        recorded = self.recorded
        step = recorded.pop(key, None)
        if step is None:
            views, likes = [block.views for block in rows], [block.bare() for block in rows]
            model = cast(JointModel, self.model)
            step = cast(Step, mx.compile(_step(model, likes, views, plans, there)))
        recorded[key] = step  # the latest used last
        if len(recorded) > KINDS:
            recorded.popitem(last=False)
        return step


def _step(
    model: JointModel,
    likes: Sequence[Sequence[RowCache]],
    views: Sequence[dict[Hashable, int]],
    plans: Sequence[Plan],
    there: Sequence[bool],
) -> Step:
    """A step as a pure function of arrays; what it is given here goes into the recording."""

    def step(
        tokens: mx.array,
        offsets: list[mx.array],
        arrays: list[list[LayerArrays]],
        fixed: list[list[LayerArrays]],
        samplers: list[list[list[mx.array]]],
        optional: list[mx.array],
    ) -> tuple[list[list[LayerArrays]], list[list[mx.array]], list[list[mx.array]], mx.array]:
        given = iter(optional)
        wanted, order, *indices = [next(given) if one else None for one in there]
        blocks = [
            _slots(*block) for block in zip(likes, arrays, fixed, offsets, views, strict=True)
        ]
        hidden = model.hidden(tokens[:, None], _side_by_side(blocks, offsets))  # (N, 1, hidden)
        logits = model.head(hidden if wanted is None else hidden[wanted])[:, 0]
        groups = [
            Group(plan, Settings(*settings), State(*state), index)
            for plan, (settings, state), index in zip(plans, samplers, indices, strict=True)
        ]
        drawing, states = _draw(groups, order, logits)
        drawn = [[array for array in own if array is not None] for own in drawing.groups]
        held = [[slots.arrays for slots in block] for block in blocks]
        return held, drawn, [list(state) for state in states], drawing.tokens

    return step


def _slots(
    likes: Sequence[RowCache],
    arrays: list[LayerArrays],
    fixed: list[LayerArrays],
    offsets: mx.array,
    views: dict[Hashable, int],
) -> list[DecodeSlots]:
    places: dict[Hashable, tuple[mx.array, mx.array]] = {}
    spreads: dict[Hashable, mx.array] = {}
    return [
        DecodeSlots(like, own, shared, offsets, views[like.layout], places, spreads)
        for like, own, shared in zip(likes, arrays, fixed, strict=True)
    ]


def _side_by_side(
    blocks: Sequence[list[DecodeSlots]], offsets: Sequence[mx.array]
) -> Sequence[KVCache]:
    """For each layer, one cache for the rows of all blocks."""
    if len(blocks) == 1:
        return blocks[0]
    position = mx.concatenate(list(offsets))
    return [
        BatchCache([Part(slots, slots.position.shape[0], 1) for slots in layer], position)
        for layer in zip(*blocks, strict=True)
    ]
