"""The memory plan as ``inspect`` tells it: its terms, whether it fits, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxrun.cli.console import Output, size, table
from mlxrun.planning.plan import LONGEST, MemoryPlan
from mlxrun.planning.weights import Held

Facts = dict[str, Any]


def plan_facts(plan: MemoryPlan, held: Held, context: int, parallel: int) -> Facts:
    """A plan as JSON types; all sizes in bytes."""
    terms = plan.terms(context, parallel)
    return {
        "context": context,
        "parallel": parallel,
        "held": held.how,
        "weights": terms.weights,
        "sequence": terms.sequence,
        "scratch": terms.scratch,
        "kept": terms.kept,
        "reserve": terms.reserve,
        "total": terms.total,
        "available": terms.limit or None,
        "fits": terms.fits,
        "largest_context": plan.context_for(parallel) if terms.limit else None,
        "largest_parallel": plan.parallel_for(context) if terms.limit else None,
    }


def print_plan(plan: Mapping[str, Any]) -> None:
    """The formula, term by term."""
    out = Output()
    context, parallel = plan["context"], plan["parallel"]
    caches = plan["sequence"] * parallel
    each = f", {parallel} x {size(plan['sequence'])}" if parallel > 1 else ""
    rows = [
        (f"weights ({plan['held']})", size(plan["weights"])),
        (f"+ keys and values{each}", size(caches)),
        ("+ scratch of a pass", size(plan["scratch"])),
        ("+ beginnings of prompts kept, at most", size(plan["kept"])),
        ("+ reserve", size(plan["reserve"])),
        ("= total", size(plan["total"])),
    ]
    if plan["available"] is not None:
        rows.append(("available", size(plan["available"])))
    sequences = "one sequence" if parallel == 1 else f"{parallel} sequences"
    out.print(f"Memory plan: {sequences} of {context} tokens")
    out.print(table("", ("", "#"), rows, header=False))
    if plan["available"] is not None:
        out.print(_verdict(plan, sequences))


def _verdict(plan: Mapping[str, Any], sequences: str) -> str:
    longest, most = plan["largest_context"], plan["largest_parallel"]
    up_to = "of any length" if longest >= LONGEST else f"of up to {longest} tokens"
    at_once = "any number" if most >= LONGEST else f"up to {most}" if most else "none"
    verdict = "It fits." if plan["fits"] else "It does not fit."
    if not longest and not most:
        return verdict
    room = f"There is room for {sequences} {up_to}, and for {at_once} of {plan['context']} tokens."
    return f"{verdict} {room}"
