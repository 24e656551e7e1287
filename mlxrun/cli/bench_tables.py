"""Facts of benchmarks and profiles of data sets as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from mlxrun.bench.report import reference_speedup
from mlxrun.bench.runner import OURS
from mlxrun.cli.console import Table, show, size
from mlxrun.cli.roofline import number

Facts = dict[str, Any]

_LEFT_OUT = {"context": "longer than the model's context", "memory": "more than memory holds"}


def print_results(found: Facts) -> None:
    """Results, and below them the machine, its load, and the tests that were left out."""
    alone = [r for r in found["results"] if "context" in r["workload"] and r["parallel"] == 1]
    decodes = [r for r in found["results"] if "predict" in r["workload"]]
    together = decodes if any(r["parallel"] > 1 for r in decodes) else []
    mixed = [r for r in found["results"] if "context" not in r["workload"]]
    for title, results, columns, cells in (
        ("One sequence", alone, _ALONE, _alone),
        ("Sequences together", together, _TOGETHER, _together),
        ("Mixed requests", mixed, _MIXED, _mixed),
    ):
        if results:
            show(_compared(title, results, columns, [cells(each) for each in results]))
            show()
    if any(result["parallel"] in (2, 4, 8) for result in together):
        reference = found["reference"]
        rates = ", ".join(f"{v} at {n}" for n, v in reference["tokens_per_second"].items())
        show(f"Reference, another machine and model: {reference['what']}: {rates} tokens/s.")
    for line in _notes(found):
        show(line)


_SPEED = ("#tokens/s", "#min-max")
_ALONE = (*_SPEED, "#first token", "#each token", "#KV", "#average", "#peak")
_TOGETHER = (
    "#sequences",
    *_SPEED,
    "#each",
    "#speed-up",
    "#efficiency",
    "#KV",
    "#peak",
    "#reference",
)
_MIXED = (*_SPEED, "#all of it", "#first token", "#x idle")


def _alone(result: Facts) -> Sequence[object]:
    return (
        *_speed(result),
        _duration(result.get("time_to_first_token")),
        _duration(result.get("time_per_token")),
        *(_bytes(result[name]) for name in ("kv_bytes", "average_memory", "peak_memory")),
    )


def _together(result: Facts) -> Sequence[object]:
    speedup = result["speedup"]
    return (
        result["parallel"],
        *_speed(result),
        number(result["tokens_per_second_each"]),
        _times(speedup),
        "" if speedup is None else f"{result['efficiency']:.0%}",
        _bytes(result["kv_bytes"]),
        _bytes(result["peak_memory"]),
        _times(reference_speedup(result["parallel"])),
    )


def _mixed(result: Facts) -> Sequence[object]:
    if "time_to_first_token" in result:
        times = (_duration(result["time_to_first_token"]), _times(result["times_idle"]))
        return ("", "", "", *times)
    return (*_speed(result), _duration(statistics.median(result["seconds"])), "", "")


def _compared(
    title: str,
    results: Sequence[Facts],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
) -> Table:
    """A table with, where there are baselines, the runtime of each test and ratios to mlxrun's."""
    others = dict.fromkeys(r["runtime"] for r in results if r["runtime"] != OURS)
    heads = ["test", *(["runtime"] if others else []), *columns, *(f"#x {n}" for n in others)]
    cells = []
    for result, row in zip(results, rows, strict=True):
        runtime = [result["runtime"]] if others else []
        ratios = [_times(result["faster_than"].get(other)) for other in others]
        cells.append((result["test"], *runtime, *row, *ratios))
    return Table(title, heads, cells)


def _speed(result: Facts) -> tuple[str, str]:
    rate = result["tokens_per_second"]
    return number(rate["median"]), f"{number(rate['low'])}-{number(rate['high'])}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def _bytes(count: int | None) -> str:
    return size(count) if count else ""


def _notes(about: Facts) -> Iterator[str]:
    machine = about["machine"]
    yield f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), " + (
        f"{machine['system']}, BLAS: {machine['blas']}, {machine['date']}"
    )
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    for runtime in about["runtimes"]:
        seconds = runtime["load_seconds"]
        loaded = "" if seconds is None else f", loaded in {seconds:.2f} s"
        yield f"{runtime['name']}: {runtime['about']}{loaded}"
    yield from _load(about["other_use"])
    by_context: dict[int, list[str]] = {}
    for room in about["room"]:
        if room["context"]:  # otherwise their tests are named among those left out
            by_context.setdefault(room["context"], []).append(str(room["parallel"]))
    each = [f"{context} in each of {', '.join(of)}" for context, of in by_context.items()]
    if each:
        yield f"Tokens that memory has room for: {'; '.join(each)} sequences."
    for reason, names in about["left_out"].items():
        if names:
            yield f"Left out, {_LEFT_OUT[reason]}: {', '.join(names)}."
    if about["interrupted"]:
        yield "Interrupted: these are the runs up to then."


def _load(use: Facts) -> Iterator[str]:
    if use["load_before"] is not None:
        before, highest = use["load_before"], use["load_highest"]
        yield (
            f"Load average {before:.1f} before, up to {highest:.1f} during; "
            f"this process used {use['cores_used']:.1f} of {use['cores']} cores."
        )
    if use["busy"]:
        named = []
        for program in use["busy"]:
            many = f" ({program['processes']} processes)" if program["processes"] > 1 else ""
            named.append(f"{program['name']} {program['cores']:.1f}{many}")
        yield f"Also busy, in cores: {', '.join(named)}; {use['others_used']:.1f} in all."
    if use["shared"]:
        yield "Other programs used this machine: these figures are lower than it can do."


def print_profile(profile: Facts) -> None:
    """Lengths of a data set, and recommendations for it."""
    for shown in (_percentiles(profile), _recommended(profile)):
        show(shown)
        show()
    for line in _profile_notes(profile):
        show(line)
    show()


def _percentiles(profile: Facts) -> Table:
    counted, total = profile["counted"], profile["exchanges"]
    some = f"{counted:,} of {total:,}" if counted < total else f"{total:,}"
    title = f"Tokens of {some} exchange{'s' * (total > 1)} in {profile['file']}"
    levels = profile["prompts"]["percentiles"]
    rows = []
    for name in ("prompts", "outputs"):
        found = profile[name]
        tokens = (*found["percentiles"].values(), found["longest"])
        rows.append((name, found["count"], f"{found['mean']:.0f}", *tokens))
    return Table(title, ("", "#count", "#mean", *(f"#{level}%" for level in levels), "#max"), rows)


def _recommended(profile: Facts) -> Table:
    rows = []
    for level, advice in profile["levels"].items():
        lengths, workers = advice["size"], advice["workers"]
        at_once = (workers["interactive"], workers["offline"]) if workers else ("", "")
        fits = f"{advice['fits']:,}" if advice["fits"] < 10**6 else "any"
        sizes = (lengths["prompt"], lengths["predict"], f"{lengths['both']:.0%}")
        rows.append((level, f"{lengths['percent']}%", *sizes, fits, *at_once))
    columns = ("coverage", "#of each", "#n-prompt", "#n-predict", "#of both", "#fit in memory")
    return Table("What to measure", (*columns, "#workers, interactive", "#workers, offline"), rows)


def _profile_notes(profile: Facts) -> Iterator[str]:
    if profile["tried"]:
        counts, rules = ", ".join(map(str, profile["tried"])), profile["rules"]
        yield (
            f"Workers, of {counts}: interactive is the most at which each keeps "
            f"{rules['interactive']:.0%} of the rate that it has alone, offline the fewest that "
            f"reach {rules['offline']:.0%} of the best rate together."
        )
    lengths = {
        level: advice["size"]["prompt"] + advice["size"]["predict"]
        for level, advice in profile["levels"].items()
    }
    if long := [f"{k} ({n} tokens)" for k, n in lengths.items() if n > profile["context"]]:
        context = profile["context"]
        yield f"Longer than the model's context of {context} tokens: {', '.join(long)}."
