"""A batch of sequences to sampled tokens: rows of KV caches, forward passes, compiled decode steps.

A sequence prefills into caches of its own. When it decodes, it has a row of a block. A step whose
sequences only decode is a pure function of arrays: MLX's compiler records it once and replays it
until a cache grows past a bucket's edge or other rows come, as building the graph of a small model
takes Python longer than running it. Other steps put all tokens through the model side by side,
(N, 1), with attention apart for each cache: selective batching (Orca: Yu et al., OSDI 2022).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as ListLike
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxrun.engine.blocks import BLOCK_ROWS, Block, Blocks
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.engine.scheduler import PrefillChunk
from mlxrun.engine.sequence import Sequence
from mlxrun.errors import NumericError
from mlxrun.kernels.compilation import avoid_fusion
from mlxrun.kv_cache.base import KVCache, StepCache
from mlxrun.kv_cache.batch import BatchCache, DecodeRows, DecodeSlots, LayerArrays, Part
from mlxrun.kv_cache.dense import RowCache
from mlxrun.model import Model
from mlxrun.outputs import TokenLogprob
from mlxrun.sampling.sampler import (
    SamplerBatch,
    SamplerGroup,
    SamplerOutput,
    SamplerState,
    SamplingSpec,
    SamplingTensors,
    next_token,
)

# Equal steps before one is compiled, which takes about as long as building two.
COMPILE_AFTER = 4
# Kinds of compiled steps to keep.
COMPILED_STEPS = 16


class Token(NamedTuple):
    """A sampled token on the host; ``logprobs`` is empty unless asked for."""

    token: int
    logprobs: tuple[TokenLogprob, ...] = ()


def read_tokens(sampled: SamplerOutput) -> list[Token]:
    """Wait for the tokens of each row of a sampler's output."""
    tokens = cast(list[int], sampled.token.tolist())
    if sampled.logprob is None or sampled.top_tokens is None or sampled.top_logprobs is None:
        return [Token(token) for token in tokens]
    reports = zip(
        tokens,
        cast(list[float], sampled.logprob.tolist()),
        cast(list[list[int]], sampled.top_tokens.tolist()),
        cast(list[list[float]], sampled.top_logprobs.tolist()),
        strict=True,
    )
    return [
        Token(token, (TokenLogprob(token, own, tuple(map(TokenLogprob, ids, values))),))
        for token, own, ids, values in reports
    ]


class Sampled(NamedTuple):
    """Sampled tokens of a step or a pass, on the device.

    Attributes:
        sequences: whose tokens they are, in order.
        tokens: (B,).
        groups: output of the samplers, and the places in ``sequences`` that each is about.
        firsts: places of first tokens.
        finite: whether the logits of these were finite, (len(firsts),); None for no first tokens.
    """

    sequences: tuple[Sequence, ...]
    tokens: mx.array
    groups: list[tuple[SamplerOutput, list[int]]]
    firsts: list[int]
    finite: mx.array | None

    def read(self) -> list[tuple[Sequence, Token | None]]:
        """Wait for the tokens; None for a sequence whose logits were not finite."""
        tokens: list[Token | None] = [None] * len(self.sequences)
        for sampled, places in self.groups:
            for place, token in zip(places, read_tokens(sampled), strict=True):
                tokens[place] = token
        if self.finite is not None:
            flags = cast(list[bool], self.finite.tolist())
            for place, finite in zip(self.firsts, flags, strict=True):
                tokens[place] = tokens[place] if finite else None
        return list(zip(self.sequences, tokens, strict=True))


class InFlight(NamedTuple):
    """A step, queued on the device.

    Attributes:
        sampled: its tokens; None if no sequence samples, and then it is complete.
        chunks: (context, tokens) of each chunk that it prefills.
        decoding: whether sequences decode in it.
        queued: when, seconds of ``time.monotonic``.
    """

    sampled: Sampled | None
    chunks: list[tuple[int, int]]
    decoding: bool
    queued: float


class ModelRunner:
    """Runs the batches of one engine.

    Args:
        model: whose weights they use.
        batched: put all sequences through one forward pass, where their caches can be rows of one
            array. Otherwise each has a pass of its own, with the operations of a sequence alone:
            slower, equal to the last bit.

    Attributes:
        num_computed: tokens that went through the model.
        num_idle: idle rows among them.
    """

    def __init__(self, model: Model[Any], *, batched: bool) -> None:
        self.model, self.batched = model, batched and model.joint
        self.blocks = Blocks(BLOCK_ROWS if self.batched else 1)
        self.decode_step = DecodeStep(model)
        self._samplers = SamplerBatch()
        self._last: mx.array | None = None  # tokens of the last step
        # States of the samplers before each of the last steps, to undo those that are never read:
        # one is on the device while the next is queued, and an interrupt may have queued a third.
        self._undo: deque[list[tuple[SamplerState, list[Sequence], list[int]]]] = deque(maxlen=3)
        self.num_computed = self.num_idle = 0

    def run(
        self, decode: ListLike[Sequence], prefill: ListLike[PrefillChunk[Sequence]]
    ) -> InFlight:
        """Queue one more token of each decoding sequence, and chunks of prompts.

        A sequence whose prompt is complete samples its first token.
        """
        queued = time.monotonic()
        chunks = [(sequence.num_computed, count) for sequence, count in prefill]
        self._undo.append([])
        joining = [sequence for sequence in decode if sequence.block is None]
        if joining:
            self.blocks.join(joining)
        self.blocks.compact()
        prompts = [chunk for chunk in prefill if chunk.sequence.score_from is None]
        passes = [self._pass(*parts) for parts in self._plan_passes(decode, prompts)]
        outputs = [output for output in passes if output is not None]
        cache_arrays = [
            a for s, _ in prompts if not s.is_prefilled for c in s.caches for a in c.state
        ]
        for sequence, count in prefill:
            if sequence.score_from is not None:
                self._score(sequence, count)
        if not outputs:
            # No token to wait for meanwhile: a request that arrives would wait for a queued step.
            mx.eval(cache_arrays)
            return InFlight(None, chunks, bool(decode), queued)
        sampled = outputs[0] if len(outputs) == 1 else _joined(outputs)
        logprobs = [a for own, _ in sampled.groups for a in own if a is not None]
        finite = [] if sampled.finite is None else [sampled.finite]
        mx.async_eval(cache_arrays, sampled.tokens, logprobs, finite)  # type: ignore[no-untyped-call]
        for place, sequence in enumerate(sampled.sequences):
            sequence.token_index = place
            sequence.num_sampled += 1
        self._last = sampled.tokens
        return InFlight(sampled, chunks, bool(decode), queued)

    def take_caches(self, sequence: Sequence) -> list[KVCache]:
        """The caches of a sequence, which leaves."""
        caches, block = self.caches_of(sequence), sequence.block
        if block is not None and len(block.rows) > 1:
            mx.async_eval([a for c in caches for a in c.state])  # type: ignore[no-untyped-call]
        self.free(sequence)
        return caches

    def free(self, sequence: Sequence) -> None:
        """Free the caches of a sequence."""
        sequence.caches = []
        if sequence.block is not None:
            if not self.batched:
                sequence.block.samplers.dissolve()
            sequence.block.clear(sequence.row)
            sequence.block = None

    def caches_of(self, sequence: Sequence) -> list[KVCache]:
        """The caches of a sequence, to be read before the next step."""
        return sequence.caches if sequence.block is None else sequence.block.caches_of(sequence.row)

    def reset(self) -> None:
        """Free all rows once no sequence is left."""
        self.blocks = Blocks(BLOCK_ROWS if self.batched else 1)
        self._samplers = SamplerBatch()
        self._undo.clear()
        self._last = None

    def undo_sampling(self, sequence: Sequence) -> None:
        """Set a sampler back to the tokens of its sequence that have been read."""
        sampler = sequence.sampler
        if sampler is None:
            return
        for groups in (self._samplers, *(block.samplers for block in self.blocks)):
            groups.dissolve()
        for step in reversed(self._undo):
            for state, sequences, counts in step:
                for row, (one, count) in enumerate(zip(sequences, counts, strict=True)):
                    if one is sequence and count == sequence.num_output:
                        sampler.state = SamplerState(*(array[row : row + 1] for array in state))
        sequence.num_sampled = sequence.num_output
        sampler.num_tokens = len(sequence.ids)

    def _plan_passes(
        self, decode: ListLike[Sequence], prefill: ListLike[PrefillChunk[Sequence]]
    ) -> list[tuple[list[Block], list[PrefillChunk[Sequence]]]]:
        """The blocks and chunks of each forward pass."""
        blocks = list(self.blocks) if decode else []
        if self.batched:
            return [(blocks, list(prefill))] if blocks or prefill else []
        decoding = [block for block in blocks if any(s and s.can_decode for s in block.rows)]
        return [*(([block], []) for block in decoding), *(([], [chunk]) for chunk in prefill)]

    def _pass(self, blocks: list[Block], chunks: list[PrefillChunk[Sequence]]) -> Sampled | None:
        """One forward pass."""
        rows = [sequence for block in blocks for sequence in block.rows]
        places = [i for i, s in enumerate(rows) if s is not None and s.can_decode]
        decoding = [rows[place] for place in places]
        self.num_computed += len(rows) + sum(count for _, count in chunks)
        self.num_idle += len(rows) - len(decoding)
        samplers = self._samplers if self.batched or not blocks else blocks[0].samplers
        if blocks and not chunks and all(block.decode_rows is not None for block in blocks):
            all_rows = len(places) == len(rows)
            compiled = all(b.steps_unchanged >= self.decode_step.compile_after for b in blocks)
            groups = samplers.arrange([s.sampler for s in decoding])
            self._save_states(groups, decoding)
            tokens, sampled = self.decode_step(
                self._tokens_of(rows),
                [cast(DecodeRows, block.decode_rows) for block in blocks],
                groups,
                None if all_rows else mx.array(places),
                compiled=compiled,
            )
            self._advance(blocks, decoding)
            return Sampled(
                tuple(decoding), tokens, list(zip(sampled, groups.rows, strict=True)), [], None
            )
        logits = self._forward(blocks, chunks, rows, places)
        self._advance(blocks, decoding)
        for sequence, count in chunks:
            sequence.num_computed += count
        firsts = [sequence for sequence, _ in chunks if sequence.is_prefilled]
        sampling = [*decoding, *firsts]
        if not sampling:
            return None
        groups = samplers.arrange([s.sampler for s in sampling])
        self._save_states(groups, sampling)
        tokens, sampled, states = sample(groups.groups, groups.order, logits)
        groups.advance(states)
        if not self.batched:
            groups.dissolve()
        finite = mx.isfinite(logits[len(decoding) :]).all(axis=-1) if firsts else None
        return Sampled(
            tuple(sampling),
            tokens,
            list(zip(sampled, groups.rows, strict=True)),
            list(range(len(decoding), len(sampling))),
            finite,
        )

    def _score(self, sequence: Sequence, count: int) -> None:
        """Hidden states of the next tokens of a sequence that is scored, if they are wanted."""
        start, first = sequence.num_computed, cast(int, sequence.score_from)
        end = start + count
        states = self.model.hidden(mx.array([sequence.ids[start:end]]), sequence.caches)
        cache_arrays = [a for c in sequence.caches for a in c.state]
        mx.eval(cache_arrays, [states] if end > first else [])
        if end > first:
            sequence.states.append((start, states))
        sequence.num_computed, self.num_computed = end, self.num_computed + count

    def _forward(
        self,
        blocks: list[Block],
        chunks: list[PrefillChunk[Sequence]],
        rows: list[Sequence | None],
        places: list[int],
    ) -> mx.array:
        """Logits (B, V) of the decoding rows, then of prompts that end."""
        model = self.model
        if not blocks and len(chunks) == 1:  # a part alone: its own caches, its own shape
            ((sequence, count),) = chunks
            start, end = sequence.num_computed, sequence.num_computed + count
            if start % PREFILL_CHUNK or (count < PREFILL_CHUNK and end < sequence.num_tokens):
                sequence.whole_chunks = False
            ids = mx.array([sequence.ids[start:end]])
            return model.forward(ids, sequence.caches, mx.array([count - 1]))
        if not chunks and len(blocks) == 1:
            return model.forward(
                self._tokens_of(rows)[:, None],
                blocks[0].caches,
                None if len(places) == len(rows) else mx.array(places),
            )
        return self._forward_ragged(blocks, chunks, rows, places)

    def _forward_ragged(
        self,
        blocks: list[Block],
        chunks: list[PrefillChunk[Sequence]],
        rows: list[Sequence | None],
        places: list[int],
    ) -> mx.array:
        """The same with the tokens of several caches side by side."""
        tokens = [self._tokens_of(rows)] if rows else []
        positions = [offset for block in blocks for offset in block.caches[0].offsets]
        layers = len(blocks[0].caches if blocks else chunks[0].sequence.caches)
        parts: list[list[Part]] = [[] for _ in range(layers)]
        for block in blocks:
            for own, cache in zip(parts, block.caches, strict=True):
                own.append(Part(cache, len(block.rows), 1))
        places = list(places)
        for sequence, count in chunks:
            start = sequence.num_computed
            sequence.whole_chunks = False
            tokens.append(mx.array(sequence.ids[start : start + count]))
            positions.extend(range(start, start + count))
            for own, cache in zip(parts, sequence.caches, strict=True):
                own.append(Part(cast(RowCache, cache), 1, count))
            if start + count >= sequence.num_tokens:
                places.append(len(positions) - 1)
        where = mx.array(positions)
        flat = mx.concatenate([t.astype(mx.uint32) for t in tokens])[:, None]  # (N, 1)
        return self.model.forward(
            flat, [BatchCache(own, where) for own in parts], mx.array(places, mx.uint32)
        )

    def _tokens_of(self, rows: ListLike[Sequence | None]) -> mx.array:
        """The last token of each row, (N,); any other for an idle one."""
        assert self._last is not None
        places = [0 if sequence is None else sequence.token_index for sequence in rows]
        in_order = places == list(range(self._last.shape[0]))
        return self._last if in_order else self._last[mx.array(places)]

    def _advance(self, blocks: list[Block], decoding: list[Sequence]) -> None:
        for block in blocks:
            block.advance()
        for sequence in decoding:
            sequence.num_computed += 1

    def _save_states(self, groups: SamplerBatch, sequences: list[Sequence]) -> None:
        """Keep the states of samplers before they sample."""
        for group, rows in zip(groups.groups, groups.rows, strict=True):
            own = [sequences[row] for row in rows]
            self._undo[-1].append((group.state, own, [s.num_sampled for s in own]))


def _joined(outputs: list[Sampled]) -> Sampled:
    """The outputs of several passes as one."""
    sequences: list[Sequence] = []
    groups, firsts, finite = [], [], []
    for output in outputs:
        start = len(sequences)
        sequences += output.sequences
        groups += [(sampled, [start + p for p in places]) for sampled, places in output.groups]
        firsts += [start + place for place in output.firsts]
        finite += [] if output.finite is None else [output.finite]
    tokens = mx.concatenate([output.tokens for output in outputs])
    return Sampled(
        tuple(sequences), tokens, groups, firsts, mx.concatenate(finite) if finite else None
    )


def sample(
    groups: ListLike[SamplerGroup], order: mx.array | None, logits: mx.array
) -> tuple[mx.array, list[SamplerOutput], list[SamplerState]]:
    """Tokens (B,) of logits (B, V), the output of each group, and the states after it."""
    outputs, states = [], []
    for spec, tensors, state, rows in groups:
        sampled, state = next_token(spec, tensors, state, logits if rows is None else logits[rows])
        outputs.append(sampled)
        states.append(state)
    tokens = outputs[0].token if len(outputs) == 1 else mx.concatenate([s.token for s in outputs])
    return tokens if order is None else tokens[order], outputs, states


StepResult = tuple[Any, Any, Any, mx.array]
StepFunction = Callable[..., StepResult]


class DecodeStep:
    """One more token of each row: model and samplers as one pure function, compiled.

    Args:
        model: whose weights it uses.

    Attributes:
        compile_after: equal steps before one is compiled.
        compile_error: why MLX cannot compile steps here, so that all are built; None if it can.
    """

    def __init__(self, model: Model[Any]) -> None:
        self.model = model
        self.compile_after = COMPILE_AFTER
        self.compile_error = avoid_fusion()
        # A compiled function must not outlive the thread that made it: MLX aborts.
        self._of_thread = threading.local()

    @property
    def compiled(self) -> OrderedDict[Hashable, StepFunction]:
        """Compiled steps of this thread, the latest used last."""
        mine: OrderedDict[Hashable, StepFunction]
        mine = self._of_thread.__dict__.setdefault("compiled", OrderedDict())
        return mine

    def __call__(
        self,
        tokens: mx.array,
        rows: ListLike[DecodeRows],
        samplers: SamplerBatch,
        select: mx.array | None = None,
        *,
        compiled: bool = True,
    ) -> tuple[mx.array, list[SamplerOutput]]:
        """Queue one more token of each row.

        Args:
            tokens: the last of each, (N,), block by own.
            rows: their caches; advanced by one.
            samplers: of the selected rows; advanced by one.
            select: rows that sample; None for all.

        Returns:
            Tokens (B,) of the selected rows, and the output of each group of samplers.
        """
        for own in rows:
            own.prepare()
        groups, order = list(samplers.groups), samplers.order
        optional = [select, order, *(group.rows for group in groups)]
        present = [one is not None for one in optional]
        arguments = (
            tokens,
            [own.offsets for own in rows],
            [own.arrays for own in rows],
            [own.fixed for own in rows],
            [[list(group.tensors), list(group.state)] for group in groups],
            [one for one in optional if one is not None],
        )
        step = self._compiled if compiled and not self.compile_error else self._built
        caches, outputs, states, sampled = step(rows, groups, present)(*arguments)
        for own, arrays in zip(rows, caches, strict=True):
            own.advance(arrays)
        samplers.advance([SamplerState(*state) for state in states])
        return sampled, [SamplerOutput(*output) for output in outputs]

    def _built(
        self, rows: ListLike[DecodeRows], groups: ListLike[SamplerGroup], present: ListLike[bool]
    ) -> StepFunction:
        views, specs = [own.views for own in rows], [group.spec for group in groups]
        return _step(self.model, [own.caches for own in rows], views, specs, present)

    def _compiled(
        self, rows: ListLike[DecodeRows], groups: ListLike[SamplerGroup], present: ListLike[bool]
    ) -> StepFunction:
        shapes = [group.tensors.key.shape + group.state.window.shape for group in groups]
        specs = tuple(group.spec for group in groups)
        key = tuple(own.key for own in rows), specs, tuple(present), tuple(shapes)
        compiled = self.compiled
        latest = next(reversed(compiled.items()), None)
        if latest is not None and key == latest[0]:  # a look-up would hash the kinds of all layers
            return latest[1]
        step = compiled.pop(key, None)
        if step is None:
            views, likes = [own.views for own in rows], [own.templates() for own in rows]
            step = cast(StepFunction, mx.compile(_step(self.model, likes, views, specs, present)))
        compiled[key] = step  # the latest used last
        if len(compiled) > COMPILED_STEPS:
            compiled.popitem(last=False)
        return step


def _step(
    model: Model[Any],
    likes: ListLike[ListLike[RowCache]],
    views: ListLike[dict[Hashable, int]],
    specs: ListLike[SamplingSpec],
    present: ListLike[bool],
) -> StepFunction:
    """A step as a pure function of arrays; its arguments here are constants of the recording."""

    def step(
        tokens: mx.array,
        offsets: list[mx.array],
        arrays: list[list[LayerArrays]],
        fixed: list[list[LayerArrays]],
        samplers: list[list[list[mx.array]]],
        optional: list[mx.array],
    ) -> tuple[list[list[LayerArrays]], list[list[mx.array]], list[list[mx.array]], mx.array]:
        given = iter(optional)
        select, order, *indices = [next(given) if one else None for one in present]
        blocks = [
            _slots(*block) for block in zip(likes, arrays, fixed, offsets, views, strict=True)
        ]
        logits = model.forward(tokens[:, None], _side_by_side(blocks, offsets), select)
        groups = [
            SamplerGroup(spec, SamplingTensors(*tensors), SamplerState(*state), rows)
            for spec, (tensors, state), rows in zip(specs, samplers, indices, strict=True)
        ]
        sampled, outputs, states = sample(groups, order, logits)
        reports = [[array for array in own if array is not None] for own in outputs]
        caches = [[slots.arrays for slots in block] for block in blocks]
        return caches, reports, [list(state) for state in states], sampled

    return step


def _slots(
    likes: ListLike[RowCache],
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
    blocks: ListLike[list[DecodeSlots]], offsets: ListLike[mx.array]
) -> ListLike[StepCache]:
    """For each layer, one cache for the rows of all blocks."""
    if len(blocks) == 1:
        return blocks[0]
    position = mx.concatenate(list(offsets))
    return [
        BatchCache([Part(slots, slots.position.shape[0], 1) for slots in layer], position)
        for layer in zip(*blocks, strict=True)
    ]


def not_finite(model: Model[Any]) -> NumericError:
    """The error of a model whose logits are not all finite."""
    if names := model.damaged():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return NumericError(
            f"the model's output is not finite: {', '.join(names[:4])}{more} with infinite numbers "
            "or none (NaN) among the weights",
            hint="The file is damaged: download or quantize it again",
        )
    dtype = str(model.dtype).removeprefix("mlx.core.")
    return NumericError(
        "the model's output is not finite: its weights are damaged, or too large for " + dtype,
        hint="Check the file, or try the dtype float32",
    )
