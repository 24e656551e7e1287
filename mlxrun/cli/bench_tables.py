"""Facts of benchmarks and profiles of data sets as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlxrun.bench.report import reference_speedup
from mlxrun.bench.runner import OURS
from mlxrun.cli.console import Table, show, size
from mlxrun.cli.roofline import number

Facts = dict[str, Any]
Row = dict[str, object]

_LEFT_OUT = {"context": "longer than the model's context", "memory": "more than memory holds"}


def print_results(found: Facts) -> None:
    """Results, and below them the machine, its load, and the tests that were left out."""
    alone = [r for r in found["results"] if "context" in r["workload"] and r["parallel"] == 1]
    decodes = [r for r in found["results"] if "predict" in r["workload"]]
    together = decodes if any(r["parallel"] > 1 for r in decodes) else []
    mixed = [r for r in found["results"] if "context" not in r["workload"]]
    for title, results, cells in (
        ("One sequence", alone, _alone),
        ("Sequences together", together, _together),
        ("Mixed requests", mixed, _mixed),
    ):
        if results:
            show(_compared(title, results, cells), "")
    if any(result["parallel"] in (2, 4, 8) for result in together):
        reference = found["reference"]
        rates = ", ".join(f"{v} at {n}" for n, v in reference["tokens_per_second"].items())
        show(f"Reference, another machine and model: {reference['what']}: {rates} tokens/s.")
    show(*_notes(found))


def _alone(result: Facts) -> Row:
    return _speed(result) | {
        "#first token": _duration(result.get("time_to_first_token")),
        "#each token": _duration(result.get("time_per_token")),
        "#KV": _bytes(result["kv_bytes"]),
        "#average": _bytes(result["average_memory"]),
        "#peak": _bytes(result["peak_memory"]),
    }


def _together(result: Facts) -> Row:
    efficiency = result["efficiency"]
    return {
        "#sequences": result["parallel"],
        **_speed(result),
        "#each": number(result["tokens_per_second_each"]),
        "#speed-up": _times(result["speedup"]),
        "#efficiency": "" if efficiency is None else f"{efficiency:.0%}",
        "#KV": _bytes(result["kv_bytes"]),
        "#peak": _bytes(result["peak_memory"]),
        "#reference": _times(reference_speedup(result["parallel"])),
    }


def _mixed(result: Facts) -> Row:
    first = "time_to_first_token" in result
    return {name: "" if first else value for name, value in _speed(result).items()} | {
        "#all of it": "" if first else _duration(statistics.median(result["seconds"])),
        "#first token": _duration(result.get("time_to_first_token")),
        "#x idle": _times(result.get("times_idle")),
    }


def _compared(title: str, results: Sequence[Facts], cells: Callable[[Facts], Row]) -> Table:
    """A table with, where there are baselines, the runtime of each test and ratios to mlxrun's."""
    others = dict.fromkeys(r["runtime"] for r in results if r["runtime"] != OURS)
    rows = [
        {"test": result["test"]}
        | ({"runtime": result["runtime"]} if others else {})
        | cells(result)
        | {f"#x {name}": _times(result["faster_than"].get(name)) for name in others}
        for result in results
    ]
    return Table.of(title, rows)


def _speed(result: Facts) -> Row:
    rate = result["tokens_per_second"]
    spread = f"{number(rate['low'])}-{number(rate['high'])}"
    return {"#tokens/s": number(rate["median"]), "#min-max": spread}


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
    show(_percentiles(profile), "", _recommended(profile), "", *_profile_notes(profile), "")


def _percentiles(profile: Facts) -> Table:
    counted, total = profile["counted"], profile["exchanges"]
    some = f"{counted:,} of {total:,}" if counted < total else f"{total:,}"
    title = f"Tokens of {some} exchange{'s' * (total > 1)} in {profile['file']}"
    rows = []
    for name in ("prompts", "outputs"):
        found = profile[name]
        levels = {f"{level}%": tokens for level, tokens in found["percentiles"].items()}
        mean = f"{found['mean']:.0f}"
        rows.append(
            {"": name, "count": found["count"], "#mean": mean, **levels, "max": found["longest"]}
        )
    return Table.of(title, rows)


def _recommended(profile: Facts) -> Table:
    rows = []
    for level, advice in profile["levels"].items():
        lengths, workers = advice["size"], advice["workers"] or {}
        rows.append(
            {
                "coverage": level,
                "#of each": f"{lengths['percent']}%",
                "#n-prompt": str(lengths["prompt"]),
                "#n-predict": str(lengths["predict"]),
                "#of both": f"{lengths['both']:.0%}",
                "#fit in memory": f"{advice['fits']:,}" if advice["fits"] < 10**6 else "any",
                "#workers, interactive": workers.get("interactive", ""),
                "#workers, offline": workers.get("offline", ""),
            }
        )
    return Table.of("What to measure", rows)


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
