"""Logits of the tokens of a window that count, few at a time, as a prompt's would be computed.

The whole window goes through caches in passes as prompts do. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlxrun.generation.engine import PREFILL_CHUNK
from mlxrun.model import Model

# Bytes of logits at once, and rows at least, for products to be worth their while.
LOGITS_BYTES, FEWEST_ROWS = 16 << 20, 16


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits are computed at once."""
    return max(FEWEST_ROWS, min(PREFILL_CHUNK, LOGITS_BYTES // (4 * max(1, vocab_size))))


def logits_of(
    model: Model[Any], cache: Sequence[Any], ids: list[int], first: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """What a model expects after each token from position ``first`` on, but for the last.

    Args:
        cache: empty memories of the model.
        ids: of a window, at least two.
        first: the first position whose following token counts.

    Yields:
        Logits, float32, (T, V), and the tokens that followed, (T,); for windows and positions
        alike, two models of the same vocabulary give parts of the same length.
    """
    parts = list(_parts(first, len(ids) - 1, rows_at_once(model.vocab_size)))
    read = _joint if model.joint else _apart
    for (start, stop), logits in zip(parts, read(model, cache, ids, parts), strict=True):
        yield logits.astype(mx.float32), mx.array(ids[start + 1 : stop + 1])


def _parts(start: int, end: int, rows: int) -> Iterator[tuple[int, int]]:
    """Positions in parts of a few rows, none of them in two passes."""
    while start < end:
        stop = min(start + rows, end, _pass_end(start))
        yield start, stop
        start = stop


def _pass_end(position: int) -> int:
    return (position // PREFILL_CHUNK + 1) * PREFILL_CHUNK


def _joint(
    model: Any, cache: Sequence[Any], ids: list[int], parts: Sequence[tuple[int, int]]
) -> Iterator[mx.array]:
    """Long passes through the layers, and the output matrix for a few rows at a time."""
    begin, read, x = 0, 0, mx.zeros(())
    for start, stop in parts:
        while read <= start:
            begin, read = read, min(_pass_end(read), len(ids) - 1)
            x = model.hidden(mx.array([ids[begin:read]]), cache)  # (1, at most PREFILL_CHUNK, D)
            mx.eval(x, [array for layer in cache for array in layer.state])
        yield model.head(x[:, start - begin : stop - begin])[0]


def _apart(
    model: Model[Any], cache: Sequence[Any], ids: list[int], parts: Sequence[tuple[int, int]]
) -> Iterator[mx.array]:
    """Passes of a few rows where a model has no output matrix of its own to be asked for."""
    for begin in range(0, parts[0][0], PREFILL_CHUNK):
        part = ids[begin : min(begin + PREFILL_CHUNK, parts[0][0])]
        model(mx.array([part]), cache, last_only=True)
        mx.eval([array for layer in cache for array in layer.state])
    for start, stop in parts:
        yield model(mx.array([ids[start:stop]]), cache)[0]
