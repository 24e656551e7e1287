"""Plots of made-up measurements: their content in every format, and refusals."""

from __future__ import annotations

import errno
import os
import sys
from functools import partial
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from mlxrun.analysis.plot import FORMATS, Line, check, draw, panels
from mlxrun.bench.report import facts
from mlxrun.bench.runner import Results, Run
from mlxrun.bench.workloads import Decode, Prefill, Ragged, Workload
from mlxrun.errors import MissingExtraError, ParameterError, PictureError

ABOUT = {
    "model": "some/$m<b>ö$.gguf",
    "machine": {
        "date": "2026-01-01",
        "device": "CPU",
        "processor": "a <fast> & $old$ one",
        "cores": 2,
        "system": "Linux",
        "versions": {"mlxrun": "1"},
    },
    "other_use": {"shared": True},
    "repetitions": 2,
}


def measured(*workloads: Workload, runtime: str = "mlxrun", into: Results | None = None) -> Results:
    """Results in which every run of a workload takes one second, or two."""
    made = into or Results()
    for workload in workloads:
        for seconds in (1.0, 2.0):
            made.add(workload, runtime, Run(seconds))
    return made


def titles(results: Results, **more: object) -> list[str]:
    return [panel.title for panel in panels(facts(results, ABOUT | more))]


def test_rates_by_the_number_of_sequences():
    found = facts(measured(Decode(12), Decode(12, 0, 4)), ABOUT)
    together, each = panels(found)
    # 12 tokens take 1 s or 2 s, the median of both rates lies between.
    assert together.lines == [Line("mlxrun tg12", {1: (9, 6, 12), 4: (36, 24, 48)})]
    assert each.lines == [Line("mlxrun tg12", {1: (9, 6, 12), 4: (9, 6, 12)})]


def test_rates_by_context_of_one_sequence():
    workloads = [Prefill(8), Prefill(8, 16), Decode(4), Decode(4, 16)]
    decode, prefill = panels(facts(measured(*workloads), ABOUT))
    assert [list(line.points) for line in decode.lines + prefill.lines] == [[0, 16], [0, 16]]
    assert [line.label for line in decode.lines + prefill.lines] == ["mlxrun tg4", "mlxrun pp8"]


def test_a_line_for_each_runtime_and_depth():
    both = [Decode(4), Decode(4, 0, 2), Decode(4, 16), Decode(4, 16, 2)]
    results = measured(*both, runtime="mlx-lm", into=measured(*both))
    together, _, behind = panels(facts(results, ABOUT))
    assert [line.label for line in together.lines] == [
        "mlxrun tg4",
        "mlxrun tg4 @ d16",
        "mlx-lm tg4",
        "mlx-lm tg4 @ d16",
    ]
    assert [line.label for line in behind.lines] == ["mlxrun tg4", "mlx-lm tg4"]


def test_where_nothing_varies_every_test_is_a_point():
    assert titles(measured(Prefill(8), Prefill(32), Decode(4))) == [
        "Prefill",
        "Decode",
    ]
    assert titles(measured(Decode(4))) == ["Decode"]
    assert titles(measured(Ragged((1,), (2,)))) == []


def test_limits_are_lines_of_their_own():
    tests = [{"test": "tg12", "limit": {"rate": 50.0}}, {"test": "tg12 x4", "limit": {"rate": 99}}]
    both = [Decode(12), Decode(12, 0, 4)]
    results = measured(*both, runtime="mlx-lm", into=measured(*both))
    together, each = panels(facts(results, ABOUT | {"roofline": {"tests": tests}}))
    limit = Line("limit of tg12", {1: (50, 50, 50), 4: (99, 99, 99)}, "mlxrun tg12")
    assert together.lines[-1] == limit
    assert [line.label for line in each.lines] == ["mlxrun tg12", "mlx-lm tg12"]


BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!DOCTYPE html>"}


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_plotted_and_the_same_each_time(tmp_path, ending):
    tests = [{"test": "tg4", "limit": {"rate": 900.0}}, {"test": "tg4 x2", "limit": {"rate": 990}}]
    results = measured(Decode(4), Decode(4, 0, 2))
    found = facts(results, ABOUT | {"roofline": {"tests": tests}})
    first, second = tmp_path / f"a{ending.upper()}", tmp_path / f"b{ending}"
    assert draw(found, first)
    assert draw(found, second)
    assert first.read_bytes().startswith(BEGINNINGS[ending])
    assert first.read_bytes() == second.read_bytes()


def test_a_page_says_everything_and_needs_nothing(tmp_path):
    path = tmp_path / "a.html"
    draw(facts(measured(Decode(4), Decode(4, 0, 2)), ABOUT), path)
    text = path.read_text()
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    said = " ".join("".join(svg.itertext()).split())
    for part in (
        "$m<b>?$.gguf",
        "mlxrun tg4",
        "a <fast> & $old$ one",
        "tokens/s",
        "Other programs",
    ):
        assert part in said

    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert not {"script", "link", "img", "b"} & set(tags)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path, monkeypatch, ending):
    path = tmp_path / f"rates{ending}"
    path.write_text("an older one")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PictureError, match=rf"cannot write .*rates\{ending}: No space left"):
        draw(facts(measured(Decode(4)), ABOUT), path)
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_draw_writes_nothing(tmp_path):
    assert not draw(facts(Results(), ABOUT), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_files_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match=r"ends in .png, .svg, .pdf, .html, not 'a.gif'"):
        check(tmp_path / "a.gif")
    with pytest.raises(ParameterError, match="in a folder that is there"):
        check(tmp_path / "none" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(PictureError, match=r"cannot write .*b.png: "):
        check(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.png")
    for refuse in (check, partial(draw, facts(measured(Decode(4)), ABOUT))):
        with pytest.raises(PictureError, match=r"cannot write .*c.png: it is a device, a pipe"):
            refuse(tmp_path / "c.png")
    assert (tmp_path / "c.png").is_fifo()
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mlxrun\[plot\]'"):
        check(tmp_path / "a.png")
