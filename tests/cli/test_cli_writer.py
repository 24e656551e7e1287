"""Streamed text wraps between words, wherever chunks end."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mlxrun.cli.console import Wrap, Writer


def shown(chunks: list[str], width: int) -> list[str]:
    """The lines of a terminal so wide."""
    wrap = Wrap()
    lines = [""]
    for part in re.findall(r"\x1b\[\d*[A-Z]|.", "".join(wrap.feed(p, width) for p in chunks), re.S):
        if part == "\n":
            lines.append("")
        elif part.endswith("D") and part[0] == "\x1b":
            back, line = int(part[2:-1]), lines[-1]
            while back > 0:
                back, line = back - cell_len(line[-1]), line[:-1]
            lines[-1] = line  # the next sequence erases what is right of the cursor
        elif part[0] != "\x1b":
            lines[-1] += part
            assert cell_len(lines[-1]) < width
    return lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("the quick brown fox", ["the quick", "brown fox"]),
        ("the complex case", ["the", "complex", "case"]),
        ("incomprehensibilities", ["incompreh", "ensibilit", "ies"]),
        ("the incomprehensible", ["the", "incompreh", "ensible"]),
        ("123456789 next", ["123456789", "next"]),
        ("123456789\nnext", ["123456789", "next"]),
        ("a 漢字漢字漢字", ["a 漢字漢", "字漢字"]),
        ("  code = 1\n", ["  code =", "1", ""]),
    ],
)
@given(cuts=st.sets(st.integers(1, 20)))
def test_words_stay_whole(text, lines, cuts):
    ends = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    chunks = [text[start:end] for start, end in pairwise(ends)]
    found = [line.rstrip() for line in shown(chunks, 10)]
    if "incompreh" in lines[-2:]:  # where such a word begins is no matter
        assert "".join(found) == text.replace(" ", "")
    else:
        assert found == lines


@given(st.text("ab漢e\u0301 \t\n😀", max_size=60), st.integers(3, 12))
def test_nothing_is_lost_and_no_line_is_too_long(text, width):
    lines = shown([text], width)
    assert "".join(lines).replace(" ", "").replace("\t", "") == re.sub(r"\s", "", text)


def test_a_pipe_gets_the_text_as_it_is(capsys):
    writer = Writer("show")
    writer.write("why " * 50, True)
    writer.write("because " * 50, False)
    assert capsys.readouterr().out == "why " * 50 + "\n\n" + "because " * 50
    assert writer.begun and not writer.all_hidden


def test_hidden_thinking_leaves_nothing_in_a_pipe(capsys):
    writer = Writer("hide")
    writer.write("why", True)
    assert writer.begun and writer.all_hidden
    writer.write("because", False)
    writer.write("why else", True)
    assert capsys.readouterr().out == "because\n"
    assert not writer.all_hidden


def test_thinking_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for think, seen in (("show", "\x1b[2mwhy\x1b[22m\n\nbecause"), ("hide", "\nbecause")):
        writer = Writer(think)
        writer.write("why", True)
        writer.write("because", False)
        out = capsys.readouterr().out
        assert out.endswith(seen) and (think == "show") == ("why" in out)
        assert (think == "hide") == ("thinking ..." in out)
