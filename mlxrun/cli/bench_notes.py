"""The lines below the tables: what was measured on, what else used it, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Facts = dict[str, Any]

_LEFT_OUT = {"context": "longer than the model's context", "memory": "more than memory holds"}


def notes(about: Facts) -> Iterator[str]:
    """Lines that belong below measurements.

    Args:
        about: what was measured on, as ``mlxrun.cli.bench_measure.measured`` gives it.
    """
    yield from _machine(about["machine"])
    for runtime in about["runtimes"]:
        seconds = runtime["load_seconds"]
        loaded = "" if seconds is None else f", loaded in {seconds:.2f} s"
        yield f"{runtime['name']}: {runtime['about']}{loaded}"
    yield from _others(about["other_use"])
    yield from _rooms(about["room"])
    for reason, names in about["left_out"].items():
        if names:
            yield f"Left out, {_LEFT_OUT[reason]}: {', '.join(names)}."
    if about["interrupted"]:
        yield "Interrupted: these are the runs up to then."


def _rooms(rooms: list[Facts]) -> Iterator[str]:
    """How long sequences that decode together may be."""
    by_context: dict[int, list[str]] = {}
    for room in rooms:
        if room["context"]:  # otherwise their tests are named among what is left out
            by_context.setdefault(room["context"], []).append(str(room["parallel"]))
    each = [f"{context} in each of {', '.join(of)}" for context, of in by_context.items()]
    if each:
        yield f"Tokens that memory has room for: {'; '.join(each)} sequences."


def _machine(machine: Facts) -> Iterator[str]:
    yield f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), " + (
        f"{machine['system']}, BLAS: {machine['blas']}, {machine['date']}"
    )
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


def _others(use: Facts) -> Iterator[str]:
    """What else used the machine, as far as the system tells."""
    if use["load_before"] is not None:
        before, highest = use["load_before"], use["load_highest"]
        yield (
            f"Load average {before:.1f} before, up to {highest:.1f} during; "
            f"this process used {use['cores_used']:.1f} of {use['cores']} cores."
        )
    if use["busy"]:
        named = ", ".join(_named(other) for other in use["busy"])
        yield f"Also busy, in cores: {named}; {use['others_used']:.1f} in all."
    if use["shared"]:
        yield "Other programs used this machine: these figures are lower than it can do."


def _named(other: Facts) -> str:
    many = f" ({other['processes']} processes)" if other["processes"] > 1 else ""
    return f"{other['name']} {other['cores']:.1f}{many}"
