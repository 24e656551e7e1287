"""Stages that change logits (B, V) by the recent tokens, and their state.

Recent tokens are a window (B, W) int32, the latest last, padded with -1. Parameters are floats, or
arrays (B, 1) with a value for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

Value = float | mx.array

# Far below any logit, and far enough from float32's limit to be safe in further arithmetic.
_LARGEST_PENALTY = 1e30


def add_bias(logits: mx.array, ids: mx.array, values: mx.array) -> mx.array:
    """Add ``values`` (B, N) to the logits of the tokens ``ids`` (B, N); none may occur twice."""
    biased = mx.take_along_axis(logits, ids, axis=-1) + values
    return mx.put_along_axis(logits, ids, biased, axis=-1)


def penalize(
    logits: mx.array, window: mx.array, repetition: Value, presence: Value, frequency: Value
) -> mx.array:
    """Make the tokens of the window (B, W) less likely (or more, depending on the values).

    ``repetition`` divides positive logits and multiplies others (Keskar et al. 2019, "CTRL", in
    the form that spares negative logits a reward); then ``presence`` is subtracted once and
    ``frequency`` once per occurrence (OpenAI's API reference).
    """
    seen = _scatter(mx.zeros_like(logits), window).add(mx.where(window >= 0, 1.0, 0.0))
    scaled = mx.where(logits > 0, logits / repetition, logits * repetition)
    return mx.where(seen > 0, scaled - presence - seen * frequency, logits)


def dry(
    logits: mx.array,
    window: mx.array,
    repeats: mx.array,
    multiplier: Value,
    base: Value,
    allowed_length: Value,
    exempt: mx.array | None = None,
) -> mx.array:
    """Subtract ``multiplier * base ** (n - allowed_length)`` from tokens that repeat.

    n is the length of the longest earlier stretch of the window (B, W) that equals its end and is
    followed by the token; ``repeats`` (B, W) comes from ``extend_repeats``. ``exempt`` (B, V) bool
    are tokens that may repeat: those that break a sequence by themselves. "Don't repeat yourself",
    by p-e-w 2024: https://github.com/oobabooga/text-generation-webui/pull/5677
    """
    if window.shape[-1] < 2:
        return logits
    # A stretch that ends at index j has at most j + 1 tokens.
    lengths = mx.minimum(repeats, mx.arange(1, window.shape[-1] + 1))
    # The last index is the end itself: no token follows it.
    ends, following = lengths[:, :-1].astype(mx.float32), window[:, 1:]
    longest = _scatter(mx.zeros_like(logits), following).maximum(ends)
    penalty = mx.minimum(multiplier * base ** (longest - allowed_length), _LARGEST_PENALTY)
    penalized = longest >= allowed_length
    if exempt is not None:
        penalized = penalized & ~exempt
    return mx.where(penalized, logits - penalty, logits)


def _scatter(target: mx.array, ids: mx.array) -> mx.ArrayAt:
    """Index ``target`` (B, V) by ids (B, W); padding points to id 0 and needs neutral values."""
    rows = mx.arange(target.shape[0])[:, None]
    return target.at[rows, mx.maximum(ids, 0)]


def append(window: mx.array, token: mx.array) -> mx.array:
    """The window (B, W) shifted by the tokens (B,)."""
    return mx.concatenate([window[:, 1:], token[:, None].astype(window.dtype)], axis=-1)


def extend_repeats(repeats: mx.array, window: mx.array) -> mx.array:
    """For each token of the window, the length of the stretch ending there that equals its end.

    The recurrence of the longest common suffix: a stretch grows by one where its next token equals
    the newest, and is reset to 0 elsewhere. It needs no shift, as the window itself moved by one.

    Args:
        repeats: (B, W) int32, of the window before its newest token.
        window: (B, W) int32, with the newest token.
    """
    return mx.where(window == window[:, -1:], repeats + 1, 0)


def ends_with_any(window: mx.array, patterns: mx.array) -> mx.array:
    """Which rows (B, 1) of the window (B, W) end with one of the patterns (B, P, L <= W).

    Patterns are right-aligned; the padding, -1, equals everything.
    """
    end = window[:, None, -patterns.shape[-1] :]
    return mx.any(mx.all((patterns < 0) | (patterns == end), axis=-1), axis=-1, keepdims=True)


def initial_repeats(tokens: Sequence[int], breakers: Sequence[Sequence[int]]) -> list[int]:
    """The result of ``extend_repeats`` after all of ``tokens``, in linear time.

    The Z algorithm (Gusfield 1997, "Algorithms on strings, trees and sequences") on the reversed
    tokens, and no stretch longer than the tokens since the last of the breakers.
    """
    limit = _tokens_since_breaker(tokens, breakers)
    text = tokens[::-1]
    lengths = [limit] * len(text)
    left = right = 0
    for place in range(1, len(text)):
        length = min(lengths[place - left], right - place) if place < right else 0
        while (
            place + length < len(text) and length < limit and text[length] == text[place + length]
        ):
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths[place] = length
    return lengths[::-1]


def _tokens_since_breaker(tokens: Sequence[int], breakers: Sequence[Sequence[int]]) -> int:
    by_last: dict[int, list[tuple[int, ...]]] = {}
    for breaker in breakers:
        by_last.setdefault(breaker[-1], []).append(tuple(breaker))
    for end in range(len(tokens), 0, -1):
        for breaker in by_last.get(tokens[end - 1], ()):
            if tuple(tokens[max(0, end - len(breaker)) : end]) == breaker:
                return len(tokens) - end
    return len(tokens)
