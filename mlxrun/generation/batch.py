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

from mlxrun.generation.blocks import Block, Blocks
from mlxrun.generation.engine import Step
from mlxrun.generation.groups import SamplerGroups
from mlxrun.generation.sampling import Sampled, Sampler
from mlxrun.generation.stepping import Stepper, draw
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.batch import BatchCache, DecodeRows, Part
from mlxrun.kv_cache.dense import RowCache
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
        rows: its caches as steps of its own take them, if they can.
        block, row: where it decodes; None until it does.
        place: which of the last step's tokens is its own.
        steps: tokens drawn so far, read or not.
    """

    key: int
    prompt: Sequence[int]
    sampler: Sampler
    limit: int
    cache: list[KVCache]
    read: int = 0
    rows: DecodeRows | None = None
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
        self._alone: tuple[Live, ...] = ()  # those of the last step that have no row
        self._samplers = SamplerGroups()
        self._stepper = Stepper(model)
        self._members: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        self._alike = 0  # steps in a row that differed in nothing but the tokens
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
        drawn = (self._together if self.joint else self._apart)(decoding, pieces)
        unread = [s for s, _ in pieces if s not in ready]
        states = [a for s in unread for cache in s.cache for a in cache.state]
        if drawn is None:
            # Nothing to read meanwhile: to queue another step would only let who comes now wait.
            mx.eval(states)
            return None
        finite = [] if drawn.finite is None else [drawn.finite]
        reports = [a for own, _ in drawn.groups for a in own if a is not None]
        mx.async_eval(states, drawn.tokens, reports, finite)  # type: ignore[no-untyped-call]
        for place, sequence in enumerate(drawn.sequences):
            sequence.place = place
            sequence.steps += 1
        self._last = drawn.tokens
        return drawn

    def leave(self, sequence: Live) -> None:
        """Forget a sequence."""
        sequence.cache, sequence.rows = [], None
        if sequence.block is not None:
            sequence.block.clear(sequence.row)
            sequence.block = None

    def rest(self) -> None:
        """Let go of all rows: nobody has one, and it may be long until somebody comes."""
        self._blocks.settle()

    def memories(self, sequence: Live) -> list[KVCache]:
        """What a sequence remembers, to be read before the next step."""
        if sequence.block is None:
            return sequence.cache
        return [cache.only(sequence.row) for cache in sequence.block.caches]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, what they hold together counted once, and of who goes alone."""
        alone = sum(cache.nbytes for sequence in self._alone for cache in sequence.cache)
        return self._blocks.nbytes + alone

    def _apart(self, decoding: Sequence[Live], pieces: Sequence[tuple[Live, int]]) -> Drawn | None:
        """Compute each sequence alone."""
        self._alone = (*decoding, *(sequence for sequence, _ in pieces))
        drawings, ready, finite = [], [], []
        for sequence in decoding:
            assert self._last is not None
            token = self._last[sequence.place][None]
            done, sampler = sequence.steps - 1, sequence.sampler
            if not done:
                sequence.rows = self._stepper.rows(sequence.cache)
            drawings.append(
                self._stepper.alone(token, sequence.rows, sequence.cache, sampler, done)
            )
        for sequence, count in pieces:
            part = mx.array([list(sequence.prompt[sequence.read : sequence.read + count])])
            logits = self.model(part, sequence.cache, last_only=True)[:, -1]
            sequence.read += count
            if sequence.read == len(sequence.prompt):
                ready.append(sequence)
                finite.append(mx.isfinite(logits).all(axis=-1))
                drawings.append(draw(sequence.sampler, logits))
        self.computed += len(decoding) + sum(count for _, count in pieces)
        if not drawings:
            return None
        groups = [
            (own, [place]) for place, drawing in enumerate(drawings) for own in drawing.groups
        ]
        tokens = mx.concatenate([drawing.tokens for drawing in drawings])
        return Drawn(
            (*decoding, *ready), tokens, groups, mx.concatenate(finite) if finite else None
        )

    def _together(
        self, decoding: Sequence[Live], pieces: Sequence[tuple[Live, int]]
    ) -> Drawn | None:
        """Compute all in one pass."""
        joining = [sequence for sequence in decoding if sequence.block is None]
        self._blocks.join((s, cast(list[RowCache], s.cache)) for s in joining)
        for sequence in joining:
            sequence.cache = []
        self._blocks.settle()
        blocks = list(self._blocks)
        held = [s for block in blocks for s in block.rows]
        self.computed += len(held) + sum(count for _, count in pieces)
        self.wasted += len(held) - len(decoding)
        at = {sequence: place for place, sequence in enumerate(held) if sequence is not None}
        wanted = [at[sequence] for sequence in decoding]
        tokens = [] if self._last is None or not held else [self._after(self._last, held)]
        rows = [block.values for block in blocks]
        samplers = self._samplers
        if not pieces and None not in rows:
            return self._replay(decoding, tokens[0], cast(list[DecodeRows], rows), wanted)
        logits, ready = self._flat(blocks, tokens, wanted, pieces)
        drawing = (*decoding, *ready)
        if not drawing:
            return None
        drawn = draw(samplers.of([s.sampler for s in drawing]), logits)
        finite = mx.isfinite(logits[len(decoding) :]).all(axis=-1) if ready else None
        groups = list(zip(drawn.groups, samplers.rows, strict=True))
        return Drawn(drawing, drawn.tokens, groups, finite)

    def _replay(
        self,
        decoding: Sequence[Live],
        tokens: mx.array,
        rows: Sequence[DecodeRows],
        wanted: list[int],
    ) -> Drawn:
        """A step that only decodes."""
        members = tuple(s.key for s in decoding), tuple(map(id, rows))
        self._alike = self._alike + 1 if members == self._members else 0
        self._members = members
        every = wanted == list(range(tokens.shape[0]))
        drawing = self._stepper(
            tokens,
            rows,
            self._samplers.of([s.sampler for s in decoding]),
            None if every else mx.array(wanted),
            compiled=self._alike >= self._stepper.patience,
        )
        groups = list(zip(drawing.groups, self._samplers.rows, strict=True))
        return Drawn(tuple(decoding), drawing.tokens, groups, None)

    @staticmethod
    def _after(last: mx.array, held: Sequence[Live | None]) -> mx.array:
        """The last token of each row, (N,); of any other for an idle one."""
        places = [0 if sequence is None else sequence.place for sequence in held]
        in_order = places == list(range(last.shape[0]))
        return last if in_order else last[mx.array(places)]

    def _flat(
        self,
        blocks: Sequence[Block[Live]],
        tokens: list[mx.array],
        wanted: list[int],
        pieces: Sequence[tuple[Live, int]],
    ) -> tuple[mx.array, list[Live]]:
        """Logits (B, V) of the wanted rows and of prompts that end, and whose those are."""
        positions = [offset for block in blocks for offset in block.caches[0].offsets]
        layers = len(blocks[0].caches if blocks else pieces[0][0].cache)
        parts: list[list[Part]] = [[] for _ in range(layers)]
        for block in blocks:
            for own, cache in zip(parts, block.caches, strict=True):
                own.append(Part(cache, len(block.rows), 1))
        ready = []
        for sequence, count in pieces:
            tokens.append(mx.array(list(sequence.prompt[sequence.read : sequence.read + count])))
            positions.extend(range(sequence.read, sequence.read + count))
            for own, mine in zip(parts, cast(list[RowCache], sequence.cache), strict=True):
                own.append(Part(mine, 1, count))
            sequence.read += count
            if sequence.read == len(sequence.prompt):
                ready.append(sequence)
                wanted.append(len(positions) - 1)
        where = mx.array(positions)
        joined = mx.concatenate([t.astype(mx.uint32) for t in tokens])[:, None]  # (N, 1)
        model = cast(JointModel, self.model)
        hidden = model.hidden(joined, [BatchCache(own, where) for own in parts])  # (N, 1, hidden)
        return model.head(hidden[mx.array(wanted)])[:, 0] if wanted else hidden, ready
