"""The example that compares patterns of attention runs, and its figures are right."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlxrun
from examples import long_context

DRAFT = Path(mlxrun.__file__).parent / "assets" / "demo-draft.gguf"


def test_bytes_read_and_divergence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A fox is an animal. A hen is a bird. " * 40)
    patterns = "dense,blocks:16x16,blocks:12x16,blocks:3x16,strided:16/8,window:64+4"
    long_context.main(
        [str(DRAFT), "--text", str(text), "--lengths", "80,240", "--patterns", patterns,
         "--tokens", "5"]
    )  # fmt: skip
    table = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    rows = {(row[0], row[1]): row[2:] for row in cells}
    assert len(rows) == 12
    # Keys and values of one layer of 4 heads, 32 wide.
    assert rows["240", "dense"] == [f"{245 * 2 * 4 * 32 * 4 / 1e6:.2f}", "0", "100%"]
    assert rows["240", "blocks:16x16"] == rows["240", "dense"]
    assert rows["80", "blocks:12x16"] == rows["80", "dense"]
    assert 0 < float(rows["240", "blocks:12x16"][1]) < float(rows["240", "blocks:3x16"][1])
    for pattern in ("blocks:3x16", "strided:16/8", "window:64+4"):
        assert float(rows["240", pattern][0]) < float(rows["240", "dense"][0]) / 2
        assert float(rows["240", pattern][1]) > 0


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A fox.")
    with pytest.raises(SystemExit, match="too few for these lengths"):
        long_context.main([str(DRAFT), "--text", str(text), "--lengths", "80"])
