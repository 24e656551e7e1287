"""Measurements, and profiles of data sets, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlxrun.bench.report import REFERENCE, reference_speedup
from mlxrun.bench.runner import OURS, Result, Results
from mlxrun.bench.workloads import Decode, FirstToken, Prefill, Ragged
from mlxrun.cli.console import Output, Table, size, table

if TYPE_CHECKING:
    from mlxrun.analysis.dataset import Profile

Facts = dict[str, Any]

_LEFT_OUT = {"context": "longer than the model's context", "memory": "more than memory holds"}


def print_results(results: Results, about: Facts) -> None:
    """Results, and below them the machine, its load, and what was left out."""
    out = Output()
    for shown in filter(None, (_alone(results), _together(results), _mixed(results))):
        out.print(shown)
        out.print()
    if any(result.workload.parallel in (2, 4, 8) for result in _decoding(results)):
        rates = REFERENCE["tokens_per_second"]
        each = ", ".join(f"{rate} at {rows}" for rows, rate in rates.items())
        out.print(f"Reference, another machine and model: {REFERENCE['what']}: {each} tokens/s.")
    for line in _notes(about):
        out.print(line)


def _alone(results: Results) -> Table | None:
    shown = [
        r
        for r in results.items
        if isinstance(r.workload, Prefill | Decode) and r.workload.parallel == 1
    ]
    columns = ("#tokens/s", "#min-max", "#first token", "#each token")
    rows = []
    for result in shown:
        if isinstance(result.workload, Prefill):
            times = (_duration(result.seconds.median), "")
        else:
            times = ("", _duration(result.per_token))
        memory = (_bytes(result.kv_bytes), _bytes(result.average), _bytes(result.peak))
        rows.append((*_speed(result), *times, *memory))
    return _compared("One sequence", results, shown, (*columns, "#KV", "#average", "#peak"), rows)


def _together(results: Results) -> Table | None:
    shown = list(_decoding(results))
    columns = ("#sequences", "#tokens/s", "#min-max", "#each", "#speed-up", "#efficiency")
    rows = []
    for result in shown:
        parallel, speedup = result.workload.parallel, results.speedup(result)
        rate, spread = _speed(result)
        gain = ("", "") if speedup is None else (f"{speedup:.2f}x", f"{speedup / parallel:.0%}")
        reference = reference_speedup(parallel)
        rows.append(
            (
                parallel,
                rate,
                spread,
                _number(result.rate.median / parallel),
                *gain,
                _bytes(result.kv_bytes),
                _bytes(result.peak),
                f"{reference:.2f}x" if reference else "",
            )
        )
    last = ("#KV", "#peak", "#reference")
    return _compared("Sequences together", results, shown, (*columns, *last), rows)


def _mixed(results: Results) -> Table | None:
    shown = [r for r in results.items if isinstance(r.workload, Ragged | FirstToken)]
    rows = []
    for result in shown:
        if isinstance(result.workload, Ragged):
            rows.append((*_speed(result), _duration(result.seconds.median), "", ""))
        else:
            delay = results.delay(result)
            times = "" if delay is None else f"{delay:.2f}x"
            rows.append(("", "", "", _duration(result.seconds.median), times))
    columns = ("#tokens/s", "#min-max", "#all of it", "#first token", "#x idle")
    return _compared("Mixed requests", results, shown, columns, rows)


def _compared(
    title: str,
    results: Results,
    shown: Sequence[Result],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
) -> Table | None:
    """A table with, where there are baselines, the runtime of each test and ratios to mlxrun's."""
    if not shown:
        return None
    runtimes = list(dict.fromkeys(result.runtime for result in shown))
    others = [name for name in runtimes if name != OURS]
    heads = ["test", *(["runtime"] if others else []), *columns]
    heads += [f"#x {name}" for name in others]
    cells = []
    for result, row in zip(shown, rows, strict=True):
        runtime = [result.runtime] if others else []
        ratios = [_ratio(results, result, other) for other in others]
        cells.append((result.workload.name, *runtime, *row, *ratios))
    return table(title, heads, cells)


def _ratio(results: Results, result: Result, other: str) -> str:
    ratio = results.ratio(result, other) if result.runtime == OURS else None
    return "" if ratio is None else f"{ratio:.2f}x"


def _decoding(results: Results) -> Iterator[Result]:
    """Decodes, if there are any of several sequences."""
    decoding = [r for r in results.items if isinstance(r.workload, Decode)]
    if any(r.workload.parallel > 1 for r in decoding):
        yield from decoding


def _speed(result: Result) -> tuple[str, str]:
    rate = result.rate
    return _number(rate.median), f"{_number(rate.low)}-{_number(rate.high)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{_number(seconds)} s" if seconds >= 1 else f"{_number(1e3 * seconds)} ms"


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
    """Lengths of a data set, and what to measure for it."""
    out = Output()
    for shown in (_percentiles(profile), _recommended(profile)):
        out.print(shown)
        out.print()
    for line in _profile_notes(profile):
        out.print(line)
    out.print()


def _percentiles(profile: Profile) -> Table:
    from mlxrun.analysis.dataset import PERCENTILES, Summary

    counted, total, lengths = profile.counted, profile.exchanges, profile.lengths
    some = f"{counted:,} of {total:,}" if counted < total else f"{total:,}"
    title = f"Tokens of {some} exchange{'s' * (total > 1)} in {profile.file}"
    rows = []
    for name, each in (("prompts", lengths.prompts), ("outputs", lengths.known_outputs)):
        summary = Summary.of(each)
        shares = [summary.percentiles[percent] for percent in PERCENTILES]
        rows.append((name, summary.count, f"{summary.mean:.0f}", *shares, summary.longest))
    return table(title, ("", "#count", "#mean", *(f"#{p}%" for p in PERCENTILES), "#max"), rows)


def _recommended(profile: Profile) -> Table:
    rows = []
    for advice in profile.advices:
        one, workers = advice.size, advice.workers
        at_once = (workers.interactive, workers.offline) if workers else ("", "")
        fits = f"{advice.fits:,}" if advice.fits < 10**6 else "any"
        lengths = (one.prompt, one.predict, f"{one.both:.0%}")
        rows.append((one.level, f"{one.percent}%", *lengths, fits, *at_once))
    columns = ("coverage", "#of each", "#n-prompt", "#n-predict", "#of both", "#fit in memory")
    return table("What to measure", (*columns, "#workers, interactive", "#workers, offline"), rows)


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
