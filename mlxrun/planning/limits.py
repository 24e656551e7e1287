"""Work and its limits on chips as facts: JSON types in bytes, FLOPs, seconds, tokens a second.

What ``bench --roofline`` and ``inspect`` tell. Bounds by the figures of makers; nothing measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from mlxrun.planning.chips import Chip
from mlxrun.planning.roof import Roof, limit
from mlxrun.planning.work import Counts, Work

Facts = dict[str, Any]
# Tokens of a pass from which bandwidth alone says nothing: at half a byte a weight each token is
# four FLOPs a byte, and chips whose figures are known do 26 to 420 FLOPs in the time of a byte.
MANY = 64


def work_facts(work: Work) -> Facts:
    """The terms of some work."""
    return {
        "passes": work.passes,
        "tokens": work.tokens,
        "bytes": work.nbytes,
        "weights_read": work.weights,
        "cache_read": work.cache_read,
        "cache_written": work.cache_written,
        "operations": work.operations,
        "intensity": work.intensity,
    }


def weight_facts(counts: Counts) -> Facts:
    """A model's bytes by how much of them a pass reads, as :class:`Weights` has them."""
    weights = counts.weights
    return {
        "total": weights.total,
        "always": weights.always,
        "head": weights.head,
        "row": weights.row,
        "experts": sum(routed.nbytes for routed in weights.routed),
    }


def chip_limits(works: Mapping[str, Work], held: float, chips: Iterable[Chip]) -> list[Facts]:
    """How fast chips could do some works at most.

    Args:
        works: by name.
        held: bytes of the weights, as they would be held there.
        chips: of which to tell.
    """
    return [
        {
            "chip": chip.name,
            "bandwidth": chip.roof.bandwidth,
            "throughput": chip.roof.throughput,
            "memory": chip.memory * 10**9,
            "holds_weights": held <= chip.memory * 10**9,
            "source": chip.source,
            "throughput_source": chip.tflops_source or None,
            "limits": [
                {"test": name, "limit": bound(work, chip.roof)} for name, work in works.items()
            ],
        }
        for chip in chips
    ]


def bound(work: Work, roof: Roof) -> Facts | None:
    """The limit of some work; None where only bandwidth is known and compute would bind.

    Where it is not ``whole``, that of bandwidth is told, and compute may bind before.
    """
    most = limit(work, roof)
    if not most.whole and work.tokens >= MANY * work.passes:
        return None
    return asdict(most)
