"""Conversion against ``cp`` of the same file on the same disk: the one time a test measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.conversion_speed import measure, seconds_of_conversion, seconds_of_cp
from examples.make_random_gguf import Kind, Shape, write

# The aim is a third, which is not reached: medians of nine pairs were 0.21 to 0.33.
SHARE_OF_CP = 1 / 7
RUNS = 10


def test_conversion_beside_cp(tmp_path: Path) -> None:
    """TinyLlama's matrices in llama-quantize's Q4_K_M mixture, 260 MB, in memory for both.

    By the clock alone. Runs alternate, so that whatever else keeps the machine busy does it to
    both, and the best of each count. The aim is a third of the speed of cp and is NOT reached:
    two quiet cores gave 0.21 to 0.33. What is held here is a seventh, so that a conversion that
    became twice as slow shows.
    """
    source = tmp_path / "q4_k_m.gguf"
    write(Shape(9, 2048, 5632, 32, 4, 8000), str(source))
    copied = converted = float("inf")
    for run in range(RUNS):
        copied = min(copied, seconds_of_cp(source))
        converted = min(converted, seconds_of_conversion(source)[0])
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
