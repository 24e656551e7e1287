"""Logits of a story are llama.cpp's, however its tokens are fed, past window and prefill chunk.

The figures hold samples: at some positions the largest logits and some chosen at random, and of
every token its surprise. The bounds are ten times the largest errors seen on x86; they stand for
what float32 leaves open over 18 and 30 layers. Gemma's are wider since ggml looks GELU up in a
table of half-precision numbers, and a rounding now and then falls the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from conformance.measure import nmse
from real_models import CLOSE, Figures, RealModel

import mlxrun


@dataclass(frozen=True)
class Bounds:
    """Of errors against llama.cpp.

    Attributes:
        mean, worst: normalized mean squared errors, on average and of a position.
        surprise: nats, of a token.
    """

    mean: float
    worst: float
    surprise: float


BOUNDS = {"smollm2": Bounds(1e-10, 1e-9, 1e-3), "gemma": Bounds(2e-7, 1e-6, 3e-2)}

# Lengths of passes by the number of tokens.
WAYS: dict[str, Callable[[int], list[int]]] = {
    "one pass": lambda count: [count],
    "ragged chunks": lambda count: [1, 7, 250, 3, 129, 1, 200, count - 591],
    "singly at the window's end and the story's": lambda count: [
        *[500], *[1] * 20, count - 540, *[1] * 20
    ],
}  # fmt: skip


def rows(llm: mlxrun.LLM, tokens: list[int], lengths: list[int]) -> Iterator[np.ndarray]:
    """Logits after each token, (V,), of one pass after the other through the same cache."""
    cache, start = llm.model.make_cache(), 0
    for length in lengths:
        piece = mx.array([tokens[start : start + length]])
        yield from np.array(llm.model(piece, cache)[0].astype(mx.float32))
        start += length
    assert start == len(tokens)


def logsumexp(row: np.ndarray) -> float:
    return float(row.max()) + float(np.log(np.exp((row - row.max()).astype(np.float64)).sum()))


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_llama_cpps(
    llm: mlxrun.LLM, model: RealModel, figures: Figures, way: str
) -> None:
    kept = figures.arrays
    tokens = kept["story"].tolist()
    at = {position: index for index, position in enumerate(kept["positions"].tolist())}
    surprises, errors = [], []
    for position, row in enumerate(rows(llm, tokens, WAYS[way](len(tokens)))):
        total = logsumexp(row)
        if position + 1 < len(tokens):
            surprises.append(total - row[tokens[position + 1]])
        if position in at:
            index = at[position]
            top, best = kept["top_tokens"][index], kept["top_logits"][index]
            got = np.concatenate([row[top], row[kept["sample_tokens"]]]).astype(np.float64)
            errors.append(nmse(got, np.concatenate([best, kept["sample_logits"][index]])))
            assert total == pytest.approx(kept["logsumexp"][index], abs=BOUNDS[model.name].surprise)
            if best[0] - best[1] > CLOSE:
                assert row.argmax() == top[0]
    assert len(errors) == len(at)
    bounds = BOUNDS[model.name]
    off = np.abs(np.array(surprises) - kept["surprises"]).max()
    assert np.mean(errors) < bounds.mean
    assert max(errors) < bounds.worst
    assert off < bounds.surprise
