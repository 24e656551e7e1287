"""Logits of the scored tokens of a window, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxrun.computing import COMPUTING
from mlxrun.config import CacheConfig
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.outputs import Request

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Bytes of logits at once, and rows at least, for products to be worth their while.
LOGITS_BYTES, FEWEST_ROWS = 16 << 20, 16


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits are computed at once."""
    return max(FEWEST_ROWS, min(PREFILL_CHUNK, LOGITS_BYTES // (4 * max(1, vocab_size))))


def logits_of(
    llm: LLM, cache: CacheConfig, ids: list[int], first: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Logits after each token from position ``first`` on, but for the last.

    Args:
        cache: how keys and values are stored.
        ids: of a window, at least two.
        first: the first position whose following token counts.

    Yields:
        Logits, float32, (T, V), evaluated, and the tokens that followed, (T,); two models of the
        same vocabulary give parts of the same lengths.
    """
    engine, rows = llm.direct_engine, rows_at_once(llm.model.vocab_size)
    sequence = engine.prepare(Request(ids[:-1]), score_from=first, cache_config=cache)
    if not llm.model.joint:
        sequence.score_rows = rows
    for start, states in engine.scores(sequence):
        end = start + states.shape[1]
        for at in range(max(start, first), end, rows):
            stop = min(at + rows, end)
            with COMPUTING:
                logits = llm.model.head(states[:, at - start : stop - start])[0]
                logits = logits.astype(mx.float32)
                mx.eval(logits)
            yield logits, mx.array(ids[at + 1 : stop + 1])
