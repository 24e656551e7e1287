"""Logits to sampled tokens, lazily on the device.

The stages, in order; each is absent from the graph unless its parameter turns it on:

 1. logit bias
 2. repetition, presence and frequency penalties, over the last ``penalty_last_n`` tokens
 3. DRY, over the last ``dry_penalty_last_n`` tokens
    (temperature 0 ends here: the likeliest token, of equal ones the lowest id)
 4. top-k       (40)
 5. typical-p   (off)
 6. top-p       (0.95)
 7. min-p       (0.05)
 8. XTC         (off)
 9. temperature (0.8)
10. sampling, with noise from the request's own seed

Order and defaults are llama.cpp's. Mirostat replaces stages 4 to 8 and acts after the temperature.
Prompt and completion both count as recent tokens. Reported log-probabilities are the model's own,
before stage 1.

``next_token`` is a pure function of arrays for any number of rows of the same ``SamplingSpec``. A
row's token never depends on the other rows: its noise comes from its own seed, and every stage
works row by row. ``Sampler`` drives it for one request, ``SamplerBatch`` for the rows of a batch.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import mlx.core as mx

from mlxrun.errors import ParameterError
from mlxrun.kernels.cpu_ops import log_softmax
from mlxrun.sampling import penalties, rng, truncation
from mlxrun.sampling_params import SamplingParams

Breakers = Sequence[tuple[int, ...]]

GROWTH: Final = 256  # tokens by which a window grows: its shape changes seldom
_MIN_TEMPERATURE: Final = 1e-30  # keeps a positive temperature positive in float32


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """The stages of the graph and their shapes, the same for all rows of a group."""

    greedy: bool
    mirostat: bool
    penalty_window: int  # 0: no penalties, -1: everything
    dry_window: int
    top_k: int  # 0: every token stays a candidate
    typical_p: bool
    top_p: bool
    min_p: bool
    xtc: bool
    logprobs: int

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int) -> SamplingSpec:
        truncates = not params.greedy and not params.mirostat
        penalizes = bool(
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )
        return cls(
            greedy=params.greedy,
            mirostat=not params.greedy and params.mirostat == 2,
            penalty_window=params.penalty_last_n if penalizes else 0,
            dry_window=params.dry_penalty_last_n if params.dry_multiplier else 0,
            top_k=params.top_k if truncates and params.top_k < vocab_size else 0,
            typical_p=truncates and params.typical_p < 1,
            top_p=truncates and params.top_p < 1,
            min_p=truncates and params.min_p > 0,
            xtc=truncates and params.xtc_probability > 0 and params.xtc_threshold <= 0.5,
            logprobs=min(params.logprobs, vocab_size),
        )

    @property
    def reach(self) -> int:
        """The longest look-back of a stage, in tokens."""
        if self.penalty_window < 0 or self.dry_window < 0:
            return sys.maxsize
        return max(self.penalty_window, self.dry_window)

    @property
    def ranks(self) -> bool:
        """Whether a stage needs the candidates sorted."""
        return bool(self.top_k or self.typical_p or self.top_p or self.xtc)


class SamplingTensors(NamedTuple):
    """Constant values of a request, (B, 1) float32 unless noted."""

    key: mx.array  # (B, 2) uint32
    temperature: mx.array
    top_p: mx.array
    min_p: mx.array
    typical_p: mx.array
    xtc_probability: mx.array
    xtc_threshold: mx.array
    repetition_penalty: mx.array
    presence_penalty: mx.array
    frequency_penalty: mx.array
    dry_multiplier: mx.array
    dry_base: mx.array
    dry_allowed_length: mx.array
    mirostat_tau: mx.array
    mirostat_eta: mx.array
    bias_ids: mx.array  # (B, N) uint32, N may be 0
    bias_values: mx.array  # (B, N)
    breaker_tokens: mx.array  # (B, V) bool: these break a sequence by themselves; V is 0 for none
    breaker_patterns: mx.array  # (B, P, L) int32, see penalties.ends_with_any; P may be 0

    @classmethod
    def of(
        cls, params: SamplingParams, vocab_size: int, seed: int, breakers: Breakers
    ) -> SamplingTensors:
        return cls(
            key=rng.request_key(seed),
            temperature=_column(max(params.temperature, _MIN_TEMPERATURE)),
            top_p=_column(params.top_p),
            min_p=_column(params.min_p),
            typical_p=_column(params.typical_p),
            xtc_probability=_column(params.xtc_probability),
            xtc_threshold=_column(params.xtc_threshold),
            repetition_penalty=_column(params.repetition_penalty),
            presence_penalty=_column(params.presence_penalty),
            frequency_penalty=_column(params.frequency_penalty),
            dry_multiplier=_column(params.dry_multiplier),
            dry_base=_column(params.dry_base),
            dry_allowed_length=_column(params.dry_allowed_length),
            mirostat_tau=_column(params.mirostat_tau),
            mirostat_eta=_column(params.mirostat_eta),
            bias_ids=mx.array(list(params.logit_bias.keys()), dtype=mx.uint32)[None],
            bias_values=mx.array(list(params.logit_bias.values()), dtype=mx.float32)[None],
            breaker_tokens=_mask([each[0] for each in breakers if len(each) == 1], vocab_size)[
                None
            ],
            breaker_patterns=_patterns([each for each in breakers if len(each) > 1])[None],
        )


def _column(value: float) -> mx.array:
    return mx.array([[value]], dtype=mx.float32)


def _mask(tokens: Sequence[int], vocab_size: int) -> mx.array:
    """The tokens as a mask (V,) bool, or (0,) if there are none."""
    if not tokens:
        return mx.zeros(0, dtype=mx.bool_)
    ids = mx.array(list(tokens), dtype=mx.uint32)
    return mx.put_along_axis(mx.zeros(vocab_size, dtype=mx.bool_), ids, mx.array(True), axis=0)


def _patterns(breakers: Breakers) -> mx.array:
    """The breakers as rows (P, L) int32, right-aligned and padded with -1."""
    length = max(map(len, breakers), default=0)
    rows = [[-1] * (length - len(each)) + list(each) for each in breakers]
    return mx.array(rows, dtype=mx.int32).reshape(len(rows), length)


class SamplerState(NamedTuple):
    """The state of a request between steps."""

    step: mx.array  # (B,) uint32
    window: mx.array  # (B, W) int32: recent tokens, the latest last, padded with -1
    repeats: mx.array  # (B, W) int32, see penalties.extend_repeats; (B, 0) without DRY
    mu: mx.array  # (B, 1) float32: mirostat's limit on the surprise, in bits

    @classmethod
    def of(
        cls, spec: SamplingSpec, params: SamplingParams, past: Sequence[int], breakers: Breakers
    ) -> SamplerState:
        """The state (one row) after the tokens ``past``."""
        longest_breaker = max(map(len, breakers), default=0)
        width = max(longest_breaker, min(spec.reach, len(past) + GROWTH))
        repeats = penalties.initial_repeats(past, breakers) if spec.dry_window else []
        return cls(
            step=mx.zeros(1, dtype=mx.uint32),
            window=_right(past, width, -1),
            repeats=_right(repeats, width if spec.dry_window else 0, 0),
            mu=_column(2 * params.mirostat_tau),
        )

    def widened(self) -> SamplerState:
        """The state with room for more tokens."""
        left = [(0, 0), (GROWTH, 0)]
        repeats = mx.pad(self.repeats, left) if self.repeats.size else self.repeats
        window = mx.pad(self.window, left, constant_values=mx.array(-1))
        return self._replace(window=window, repeats=repeats)


class SamplerGroup(NamedTuple):
    """Requests of one spec; ``rows`` are theirs of the logits, None for all."""

    spec: SamplingSpec
    tensors: SamplingTensors
    state: SamplerState
    rows: mx.array | None = None


def _right(values: Sequence[int], width: int, fill: int) -> mx.array:
    """The last ``width`` values as a row (1, width) int32, padded on the left."""
    last = list(values)[max(0, len(values) - width) :]
    return mx.array([fill] * (width - len(last)) + last, dtype=mx.int32)[None]


class SamplerOutput(NamedTuple):
    """Sampled tokens of a step, unevaluated; log-probabilities are None unless requested."""

    token: mx.array  # (B,) uint32
    logprob: mx.array | None = None  # (B,) of the token
    top_tokens: mx.array | None = None  # (B, N) uint32, likeliest first
    top_logprobs: mx.array | None = None  # (B, N)


def next_token(
    spec: SamplingSpec, tensors: SamplingTensors, state: SamplerState, logits: mx.array
) -> tuple[SamplerOutput, SamplerState]:
    """Sample the tokens of logits (B, V); returns them and the next state, unevaluated."""
    logits = logits.astype(mx.float32)
    candidates, ids = distribution(spec, tensors, state, logits)
    token = ids[:, 0] if spec.greedy else _sample(tensors, state, candidates, ids)
    if spec.mirostat:
        state = state._replace(mu=_steer(tensors, state.mu, candidates, token))
    return _report(spec, logits, token), _advance(spec, tensors, state, token)


def distribution(
    spec: SamplingSpec, tensors: SamplingTensors, state: SamplerState, logits: mx.array
) -> tuple[mx.array, mx.array]:
    """Stages 1 to 9 on logits (B, V) float32.

    Returns unnormalized log-probabilities (B, K), -inf where dropped, and the candidates' token ids
    (B, K) or (1, K). Greedy sampling has one candidate.
    """
    logits = _adjust(spec, tensors, state, logits)
    every_id = mx.arange(logits.shape[-1], dtype=mx.uint32)[None]
    if spec.greedy:
        likeliest = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.zeros(likeliest.shape), likeliest
    if spec.mirostat:
        return truncation.mirostat(_cool(logits, tensors.temperature), state.mu), every_id
    if spec.ranks:
        logits, ids = truncation.ranked(logits, spec.top_k or logits.shape[-1])
    else:
        ids = every_id
    return _cool(_truncate(spec, tensors, state, logits), tensors.temperature), ids


def _adjust(
    spec: SamplingSpec, tensors: SamplingTensors, state: SamplerState, logits: mx.array
) -> mx.array:
    """Stages 1 to 3."""
    if tensors.bias_ids.size:
        logits = penalties.add_bias(logits, tensors.bias_ids, tensors.bias_values)
    if spec.penalty_window:
        logits = penalties.penalize(
            logits,
            _last(state.window, spec.penalty_window),
            tensors.repetition_penalty,
            tensors.presence_penalty,
            tensors.frequency_penalty,
        )
    if spec.dry_window:
        logits = penalties.dry(
            logits,
            _last(state.window, spec.dry_window),
            _last(state.repeats, spec.dry_window),
            tensors.dry_multiplier,
            tensors.dry_base,
            tensors.dry_allowed_length,
            tensors.breaker_tokens if tensors.breaker_tokens.size else None,
        )
    return logits


def _last(window: mx.array, n: int) -> mx.array:
    return window if n < 0 else window[:, -n:]


def _truncate(
    spec: SamplingSpec, tensors: SamplingTensors, state: SamplerState, logits: mx.array
) -> mx.array:
    """Stages 5 to 8 on ranked candidates (B, K)."""
    if spec.typical_p:
        logits = truncation.typical_p(logits, tensors.typical_p)
    if spec.top_p:
        logits = truncation.top_p(logits, tensors.top_p)
    if spec.min_p:
        logits = truncation.min_p(logits, tensors.min_p)
    if spec.xtc:
        active = rng.uniform(tensors.key, state.step) < tensors.xtc_probability
        logits = truncation.xtc(logits, tensors.xtc_threshold, active)
    return logits


def _cool(logits: mx.array, temperature: mx.array) -> mx.array:
    """Logits over temperature, shifted to a peak of 0 so that no temperature overflows."""
    return (logits - mx.max(logits, axis=-1, keepdims=True)) / temperature


def _sample(
    tensors: SamplingTensors, state: SamplerState, logits: mx.array, ids: mx.array
) -> mx.array:
    """Tokens (B,) sampled from logits (B, K) by the Gumbel-max trick."""
    scores = logits + rng.gumbel(tensors.key, state.step, ids)
    chosen = mx.argmax(scores, axis=-1, keepdims=True)
    return mx.take_along_axis(mx.broadcast_to(ids, scores.shape), chosen, axis=-1)[:, 0]


def _steer(tensors: SamplingTensors, mu: mx.array, kept: mx.array, token: mx.array) -> mx.array:
    """Mirostat's mu (B, 1) after the tokens (B,) sampled from the logits ``kept`` (B, V)."""
    surprise = -mx.take_along_axis(log_softmax(kept), token[:, None], axis=-1) / math.log(2)
    return mu - tensors.mirostat_eta * (surprise - tensors.mirostat_tau)


def _report(spec: SamplingSpec, logits: mx.array, token: mx.array) -> SamplerOutput:
    if not spec.logprobs:
        return SamplerOutput(token)
    logprobs = log_softmax(logits)
    chosen = mx.take_along_axis(logprobs, token[:, None], axis=-1)
    _, ids = truncation.ranked(logits, spec.logprobs)
    return SamplerOutput(token, chosen[:, 0], ids, mx.take_along_axis(logprobs, ids, axis=-1))


def _advance(
    spec: SamplingSpec, tensors: SamplingTensors, state: SamplerState, token: mx.array
) -> SamplerState:
    window, repeats = state.window, state.repeats
    if window.shape[-1]:
        window = penalties.append(window, token)
    if spec.dry_window:
        repeats = penalties.extend_repeats(repeats, window)
        if tensors.breaker_tokens.size:
            broken = mx.take_along_axis(tensors.breaker_tokens, token[:, None], axis=-1)
            repeats = mx.where(broken, 0, repeats)
        if tensors.breaker_patterns.size:
            broken = penalties.ends_with_any(window, tensors.breaker_patterns)
            repeats = mx.where(broken, 0, repeats)
    # A greedy request's step is never read: counting it would grow an unevaluated graph.
    step = state.step if spec.greedy else state.step + 1
    return SamplerState(step, window, repeats, state.mu)


class Sampler:
    """Samples the tokens of one request, step by step, lazily.

    Args:
        vocab_size: V, the number of logits.
        context_tokens: the prompt, checked ids, for the stages that look back.
        dry_breakers: token sequences that break a repetition for DRY, as ``breaker_tokens`` finds
            them for ``params.dry_sequence_breakers``.

    Attributes:
        seed: the seed in use, also if ``params`` has none.
        spec, tensors: the constant arguments of ``next_token``.
        state: its state before the next step.
        num_tokens: tokens so far, the prompt's included.

    ``copy.copy(sampler)`` is a snapshot: both continue independently, at no cost.

    Raises:
        ParameterError: a token id of a bias or a breaker outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        context_tokens: Sequence[int] = (),
        dry_breakers: Collection[Sequence[int]] = (),
    ) -> None:
        _check_ids("logit_bias", params.logit_bias, vocab_size)
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self.spec = SamplingSpec.of(params, vocab_size)
        breakers = [tuple(each) for each in dry_breakers if each] if self.spec.dry_window else []
        _check_ids("dry_breakers", {token for each in breakers for token in each}, vocab_size)
        self.tensors = SamplingTensors.of(params, vocab_size, self.seed, breakers)
        self.state = SamplerState.of(self.spec, params, context_tokens, breakers)
        self.num_tokens = len(context_tokens)

    def sample(self, logits: mx.array) -> SamplerOutput:
        """The next token of logits (1, V), unevaluated."""
        if self.full:
            self.widen()
        sampled, self.state = next_token(self.spec, self.tensors, self.state, logits)
        self.num_tokens += 1
        return sampled

    @property
    def full(self) -> bool:
        """Whether the state must be widened before the next step."""
        return self.num_tokens == self.state.window.shape[-1] < self.spec.reach

    def widen(self) -> None:
        self.state = self.state.widened()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for samplers whose rows may be stacked."""
        arrays = (*self.tensors, *self.state)
        return self.spec, *(array.shape[1:] for array in arrays)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ParameterError(name, token, f"made of token ids from 0 to {vocab_size - 1}")


class _Stacked:
    """Samplers of equal spec and shapes, with their states stacked until ``dissolve``."""

    def __init__(self, samplers: Sequence[Sampler], rows: mx.array | None) -> None:
        self._samplers = list(samplers)
        spec = samplers[0].spec
        tensors = SamplingTensors(*_joined([s.tensors for s in samplers]))
        self.group = SamplerGroup(
            spec, tensors, SamplerState(*_joined([s.state for s in samplers])), rows
        )

    def advance(self, state: SamplerState) -> None:
        self.group = self.group._replace(state=state)
        for sampler in self._samplers:
            sampler.num_tokens += 1

    def dissolve(self) -> None:
        for row, sampler in enumerate(self._samplers):
            sampler.state = SamplerState(*(array[row : row + 1] for array in self.group.state))


def _joined(rows: Sequence[tuple[mx.array, ...]]) -> list[mx.array]:
    return [mx.concatenate(list(arrays)) for arrays in zip(*rows, strict=True)]


class SamplerBatch:
    """The samplers of a batch's rows, regrouped only when rows join or leave.

    Attributes:
        rows: the rows of each group.
        order: index of each row's token in the concatenated groups; None if in order.
    """

    def __init__(self) -> None:
        self._stacked: list[_Stacked] = []
        self._members: list[Sampler] = []
        self.rows: list[list[int]] = []
        self.order: mx.array | None = None

    def arrange(self, samplers: Sequence[Sampler]) -> Self:
        """Group the samplers, one per row; does nothing for those of the last call."""
        members = list(samplers)
        if members != self._members or any(sampler.full for sampler in members):
            self._regroup(members)
        return self

    @property
    def groups(self) -> Sequence[SamplerGroup]:
        return [stacked.group for stacked in self._stacked]

    def advance(self, states: Sequence[SamplerState]) -> None:
        for stacked, state in zip(self._stacked, states, strict=True):
            stacked.advance(state)

    def dissolve(self) -> None:
        """Return the states to their samplers."""
        for stacked in self._stacked:
            stacked.dissolve()
        self._members, self._stacked = [], []

    def _regroup(self, members: list[Sampler]) -> None:
        self.dissolve()
        places: dict[object, list[int]] = defaultdict(list)
        for row, sampler in enumerate(members):
            if sampler.full:
                sampler.widen()
            places[sampler.key].append(row)
        self.rows = list(places.values())
        several = len(self.rows) > 1
        self._stacked = [
            _Stacked([members[row] for row in rows], mx.array(rows) if several else None)
            for rows in self.rows
        ]
        order = [row for rows in self.rows for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        self.order = mx.array(back) if several else None
        self._members = members
