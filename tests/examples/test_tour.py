"""The notebook runs from top to bottom, as a reader would run it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell; the value of a last expression, as a notebook displays it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_every_cell_runs_and_shows_something(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxrun.cli.chat.find_spec", lambda name: None)  # the demo: fast
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    shown = [run("".join(cell["source"]), names) for cell in CELLS]
    assert "<table>" in shown[0]._repr_html_()
    assert "<pre" in shown[1]._repr_html_()
    printed = capsys.readouterr().out
    assert "prompt tokens were remembered" in printed
    assert "top_p must be" in printed
    assert names["second"].usage.cached_tokens > 0
    assert len(names["likeliest"]) == 8


def test_the_notebook_is_stored_as_it_was_run() -> None:
    """With the outputs of one run from top to bottom, for those who read it without running it."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CELLS)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert str(Path.home()) not in NOTEBOOK.read_text()
