"""Published memory, bandwidth and throughput of chips; ``chips.csv`` has each with its source.

The source is the maker's page where one was found. Throughput is that of dense products of
half-precision matrices with sums in float32: half of a page's figure for sparse ones. For the GPUs
of the M1 to the M3 it is an estimate from cores and clock. Where sources contradict one another
there is no figure (the M4's clocks are given as 1.47 to 1.68 GHz, and no source has the throughput
of the matrix units since the M5), and without a bandwidth no chip (the B200: 7.7 to 8 TB/s).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mlxrun.analysis.costs import Roof
from mlxrun.errors import ParameterError

ALL = "all"
ESTIMATED = "estimated"
# Of an Apple GPU: lanes of a core, and FLOPs of a lane in a cycle.
_LANES, _FLOPS = 128, 2


@dataclass(frozen=True)
class Chip:
    """One chip, in its largest configuration."""

    name: str
    bandwidth: float  # GB/s (10^9 bytes/s)
    memory: int  # GB
    source: str  # address of bandwidth and memory
    tflops: float | None = None  # 10^12 FLOPs/s in half precision; None where there is no figure
    tflops_source: str = ""  # address, or the formula of the estimate

    @property
    def key(self) -> str:
        """The name on the command line: ``m1-pro``."""
        return _key(self.name)

    @property
    def roof(self) -> Roof:
        return Roof(self.bandwidth * 1e9, None if self.tflops is None else self.tflops * 1e12)


def _key(name: str) -> str:
    return re.sub(r"[ _]+", "-", name.strip().lower())


def _chip(row: Mapping[str, str]) -> Chip:
    tflops = float(row["TFLOPS"]) if row["TFLOPS"] else None
    source = row["source of TFLOPS or of the clock"]
    if row["GPU cores"]:
        cores, gigahertz = int(row["GPU cores"]), float(row["GPU GHz"])
        tflops = round(cores * _LANES * _FLOPS * gigahertz / 1e3, 1)
        source = (
            f"{ESTIMATED}: {cores} cores x {_LANES} lanes x {_FLOPS} FLOPs x {gigahertz} GHz, "
            "halves as fast as singles (https://github.com/philipturner/metal-benchmarks); "
            f"clock: {source}"
        )
    return Chip(row["name"], float(row["GB/s"]), int(row["GB"]), row["source"], tflops, source)


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as _table:
    CHIPS = tuple(map(_chip, csv.DictReader(_table)))


def chips_named(names: Iterable[str]) -> tuple[Chip, ...]:
    """Chips by names such as ``m1-pro`` or ``RTX 4090``; ``all`` for all."""
    by_key = {chip.key: chip for chip in CHIPS}
    chosen: dict[str, Chip] = {}
    for name in names:
        key = _key(name).removeprefix("apple-").removeprefix("nvidia-")
        if key == ALL:
            return CHIPS
        if key not in by_key:
            near = get_close_matches(key, by_key, n=3) or list(by_key)[:3]
            raise ParameterError("chip", name, f"all, or one such as {', '.join(near)}")
        chosen[key] = by_key[key]
    return tuple(chosen.values())
