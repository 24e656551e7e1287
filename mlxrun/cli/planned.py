"""The memory plan as ``inspect`` tells it: its terms, whether it fits, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxrun.cli.console import Output, size, table
from mlxrun.planning.plan import LONGEST, MemoryPlan
from mlxrun.planning.weights import Held

Facts = dict[str, Any]


def plan_facts(plan: MemoryPlan, held: Held, context: int, parallel: int, *, longest: int) -> Facts:
    """A plan as JSON types; all sizes in bytes.

    Args:
        longest: tokens that the model was trained for, beyond which nothing is promised.
    """
    terms = plan.terms(context, parallel)
    return {
        "context": context,
        "parallel": parallel,
        "held": held.how,
        "weights": terms.weights,
        "sequence": terms.sequence,
        "scratch": terms.scratch,
        "reserve": terms.reserve,
        "needed": terms.needed,
        "kept": terms.kept,
        "total": terms.total,
        "available": terms.limit or None,
        "fits": terms.fits,
        "largest_context": min(longest, plan.context_for(parallel)) if terms.limit else None,
        "largest_parallel": plan.parallel_for(context) if terms.limit else None,
        "trained_context": longest,
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
        ("+ reserve", size(plan["reserve"])),
        ("= needed", size(plan["needed"])),
        ("+ beginnings of prompts kept, at most", size(plan["kept"])),
        ("= total", size(plan["total"])),
    ]
    if plan["available"] is not None:
        rows.append(("available", size(plan["available"])))
    sequences = "one sequence" if parallel == 1 else f"{parallel} sequences"
    out.print(f"Memory plan: {sequences} of {context} tokens")
    out.print(table("", ("", "#"), rows, header=False))
    if plan["available"] is not None:
        out.print(_verdict(plan, sequences))
    if context > plan["trained_context"]:
        out.print(f"The model was trained for {plan['trained_context']} tokens, not for {context}.")


def _verdict(plan: Mapping[str, Any], sequences: str) -> str:
    longest, most = plan["largest_context"], plan["largest_parallel"]
    whole = ", the model's context" if longest == plan["trained_context"] else ""
    up_to = f"of up to {longest} tokens{whole}"
    at_once = "any number" if most >= LONGEST else f"up to {most}" if most else "none"
    verdict = "It fits." if plan["fits"] else "It does not fit."
    if not longest and not most:
        return verdict
    if not longest:
        fewer = f"there is for {at_once} of {plan['context']} tokens"
        return f"{verdict} There is no room for {sequences}, however short; {fewer}."
    room = f"There is room for {sequences} {up_to}, and for {at_once} of {plan['context']} tokens."
    return f"{verdict} {room}"
