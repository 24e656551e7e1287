"""Rooflines: ``bench --roofline`` and ``inspect --chip``, measured rates next to their limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, Table, in_thousands, show, size
from mlxrun.errors import ParameterError

if TYPE_CHECKING:
    from mlxrun.analysis.device import Device

Facts = dict[str, Any]
# The name of this device among those of chips.
HERE = "here"
NO_FIGURE = "-"
_UNKNOWN = "Not known of this class of model: {}."


def _known(
    context: click.Context, parameter: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Names of known chips: others are refused before a model is looked for."""
    if names:
        from mlxrun.analysis.chips import chips_named

        try:
            chips_named(name for name in names if name != HERE)
        except ParameterError as error:
            raise click.BadParameter(str(error), context, parameter) from None
    return names


with_chips = click.option(
    "--chip",
    "chips",
    multiple=True,
    metavar="NAME",
    callback=_known,
    help="Also show how fast a chip could be at most, such as m1-pro or h100; all for every known "
    "one, or here: this device, measured in some seconds. May be given again.",
)


def measured_device() -> Device:
    """Rates of this device, measured in some seconds."""
    from mlxrun.analysis.device import measure_device

    with Bar("Measuring this device", unit=""):
        return measure_device()


def print_model(facts: Mapping[str, Any]) -> None:
    decode, prefill = facts["works"]["decode"], facts["works"]["prefill"]
    rows = [
        {"": "decode of a token in each sequence", **_terms(decode, decode["passes"])},
        {"": "prefill of a token, on average", **_terms(prefill, prefill["tokens"])},
    ]
    sequences = "one sequence" if facts["parallel"] == 1 else f"{facts['parallel']} sequences"
    show(f"Cost: {sequences} of {facts['context']} tokens, weights {facts['held']}")
    show(Table.of("", rows), *map(_UNKNOWN.format, facts["unknown"]))
    if here := facts["here"]:
        rates = ", ".join(
            f"{each['test']} {number(each['limit']['rate'])} tokens/s "
            f"({each['limit']['binds']} binds)"
            for each in here["limits"]
            if each["limit"]
        )
        throughput = in_thousands(here["throughput"], "FLOP")
        show(
            f"This device was measured to do {here['bandwidth'] / 1e9:.3g} GB/s and "
            f"{throughput}/s; at most: {rates}."
        )
    if facts["elsewhere"]:
        show("")
        _print_chips(facts["elsewhere"])


def _terms(cost: Mapping[str, Any], by: int) -> dict[str, str]:
    operations = cost["operations"]
    return {
        "#bytes": size(cost["bytes"] / by),
        "#of weights": size(cost["weights_read"] / by),
        "#of caches": size((cost["cache_read"] + cost["cache_written"]) / by),
        "#FLOPs": "not known" if operations is None else in_thousands(operations / by, "FLOP"),
    }


def print_roofline(facts: Facts) -> None:
    """Tables of :func:`mlxrun.analysis.roofline.bench_facts`."""
    show("")
    if not facts["tests"]:
        show("No limits: the cost of mixed requests depends on which share a pass.")
        return
    show(_tests(facts), *_notes(facts), "")
    _print_chips(facts["elsewhere"])


def _tests(facts: Facts) -> Table:
    several = len({test["runtime"] for test in facts["tests"]}) > 1
    rows = []
    for test in facts["tests"]:
        limit, intensity = test["limit"], test["intensity"]
        rows.append(
            {
                "test": test["test"],
                **({"runtime": test["runtime"]} if several else {}),
                "#tokens/s": number(test["tokens_per_second"]),
                "#limit": number(limit["rate"]),
                "#reached": f"{test['fraction']:.1%}",
                "binds": limit["binds"] if limit["whole"] else "bandwidth (compute unknown)",
                "#bytes a pass": size(test["bytes"] / test["passes"]),
                "#FLOPs a byte": "" if intensity is None else number(intensity),
            }
        )
    return Table.of("Against the limits of this device", rows)


def _notes(facts: Facts) -> Iterator[str]:
    device = facts["device"]
    moves = ", ".join(f"{r['name']} {r['best'] / 1e9:.3g}" for r in device["bandwidth"])
    products = ", ".join(f"{r['name']} {r['best'] / 1e9:.4g}" for r in device["throughput"])
    yield f"Bandwidth in GB/s, {size(device['moved'])} moved: {moves}; the best is the limit."
    yield f"Products of matrices in GFLOPS: {products}."
    if any(test["in_cache"] for test in facts["tests"]):
        yield (
            f"This model fits the processor's last cache ({size(device['cached'])}), which is "
            "faster than memory: it may exceed the limit of bandwidth."
        )
    yield from map(_UNKNOWN.format, facts["unknown"])


def _print_chips(elsewhere: Facts) -> None:
    rows = [
        {
            "chip": chip["chip"],
            "#GB/s": f"{chip['bandwidth'] / 1e9:g}",
            "#TFLOPS": _tflops(chip),
            **{f"#{each['test']}": _limit(chip, each["limit"]) for each in chip["limits"]},
        }
        for chip in elsewhere["chips"]
    ]
    show(Table.of("Limits of other chips, tokens/s", rows))
    show(
        f"Bounds, not measured: weights as a GPU would hold them ({elsewhere['held']}, "
        f"{size(elsewhere['weights'])}), every byte at full bandwidth, every operation at full "
        "throughput, by the figures of their makers. Nothing was run there, and no program "
        "reaches them."
    )
    show(
        "* compute binds, else bandwidth; ? bandwidth alone, compute may bind before; ~ estimated; "
        "- no figure. Sources: --json."
    )


def _tflops(chip: Mapping[str, Any]) -> str:
    from mlxrun.analysis.chips import ESTIMATED

    if chip["throughput"] is None:
        return NO_FIGURE
    about = "~" if chip["throughput_source"].startswith(ESTIMATED) else ""
    return f"{about}{chip['throughput'] / 1e12:g}"


def _limit(chip: Mapping[str, Any], most: Mapping[str, Any] | None) -> str:
    if not chip["holds_weights"]:
        return "too large"
    if most is None:
        return NO_FIGURE
    mark = "*" if most["binds"] == "compute" else "" if most["whole"] else "?"
    return number(most["rate"]) + mark


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
