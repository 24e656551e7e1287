"""Measurements as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlxrun.bench.report import REFERENCE, reference_speedup
from mlxrun.bench.results import OURS, Result, Results
from mlxrun.bench.workload import Decode, FirstToken, Prefill, Ragged
from mlxrun.cli.bench_notes import notes
from mlxrun.cli.console import Output, Table, size, table

Facts = dict[str, Any]


def print_results(results: Results, about: Facts) -> None:
    """Everything that was measured, and what it was measured on."""
    out = Output()
    for made in filter(None, (_alone(results), _together(results), _mixed(results))):
        out.print(made)
        out.print()
    if any(result.workload.parallel in (2, 4, 8) for result in _decoding(results)):
        rates = REFERENCE["tokens_per_second"]
        each = ", ".join(f"{rate} at {rows}" for rows, rate in rates.items())
        out.print(f"Reference, another machine and model: {REFERENCE['what']}: {each} tokens/s.")
    for line in notes(about):
        out.print(line)


def _alone(results: Results) -> Table | None:
    """One sequence, a row for each test and runtime."""
    shown = [
        r
        for r in results.items
        if isinstance(r.workload, Prefill | Decode) and r.workload.parallel == 1
    ]
    columns = ("#tokens/s", "#min-max", "#first token", "#each token")
    rows = [
        (*_speed(r), *_waits(r), _bytes(r.kv_bytes), _bytes(r.average), _bytes(r.peak))
        for r in shown
    ]
    return _compared("One sequence", results, shown, (*columns, "#KV", "#average", "#peak"), rows)


def _waits(result: Result) -> tuple[str, str]:
    if isinstance(result.workload, Prefill):
        return _duration(result.seconds.median), ""
    return "", _duration(result.per_token)


def _together(results: Results) -> Table | None:
    """Sequences that decode together."""
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
    """Requests of many lengths, and one that comes behind a long prompt."""
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
    """A table with, where there are others, who ran each test and how ours compares."""
    if not shown:
        return None
    runtimes = list(dict.fromkeys(result.runtime for result in shown))
    others = [name for name in runtimes if name != OURS]
    heads = ["test", *(["runtime"] if others else []), *columns]
    heads += [f"#x {name}" for name in others]
    made = []
    for result, row in zip(shown, rows, strict=True):
        who = [result.runtime] if others else []
        ratios = [_ratio(results, result, other) for other in others]
        made.append((result.workload.name, *who, *row, *ratios))
    return table(title, heads, made)


def _ratio(results: Results, result: Result, other: str) -> str:
    ratio = results.ratio(result, other) if result.runtime == OURS else None
    return "" if ratio is None else f"{ratio:.2f}x"


def _decoding(results: Results) -> Iterator[Result]:
    """Decoding at several numbers of sequences; nothing where there was only one."""
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
