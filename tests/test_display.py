"""What a notebook shows."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun import display


class Table(HTMLParser):
    """The texts of a table's cells, and its tags."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(layers=1).write(tmp_path_factory.mktemp("display") / "<b>.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path)


def test_public_values_are_tables(llm: mlxrun.LLM) -> None:
    text = "some text " * 20
    session = llm.session(window=32)
    llm.generate("tea", session=session, max_tokens=2, ignore_eos=True)
    with llm.engine(parallel=1, context=50) as engine:
        shown = {
            "model": llm._repr_html_(),
            "engine": engine._repr_html_(),
            "session": session._repr_html_(),
            "choices": llm.choices._repr_html_(),
            "perplexity": llm.perplexity(text, context=16)._repr_html_(),
            "comparison": mlxrun.compare(llm, llm, text, context=16)._repr_html_(),
            "report": llm.report._repr_html_(),  # type: ignore[union-attr]
        }
    tables = {name: Table(markup) for name, markup in shown.items()}
    for name, found in tables.items():
        assert "td" in found.tags, name
        assert found.tags <= {"table", "tr", "th", "td", "details", "summary"}, name
    assert llm.source in tables["model"].texts
    assert {"parallel", "1", "context", "50", "live", "0"} <= set(tables["engine"].texts)
    assert {"tokens", str(len(session.tokens)), "window", "32"} <= set(tables["session"].texts)
    assert "device" in tables["choices"].texts
    assert any("±" in cell for cell in tables["perplexity"].texts)
    assert "agreement" in tables["comparison"].texts
    assert "token_embd.weight" in tables["report"].texts


@pytest.mark.parametrize("notebook", [True, False])
def test_loading_shows_a_bar_in_a_notebook(
    path: Path,
    notebook: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(display, "PATIENCE", 0)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    mlxrun.load(path)
    assert ("Loading" in capsys.readouterr().err) == notebook
    seen: list[tuple[int, int]] = []
    mlxrun.load(path, progress=lambda *now: seen.append(now))
    assert seen
    assert capsys.readouterr().err == ""
