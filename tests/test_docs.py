"""Pages that quote the code."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from mlxrun.engine.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def test_the_page_on_architecture_quotes_the_step() -> None:
    assert textwrap.dedent(inspect.getsource(Engine.step)) in ARCHITECTURE


def test_the_page_on_architecture_names_files_and_folders_that_exist() -> None:
    names = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", ARCHITECTURE)
    missing = [n for n in names if not (ROOT / n).exists() and not (ROOT / "mlxrun" / n).exists()]
    assert names and not missing


def test_the_walks_name_functions_and_classes_that_exist() -> None:
    walks = ARCHITECTURE.split("## Four walks")[1].split("\n## ")[0]
    calls = re.findall(r"`(?:\w+\.)?(\w+)(?:\(.*?\))?`", walks)
    names = {name for name in calls if name not in ("py", "json")}
    sources = [f for package in ("mlxrun", "converters") for f in (ROOT / package).rglob("*.py")]
    defined = set(re.findall(r"(?:def|class) (\w+)", "\n".join(f.read_text() for f in sources)))
    assert "prepare" in names
    assert names <= defined
