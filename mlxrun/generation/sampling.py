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

``next_token`` is a pure function of arrays for any number of rows with the same ``Plan``, and a
row's token never depends on the other rows; ``Sampler`` drives it for one request.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxrun.errors import ParameterError
from mlxrun.generation import noise, penalties, truncation
from mlxrun.generation.plan import Group, Plan, Settings, State
from mlxrun.kernels.cpu_ops import log_softmax
from mlxrun.sampling_params import SamplingParams

__all__ = ["Plan", "Sampled", "Sampler", "Settings", "State", "distribution", "next_token"]


class Sampled(NamedTuple):
    """Sampled tokens of a step, unevaluated; log-probabilities are None unless requested."""

    token: mx.array  # (B,) uint32
    logprob: mx.array | None = None  # (B,) of the token
    top_tokens: mx.array | None = None  # (B, N) uint32, likeliest first
    top_logprobs: mx.array | None = None  # (B, N)


def next_token(
    plan: Plan, settings: Settings, state: State, logits: mx.array
) -> tuple[Sampled, State]:
    """Sample the tokens of logits (B, V); returns them and the next state, unevaluated."""
    logits = logits.astype(mx.float32)
    candidates, ids = distribution(plan, settings, state, logits)
    token = ids[:, 0] if plan.greedy else _draw(settings, state, candidates, ids)
    if plan.mirostat:
        state = state._replace(mu=_steer(settings, state.mu, candidates, token))
    return _report(plan, logits, token), _advance(plan, settings, state, token)


def distribution(
    plan: Plan, settings: Settings, state: State, logits: mx.array
) -> tuple[mx.array, mx.array]:
    """Stages 1 to 9 on logits (B, V) float32.

    Returns unnormalized log-probabilities (B, K), -inf where dropped, and the candidates' token ids
    (B, K) or (1, K). Greedy sampling has one candidate.
    """
    logits = _adjust(plan, settings, state, logits)
    every_id = mx.arange(logits.shape[-1], dtype=mx.uint32)[None]
    if plan.greedy:
        likeliest = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.zeros(likeliest.shape), likeliest
    if plan.mirostat:
        return truncation.mirostat(_cool(logits, settings.temperature), state.mu), every_id
    if plan.ranks:
        logits, ids = truncation.ranked(logits, plan.top_k or logits.shape[-1])
    else:
        ids = every_id
    return _cool(_truncate(plan, settings, state, logits), settings.temperature), ids


def _adjust(plan: Plan, settings: Settings, state: State, logits: mx.array) -> mx.array:
    """Stages 1 to 3."""
    if settings.bias_ids.size:
        logits = penalties.add_bias(logits, settings.bias_ids, settings.bias_values)
    if plan.penalty_window:
        logits = penalties.penalise(
            logits,
            _last(state.window, plan.penalty_window),
            settings.repetition_penalty,
            settings.presence_penalty,
            settings.frequency_penalty,
        )
    if plan.dry_window:
        logits = penalties.dry(
            logits,
            _last(state.window, plan.dry_window),
            _last(state.repeats, plan.dry_window),
            settings.dry_multiplier,
            settings.dry_base,
            settings.dry_allowed_length,
            settings.breaker_tokens if settings.breaker_tokens.size else None,
        )
    return logits


def _last(window: mx.array, n: int) -> mx.array:
    return window if n < 0 else window[:, -n:]


def _truncate(plan: Plan, settings: Settings, state: State, logits: mx.array) -> mx.array:
    """Stages 5 to 8 on ranked candidates (B, K)."""
    if plan.typical_p:
        logits = truncation.typical_p(logits, settings.typical_p)
    if plan.top_p:
        logits = truncation.top_p(logits, settings.top_p)
    if plan.min_p:
        logits = truncation.min_p(logits, settings.min_p)
    if plan.xtc:
        active = noise.uniform(settings.key, state.step) < settings.xtc_probability
        logits = truncation.xtc(logits, settings.xtc_threshold, active)
    return logits


def _cool(logits: mx.array, temperature: mx.array) -> mx.array:
    """Logits over temperature, shifted to a peak of 0 so that no temperature overflows."""
    return (logits - mx.max(logits, axis=-1, keepdims=True)) / temperature


def _draw(settings: Settings, state: State, logits: mx.array, ids: mx.array) -> mx.array:
    """Tokens (B,) sampled from logits (B, K) by the Gumbel-max trick."""
    scores = logits + noise.gumbel(settings.key, state.step, ids)
    chosen = mx.argmax(scores, axis=-1, keepdims=True)
    return mx.take_along_axis(mx.broadcast_to(ids, scores.shape), chosen, axis=-1)[:, 0]


def _steer(settings: Settings, mu: mx.array, kept: mx.array, token: mx.array) -> mx.array:
    """Mirostat's mu (B, 1) after the tokens (B,) sampled from the logits ``kept`` (B, V)."""
    surprise = -mx.take_along_axis(log_softmax(kept), token[:, None], axis=-1) / math.log(2)
    return mu - settings.mirostat_eta * (surprise - settings.mirostat_tau)


def _report(plan: Plan, logits: mx.array, token: mx.array) -> Sampled:
    if not plan.logprobs:
        return Sampled(token)
    logprobs = log_softmax(logits)
    chosen = mx.take_along_axis(logprobs, token[:, None], axis=-1)
    _, ids = truncation.ranked(logits, plan.logprobs)
    return Sampled(token, chosen[:, 0], ids, mx.take_along_axis(logprobs, ids, axis=-1))


def _advance(plan: Plan, settings: Settings, state: State, token: mx.array) -> State:
    window, repeats = state.window, state.repeats
    if window.shape[-1]:
        window = penalties.append(window, token)
    if plan.dry_window:
        repeats = penalties.extend_repeats(repeats, window)
        if settings.breaker_tokens.size:
            broken = mx.take_along_axis(settings.breaker_tokens, token[:, None], axis=-1)
            repeats = mx.where(broken, 0, repeats)
        if settings.breaker_patterns.size:
            broken = penalties.ends_with_any(window, settings.breaker_patterns)
            repeats = mx.where(broken, 0, repeats)
    # A greedy request's step is never read: counting it would grow an unevaluated graph.
    step = state.step if plan.greedy else state.step + 1
    return State(step, window, repeats, state.mu)


class Sampler:
    """Samples the tokens of one request, step by step, lazily.

    Args:
        vocab_size: V, the number of logits.
        context_tokens: the prompt, for the stages that look back.
        dry_breakers: token sequences that break a repetition for DRY, as ``breaker_tokens`` finds
            them for ``params.dry_sequence_breakers``.

    Attributes:
        seed: the seed in use, also if ``params`` has none.
        plan, settings: constant arguments of ``next_token``.
        state: before the next step.
        tokens: tokens so far, the prompt's included.

    ``copy.copy(sampler)`` is a snapshot: both continue independently, at no cost.

    Raises:
        ParameterError: a token id outside the vocabulary.
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
        _check_ids("context_tokens", context_tokens, vocab_size)
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self.plan = Plan.of(params, vocab_size)
        breakers = [tuple(each) for each in dry_breakers if each] if self.plan.dry_window else []
        _check_ids("dry_breakers", {token for each in breakers for token in each}, vocab_size)
        self.settings = Settings.of(params, vocab_size, self.seed, breakers)
        self.state = State.of(self.plan, params, context_tokens, breakers)
        self.tokens = len(context_tokens)

    def sample(self, logits: mx.array) -> Sampled:
        """The next token of logits (1, V), unevaluated."""
        ((plan, settings, state, _),) = self.groups
        sampled, state = next_token(plan, settings, state, logits)
        self.advance([state])
        return sampled

    @property
    def groups(self) -> Sequence[Group]:
        """Its own row, as a step takes it."""
        if self.full:
            self.widen()
        return [Group(self.plan, self.settings, self.state)]

    @property
    def order(self) -> None:
        """A single row is in order."""

    def advance(self, states: Sequence[State]) -> None:
        """Take over the state after a step."""
        (self.state,) = states
        self.tokens += 1

    @property
    def full(self) -> bool:
        """Whether the state must be widened before the next step."""
        return self.tokens == self.state.window.shape[-1] < self.plan.reach

    def widen(self) -> None:
        self.state = self.state.widened()

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for samplers whose rows may be stacked."""
        arrays = (*self.settings, *self.state)
        return self.plan, *(array.shape[1:] for array in arrays)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ParameterError(name, token, f"made of token ids from 0 to {vocab_size - 1}")
