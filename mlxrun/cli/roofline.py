"""What ``mlxrun bench --roofline`` tells: measured rates beside limits, here and of other chips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, Output, Table, size, table

if TYPE_CHECKING:
    from mlxrun.bench.results import Results
    from mlxrun.cache.choice import Wanted
    from mlxrun.llm import LLM
    from mlxrun.planning.work import Counts

Facts = dict[str, Any]
# The form in which a GPU holds weights: half precision, what is packed stays so.
ELSEWHERE = "float16"
NO_FIGURE = "-"


def with_roofline(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option."""
    return click.option(
        "--roofline",
        is_flag=True,
        help="Also measure what this device can do, and tell each rate as a fraction of its limit, "
        "which limit binds, and the limits of other chips. Not with --csv.",
    )(command)


def roofline_facts(
    llm: LLM, path: Path, results: Results, policy: str | None, cache: Mapping[str, Any]
) -> Facts:
    """What there is to tell of measured results; measures the device, which takes some seconds.

    Args:
        llm: the model that was measured.
        path: where it came from.
        policy: it was loaded with.
        cache: how keys and values were stored and attended to, as ``LLM.session`` takes it.
    """
    from mlxrun.admission import Options
    from mlxrun.bench.device import measure_device
    from mlxrun.bench.results import OURS
    from mlxrun.bench.roofline import SAME_WEIGHTS, roofline, works
    from mlxrun.generation.engine import PREFILL_CHUNK
    from mlxrun.loader import open_model
    from mlxrun.planning.chips import CHIPS
    from mlxrun.planning.counting import count_held
    from mlxrun.planning.limits import chip_limits

    with Bar("Measuring this device", count=""):
        device = measure_device()
    dtype = str(llm.model.dtype).removeprefix("mlx.core.")
    wanted = Options(**cache).wanted()
    runtimes = (OURS,) if cache else SAME_WEIGHTS  # others have caches as they come
    counts = _counts(llm, dtype, wanted)
    facts = roofline(results, counts, device, dtype, PREFILL_CHUNK, runtimes)
    source = open_model(path)
    held = source.storage(dtype=ELSEWHERE, policy=policy)
    workloads = [result.workload for result in results.items]
    there = works(workloads, count_held(source.config, held, wanted), PREFILL_CHUNK)
    chips = chip_limits(there, held.nbytes, CHIPS)
    return {**facts, "elsewhere": {"held": held.how, "weights": held.nbytes, "chips": chips}}


def _counts(llm: LLM, dtype: str, cache: Wanted) -> Counts:
    """Of the model as it is held in memory."""
    from mlxrun.loader import WeightStorage
    from mlxrun.models.transformer import Transformer
    from mlxrun.planning.counting import count_held

    model = llm.model
    modules = model.module_bytes if isinstance(model, Transformer) else {}
    storage = WeightStorage(model.nbytes, dtype, False, "as loaded", modules)
    return count_held(llm.config, storage, cache)


def print_roofline(facts: Facts) -> None:
    """Tables of what :func:`roofline_facts` found."""
    out = Output()
    out.print()
    if not facts["tests"]:
        out.print("Nothing has a limit: what mixed requests must do depends on how they meet.")
        return
    out.print(_here(facts))
    for line in _notes(facts):
        out.print(line)
    out.print()
    out.print(chip_table(facts["elsewhere"]["chips"]))
    for line in chip_notes(facts["elsewhere"]["held"], facts["elsewhere"]["weights"]):
        out.print(line)


def _here(facts: Facts) -> Table:
    """A row for each test; who ran it, where several did."""
    several = len({test["runtime"] for test in facts["tests"]}) > 1
    rows = [
        (
            test["test"],
            *([test["runtime"]] if several else []),
            number(test["tokens_per_second"]),
            number(test["limit"]["rate"]),
            f"{test['fraction']:.1%}",
            _binding(test["limit"]),
            size(test["bytes"] / test["passes"]),
            "" if test["intensity"] is None else number(test["intensity"]),
        )
        for test in facts["tests"]
    ]
    who = ("runtime",) if several else ()
    figures = ("#tokens/s", "#limit", "#reached", "binds", "#bytes a pass", "#FLOPs a byte")
    return table("Against the limits of this device", ("test", *who, *figures), rows)


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
    for what in facts["unknown"]:
        yield f"Not known of this class of model: {what}."


def chip_table(chips: Sequence[Mapping[str, Any]]) -> Table:
    """Limits of chips, as :func:`mlxrun.planning.limits.chip_limits` gives them."""
    tests = [each["test"] for each in chips[0]["limits"]]
    columns = ("chip", "#GB/s", "#TFLOPS", *(f"#{test}" for test in tests))
    rows = [
        (
            chip["chip"],
            f"{chip['bandwidth'] / 1e9:g}",
            _tflops(chip),
            *(_limit(chip, each["limit"]) for each in chip["limits"]),
        )
        for chip in chips
    ]
    return table("Limits of other chips, tokens/s", columns, rows)


def _tflops(chip: Mapping[str, Any]) -> str:
    if chip["throughput"] is None:
        return NO_FIGURE
    from mlxrun.planning.chips import ESTIMATED

    about = "~" if chip["throughput_source"].startswith(ESTIMATED) else ""
    return f"{about}{chip['throughput'] / 1e12:g}"


def _limit(chip: Mapping[str, Any], most: Mapping[str, Any] | None) -> str:
    if not chip["holds_weights"]:
        return "too large"
    if most is None:
        return NO_FIGURE
    mark = "*" if most["binds"] == "compute" else "" if most["whole"] else "?"
    return number(most["rate"]) + mark


def chip_notes(held: str, weights: float) -> Iterator[str]:
    """What a reader of the limits of chips has to know."""
    yield (
        f"Bounds, not measured: weights as a GPU would hold them ({held}, {size(weights)}), every "
        "byte at full bandwidth, every operation at full throughput, by the figures of their "
        "makers. Nothing was run there, and no program reaches them."
    )
    yield (
        "* compute binds, else bandwidth; ? bandwidth alone, compute may bind before; ~ estimated; "
        "- no figure. Sources: --json."
    )


def _binding(most: Mapping[str, Any]) -> str:
    """Which limit binds, in words."""
    return str(most["binds"]) if most["whole"] else "bandwidth (compute unknown)"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
