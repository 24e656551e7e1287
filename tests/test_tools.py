"""Tools: the README's picture is the recording that is kept with it; lines are counted right."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tools.lines import Count, circles, count, import_graph, main
from tools.picture import PICTURES, THEMES, Screen, read_cast, shown, svg

SVG = "{http://www.w3.org/2000/svg}"


def lines_at_the_end(picture: ElementTree.Element) -> list[str]:
    texts = [text for text in picture.iter(f"{SVG}text") if text.get("opacity") != "0"]
    rows = {float(text.get("y", "")): "".join(text.itertext()).rstrip() for text in texts}
    return [rows[y] for y in sorted(rows)]


@pytest.mark.parametrize("theme", THEMES)
def test_the_picture_is_the_recording(theme: str) -> None:
    events = read_cast(PICTURES / "chat.cast")
    made = svg(*shown(events), THEMES[theme])
    assert made == (PICTURES / f"chat-{theme}.svg").read_text()
    screen = Screen()
    for _, text in events:
        screen.feed(text)
    rows = [row.rstrip() for row in str(screen).splitlines()]
    assert lines_at_the_end(ElementTree.fromstring(made)) == [row for row in rows if row]


def test_the_recording_is_a_chat_with_a_real_model() -> None:
    output = "".join(text for _, text in read_cast(PICTURES / "chat.cast"))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "Talking with SmolLM2-135M-Instruct" in plain
    assert "Paris" in plain


def test_a_line_is_shown_from_when_it_appears_to_when_it_changes() -> None:
    events = [(0.0, "one"), (1.0, "\r\ntwo"), (2.0, "\r\x1b[2Kthree\r\n<&>")]
    lines, seconds = shown(events)
    texts = [("".join(text for text, _, _ in each.line), each.start, each.end) for each in lines]
    assert texts == [
        ("one", 0.0, None),
        ("two", 0.96, 2.0),
        ("three", 2.0, None),
        ("<&>", 2.0, None),
    ]
    picture = ElementTree.fromstring(svg(lines, seconds, THEMES["dark"]))
    assert lines_at_the_end(picture) == ["one", "three", "<&>"]


FILE = '''"""A module
of two lines."""

# A comment.
import os  # and another


class Thing:
    """A class."""

    async def run(self):
        """A function."""
        text = """no
        docstring"""
        return lambda: text
'''


def test_lines_of_code_are_those_without_docstrings_comments_and_blanks() -> None:
    assert count(FILE) == Count(1, 15, code=6, docstrings=4, functions=1, classes=1)


def test_circles_count_lazy_imports_and_those_for_types() -> None:
    sources = {
        "mlxrun/__init__.py": "from mlxrun.a import A",
        "mlxrun/a.py": "from mlxrun import b",
        "mlxrun/b.py": "def f():\n    import mlxrun.c",
        "mlxrun/c.py": "if TYPE_CHECKING:\n    from mlxrun.a import A\nfrom mlxrun.d import D",
        "mlxrun/d.py": "import mlxrun, os",
    }
    assert circles(import_graph(sources)) == [{"mlxrun.a", "mlxrun.b", "mlxrun.c"}]


def test_the_table_has_both_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"converters", "mlxrun/kernels", "both packages", "the core"} <= rows.keys()
    assert rows["import circles"]
