"""``docs/models.md`` is what ``make docs`` writes."""

from __future__ import annotations

import re
from pathlib import Path

from converters.architectures.mapping import ARCHITECTURES

from .catalogue import CATALOGUE, REASONS
from .docs import UNMEASURED, by_architecture, render
from .measure import SAME

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
FIGURE = re.compile(r"(?<=\| )\d+e-\d+(?= \|)")
#: Rows that are no name of a GGUF architecture: llama with experts.
ALIASES = {"mixtral"}


def test_the_page_is_up_to_date() -> None:
    """But for the figures: their last digit differs between machines."""
    page = FIGURE.sub(UNMEASURED, PAGE.read_text())
    assert page == render({}), "run: make docs"


def test_every_figure_is_small_enough() -> None:
    figures = FIGURE.findall(PAGE.read_text())
    assert len(figures) == len(by_architecture())
    assert all(float(figure) <= SAME for figure in figures)


def test_every_architecture_is_measured_and_catalogued() -> None:
    measured = set(by_architecture())
    assert set(ARCHITECTURES) - ALIASES == measured
    assert measured <= set(CATALOGUE)
    assert measured.isdisjoint(REASONS)
