"""The family that ``CONTRIBUTING.md`` shows is there as shown."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_diff_of_a_family_is_what_the_files_have() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    parts = re.findall(r"^--- (\S+).*\n((?:\+.*\n)+)", diff, re.MULTILINE)
    assert len(parts) == diff.count("--- ")
    for path, added in parts:
        lines = iter((ROOT / path).read_text().splitlines())
        for line in added.splitlines():
            assert line[1:] in lines, f"{path} has no line {line[1:]!r}, or has it earlier"
