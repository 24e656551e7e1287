"""Conversion against ``cp`` of the same file: the one time a test measures, the cores' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.conversion_speed import SHAPE, measure, seconds_of_conversion, seconds_of_cp
from examples.make_random_gguf import Kind, Shape, write

# Of the cores' time of a conversion; 0.055 to 0.061 were measured, whatever else the machine did.
SHARE_OF_CP = 1 / 40
RUNS = 3


def test_conversion_beside_cp(tmp_path: Path) -> None:
    """TinyLlama's matrices in llama-quantize's Q4_K_M mixture, 100 MB, in memory for both.

    By the cores' time: by the clock, which docs/benchmarks.md has, a busy machine gave shares of
    0.08 to 0.5 in a row. A conversion that became twice as slow shows.
    """
    source = tmp_path / "q4_k_m.gguf"
    write(SHAPE, str(source))
    copied = min(seconds_of_cp(source)[1] for _ in range(RUNS))
    converted = min(seconds_of_conversion(source)[1] for _ in range(RUNS))
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
