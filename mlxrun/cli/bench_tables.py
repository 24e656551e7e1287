"""Measurements, and profiles of data sets, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlxrun.bench.report import REFERENCE, reference_speedup
from mlxrun.bench.runner import OURS, Result, Results
from mlxrun.bench.workloads import Decode, Prefill, Ragged
from mlxrun.cli.console import Output, Table, size
from mlxrun.cli.roofline import number

if TYPE_CHECKING:
    from mlxrun.analysis.dataset import Profile

Facts = dict[str, Any]

_LEFT_OUT = {"context": "longer than the model's context", "memory": "more than memory holds"}


def print_results(results: Results, about: Facts) -> None:
    """Results, and below them the machine, its load, and the tests that were left out."""
    out = Output()
    alone = [r for r in results.items if _is_plain(r) and r.workload.parallel == 1]
    decodes = [r for r in results.items if isinstance(r.workload, Decode)]
    together = decodes if any(r.workload.parallel > 1 for r in decodes) else []
    mixed = [r for r in results.items if not _is_plain(r)]
    for title, shown, columns, cells in (
        ("One sequence", alone, _ALONE, _alone),
        ("Sequences together", together, _TOGETHER, _together),
        ("Mixed requests", mixed, _MIXED, _mixed),
    ):
        if shown:
            rows = [cells(results, result) for result in shown]
            out.print(_compared(title, results, shown, columns, rows))
            out.print()
    if any(result.workload.parallel in (2, 4, 8) for result in together):
        rates = REFERENCE["tokens_per_second"]
        each = ", ".join(f"{rate} at {rows}" for rows, rate in rates.items())
        out.print(f"Reference, another machine and model: {REFERENCE['what']}: {each} tokens/s.")
    for line in _notes(about):
        out.print(line)


def _is_plain(result: Result) -> bool:
    return isinstance(result.workload, Prefill | Decode)


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


def _alone(results: Results, result: Result) -> Sequence[object]:
    if isinstance(result.workload, Prefill):
        times = (_duration(result.seconds.median), "")
    else:
        times = ("", _duration(result.per_token))
    memory = (_bytes(result.kv_bytes), _bytes(result.average), _bytes(result.peak))
    return (*_speed(result), *times, *memory)


def _together(results: Results, result: Result) -> Sequence[object]:
    parallel, speedup = result.workload.parallel, results.speedup(result)
    reference = reference_speedup(parallel)
    return (
        parallel,
        *_speed(result),
        number(result.rate.median / parallel),
        *(("", "") if speedup is None else (f"{speedup:.2f}x", f"{speedup / parallel:.0%}")),
        _bytes(result.kv_bytes),
        _bytes(result.peak),
        f"{reference:.2f}x" if reference else "",
    )


def _mixed(results: Results, result: Result) -> Sequence[object]:
    duration, delay = _duration(result.seconds.median), results.delay(result)
    if isinstance(result.workload, Ragged):
        return (*_speed(result), duration, "", "")
    return ("", "", "", duration, "" if delay is None else f"{delay:.2f}x")


def _compared(
    title: str,
    results: Results,
    shown: Sequence[Result],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
) -> Table:
    """A table with, where there are baselines, the runtime of each test and ratios to mlxrun's."""
    runtimes = list(dict.fromkeys(result.runtime for result in shown))
    others = [name for name in runtimes if name != OURS]
    heads = ["test", *(["runtime"] if others else []), *columns, *(f"#x {n}" for n in others)]
    cells = []
    for result, row in zip(shown, rows, strict=True):
        runtime = [result.runtime] if others else []
        ratios = [_ratio(results, result, other) for other in others]
        cells.append((result.workload.name, *runtime, *row, *ratios))
    return Table(title, heads, cells)


def _ratio(results: Results, result: Result, other: str) -> str:
    ratio = results.ratio(result, other) if result.runtime == OURS else None
    return "" if ratio is None else f"{ratio:.2f}x"


def _speed(result: Result) -> tuple[str, str]:
    rate = result.rate
    return number(rate.median), f"{number(rate.low)}-{number(rate.high)}"


def _duration(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def _bytes(count: int) -> str:
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


def print_profile(profile: Profile) -> None:
    """Lengths of a data set, and recommendations for it."""
    out = Output()
    for shown in (_percentiles(profile), _recommended(profile)):
        out.print(shown)
        out.print()
    for line in _profile_notes(profile):
        out.print(line)
    out.print()


def _percentiles(profile: Profile) -> Table:
    from mlxrun.analysis.dataset import PERCENTILES, summary

    counted, total, lengths = profile.counted, profile.exchanges, profile.lengths
    some = f"{counted:,} of {total:,}" if counted < total else f"{total:,}"
    title = f"Tokens of {some} exchange{'s' * (total > 1)} in {profile.file}"
    rows = []
    for name, each in (("prompts", lengths.prompts), ("outputs", lengths.known_outputs)):
        found = summary(each)
        levels = found["percentiles"].values()
        rows.append((name, found["count"], f"{found['mean']:.0f}", *levels, found["longest"]))
    return Table(title, ("", "#count", "#mean", *(f"#{p}%" for p in PERCENTILES), "#max"), rows)


def _recommended(profile: Profile) -> Table:
    rows = []
    for advice in profile.advices:
        one, workers = advice.size, advice.workers
        at_once = (workers.interactive, workers.offline) if workers else ("", "")
        fits = f"{advice.fits:,}" if advice.fits < 10**6 else "any"
        lengths = (one.prompt, one.predict, f"{one.both:.0%}")
        rows.append((one.level, f"{one.percent}%", *lengths, fits, *at_once))
    columns = ("coverage", "#of each", "#n-prompt", "#n-predict", "#of both", "#fit in memory")
    return Table("What to measure", (*columns, "#workers, interactive", "#workers, offline"), rows)


def _profile_notes(profile: Profile) -> Iterator[str]:
    from mlxrun.analysis.dataset import INTERACTIVE, OFFLINE

    if profile.trials:
        counts = ", ".join(str(workload.parallel) for workload in profile.trials)
        yield (
            f"Workers, of {counts}: interactive is the most at which each keeps "
            f"{INTERACTIVE:.0%} of the rate that it has alone, offline the fewest that reach "
            f"{OFFLINE:.0%} of the best rate together."
        )
    long = [one.size for one in profile.advices if one.size.length > profile.context]
    if long:
        named = ", ".join(f"{each.level} ({each.length} tokens)" for each in long)
        yield f"Longer than the model's context of {profile.context} tokens: {named}."
