"""Sequences that go through a model together: join, step, leave.

Knows models, caches and samplers; knows neither text nor why a sequence is here. A sequence reads
its prompt into caches of its own. When it has, what they hold moves into a row of the batch's, in
which it decodes beside the others; a row that becomes free is taken by the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxrun.cache.base import Memory
from mlxrun.cache.ragged import Part, Ragged
from mlxrun.cache.rows import RowCache
from mlxrun.generation.blocks import Block, Blocks
from mlxrun.generation.engine import Step
from mlxrun.generation.groups import SamplerGroups
from mlxrun.generation.sampling import Sampled, Sampler
from mlxrun.model import JointModel, Model


@dataclass(eq=False)
class Live:
    """One prompt and its continuation, on the device.

    Attributes:
        key: its number, for whoever asked for it.
        prompt: token ids.
        sampler: draws its tokens.
        limit: the most tokens to draw.
        cache: of its own, until it has a row.
        read: tokens of the prompt that are in the cache.
        block, row: where it decodes; None until it does.
        place: which of the last step's tokens is its own.
        steps: tokens drawn so far, read or not.
    """

    key: int
    prompt: Sequence[int]
    sampler: Sampler
    limit: int
    cache: list[Memory]
    read: int = 0
    block: Block[Live] | None = None
    row: int = 0
    place: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        for memory in self.cache:
            memory.prompt = len(self.prompt)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of all that may be drawn."""
        return len(self.prompt) + self.limit


class Drawn(NamedTuple):
    """What a step drew, queued on the device.

    Attributes:
        sequences: whose tokens they are, in order.
        tokens: (B,).
        groups: what the samplers report, with the places that each report is about.
        finite: for the last of them, which draw their first token: whether logits are numbers.
    """

    sequences: tuple[Live, ...]
    tokens: mx.array
    groups: list[tuple[Sampled, list[int]]]
    finite: mx.array | None

    def read(self) -> list[tuple[Live, Step | None]]:
        """Wait for the tokens; None for a sequence whose logits are no numbers."""
        steps: list[Step | None] = [None] * len(self.sequences)
        for sampled, places in self.groups:
            for place, step in zip(places, Step.rows_of(sampled), strict=True):
                steps[place] = step
        if self.finite is not None:
            finite = cast(list[bool], self.finite.tolist())
            for back, fine in enumerate(reversed(finite), 1):
                steps[-back] = steps[-back] if fine else None
        return list(zip(self.sequences, steps, strict=True))


class Batch:
    """The sequences of one model that are live.

    Args:
        model: whose weights they share.
        joint: put all of them through one forward pass, where the model can. Otherwise each goes
            alone, with the very operations of a single sequence: slower, equal to the last bit.

    Attributes:
        computed: tokens that went through the model.
        wasted: idle rows among them.
    """

    def __init__(self, model: Model[Any], *, joint: bool) -> None:
        self.model, self.joint = model, joint and model.joint
        self._blocks: Blocks[Live] = Blocks()
        self._samplers = SamplerGroups()
        self._last: mx.array | None = None
        self.computed = self.wasted = 0

    def step(self, decoding: Sequence[Live], pieces: Sequence[tuple[Live, int]]) -> Drawn | None:
        """Queue one more token for each decoding sequence, and pieces of prompts.

        Args:
            decoding: sequences that have read their prompts and drawn a token in the last step.
            pieces: sequences and how many tokens of their prompts to read. One that comes to the
                end of its prompt draws its first token.

        Returns:
            What is drawn; None if no sequence draws.
        """
        ready = [s for s, count in pieces if s.read + count == len(s.prompt)]
        logits = (self._together if self.joint else self._apart)(decoding, pieces)
        unread = [s for s, _ in pieces if s not in ready]
        states = [a for s in unread for cache in s.cache for a in cache.state]
        drawing = (*decoding, *ready)
        if not drawing:
            # Nothing to read meanwhile: to queue another step would only let who comes now wait.
            mx.eval(states)
            return None
        mx.async_eval(states)  # type: ignore[no-untyped-call]
        tokens, groups = self._samplers.sample([s.sampler for s in drawing], logits)
        finite = mx.isfinite(logits[len(decoding) :]).all(axis=-1) if ready else None
        arrays = [a for sampled, _ in groups for a in sampled if a is not None]
        mx.async_eval(tokens, *arrays, *([] if finite is None else [finite]))  # type: ignore[no-untyped-call]
        for place, sequence in enumerate(drawing):
            sequence.place = place
            sequence.steps += 1
        self._last = tokens
        return Drawn(drawing, tokens, groups, finite)

    def leave(self, sequence: Live) -> None:
        """Forget a sequence."""
        sequence.cache = []
        if sequence.block is not None:
            sequence.block.clear(sequence.row)
            sequence.block = None

    def memories(self, sequence: Live) -> list[Memory]:
        """What a sequence remembers, to be read before the next step."""
        if sequence.block is None:
            return sequence.cache
        return [cache.only(sequence.row) for cache in sequence.block.caches]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(cache.nbytes for block in self._blocks for cache in block.caches)

    def _apart(self, decoding: Sequence[Live], pieces: Sequence[tuple[Live, int]]) -> mx.array:
        """Logits (B, V) of the sequences that draw, each computed alone."""
        logits = []
        for sequence in decoding:
            assert self._last is not None
            token = self._last[sequence.place]
            logits.append(self.model(token.reshape(1, 1), sequence.cache)[:, -1])
        for sequence, count in pieces:
            part = mx.array([list(sequence.prompt[sequence.read : sequence.read + count])])
            out = self.model(part, sequence.cache, last_only=True)[:, -1]
            sequence.read += count
            if sequence.read == len(sequence.prompt):
                logits.append(out)
        self.computed += len(decoding) + sum(count for _, count in pieces)
        return mx.concatenate(logits) if logits else mx.zeros((0, 1))

    def _together(self, decoding: Sequence[Live], pieces: Sequence[tuple[Live, int]]) -> mx.array:
        """Logits (B, V) of the sequences that draw, from one pass over all tokens."""
        for sequence in decoding:
            if sequence.block is None:
                self._blocks.join(sequence, cast(list[RowCache], sequence.cache))
                sequence.cache = []
        self._blocks.settle()
        places: list[int] = []  # of the last step's tokens, one for each row of every block
        positions: list[int] = []
        parts: list[list[Part]] = []
        at: dict[Live, int] = {}
        for block in self._blocks:
            at |= {s: len(places) + row for row, s in enumerate(block.rows) if s is not None}
            places.extend(0 if s is None else s.place for s in block.rows)
            positions.extend(block.caches[0].offsets)
            parts = parts or [[] for _ in block.caches]
            for own, cache in zip(parts, block.caches, strict=True):
                own.append(Part(cache, len(block.rows), 1))
        tokens = []
        if places:
            assert self._last is not None
            tokens.append(self._last[mx.array(places)])
        wanted = [at[sequence] for sequence in decoding]
        parts = parts or [[] for _ in pieces[0][0].cache]
        for sequence, count in pieces:
            tokens.append(mx.array(list(sequence.prompt[sequence.read : sequence.read + count])))
            positions.extend(range(sequence.read, sequence.read + count))
            for own, mine in zip(parts, cast(list[RowCache], sequence.cache), strict=True):
                own.append(Part(mine, 1, count))
            sequence.read += count
            if sequence.read == len(sequence.prompt):
                wanted.append(len(positions) - 1)
        self.computed += len(positions)
        self.wasted += len(places) - len(decoding)
        where = mx.array(positions)
        layers = [Ragged(own, where) for own in parts]
        joined = mx.concatenate([t.astype(mx.uint32) for t in tokens])[:, None]  # (N, 1)
        model = cast(JointModel, self.model)
        hidden = model.hidden(joined, layers)  # (N, 1, hidden)
        return model.head(hidden[mx.array(wanted)])[:, 0] if wanted else hidden
