"""The memory plan as ``inspect`` tells it: its terms, whether it fits, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxrun.cli.console import Output, size, table
from mlxrun.loader import WeightStorage
from mlxrun.memory.plan import LONGEST, MemoryPlan

Facts = dict[str, Any]


def plan_facts(
    plan: MemoryPlan, held: WeightStorage, context: int, parallel: int, *, longest: int
) -> Facts:
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
        "kept": terms.prefix_bytes,
        "total": terms.total,
        "available": terms.limit or None,
        "fits": terms.fits,
        "largest_context": min(longest, plan.context_for(parallel)) if terms.limit else None,
        "largest_parallel": plan.parallel_for(context) if terms.limit else None,
        "trained_context": longest,
    }


def sequences(plan: Mapping[str, Any]) -> str:
    """The sequences that a plan is for, in words."""
    count = plan["parallel"]
    return f"{'one sequence' if count == 1 else f'{count} sequences'} of {plan['context']} tokens"


def print_plan(plan: Mapping[str, Any]) -> None:
    """The formula, term by term."""
    out = Output()
    parallel = plan["parallel"]
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
    out.print(f"Memory plan: {sequences(plan)}")
    out.print(table("", ("", "#"), rows, header=False))
    print_verdict(plan)


def print_verdict(plan: Mapping[str, Any]) -> None:
    """Whether it fits, and what would."""
    out = Output()
    context, trained = plan["context"], plan["trained_context"]
    if plan["available"] is not None:
        out.print(_verdict(plan))
    if context > trained:
        out.print(f"The model was trained for {trained} tokens, not for {context}.")


def _verdict(plan: Mapping[str, Any]) -> str:
    sequences = "one sequence" if plan["parallel"] == 1 else f"{plan['parallel']} sequences"
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
