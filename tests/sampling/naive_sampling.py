"""The sampling stages in plain Python and float64, one candidate at a time, as the papers put them.

Candidates are lists of (token, logit), likeliest first, equal ones by ascending id. ``CLOSE``
collects how near each decision was to going the other way, so that a test can set aside what
float32 is free to decide differently.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

from hypothesis import strategies as st

from mlxrun.outputs import SamplingParams

Candidates = list[tuple[int, float]]

CLOSE: list[float] = []


@st.composite
def pasts(draw: st.DrawFn, vocabulary: int) -> list[int]:
    """Up to 40 tokens of a few kinds: long enough to repeat itself in many ways."""
    length, kinds = draw(st.integers(0, 40)), draw(st.integers(1, vocabulary))
    return draw(st.randoms(use_true_random=False)).choices(range(kinds), k=length)


def breakers(vocabulary: int) -> st.SearchStrategy[set[tuple[int, ...]]]:
    """A few sequences of one to three tokens."""
    sequence = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=3).map(tuple)
    return st.just(set()) | st.sets(sequence, min_size=1, max_size=2)


def compare(left: float, right: float) -> float:
    """left - right, remembered."""
    if math.isfinite(left) and math.isfinite(right):
        CLOSE.append(abs(left - right))
    return left - right


def softmax(logits: Sequence[float]) -> list[float]:
    peak = max(logits)
    if peak == -math.inf:
        return [math.nan] * len(logits)
    weights = [math.exp(value - peak) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def probabilities(candidates: Candidates) -> list[float]:
    return softmax([logit for _, logit in candidates])


def rank(logits: Sequence[float]) -> Candidates:
    return sorted(enumerate(logits), key=lambda item: (-item[1], item[0]))


def top_p(candidates: Candidates, p: float) -> Candidates:
    kept: Candidates = []
    total = 0.0
    for candidate, probability in zip(candidates, probabilities(candidates), strict=True):
        kept.append(candidate)
        total += probability
        if compare(total, p) >= 0:
            break
    return kept


def min_p(candidates: Candidates, p: float) -> Candidates:
    likelihood = probabilities(candidates)
    return [
        candidate
        for candidate, value in zip(candidates, likelihood, strict=True)
        if compare(value, p * likelihood[0]) >= 0
    ]


def typical_p(candidates: Candidates, p: float) -> Candidates:
    likelihood = probabilities(candidates)
    surprise = [-math.log(value) if value > 0 else math.inf for value in likelihood]
    entropy = sum(v * s for v, s in zip(likelihood, surprise, strict=True) if v > 0)
    distance = [abs(value - entropy) for value in surprise]
    order = sorted(range(len(candidates)), key=lambda i: distance[i])
    for i, j in pairwise(order):
        if surprise[i] != surprise[j]:
            compare(distance[i], distance[j])
    kept: list[int] = []
    total = 0.0
    for place in order:
        kept.append(place)
        total += likelihood[place]
        if compare(total, p) > 0:
            break
    return [candidates[place] for place in sorted(kept)]


def xtc(candidates: Candidates, threshold: float) -> Candidates:
    likelihood = probabilities(candidates)
    top = [i for i, value in enumerate(likelihood) if compare(value, threshold) >= 0]
    return [candidate for i, candidate in enumerate(candidates) if i not in top[:-1]]


def mirostat(candidates: Candidates, mu: float) -> Candidates:
    likelihood = probabilities(candidates)
    kept = [
        candidate
        for candidate, value in zip(candidates, likelihood, strict=True)
        if value > 0 and compare(-math.log2(value), mu) <= 0
    ]
    return kept or candidates[:1]


def penalize(
    logits: Sequence[float],
    past: Sequence[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> list[float]:
    result = list(logits)
    for token in set(past):
        value = result[token]
        value = value / repetition if value > 0 else value * repetition
        result[token] = value - presence - frequency * list(past).count(token)
    return result


def last(past: Sequence[int], n: int) -> Sequence[int]:
    """The last n of the past, all of it for -1."""
    return past if n < 0 else past[max(0, len(past) - n) :]


def repetitions(
    past: Sequence[int], n: int, breakers: Collection[tuple[int, ...]]
) -> dict[int, int]:
    """How long a repetition each token would continue, by comparing backwards from every place."""
    limit = since_breaker(past, breakers)
    window = last(past, n)
    found: dict[int, int] = {}
    for place in range(len(window) - 1):
        length = 0
        while (
            length < limit
            and length <= place
            and window[place - length] == window[len(window) - 1 - length]
        ):
            length += 1
        token = window[place + 1]
        found[token] = max(found.get(token, 0), length)
    return found


def since_breaker(past: Sequence[int], breakers: Collection[tuple[int, ...]]) -> int:
    for end in range(len(past), 0, -1):
        if any(tuple(past[max(0, end - len(b)) : end]) == b for b in breakers):
            return len(past) - end
    return len(past)


def dry(
    logits: Sequence[float],
    past: Sequence[int],
    n: int,
    breakers: Collection[tuple[int, ...]],
    multiplier: float,
    base: float,
    allowed_length: int,
) -> list[float]:
    result = list(logits)
    for token, length in repetitions(past, n, breakers).items():
        if length >= allowed_length and (token,) not in breakers:
            result[token] -= multiplier * base ** (length - allowed_length)
    return result


def pipeline(
    logits: Sequence[float],
    params: SamplingParams,
    past: Sequence[int],
    breakers: Collection[tuple[int, ...]],
    chance: float,
) -> Candidates:
    """The distribution to sample from: all stages in order, with XTC's dice at ``chance``."""
    p = params
    adjusted = [value + p.logit_bias.get(token, 0.0) for token, value in enumerate(logits)]
    adjusted = penalize(
        adjusted,
        last(past, p.penalty_last_n),
        p.repetition_penalty,
        p.presence_penalty,
        p.frequency_penalty,
    )
    if p.dry_multiplier:
        strength = (p.dry_multiplier, p.dry_base, p.dry_allowed_length)
        adjusted = dry(adjusted, past, p.dry_penalty_last_n, breakers, *strength)
    candidates = rank(adjusted)
    for (_, more), (_, less) in pairwise(candidates):
        compare(more, less)  # rounding may swap neighbors
    if p.temperature == 0:
        return [(candidates[0][0], 0.0)]
    if p.mirostat:
        return mirostat(over(candidates, p.temperature), 2 * p.mirostat_tau)
    return over(truncate(candidates, p, chance), p.temperature)


def truncate(candidates: Candidates, p: SamplingParams, chance: float) -> Candidates:
    if p.top_k:
        candidates = candidates[: p.top_k]
    if p.typical_p < 1:
        candidates = typical_p(candidates, p.typical_p)
    if p.top_p < 1:
        candidates = top_p(candidates, p.top_p)
    if p.min_p > 0:
        candidates = min_p(candidates, p.min_p)
    if chance < p.xtc_probability:
        candidates = xtc(candidates, p.xtc_threshold)
    return candidates


def over(candidates: Candidates, temperature: float) -> Candidates:
    return [(token, logit / temperature) for token, logit in candidates]
