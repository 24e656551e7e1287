"""The table of chips: every figure has a source, and chips are found by name."""

from __future__ import annotations

import re

import pytest

from mlxrun.analysis.chips import CHIPS, ESTIMATED, Chip, chips_named
from mlxrun.errors import ParameterError

ADDRESS = re.compile(r"https://[a-z0-9.-]+\.[a-z]+/\S*")
MAKERS = ("https://www.apple.com/", "https://support.apple.com/", "https://www.nvidia.com/",
          "https://images.nvidia.com/")  # fmt: skip
# Figures that no maker's page was found for.
ELSEWHERE = {"M1", "M3 Ultra", "M5 Pro", "M5 Max", "M5 Ultra", "M6", "DGX Spark"}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.key)
def test_every_figure_has_a_source(chip: Chip) -> None:
    assert ADDRESS.fullmatch(chip.source)
    assert chip.bandwidth > 0
    assert chip.memory > 0
    assert (chip.tflops is None) == (chip.tflops_source == "")
    if chip.tflops is not None:
        assert chip.tflops > 0
        assert ADDRESS.search(chip.tflops_source)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.key)
def test_other_figures_are_called_estimates(chip: Chip) -> None:
    if chip.tflops_source and not chip.tflops_source.startswith(MAKERS):
        assert chip.tflops_source.startswith(f"{ESTIMATED}: ")
    assert chip.source.startswith(MAKERS) == (chip.name not in ELSEWHERE)


def test_an_estimate_is_its_formula() -> None:
    numbers = re.compile(r"(\d+) cores x (\d+) lanes x (\d+) FLOPs x ([\d.]+) GHz")
    estimated = [chip for chip in CHIPS if chip.tflops_source.startswith(ESTIMATED)]
    assert estimated
    for chip in estimated:
        found = numbers.search(chip.tflops_source)
        assert found
        cores, lanes, flops, clock = (float(n) for n in found.groups())
        assert chip.tflops == round(cores * lanes * flops * clock / 1000, 1)


def test_units() -> None:
    (m1_pro,) = chips_named(["m1-pro"])
    assert m1_pro.roof.bandwidth == 200e9
    (h100,) = chips_named(["NVIDIA H100"])
    assert h100.roof.throughput == 989e12
    (m4,) = chips_named(["Apple M4"])
    assert m4.roof.throughput is None


def test_families_are_complete_and_names_differ() -> None:
    keys = [chip.key for chip in CHIPS]
    assert len(set(keys)) == len(keys)
    for family in (1, 2, 3, 5):
        assert {f"m{family}{kind}" for kind in ("", "-pro", "-max", "-ultra")} <= set(keys)
    assert {"m4", "m4-pro", "m4-max"} <= set(keys)


def test_within_a_family_more_is_more() -> None:
    by_key = {chip.key: chip for chip in CHIPS}
    for family in ("m1", "m2", "m3", "m5"):
        members = [by_key[f"{family}{kind}"] for kind in ("", "-pro", "-max", "-ultra")]
        bandwidths = [chip.bandwidth for chip in members]
        assert bandwidths == sorted(bandwidths)
        memories = [chip.memory for chip in members]
        assert memories == sorted(memories)


def test_names_as_people_write_them() -> None:
    assert [chip.name for chip in chips_named(["M2 max", "rtx_4090", "m2-max"])] == [
        "M2 Max",
        "RTX 4090",
    ]
    assert chips_named(["h100", "all"]) == CHIPS
    with pytest.raises(ParameterError, match=r"chip must be all, or one such as .*m1-pro"):
        chips_named(["m1-pr"])
