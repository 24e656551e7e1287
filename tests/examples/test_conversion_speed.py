"""Conversion against ``cp`` of the same file on the same disk: the one time a test measures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.conversion_speed import measure, seconds_of_conversion, seconds_of_cp
from examples.make_random_gguf import Kind, Shape, write

SHARE_OF_CP = 1 / 3
RUNS = 6


def seconds_converted(source: Path) -> float:
    """By the clock of an idle machine.

    Where others keep the cores busy, the clock says how many they are; then the cores' own time
    that went into the conversion is what counts, spread over them as its threads are.
    """
    cores = os.cpu_count() or 1
    busy = os.getloadavg()[0] > cores / 2
    clock, worked = seconds_of_conversion(source)
    return min(clock, worked / cores) if busy else clock


def test_conversion_has_a_third_of_the_speed_of_cp(tmp_path: Path) -> None:
    """TinyLlama's matrices in llama-quantize's Q4_K_M mixture, 240 MB, in memory for both.

    Runs alternate, and the best of each count.
    """
    source = tmp_path / "q4_k_m.gguf"
    write(Shape(9, 2048, 5632, 32, 4, 8000), str(source))
    copied = converted = float("inf")
    for run in range(RUNS):
        copied = min(copied, seconds_of_cp(source))
        converted = min(converted, seconds_converted(source))
        if run and copied >= SHARE_OF_CP * converted:
            break
    assert copied >= SHARE_OF_CP * converted


@pytest.mark.parametrize("kind", ["Q5_K", "BF16", "MXFP4"])
def test_a_line_of_the_table(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{kind}.gguf"
    write(Shape(1, 256, 512, 4, 2, 512), str(path), kinds=(Kind[kind], Kind[kind]))
    measure(path, ("near",), 1)
    name, size, *speeds = capsys.readouterr().out.split()
    assert name == kind
    assert float(size) == round(path.stat().st_size / 1e6)
    assert len(speeds) == 3
    assert all(float(speed) > 0 for speed in speeds)
