"""What ``inspect`` tells of the work of a model, and how fast chips could be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, Output, in_thousands, size, table
from mlxrun.cli.roofline import ELSEWHERE, chip_notes, chip_table, number
from mlxrun.errors import ParameterError

if TYPE_CHECKING:
    from mlxrun.loader import Source, WeightStorage
    from mlxrun.planning.work import Counts, Work

Facts = dict[str, Any]
# The name of this device among those of chips.
HERE = "here"


def with_chips(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option that names chips."""
    return click.option(
        "--chip",
        "chips",
        multiple=True,
        metavar="NAME",
        callback=_known,
        help="Also tell how fast a chip could be at most, such as m1-pro or h100; all of those "
        "known, or here: this device, which is measured for some seconds. May be given again.",
    )(command)


def _known(
    context: click.Context, parameter: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """The names, of chips that are known: refused before a model is looked for."""
    if names:
        from mlxrun.planning.chips import chips_named

        try:
            chips_named(name for name in names if name != HERE)
        except ParameterError as error:
            raise click.BadParameter(str(error), context, parameter) from None
    return names


def work_of_source(
    source: Source,
    *,
    context: int,
    parallel: int,
    cache: tuple[str | None, str | None],
    chips: Sequence[str],
    policy: str | None = None,
) -> Facts:
    """What drawing a token in each sequence and reading a prompt must do at least.

    Args:
        source: as :func:`mlxrun.loader.open_model` gives it.
        context: tokens of each sequence.
        parallel: sequences at once.
        cache: how keys and values are stored; see :mod:`mlxrun.cache.types`.
        chips: names of those whose limits to tell.
        policy: under which a GGUF's weights are held; see :func:`mlxrun.load`.

    Raises:
        ParameterError: there is no chip of a name, or no such type of cache.
    """
    from mlxrun.planning.chips import chips_named
    from mlxrun.planning.limits import chip_limits, weight_facts, work_facts

    named = chips_named(name for name in chips if name != HERE)
    counts, held = _counted(source, None, cache, policy)
    works = _works(counts, context, parallel)
    facts: Facts = {
        "context": context,
        "parallel": parallel,
        "held": held.how,
        "weights": weight_facts(counts),
        "works": {name: work_facts(work) for name, work in works.items()},
        "unknown": list(counts.unknown),
        "here": _measured(works, held.dtype) if HERE in chips else None,
        "elsewhere": None,
    }
    if named:
        counts, held = _counted(source, ELSEWHERE, cache, policy)
        limits = chip_limits(_works(counts, context, parallel), held.nbytes, named)
        facts["elsewhere"] = {"held": held.how, "weights": held.nbytes, "chips": limits}
    return facts


def _counted(
    source: Source,
    dtype: str | None,
    cache: tuple[str | None, str | None],
    policy: str | None,
) -> tuple[Counts, WeightStorage]:
    from mlxrun.cache.choice import Wanted
    from mlxrun.planning.counting import count_held

    held = source.storage(dtype=dtype, policy=policy)
    return count_held(source.config, held, Wanted(None, 0, *cache)), held


def _works(counts: Counts, context: int, parallel: int) -> dict[str, Work]:
    from mlxrun.generation.engine import PREFILL_CHUNK
    from mlxrun.planning.work import decode, prefill

    return {
        "drawing": decode(counts, context - 1, rows=parallel),
        "reading": prefill(counts, context, piece=PREFILL_CHUNK),
    }


def _measured(works: Mapping[str, Work], dtype: str) -> Facts:
    """Limits of this device."""
    from mlxrun.bench.device import measure_device
    from mlxrun.planning.limits import bound

    with Bar("Measuring this device", count=""):
        roof = measure_device().roof(dtype)
    limits = [{"test": name, "limit": bound(work, roof)} for name, work in works.items()]
    return {"bandwidth": roof.bandwidth, "throughput": roof.throughput, "limits": limits}


def print_work(facts: Mapping[str, Any]) -> None:
    """The least that a token takes, and how fast chips could be."""
    out = Output()
    drawing, reading = facts["works"]["drawing"], facts["works"]["reading"]
    rows = [
        ("drawing a token in each sequence", *_terms(drawing, drawing["passes"])),
        ("reading a token of a prompt, on average", *_terms(reading, reading["tokens"])),
    ]
    sequences = "one sequence" if facts["parallel"] == 1 else f"{facts['parallel']} sequences"
    out.print(f"Work: {sequences} of {facts['context']} tokens, weights {facts['held']}")
    out.print(table("", ("", "#bytes", "#of weights", "#of caches", "#FLOPs"), rows))
    for what in facts["unknown"]:
        out.print(f"Not known of this class of model: {what}.")
    if facts["here"]:
        out.print(_told_here(facts["here"]))
    if facts["elsewhere"]:
        out.print()
        out.print(chip_table(facts["elsewhere"]["chips"]))
        for line in chip_notes(facts["elsewhere"]["held"], facts["elsewhere"]["weights"]):
            out.print(line)


def _terms(work: Mapping[str, Any], by: int) -> tuple[str, ...]:
    cache = work["cache_read"] + work["cache_written"]
    moved = (size(part / by) for part in (work["bytes"], work["weights_read"], cache))
    operations = work["operations"]
    return (*moved, "not known" if operations is None else flops(operations / by))


def _told_here(here: Mapping[str, Any]) -> str:
    rates = ", ".join(
        f"{each['test']} {number(each['limit']['rate'])} tokens/s ({each['limit']['binds']} binds)"
        for each in here["limits"]
        if each["limit"]
    )
    did = f"{here['bandwidth'] / 1e9:.3g} GB/s and {flops(here['throughput'])}/s"
    return f"This device was measured to do {did}; at most: {rates}."


def flops(count: float) -> str:
    """A number of operations for people, in powers of ten."""
    return in_thousands(count, "FLOP")
