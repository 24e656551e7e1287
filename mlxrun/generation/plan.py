"""Sampling parameters: a static plan that shapes the graph, and arrays with a row per request."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import mlx.core as mx

from mlxrun.generation import noise, penalties
from mlxrun.sampling_params import SamplingParams

__all__ = ["Plan", "Settings", "State"]

Breakers = Sequence[tuple[int, ...]]

GROWTH: Final = 256  # tokens by which a window grows: its shape changes seldom
_COLDEST: Final = 1e-30  # keeps a positive temperature positive in float32


@dataclass(frozen=True, slots=True)
class Plan:
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
    def of(cls, params: SamplingParams, vocab_size: int) -> Plan:
        truncates = not params.greedy and not params.mirostat
        penalises = bool(
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )
        return cls(
            greedy=params.greedy,
            mirostat=not params.greedy and params.mirostat == 2,
            penalty_window=params.penalty_last_n if penalises else 0,
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


class Settings(NamedTuple):
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
    def of(cls, params: SamplingParams, vocab_size: int, seed: int, breakers: Breakers) -> Settings:
        return cls(
            key=noise.request_key(seed),
            temperature=_column(max(params.temperature, _COLDEST)),
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


class State(NamedTuple):
    """The state of a request between steps."""

    step: mx.array  # (B,) uint32
    window: mx.array  # (B, W) int32: recent tokens, the latest last, padded with -1
    repeats: mx.array  # (B, W) int32, see penalties.extend_repeats; (B, 0) without DRY
    mu: mx.array  # (B, 1) float32: mirostat's limit on the surprise, in bits

    @classmethod
    def of(
        cls, plan: Plan, params: SamplingParams, past: Sequence[int], breakers: Breakers
    ) -> State:
        """The state (one row) after the tokens ``past``."""
        longest_breaker = max(map(len, breakers), default=0)
        width = max(longest_breaker, min(plan.reach, len(past) + GROWTH))
        repeats = penalties.initial_repeats(past, breakers) if plan.dry_window else []
        return cls(
            step=mx.zeros(1, dtype=mx.uint32),
            window=_right(past, width, -1),
            repeats=_right(repeats, width if plan.dry_window else 0, 0),
            mu=_column(2 * params.mirostat_tau),
        )

    def widened(self) -> State:
        """The state with room for more tokens."""
        left = [(0, 0), (GROWTH, 0)]
        repeats = mx.pad(self.repeats, left) if self.repeats.size else self.repeats
        window = mx.pad(self.window, left, constant_values=mx.array(-1))
        return self._replace(window=window, repeats=repeats)


class Group(NamedTuple):
    """Rows of one plan; ``which`` are their rows of the logits, None for all."""

    plan: Plan
    settings: Settings
    state: State
    which: mx.array | None = None


def _right(values: Sequence[int], width: int, fill: int) -> mx.array:
    """The last ``width`` values as a row (1, width) int32, padded on the left."""
    last = list(values)[max(0, len(values) - width) :]
    return mx.array([fill] * (width - len(last)) + last, dtype=mx.int32)[None]
