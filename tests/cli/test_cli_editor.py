"""Line editing: messages, completion, history."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlxrun.cli.line_editor import LineEditor, _Completer, history_path, unfold, wants_more

COMMANDS, SETTINGS = ["/save", "/set", "/stats"], ["temperature", "top_k", "top_p"]
ALT_ENTER, ENTER, PASTE = "\x1b\r", "\r", "\x1b[200~{}\x1b[201~"


def typed(keys: str, history: Path | None = None, reads: int = 1) -> list[str]:
    """The messages that some keys make."""
    with create_pipe_input() as keyboard:
        editor = LineEditor(COMMANDS, SETTINGS, history, input=keyboard, output=DummyOutput())
        keyboard.send_text(keys)
        return [editor.read() for _ in range(reads)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello" + ENTER, "hello"),
        ("a" + ALT_ENTER + "b" + ENTER, "a\nb"),
        ("a\\" + ENTER + "b" + ENTER, "a\nb"),
        ("half a line\x03" + "other" + ENTER, "other"),
        ('"""a' + ENTER + ENTER + 'b"""' + ENTER, "a\n\nb"),
        ('"""' + ENTER + "a\\" + ENTER + "b" + ENTER + '"""' + ENTER, "a\\\nb"),
        (PASTE.format("one\ntwo\n\nthree") + ENTER, "one\ntwo\n\nthree"),
        (PASTE.format("one\r\ntwo") + ENTER, "one\ntwo"),
        (PASTE.format("make \\\n  all") + ENTER, "make \\\n  all"),
        ('"""' + PASTE.format("make \\\n  all") + '"""' + ENTER, "make \\\n  all"),
        (" /not a command" + ENTER, " /not a command"),
    ],
)
def test_one_message(keys, message):
    assert [unfold(line) for line in typed(keys)] == [message]


def test_a_pasted_backslash_is_shown_as_it_is():
    assert typed(PASTE.format("make \\\n  all") + ENTER) == ["make \\\n  all"]


def test_a_fence_is_left_for_slash_commands():
    assert typed('"""/help"""' + ENTER) == ['"""/help"""']


@given(st.text("ab\\\n", max_size=20))
def test_a_sent_message_has_no_open_end(text):
    if not wants_more(text):
        assert not unfold(text).endswith("\\")


def test_control_keys():
    with pytest.raises(KeyboardInterrupt):
        typed("\x03")
    with pytest.raises(KeyboardInterrupt):
        typed("half a line\x03\x03")
    with pytest.raises(EOFError):
        typed("\x04")


def completions(text: str) -> list[str]:
    found = _Completer(COMMANDS, SETTINGS).get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/s", ["/save", "/set", "/stats"]),
        ("/se", ["/set"]),
        ("/set t", ["temperature", "top_k", "top_p"]),
        ("/set top_", ["top_k", "top_p"]),
        ("/set top_k 4", []),
        ("/save f", []),
        ("say /s", []),
        ("", []),
        ("/s\n/s", []),
    ],
)
def test_completion(text, words):
    assert completions(text) == words


def test_history_outlives_the_session_and_is_private(tmp_path):
    file = tmp_path / "state" / "mlxrun" / "chat_history"
    typed("first" + ENTER + "two\\" + ENTER + "lines" + ENTER, file, reads=2)
    up = "\x1b[A"
    assert typed(up + ENTER, file) == ["two\nlines"]
    assert typed(up + up + up + ENTER, file) == ["first"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_history_that_was_public_becomes_private(tmp_path):
    file = tmp_path / "chat_history"
    file.touch(0o644)
    typed("x" + ENTER, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_history_in_dev_null_changes_no_device(tmp_path, monkeypatch):
    file = tmp_path / "chat_history"
    file.symlink_to("/dev/null")
    changed = []
    monkeypatch.setattr(Path, "chmod", lambda path, mode: changed.append(path))
    assert typed("x" + ENTER, file) == ["x"]
    assert not changed


def test_no_place_for_history(tmp_path):
    (tmp_path / "file").touch()
    assert typed("x" + ENTER, tmp_path / "file" / "mlxrun" / "chat_history") == ["x"]
    assert typed("x" + ENTER, Path("/proc/mlxrun/chat_history")) == ["x"]
    assert typed("x" + ENTER, None) == ["x"]


def test_history_that_is_lost_meanwhile(tmp_path):
    file = tmp_path / "mlxrun" / "chat_history"
    with create_pipe_input() as keyboard:
        editor = LineEditor(COMMANDS, SETTINGS, file, input=keyboard, output=DummyOutput())
        file.unlink()
        file.mkdir()
        keyboard.send_text("x" + ENTER + "y" + ENTER)
        assert [editor.read(), editor.read()] == ["x", "y"]


def test_history_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/mlxrun/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    monkeypatch.setattr("sys.platform", "linux")
    assert history_path() == tmp_path / ".local/state/mlxrun/chat_history"
    monkeypatch.setattr("sys.platform", "darwin")
    assert history_path() == tmp_path / "Library/Application Support/mlxrun/chat_history"


@pytest.mark.parametrize("value", ["0", "off", "OFF", "no"])
def test_no_history_where_it_is_off(monkeypatch, value):
    monkeypatch.setenv("MLXRUN_HISTORY", value)
    assert history_path() is None


def test_no_home(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert history_path() is None
