"""The benchmark of conversions runs; what it measures is docs/benchmarks.md's business."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.conversion_speed import measure
from examples.make_random_gguf import Kind, Shape, write


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
