"""What reaches a terminal is harmless, and a bar appears on a terminal only."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mlxrun.cli.console import (
    Bar,
    Table,
    dim,
    json_of,
    note,
    noticing_interrupts,
    one_line,
    show,
    size,
    visible,
)


@given(st.text())
def test_visible_has_no_control_characters(text):
    assert not [c for c in visible(text) if unicodedata.category(c) == "Cc" and c not in "\n\t"]


# They turn the direction of text around: a file named so shows as another one.
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_visible_lets_nothing_turn_text_around():
    assert visible(f"a{TURNING}b") == "a" + "\ufffd" * len(TURNING) + "b"


@given(
    st.text(
        st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=TURNING)
        | st.sampled_from("\n\t")
    )
)
def test_visible_keeps_all_other_text(text):
    assert visible(text) == text


@given(st.text())
def test_one_line_is_one_line(text):
    assert len(one_line(text).splitlines()) <= 1


def test_escape_sequences_become_readable():
    assert visible("\x1b]0;title\x07 a\rb \x9b2J") == "␛]0;title␇ ab \ufffd2J"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (4_682_000_000, "4.68 GB")],
)
def test_size(nbytes, text):
    assert size(nbytes) == text


def test_piped_tables_are_bare(capsys):
    show(Table("Title", ("a", "#n"), [("x\x1b[31m", 1), ("[bold]y", "2" * 150)]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Title"
    assert lines[1].split() == ["a", "n"]
    assert lines[2].split() == ["x␛[31m", "1"]
    assert lines[3].split() == ["[bold]y", "2" * 150]
    assert all(line == line.rstrip() for line in lines)


def test_no_bar_in_a_pipe(capsys):
    with Bar("Working", delay=0) as bar:
        bar(1, 2)
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Bar("Working", delay=0) as bar:
        bar(1, 2)
    assert "Working" in capsys.readouterr().err
    bar(2, 2)  # a late report
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("appeared", [False, True])
def test_a_bar_has_a_label(monkeypatch, capsys, appeared):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Bar("Reading", delay=0 if appeared else 0.2) as bar:
        bar.label("perplexity 3.4\x1b[2J")
        if not appeared:
            bar._timer.join()
        bar(1, 2)
    shown = capsys.readouterr().err
    assert "perplexity 3.4␛" in shown
    assert ("Reading" in shown) == appeared


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_dim_only_where_wanted(monkeypatch, variable, value):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert dim("x") == "\x1b[2mx\x1b[22m"
    monkeypatch.setenv(variable, value)
    assert dim("x") == "x"


NUMBERS = st.from_regex(r"[0-9]{1,12}( [kMG]?B)?", fullmatch=True)


@given(
    st.lists(st.sampled_from(["pp128", "a name of some length", "名前"]), min_size=1, max_size=3),
    st.data(),
)
def test_numbers_stay_whole_in_a_narrow_terminal(names, data):
    """Columns that do not fit stand below, in order, behind the name of their row."""
    count = data.draw(st.integers(1, 9))
    rows = [(name, *(data.draw(NUMBERS) for _ in range(count))) for name in names]
    made = Table("", ("name", *(f"#number {i}" for i in range(count))), rows)
    width = data.draw(st.integers(36, 130))
    parts = made.within(width)
    assert sum((part.columns[1:] for part in parts), ()) == made.columns[1:]
    for part in parts:
        assert part.columns[0] == "name"
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(part.rendered())
        lines = console.file.getvalue().splitlines()
        assert all(cell_len(line) <= width for line in lines)
        for row in part.rows:
            assert any(all(number in line for number in row[1:]) for line in lines)


def test_a_wide_table_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    rows = [("first", "12345 MB", "67890 MB", "13579 MB")]
    show(Table("Title", ("name", "#one", "#two", "#three"), rows))
    shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    assert [line.split() for line in shown.splitlines()] == [
        ["Title"], ["name", "one", "two"], ["first", "12345", "MB", "67890", "MB"], [],
        ["name", "three"], ["first", "13579", "MB"],
    ]  # fmt: skip


def test_json_has_no_infinity():
    found = json_of({"a": math.inf, "b": [1.5, {"c": -math.inf}], "d": (math.nan, "x", None)})
    assert json.loads(found, parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, {"c": None}], "d": [None, "x", None],
    }  # fmt: skip


def test_an_interrupt_that_must_wait_is_acknowledged():
    """As of Python code that a pass of the model keeps from running its handler."""
    notified, handled = threading.Event(), []
    before = signal.signal(signal.SIGINT, lambda *_: handled.append(True))
    try:
        with noticing_interrupts(notified.set, delay=0):
            os.kill(os.getpid(), signal.SIGINT)
            assert notified.wait(60) and handled
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_is_obeyed_at_once_is_not_acknowledged():
    notified = threading.Event()
    # Which a shell's background job ignores, and so would Python.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), noticing_interrupts(notified.set, delay=60):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not notified.is_set()


def test_a_bar_appears_after_its_delay_only(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar("Loading", delay=0):
        assert "Loading" in capsys.readouterr().err
    assert capsys.readouterr().err.endswith("\r")
    with Bar("Loading", delay=60) as bar:
        bar(1, 2)
    assert capsys.readouterr().err == ""


def test_a_note_takes_the_line_of_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar("Loading", delay=0) as bar:
        bar(1, 2)
        capsys.readouterr()
        note("something")
        assert re.fullmatch(r"\r *\rsomething\n", capsys.readouterr().err)
