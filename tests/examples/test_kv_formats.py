"""The example that compares types of caches runs, and its figures are right."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlxrun
from examples import kv_formats

DRAFT = Path(mlxrun.__file__).parent / "assets" / "demo-draft.gguf"


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], list[str]]:
    kv_formats.main([str(DRAFT), *arguments])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    return {(keys, values): rest for keys, values, *rest in lines}


def test_the_fewer_bits_the_larger_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    got = rows(capsys, "--chats", "2", "--types", "f16", "q8", "q4", "q2", "q4c/32:q8", "q8:q4c")
    errors = [float(got[name, name][1]) for name in ("f16", "q8", "q4", "q2")]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 1e-3
    # Four bits for each number and two float32 for each 32 of them, in one layer of 4 x 32.
    assert got["q4", "q4"][0] == str(2 * 4 * (16 + 8))
    assert got["plain", "plain"][0] == f"{2 * 4 * 32 * 4:,}"
    assert "without c" in " ".join(got["q8", "q4c"])


def test_a_text_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A fox is an animal. " * 20)
    got = rows(capsys, "--text", str(text), "--types", "q8:q4")
    assert float(got["q8", "q4"][1]) > 0
