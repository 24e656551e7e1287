"""A handful of the kills of ``kill_stress``, in a process in which MLX has not been used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_what_a_kill_leaves_is_absent_old_or_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_stress", "--kills", "14"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 kills" in done.stdout and " 0 wrong" in done.stdout
